"""The role perimeter: what it writes is a configuration that the gatekeeper reads, and files that it finds."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from msgspec.structs import astuple

from saw.addressing import Band
from saw.errors import ConfigError
from saw.gateway.config import CredentialVault, GatekeeperConfig, RecordsConfig, load_config
from saw.gateway.credential_sources import file_name
from saw.gateway.pg_places import MOST, ROOM
from saw.gateway.service import EVERY_S, LEDGER_PATIENCE_S
from saw.policy.references import parse_reference
from saw.secrets.vault_settings import AppRole

ROLE = Path(__file__).resolve().parents[3] / "roles/perimeter"
NEEDED = {
    "inventory_hostname_short": "edge",
    "perimeter_broker_address": "10.77.0.10:8443",
    "perimeter_operator_networks": ["10.77.0.0/24"],
    "groups": {},
}


def templar_of(**values: object) -> Templar:
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    own = {name: trust_as_template(told) if isinstance(told, str) else told for name, told in defaults.items()}
    return Templar(loader=DataLoader(), variables={**own, **NEEDED, **values})


def rendered(base: Path, **values: object) -> GatekeeperConfig:
    """The configuration that the role makes of ``values``, as the gatekeeper reads it."""
    text = (ROLE / "templates/gatekeeper.json.j2").read_text()
    place = base / "gatekeeper.json"
    place.write_text(str(templar_of(**values).template(trust_as_template(text))))
    return load_config(place)


def files(name: str, **values: object) -> list[dict[str, Any]]:
    """The files that ``name`` of the last step stands for."""
    (step,) = (step for step in yaml.safe_load((ROLE / "tasks/service.yml").read_text()) if "vars" in step)
    own = {key: trust_as_template(told) if isinstance(told, str) else told for key, told in step["vars"].items()}
    for key, told in step["vars"].items():
        if isinstance(told, dict):
            own[key] = {part: trust_as_template(text) for part, text in told.items()}
    templar = templar_of(**{**own, **values})
    found: list[dict[str, Any]] = templar.template(own[name])
    return found


def test_without_a_vault_the_gatekeeper_has_none(tmp_path: Path) -> None:
    assert rendered(tmp_path).vault is None
    assert files("perimeter_vault_files") == []


def test_a_vault_is_told_as_it_is_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    role = {"role_id": "7d1c", "secret_id_file": "/etc/saw/gatekeeper-vault/secret"}
    told = {"url": "https://vault.example.com:8200", "ca_file": "/etc/ssl/v.pem", "approle": role, "cache_s": 5}
    assert rendered(tmp_path, perimeter_vault=told).vault == CredentialVault(
        url=told["url"], ca_file="/etc/ssl/v.pem", approle=AppRole(**role), cache_s=5.0
    )  # fmt: skip
    for bad in ({"url": "http://vault.example.com"}, {"token_file": "/t"}, {"cache_s": 301}, {"more": 1}):
        with pytest.raises(ConfigError):
            rendered(tmp_path, perimeter_vault={**told, **bad})


@pytest.mark.control("INF-01")
def test_calls_of_models_are_kept_where_somebody_says_so(tmp_path: Path) -> None:
    assert rendered(tmp_path).records is None
    told = rendered(tmp_path, perimeter_records=True, perimeter_records_readers="auditors")
    key = Path("/etc/saw/gatekeeper-tls/records.key")
    assert told.records == RecordsConfig(key_file=key, limit_mib=10240, readers_group="auditors")
    with pytest.raises(ConfigError):
        rendered(tmp_path, perimeter_records=True, perimeter_records_limit_mib=0)
    owners = (ROLE / "templates/tmpfiles.conf.j2").read_text()
    assert f"z {key} 0400 saw-gateway saw-gateway -" in owners
    accounts = trust_as_template((ROLE / "templates/sysusers.conf.j2").read_text())
    on = str(
        templar_of(ansible_managed="", perimeter_records=True, perimeter_records_readers="auditors").template(accounts)
    )
    assert "g auditors -\nm saw-gateway auditors" in on
    assert "auditors" not in str(
        templar_of(ansible_managed="", perimeter_records_readers="auditors").template(accounts)
    )


@pytest.mark.control("CRED-01")
def test_what_proves_who_we_are_at_the_vault_is_private_to_the_gatekeeper() -> None:
    (file,) = files("perimeter_vault_files", perimeter_vault_secret="s.1234")
    assert base64.b64decode(file.pop("secret_base64")) == b"s.1234"
    owner = {"owner": "saw-gateway", "group": "saw-gateway"}
    assert file == {"dest": "/etc/saw/gatekeeper-vault/secret", "mode": "0600", **owner}


@pytest.mark.control("CRED-01")
def test_what_is_not_given_any_more_leaves_the_host_and_ring_2_sees_none_of_it() -> None:
    (step,) = (step for step in yaml.safe_load((ROLE / "tasks/service.yml").read_text()) if "vars" in step)
    (vault,) = files("perimeter_vault_files", perimeter_vault_secret="s.1234")
    (value,) = files("perimeter_credential_files", perimeter_credentials={"git": "x"})
    folders = {str(Path(file["dest"]).parent) for file in (vault, value)}
    assert set(step["secure_agent.workspace.component"]["exclusive"]) == folders
    (hidden,) = re.findall(
        "^InaccessiblePaths=(.*)$", (ROLE / "templates/saw-ring2.service.j2").read_text(), re.MULTILINE
    )
    assert folders <= {path.removeprefix("-") for path in hidden.split()}
    for folder in folders:
        assert f"d {folder} 0700 saw-gateway saw-gateway -\n" in (ROLE / "templates/tmpfiles.conf.j2").read_text()


def test_the_gatekeeper_may_open_as_many_files_as_sessions_need() -> None:
    text = (ROLE / "templates/saw-gatekeeper@.service.j2").read_text()
    (limit,) = re.findall("^LimitNOFILE=([0-9]+)$", text, re.MULTILINE)
    # Two for each session, one for each connection that starts; the rest is for decisions, which must not lack any.
    assert int(limit) >= 8 * (2 * MOST + ROOM)


@pytest.mark.parametrize(("name", "taken"), [("git/mia", True), ("git-token", True), ("git:mia", False)])
def test_two_keys_are_never_one_file(name: str, taken: bool) -> None:
    said = preflight("Check the names of credentials", perimeter_credentials={name: "x"})
    assert said is taken


@pytest.mark.parametrize(
    ("group", "taken"), [("", True), ("model-auditors", True), ("sudo", False), ("saw-ring2", False)]
)
def test_who_reads_records_is_a_group_for_that_alone(group: str, taken: bool) -> None:
    assert preflight("Check the group of those who read", perimeter_records_readers=group) is taken


def preflight(name: str, **values: object) -> object:
    """Return whether the check of the role whose name begins so is passed with these values."""
    steps = yaml.safe_load((ROLE / "tasks/preflight.yml").read_text())
    (step,) = (step for step in steps if step["name"].startswith(name))
    check = step["ansible.builtin.assert"]
    return templar_of(**values).template(trust_as_template("{{ " + check["that"] + " }}"))


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize("name", ["git-token", "git/mia", "git/a%2Fb"])
def test_a_value_lies_where_the_gatekeeper_looks_for_it(name: str) -> None:
    (file,) = files("perimeter_credential_files", perimeter_credentials={name: "the value"})
    if "/" not in name:
        place = parse_reference(f"file:{name}").at({})
    else:
        sponsor = {"git/mia": "mia", "git/a%2Fb": "a/b"}[name]
        place = parse_reference("file:git/{sponsor}").at({"sponsor": sponsor})
    assert file["dest"] == f"/etc/saw/credentials/{file_name(place)}"
    assert (base64.b64decode(file["secret_base64"]), file["mode"], file["owner"]) == (
        b"the value",
        "0600",
        "saw-gateway",
    )


def unit(name: str, **values: object) -> dict[str, str]:
    """The settings of a unit that the role writes; of those that are there twice, the last one."""
    text = (ROLE / "templates" / name).read_text()
    text = str(templar_of(ansible_managed="x", **values).template(trust_as_template(text)))
    return dict(line.split("=", 1) for line in text.splitlines() if re.match("[A-Z][A-Za-z]*=", line))


def test_each_gatekeeper_has_sockets_of_its_own(tmp_path: Path) -> None:
    two = rendered(tmp_path, perimeter_reviews=True, perimeter_replicas=2)
    assert (two.replicas, rendered(tmp_path).replicas) == (2, 2), "two by default"
    places = {path for sockets in two.all_sockets() for path in astuple(sockets)}
    assert len(places) == 12
    own = unit("saw-gatekeeper@.service.j2")
    for number, sockets in enumerate(two.all_sockets(), 1):
        folder = Path("/run") / own["RuntimeDirectory"].replace("%i", str(number))
        for path in (sockets.authz, sockets.mcp, sockets.postgres, sockets.records, sockets.review):
            assert path is not None
            assert path.parent == folder, "systemd makes the folder of each instance, and takes away no other's"
        assert sockets.send.parent == Path("/run/saw/ring2")
    assert own["ExecStart"].endswith(" --replica %i")
    one = rendered(tmp_path, perimeter_replicas=1)
    assert [item.authz for item in one.all_sockets()] == [Path("/run/saw/gatekeeper/1/authz.sock")]
    for wrong in (0, 9):
        with pytest.raises(ConfigError):
            rendered(tmp_path, perimeter_replicas=wrong)


def test_a_gatekeeper_that_stands_still_is_ended_and_started_again() -> None:
    """What it holds, the others wait for; SIGKILL is the one signal that ends a process that was stopped."""
    own = unit("saw-gatekeeper@.service.j2")
    assert (own["Type"], own["NotifyAccess"], own["Restart"]) == ("notify", "main", "on-failure")
    assert own["WatchdogSignal"] == "SIGKILL"
    assert EVERY_S < int(own["WatchdogSec"]) <= 3 * LEDGER_PATIENCE_S, "the end of a call is told three times"


@pytest.mark.parametrize("replicas", [1, 2, "3"])
def test_the_wanted_gatekeepers_run_and_no_other(replicas: int | str) -> None:
    found = files("perimeter_gatekeepers", perimeter_replicas=replicas)
    assert [item["name"] for item in found] == [f"saw-gatekeeper@{number}.service" for number in range(1, 9)]
    wanted = [True] * int(replicas) + [False] * (8 - int(replicas))
    assert [item["enabled"] for item in found] == wanted
    assert [item["state"] == "started" for item in found] == wanted
    after = unit("saw-ring2.service.j2", perimeter_replicas=replicas)["After"].split()
    assert [name for name in after if "gatekeeper" in name] == [
        item["name"] for item in found if item["enabled"]
    ]  # fmt: skip


def test_the_unit_of_the_one_gatekeeper_ends_before_others_start_and_goes() -> None:
    steps = yaml.safe_load((ROLE / "tasks/service.yml").read_text())
    (step,) = (step for step in steps if "vars" in step)
    before = step["vars"]["perimeter_units_before"]
    assert before[-1] == {"name": "saw-gatekeeper.service", "enabled": False, "state": "stopped"}
    units = step["secure_agent.workspace.component"]["units"]
    assert units.index("perimeter_units_before") < units.index("perimeter_gatekeepers") < units.index("saw-ring2")
    gone = {"path": "/etc/systemd/system/saw-gatekeeper.service", "state": "absent"}
    assert steps[-1]["ansible.builtin.file"] == gone


def test_numbers_and_ingress_addresses_are_told(tmp_path: Path) -> None:
    plain = rendered(tmp_path)
    assert (plain.numbers, plain.ring2.ingress_blocks) == (Band(1, 1000), {})
    told = {"perimeter_numbers": {"first": "10001", "last": 16_000}, "perimeter_ingress_blocks": {"1": "192.0.2.8"}}
    found = rendered(tmp_path, perimeter_ingress_address="192.0.2.7", **told)
    assert found.numbers == Band(10_001, 16_000)
    assert (found.ring2.ingress_of(1), found.ring2.ingress_of(10_001)) == ("192.0.2.7", "192.0.2.8")
    with pytest.raises(ConfigError, match=r"numbers.first is above numbers.last"):
        rendered(tmp_path, perimeter_numbers={"first": 2, "last": 1})
