"""The attestation agent from its socket to the identity files: real TPM, real verifier, real authorities, real TLS."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime
from time import monotonic

import msgspec
import pytest
from attest_lab import CURRENT, EARLIER, boot_events, boot_pcrs, event_log, release
from broker_lab import Broker
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from saw.attest.messages import PolicyLogEntry
from saw.attest.policy_log import fold, measurement
from saw.attest.tpm import Tpm, TpmError, read_ek
from saw.identity.x509 import verify_svid
from saw.runtime.attestd import SYSTEM_CLOCK, Service
from saw.runtime.attestd_agent import Clock
from saw.runtime.attestd_config import AttestdConfig
from saw.runtime.attestd_measure import PolicyLog, PolicyPcrError

pytestmark = pytest.mark.control("POL-03")


class Skewed:
    """The system's clock with an offset that a test may move: time passes at once."""

    def __init__(self):
        self.offset = 0.0
        self.clock = Clock(now=SYSTEM_CLOCK.now, boottime=lambda: SYSTEM_CLOCK.boottime() + self.offset)


class Workspace:
    """A workspace's directory with the agent running in a thread."""

    def __init__(self, directory, swtpm, broker, **config):
        self.run = directory / "run"
        self.run.mkdir()
        self.swtpm, self.broker = swtpm, broker
        (self.run / "workspace.json").write_text(
            json.dumps(
                {
                    "workspace_id": "ws-demo",
                    "number": 1,
                    "trust_domain": "saw.example",
                    "broker_url": broker.url,
                    "broker_name": "broker.saw.internal",
                    "tuf_root": {},
                }
            )
        )
        (self.run / "ca.pem").write_bytes(broker.authority.ca_pem)
        (directory / "log").write_bytes(event_log(boot_events()))
        key = ed25519.Ed25519PrivateKey.generate().public_key()
        line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        (directory / "host.pub").write_bytes(line + b" root@ws-demo\n")
        self.config = AttestdConfig(
            **{
                "tcti": swtpm.tcti,
                "run_dir": str(self.run),
                "event_log": str(directory / "log"),
                "ssh_host_key": str(directory / "host.pub"),
                "svid_group": "saw-no-such-group",
            }
            | config
        )
        self.time = Skewed()
        self.service = None

    def start(self):
        self.service = Service(self.config, self.time.clock)
        self.thread = threading.Thread(target=self.service.run, daemon=True)
        self.thread.start()
        assert self.service.ready.wait(20)

    def stop(self):
        if self.service is not None:
            self.service.stop()
            self.thread.join(20)
            assert not self.thread.is_alive()
            self.service = None

    def ask(self, **request):
        return self.ask_raw(json.dumps(request).encode() + b"\n")

    def ask_raw(self, raw):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.settimeout(30)
            channel.connect(str(self.config.socket))
            channel.sendall(raw)
            with channel.makefile("rb") as stream:
                return json.loads(stream.readline())

    def measure(self, digest, revision=1):
        return self.ask(op="measure", policy_digest=digest, revision=revision)

    def later(self, seconds):
        """Let time pass for the agent."""
        self.time.offset += seconds
        self.service._wake.set()

    def lease(self):
        return json.loads((self.run / "svid" / "lease.json").read_bytes())

    def wait(self, condition):
        deadline = monotonic() + 20
        pause = threading.Event()
        while not condition():
            assert monotonic() < deadline
            pause.wait(0.01)

    def pcr(self):
        return Tpm(self.run / "attest" / "tpm", self.swtpm.tcti).read_policy_pcr()

    def codes(self, answer):
        assert answer["ok"] is False
        assert "lease" not in answer
        return [failure["code"] for failure in answer["failures"]]


@pytest.fixture
def broker(machine_tpm, tmp_path):
    (tmp_path / "broker").mkdir()
    broker = Broker(tmp_path / "broker", read_ek(machine_tpm.tcti), release(boot_pcrs(boot_events())))
    broker.released = [EARLIER, CURRENT]
    yield broker
    broker.stop()


@pytest.fixture
def machine_tpm(new_tpm):
    swtpm = new_tpm()
    swtpm.boot(boot_events())
    return swtpm


@pytest.fixture
def workspace(machine_tpm, broker, tmp_path):
    workspace = Workspace(tmp_path, machine_tpm, broker)
    yield workspace
    workspace.stop()


def test_a_measured_policy_yields_identity_and_lease(workspace, broker):
    workspace.start()
    assert workspace.codes(workspace.ask(op="status")) == ["attestation_pending"]
    assert workspace.codes(workspace.measure(EARLIER)) == ["policy_not_current"]
    assert json.loads((workspace.run / "svid" / "sds.json").read_text()) == {"resources": []}

    answer = workspace.measure(CURRENT, 2)
    assert answer["ok"] is True
    assert answer["policy_digest"] == answer["lease"]["policy_digest"] == CURRENT
    assert answer == workspace.ask(op="status")
    assert workspace.pcr() == fold(workspace_log(workspace))

    directory = workspace.run / "svid"
    pem = (directory / "svid.pem").read_bytes()
    svid = verify_svid(pem, (directory / "ca.pem").read_bytes(), datetime.now(UTC))
    assert (svid.workspace_id, svid.policy_digest) == ("ws-demo", CURRENT)
    lease = json.loads((directory / "lease.json").read_text())
    assert lease == answer["lease"]
    assert (set(lease), lease["ttl_s"]) == ({"expires_at", "ttl_s", "policy_digest"}, 120)
    (secret,) = json.loads((directory / "sds.json").read_text())["resources"]
    assert secret["name"] == "svid"
    assert secret["tls_certificate"]["certificate_chain"]["inline_string"].encode() == pem
    assert secret["tls_certificate"]["private_key"]["inline_string"] == (directory / "key.pem").read_text()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    assert modes == {"key.pem": 0o640, "sds.json": 0o640, "svid.pem": 0o644, "ca.pem": 0o644, "lease.json": 0o644}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(workspace.config.socket.stat().st_mode) == 0o600
    assert (workspace.run / "ssh" / "user-ca.pub").read_text().strip() == broker.ssh.user_ca
    listed = subprocess.run(
        ["ssh-keygen", "-L", "-f", str(workspace.run / "ssh" / "host-cert.pub")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "host certificate" in listed.stdout

    before = workspace.pcr()
    assert workspace.measure(CURRENT, 2)["ok"] is True
    assert workspace.pcr() == before  # the digest that is already last is not measured again
    assert (directory / "svid.pem").read_bytes() != pem
    assert broker.seen.count("enrol") == 1


def workspace_log(workspace):
    raw = json.loads((workspace.run / "attest" / "policy-log.json").read_text())
    return [PolicyLogEntry(**entry) for entry in raw["entries"]]


def test_a_policy_that_was_never_released_gets_no_identity(workspace):
    workspace.start()
    assert workspace.codes(workspace.measure("ab" * 32)) == ["policy_not_released", "policy_not_current"]
    # And never again in this boot, because the measurement cannot be taken back.
    assert workspace.codes(workspace.measure(CURRENT)) == ["policy_not_released"]
    assert not (workspace.run / "svid" / "svid.pem").exists()


def test_another_endorsement_key_is_not_enrolled(workspace, broker):
    broker.ek_pem = broker.ek_pem.replace("A", "B", 1)
    workspace.start()
    assert workspace.codes(workspace.measure(CURRENT)) == ["ek_mismatch"]


def test_the_agent_attests_again_in_time_and_with_new_keys(workspace, broker):
    workspace.start()
    assert workspace.measure(CURRENT)["ok"]
    first = (workspace.run / "svid" / "key.pem").read_bytes()
    workspace.later(60)  # reattest_seconds, and half of the lease
    broker.wait_for(2, "quote")
    workspace.wait(lambda: (workspace.run / "svid" / "key.pem").read_bytes() != first)
    assert broker.seen.count("enrol") == 1


@pytest.mark.control("POL-05")
@pytest.mark.regression("CVE-2022-3500")
def test_a_refused_workspace_loses_its_identity_when_the_lease_ends(workspace, broker):
    workspace.start()
    assert workspace.measure(CURRENT)["ok"]
    broker.pcrs = broker.pcrs | {4: "ab" * 32}
    workspace.later(60)
    broker.wait_for(1, "refused")
    assert (workspace.run / "svid" / "svid.pem").exists()
    assert workspace.ask(op="status")["ok"] is True
    workspace.later(61)
    directory = workspace.run / "svid"
    workspace.wait(lambda: sorted(path.name for path in directory.iterdir()) == ["ca.pem", "sds.json"])
    assert workspace.codes(workspace.ask(op="status")) == ["pcr_mismatch"]
    # The twin: a workspace that is as released again gets an identity again.
    broker.pcrs = release(boot_pcrs(boot_events()))
    workspace.later(60)
    workspace.wait((directory / "lease.json").exists)


@pytest.mark.control("POL-05")
def test_without_a_broker_the_identity_ends_with_the_lease(workspace, broker):
    workspace.start()
    assert workspace.measure(CURRENT)["ok"]
    broker.stop()
    assert workspace.codes(workspace.measure(CURRENT)) == ["broker_unreachable"]
    workspace.later(121)
    workspace.wait(lambda: not (workspace.run / "svid" / "key.pem").exists())


@pytest.mark.control("POL-05")
def test_time_offline_prolongs_the_identity_once_while_the_broker_is_away(workspace, broker):
    broker.offline = 100
    workspace.start()
    assert workspace.measure(CURRENT)["ok"]
    before = workspace.lease()
    assert before["offline_s"] == 100
    broker.stop()
    assert workspace.codes(workspace.measure(CURRENT)) == ["broker_unreachable"]
    workspace.later(121)
    workspace.wait(lambda: workspace.lease() != before)
    after = workspace.lease()
    assert "offline_s" not in after, "used up"
    ends = [datetime.fromisoformat(lease["expires_at"]) for lease in (before, after)]
    assert (ends[1] - ends[0]).total_seconds() == 100
    assert workspace.ask(op="status")["ok"]
    workspace.stop()
    workspace.start()  # a restart of the agent neither ends nor renews it
    workspace.wait(lambda: workspace.ask(op="status")["ok"])
    workspace.later(221)
    workspace.wait(lambda: not (workspace.run / "svid" / "key.pem").exists())
    assert not (workspace.run / "svid" / "lease.json").exists()


@pytest.mark.control("POL-05")
def test_a_refused_workspace_gets_no_time_offline(workspace, broker):
    broker.offline = 100
    workspace.start()
    assert workspace.measure(CURRENT)["ok"]
    broker.pcrs = broker.pcrs | {4: "ab" * 32}
    assert workspace.codes(workspace.measure(CURRENT)) == ["pcr_mismatch"]
    workspace.later(121)
    workspace.wait(lambda: not (workspace.run / "svid" / "key.pem").exists())
    assert not (workspace.run / "svid" / "lease.json").exists()


@pytest.mark.control("POL-05")
def test_time_offline_begins_before_an_attempt_could_outlast_the_lease_and_a_refusal_ends_it(workspace, broker):
    workspace.config = msgspec.structs.replace(workspace.config, broker_timeout_seconds=60.0)
    broker.offline = 400
    workspace.start()
    assert workspace.measure(CURRENT)["ok"]
    before = workspace.lease()
    broker.broken = True
    workspace.later(70)  # another attempt might not have ended when the lease does
    workspace.wait(lambda: workspace.lease() != before)
    workspace.later(60)
    assert workspace.ask(op="status")["ok"]
    broker.pcrs, broker.broken = broker.pcrs | {4: "ab" * 32}, False
    workspace.later(20)
    workspace.wait(lambda: not (workspace.run / "svid" / "key.pem").exists())
    assert workspace.codes(workspace.ask(op="status")) == ["pcr_mismatch"]


@pytest.mark.parametrize("server_name", ["other.saw.internal"])
def test_a_broker_of_another_name_is_not_believed(machine_tpm, tmp_path, server_name):
    (tmp_path / "broker").mkdir()
    broker = Broker(tmp_path / "broker", read_ek(machine_tpm.tcti), {}, server_name=server_name)
    broker.released = [CURRENT]
    workspace = Workspace(tmp_path, machine_tpm, broker)
    try:
        workspace.start()
        assert workspace.codes(workspace.measure(CURRENT)) == ["broker_unreachable"]
        assert broker.seen == []
    finally:
        workspace.stop()
        broker.stop()


def test_a_broker_that_lost_the_key_is_enrolled_with_again(workspace, broker):
    workspace.start()
    assert workspace.measure(CURRENT)["ok"]
    broker.ak_pub = b""
    assert workspace.measure(CURRENT)["ok"]
    assert broker.seen.count("enrol") == 2


def test_a_restarted_agent_goes_on_without_enrolling(workspace, broker):
    workspace.start()
    assert workspace.measure(CURRENT)["ok"]
    workspace.stop()
    assert not workspace.config.socket.exists()
    workspace.start()
    broker.wait_for(2, "quote")
    workspace.wait(lambda: workspace.ask(op="status")["ok"])
    assert broker.seen.count("enrol") == 1


def test_a_foreign_measurement_ends_attestation(workspace, machine_tpm, broker):
    workspace.start()
    assert workspace.measure(CURRENT)["ok"]
    machine_tpm.tool("tpm2_pcrextend", f"14:sha256={measurement('ab' * 32).hex()}")
    assert workspace.codes(workspace.measure(CURRENT)) == ["policy_pcr_mismatch"]
    workspace.stop()
    workspace.start()
    assert workspace.codes(workspace.measure(EARLIER)) == ["policy_pcr_mismatch"]


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b'{"op":"measure","policy_digest":"AB","revision":1}\n',
        b'{"op":"measure","policy_digest":"' + b"ab" * 32 + b'"}\n',
        b'{"op":"status","more":1}\n',
        b'{"op":"reset"}\n',
        b'{"op":"status"' + b" " * 5000 + b"}\n",
    ],
    ids=range(6),
)
def test_malformed_requests_are_refused(workspace, line):
    workspace.start()
    assert workspace.codes(workspace.ask_raw(line)) == ["request_malformed"]
    assert not (workspace.run / "attest" / "policy-log.json").exists() or workspace_log(workspace) == []


class Dying:
    """A TPM whose machine dies just before or just after the extension."""

    def __init__(self, tpm, after):
        self.tpm, self.after = tpm, after
        self.read_policy_pcr = tpm.read_policy_pcr

    def extend_policy(self, digest):
        if self.after:
            self.tpm.extend_policy(digest)
        raise TpmError("power lost")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_around_the_extension_leaves_log_and_pcr_in_step(machine_tpm, tmp_path, after):
    tpm, path = Tpm(tmp_path / "keys", machine_tpm.tcti), tmp_path / "log.json"
    assert PolicyLog(path, tpm).measure(EARLIER, 1) is True
    dying = PolicyLog(path, Dying(tpm, after))
    with pytest.raises(TpmError):
        dying.measure(CURRENT, 2)
    for log in (dying, PolicyLog(path, tpm)):
        assert [entry.policy_digest for entry in log.entries] == ([EARLIER, CURRENT] if after else [EARLIER])
        assert log.value == tpm.read_policy_pcr()
    again = PolicyLog(path, tpm)
    assert again.measure(CURRENT, 2) is (not after)
    assert [entry.seq for entry in again.entries] == [1, 2]
    assert again.value == tpm.read_policy_pcr()


def test_a_lost_policy_log_is_noticed(machine_tpm, tmp_path):
    tpm, path = Tpm(tmp_path / "keys", machine_tpm.tcti), tmp_path / "log.json"
    PolicyLog(path, tpm).measure(CURRENT, 1)
    assert PolicyLog(path, tpm).entries
    path.unlink()
    with pytest.raises(PolicyPcrError):
        PolicyLog(path, tpm).measure(CURRENT, 1)


def test_the_command_serves_notifies_and_ends(workspace, tmp_path):
    config = tmp_path / "attestd.json"
    config.write_bytes(msgspec.json.encode(workspace.config))
    command = [sys.executable, "-m", "saw.cli.main", "attestd"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(30)
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "PYTHONWARNINGS": "error"}
        process = subprocess.Popen([*command, "--config", str(config)], env=environment, stderr=subprocess.PIPE)
        try:
            assert channel.recv(100) == b"READY=1"
            assert workspace.measure(CURRENT)["ok"]
            status = subprocess.run(
                [*command, "status", "--config", str(config)], capture_output=True, check=True, timeout=30
            )
            assert json.loads(status.stdout)["policy_digest"] == CURRENT
        finally:
            process.terminate()
            _, log = process.communicate(timeout=30)
        assert process.returncode == 0, log
        assert channel.recv(100) == b"STOPPING=1"
    down = subprocess.run(
        [*command, "status", "--config", str(config)], capture_output=True, text=True, check=False, timeout=30
    )
    assert (down.returncode, "does not answer" in down.stderr) == (1, True)
    key = (workspace.run / "svid" / "key.pem").read_text().splitlines()[1]
    assert key not in log.decode()
