"""The control host with all that is off by default: PostgreSQL, sign-in, terminals in the browser, and a worker for jobs.

The last test switches it off again; the shared one, that another look finds nothing to change, runs before all of these.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from page_rig import Page, ask, ticket
from sso_rig import Browser, TestProvider

testinfra_hosts = ["control"]

FAR_ENDS = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"]) / "build/molecule/control"
PORTAL = SimpleNamespace(origin="https://10.79.0.10:8445", ca_file=FAR_ENDS / "far-ends.pem")
SCENARIO = Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"])
WORKSPACE = "ws-booted"


@contextmanager
def browser() -> Iterator[Browser]:
    context = ssl.create_default_context(cafile=PORTAL.ca_file)
    with httpx.Client(verify=context, timeout=60, trust_env=False, base_url=PORTAL.origin) as http:
        yield Browser(http, PORTAL.origin)


@pytest.fixture(scope="module")
def ada(tmp_path_factory) -> Iterator[Browser]:
    """Somebody who signed in. The provider runs where the host was told that it is, with the secret that the host was given."""
    provider = TestProvider(tmp_path_factory.mktemp("provider"), PORTAL.origin)
    provider.settings["clients"][0]["client_secret"] = (FAR_ENDS / "oidc.secret").read_text().strip()
    files = {"certificate": str(FAR_ENDS / "provider.pem"), "key": str(FAR_ENDS / "provider.key")}
    provider.settings |= {"address": "10.79.0.1", "port": 8446, **files}
    provider.start()
    try:
        with browser() as found:
            found.sign_in("u-ada")
            yield found
    finally:
        provider.stop()


@pytest.fixture(scope="module")
def workspace(host) -> str:
    """An active workspace of ada's, as it is in the register after its attestation."""
    now = datetime.now(UTC)
    row = {
        "id": WORKSPACE, "number": 200, "sponsor": "ada@example.com", "blueprint": "coding", "ring": "stable",
        "image": "workspace", "image_sha256": "a" * 64, "agent_id": "agent-booted", "state": "active", "state_reason": "attested",
        "state_since": now.isoformat(), "created_at": now.isoformat(), "watch_seq": 0, "policy_digest": "a" * 64,
        "lease_expires_at": (now + timedelta(hours=1)).isoformat(),
    }  # fmt: skip
    values = ", ".join(f"'{value}'" for value in row.values())
    psql(host, f"DELETE FROM workspaces WHERE id = '{WORKSPACE}'")  # noqa: S608
    psql(host, f"INSERT INTO workspaces ({', '.join(row)}) VALUES ({values})")  # noqa: S608
    return WORKSPACE


def psql(host, query: str) -> str:
    """What the host's PostgreSQL answers to its own superuser."""
    done = host.run("runuser -u postgres -- psql --no-psqlrc --tuples-only --no-align --dbname=saw --command=%s", query)
    assert done.rc == 0, done.stderr
    return done.stdout.strip()


def properties(host, unit: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in host.check_output("systemctl show %s", unit).splitlines() if "=" in line)


@pytest.mark.control("LIF-01")
@pytest.mark.parametrize(("unit", "state"), [("saw-broker", "broker"), ("saw-worker", "worker")])
def test_each_service_runs_enabled_as_its_own_user_and_its_confinement_is_in_force(host, unit, state):
    found = properties(host, f"{unit}.service")
    journal = host.run("journalctl --no-pager --lines=40 --unit=%s", unit).stdout
    assert (found["ActiveState"], found["SubState"], found["UnitFileState"]) == ("active", "running", "enabled"), (
        journal
    )
    assert found["NRestarts"] == "0", journal
    assert (found["User"], found["ProtectSystem"], found["NoNewPrivileges"], found.get("CapabilityBoundingSet", "")) == (
        unit, "strict", "yes", "",
    )  # fmt: skip
    pid = found["MainPID"]
    status = dict(line.split(":", 1) for line in host.check_output("cat /proc/%s/status", pid).splitlines())
    assert status["Uid"].split() == [host.check_output("id --user %s", unit)] * 4
    assert [status[name].strip() for name in ("NoNewPrivs", "Seccomp", "CapEff", "CapBnd")] == [
        "1",
        "2",
        "0" * 16,
        "0" * 16,
    ]
    # what the process itself sees, and its twin: the one folder that is its own
    inside = f"nsenter --target={pid} --mount"
    for place in ("/usr", "/etc", "/var/lib/saw", "/srv"):
        assert "Read-only file system" in host.run(f"{inside} touch {place}/probe").stderr
    assert host.check_output(f"{inside} ls -A /root /home") == "/home:\n\n/root:"
    assert host.run(f"{inside} sh -c 'touch /var/lib/saw/{state}/probe && rm /var/lib/saw/{state}/probe'").rc == 0
    assert (
        float(host.check_output(f"systemd-analyze security --no-pager {unit} | tail -n 1").split(":")[1].split()[0]) < 4
    )


@pytest.mark.control("FLT-01")
def test_the_register_is_in_postgresql_and_there_is_no_file_of_it(host, workspace):
    listed = json.loads(host.check_output("saw workspace list --json"))
    assert [one["id"] for one in listed["workspaces"]] == [workspace]
    # on a host that stays there is one of the last test
    assert host.check_output("find /var/lib/saw/broker -name 'broker.db*' -newer /run/saw/broker/operator.sock") == ""
    sessions = (
        "SELECT bool_and(ssl), count(*) > 0 FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = 'saw'"
    )
    assert psql(host, sessions) == "t|t"


@pytest.mark.control("ID-01")
def test_secrets_are_their_owners_alone_and_nowhere_else(host):
    owners = {
        "/etc/saw/broker.pgpass": ("saw-broker", 0o600), "/etc/saw/oidc.secret": ("root", 0o600),
        "/etc/saw/pages.pem": ("root", 0o640), "/etc/saw/fleet/id_ed25519": ("root", 0o600),
    }  # fmt: skip
    for path, (owner, mode) in owners.items():
        found = host.file(path)
        assert (found.user, found.mode) == (owner, mode)
    for path in ("/etc/saw/broker.json", "/etc/saw/worker.json"):
        assert (host.file(path).user, host.file(path).mode) == ("root", 0o640)
    as_account = "setpriv --reuid %s --regid %s --init-groups cat %s"
    handed = ["/run/credentials/saw-broker.service/oidc-client-secret", "/run/credentials/saw-worker.service/ssh-key"]
    may = {
        "saw-broker": {"/etc/saw/broker.pgpass", "/etc/saw/pages.pem", handed[0]},
        "saw-worker": {handed[1]},
        "nobody": set(),
    }
    for account, group in (("saw-broker", "saw-broker"), ("saw-worker", "saw-worker"), ("nobody", "nogroup")):
        read = {path for path in (*owners, *handed) if host.run(as_account, account, group, path).rc == 0}
        assert read == may[account], account
    # Patterns are lines of the files, and the file of patterns itself is the twin that is found.
    search = """
        set -e; umask 077; patterns=$(mktemp)
        { cut -d: -f5 /etc/saw/broker.pgpass; cat /etc/saw/oidc.secret; sed -n 4p /etc/saw/fleet/id_ed25519
          sed -n 3p /etc/saw/pages.pem; } > $patterns
        count() { grep --count --fixed-strings --text --file=$patterns || true; }
        count < $patterns
        systemctl show '*' | count
        journalctl --no-pager --all --output=export | count
        cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | count
        cat /etc/saw/*.json /etc/systemd/system/saw-* | count
        grep --recursive --files-with-matches --fixed-strings --text --file=$patterns /var/lib/saw | wc -l
        rm $patterns
    """
    assert host.check_output(search).split() == ["4", "0", "0", "0", "0", "0"]


def test_the_brokers_own_keys_are_sealed_and_open_with_what_systemd_hands_over_alone(host):
    assert host.check_output("cat /var/lib/saw/broker/secrets.json") == '{"provider":"sealed","leaving":null}'
    assert host.run("grep --recursive --files-with-matches 'PRIVATE KEY' /var/lib/saw/broker").rc == 1
    sealed = host.check_output("find /var/lib/saw/broker/sealed -type f -printf '%u %m %f\\n'").splitlines()
    assert len(sealed) == 11
    assert {tuple(line.split()[:2]) for line in sealed} == {("saw-broker", "600")}
    look = "setpriv --reuid saw-broker --regid saw-broker --clear-groups env %s saw broker secrets status"
    alone = host.run(look % "-u CREDENTIALS_DIRECTORY")
    assert alone.rc == 1, alone.stdout + alone.stderr
    handed = host.run(look % "CREDENTIALS_DIRECTORY=/run/credentials/saw-broker.service")
    assert handed.rc == 0, handed.stdout + handed.stderr


@pytest.mark.control("LIF-01")
def test_a_job_is_run_by_the_worker_on_a_hypervisor_and_told(host, workspace):
    edge = host.get_host("ansible://edge", ansible_inventory=os.environ["MOLECULE_INVENTORY_FILE"])
    edge.check_output("rm -f /run/asked")
    done = host.run("saw job run stop %s --reason 'for the week-end' --wait --json", workspace)
    assert done.rc == 0, done.stdout + host.run("journalctl --no-pager --unit=saw-worker --lines=40").stdout
    job = json.loads(done.stdout.splitlines()[-1])["job"]
    assert (job["state"], job["executor"], job["worker"], job["asked_by"]) == (
        "succeeded", "ansible", "worker:saw-worker", "operator:root",
    )  # fmt: skip
    assert job["progress"]["hosts"]["edge"]["changed"] == 1
    asked = edge.file("/run/asked")
    assert asked.content_string == f"{workspace} for the week-end\n"
    assert (asked.user, asked.mode) == ("root", 0o644)
    # and the trail of it is in the database
    assert int(psql(host, f"SELECT count(*) FROM audit_events WHERE event LIKE '%{job['id']}%'")) >= 3  # noqa: S608
    refused = host.run("saw job run start ws-nobody --reason x --wait --json")
    assert refused.rc == 1
    assert "unknown_workspace" in refused.stdout + refused.stderr
    # an account without the group does not get work
    stranger = (
        "setpriv --reuid nobody --clear-groups curl --silent --unix-socket /run/saw/broker/worker.sock http://broker/"
    )
    assert host.run(stranger).rc == 7


@pytest.mark.control("ID-01")
def test_whoever_is_not_signed_in_is_sent_to_the_provider_and_gets_nothing_else(host, ada):
    assert host.socket("tcp://0.0.0.0:8445").is_listening
    with browser() as nobody:
        page = nobody.get("/")
        assert (page.status_code, page.url.path) == (200, "/sign-in")
        assert page.headers["content-security-policy"].startswith("default-src 'none'; ")
        assert page.headers["strict-transport-security"] == "max-age=31536000"
        assert (page.headers["x-frame-options"], page.headers["cache-control"]) == ("DENY", "no-store")
        sent = nobody.http.get("/login")
        assert sent.status_code in {302, 303}
        assert sent.headers["location"].startswith("https://10.79.0.1:8446/auth?")
        cookie = sent.headers["set-cookie"]
        assert {"Secure", "HttpOnly", "Path=/"} <= set(cookie.split("; "))
    assert "ada@example.com" in ada.get("/").text


@pytest.mark.control("ID-01")
def test_a_terminal_is_refused_without_a_sign_in_and_with_one_ssh_starts_confined(host, ada, workspace):
    with browser() as nobody:
        assert Page(PORTAL, nobody, "x" * 43, workspace).refusal == (401, "not_signed_in")
    assert ask(ada, "ws-nobody").json()["code"] == "unknown_workspace"
    page = Page(PORTAL, ada, ticket(ada, workspace), workspace)
    page.begin()
    # the bastion is not there in this scenario: the way ends with ssh's own words
    ended = page.end()["ended"]
    page.close()
    assert ended["reason"] == "connection_lost", page.shown
    assert b"10.79.0.20 port 2222: Connection refused" in page.shown
    assert host.check_output("find /run/saw/broker/terminals -mindepth 1") == ""


def play(name: str, *options: str, refused: bool = False) -> str:
    command = ["ansible-playbook", *options, "--inventory", os.environ["MOLECULE_INVENTORY_FILE"], str(SCENARIO / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    told = done.stdout + done.stderr
    assert (done.returncode != 0) is refused, told
    return told


@pytest.mark.control("P0-01")
def test_at_last_what_is_switched_off_runs_no_more_and_a_look_at_a_half_made_host_tells_what_would_change(host):
    # neither the keys nor what the register holds is left behind by a setting that was forgotten
    files = ["--extra-vars", json.dumps({"broker_secrets": {"provider": "files", "sealed": {}}})]
    plain = ["--extra-vars", json.dumps({"broker_secrets": {"provider": "files"}})]
    database = host.file("/etc/saw/broker.json").content_string
    told = play("plain.yml", *plain, refused=True)
    assert "secrets of this installation are in sealed, which the configuration does not name" in told, told
    told = play("plain.yml", *files, refused=True)
    assert "the register of this installation is in PostgreSQL" in told, told
    assert host.file("/etc/saw/broker.json").content_string == database
    assert host.check_output("systemctl is-active saw-broker") == "active"
    host.check_output("rm /var/lib/saw/broker/register.json")
    trusted = host.check_output("cat /var/lib/saw/broker/keys/x509/ca.pem")

    play("plain.yml", *files)
    assert host.check_output("cat /var/lib/saw/broker/keys/x509/ca.pem") == trusted
    assert host.check_output("cat /var/lib/saw/broker/secrets.json") == '{"provider":"files","leaving":null}'
    assert host.check_output("find /var/lib/saw/broker/sealed -type f") == ""
    assert "WARNING: the broker's own keys are in plain files" in play("plain.yml", *plain)
    assert host.check_output("systemctl is-active saw-broker") == "active"
    assert host.run("systemctl is-active saw-worker").stdout.strip() == "inactive"
    assert host.run("systemctl is-enabled saw-worker").stdout.strip() == "disabled"
    assert host.run("pgrep --uid saw-worker").rc == 1
    assert host.check_output("ls /run/saw/broker") == "operator.sock"
    assert not host.socket("tcp://0.0.0.0:8445").is_listening
    assert host.socket("tcp://0.0.0.0:8443").is_listening
    assert not host.file("/run/credentials/saw-broker.service").exists
    query = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'saw'"
    assert host.check_output("runuser -u postgres -- psql -At --command=%s saw", query) == "0"

    # nothing said of it seals what is plain, with the key that is there; a look tells so before
    told = play("plain.yml", "--check", "--diff")
    assert "changed=0" not in told, told
    assert host.check_output("cat /var/lib/saw/broker/secrets.json") == '{"provider":"files","leaving":null}'
    play("plain.yml")
    assert host.check_output("cat /var/lib/saw/broker/secrets.json") == '{"provider":"sealed","leaving":null}'
    assert host.check_output("find /var/lib/saw/broker/keys -name '*.key' -o -name '*-key.pem'") == ""
    assert host.check_output("cat /var/lib/saw/broker/keys/x509/ca.pem") == trusted
    play("plain.yml", *files)

    away = "/etc/saw/oidc.secret /etc/saw/fleet /opt/saw-worker /opt/saw/share/terminal"
    host.check_output(f"userdel saw-worker && mkdir /root/away && mv {away} /root/away/")
    try:
        told = play("converge.yml", "--check")
        assert [int(count) > 0 for count in re.findall(r"changed=(\d+)", told)] == [True]
        assert host.run("systemctl is-active saw-worker").stdout.strip() == "inactive"
    finally:
        back = "mv oidc.secret fleet /etc/saw/ && mv saw-worker /opt/ && mv terminal /opt/saw/share/"
        host.check_output(f"cd /root/away && {back} && rmdir /root/away")
