"""What the broker states, how it is kept, and which release may judge a call."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from saw.errors import ConfigError
from saw.gateway.config import GatekeeperConfig, load_config, split_address
from saw.gateway.errors import StateRefused
from saw.gateway.state import Grace, StateFile, WorkspaceEntry, next_graces, parse_state

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def workspace(**fields: Any) -> dict[str, Any]:
    return {"id": "ws-1", "number": 1, "state": "active", **fields}


def state(*workspaces: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"seq": 3, "now": "2026-01-02T03:04:05Z", "workspaces": workspaces, **fields}).encode()


def test_a_state_is_read() -> None:
    parsed = parse_state(state(workspace(lease_expires_at="2026-01-02T03:06:05Z"), workspace(id="ws-2", number=2)))
    assert parsed.now == NOW
    assert parsed.workspaces[0].lease_expires_at == NOW + timedelta(minutes=2)


@pytest.mark.parametrize(
    "raw",
    [
        b"[]",
        b"{",
        state(workspace(state="fine")),
        state(workspace(number=0)),
        state(workspace(number=64_001)),
        state(workspace(surprise=1)),
        state(workspace(), workspace(number=2)),
        state(workspace(), workspace(id="ws-2")),
        state(workspace(lease_expires_at="2026-01-02T03:06:05")),
    ],
)
def test_a_state_that_is_not_one_consistent_state_is_refused(raw: bytes) -> None:
    with pytest.raises(StateRefused):
        parse_state(raw)


def test_the_number_of_a_workspace_that_is_gone_may_be_used_again() -> None:
    parsed = parse_state(state(workspace(state="decommissioned"), workspace(id="ws-2")))
    assert len(parsed.workspaces) == 2


def entry(released: str, released_at: datetime | None = None) -> WorkspaceEntry:
    return WorkspaceEntry(id="ws-1", number=1, state="active", released_digest=released, released_at=released_at)


def test_a_new_release_starts_a_grace_for_the_one_before_it() -> None:
    first = next_graces({}, (entry("a"),), NOW)
    assert first == {"ws-1": Grace("a", "", NOW)}
    later = NOW + timedelta(hours=1)
    assert next_graces(first, (entry("a"),), later) == first
    assert next_graces(first, (entry("b"),), later) == {"ws-1": Grace("b", "a", later)}
    stated = later - timedelta(minutes=10)
    assert next_graces(first, (entry("b", stated),), later) == {"ws-1": Grace("b", "a", stated)}
    assert next_graces(first, (entry("b", later + timedelta(days=1)),), later)["ws-1"].since == later
    assert next_graces(first, (), later) == {}


def test_the_state_survives_on_disk_privately_and_a_broken_file_counts_as_none(tmp_path: Path) -> None:
    file = StateFile(tmp_path)
    assert file.load() is None
    parsed = parse_state(state(workspace()))
    file.save(parsed, {"ws-1": Grace("a", "", NOW)}, {"stable/coding": 7}, NOW)
    path = tmp_path / "state.json"
    assert path.stat().st_mode & 0o777 == 0o600
    loaded = file.load()
    assert loaded is not None
    assert (loaded.state, loaded.floors, loaded.saved_at) == (parsed, {"stable/coding": 7}, NOW)
    path.write_bytes(path.read_bytes()[:-9])
    assert file.load() is None


def config(**changes: Any) -> dict[str, Any]:
    base = {
        "name": "edge",
        "broker_url": "https://10.77.0.10:8443",
        "ca_file": "/a",
        "cert_file": "/b",
        "key_file": "/c",
        "tuf_root_file": "/d",
        "ring2": {"broker_address": "10.77.0.10:8443"},
    }
    return {**base, **changes}


def write(tmp_path: Path, value: dict[str, Any]) -> Path:
    path = tmp_path / "gatekeeper.json"
    path.write_bytes(msgspec.json.encode(value))
    return path


def test_the_smallest_configuration_loads_with_its_defaults(tmp_path: Path) -> None:
    loaded = load_config(write(tmp_path, config()))
    assert isinstance(loaded, GatekeeperConfig)
    assert loaded.state_dir == Path("/var/lib/saw/gatekeeper")
    assert loaded.authz_socket == Path("/run/saw/gatekeeper/authz.sock")


@pytest.mark.parametrize(
    "changes",
    [
        {"surprise": 1},
        {"ca_file": "relative"},
        {"broker_url": "http://10.77.0.10"},
        {"ring2": {"broker_address": "broker:8443"}},
        {"ring2": {"broker_address": "10.0.0.1:8443", "ingress_address": "edge"}},
        {"nft": {"operator_networks": ["10.0.0.1/8"]}},
        {"stale_after_s": -1},
        {"poll_wait_s": 31},
    ],
)
def test_a_wrong_configuration_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        load_config(write(tmp_path, config(**changes)))


def test_addresses_are_split() -> None:
    assert split_address("[2001:db8::1]:443", "x") == ("2001:db8::1", 443)
    for text in ("10.0.0.1", "10.0.0.1:0", "10.0.0.1:70000", "name:1", ""):
        with pytest.raises(ConfigError):
            split_address(text, "x")
