"""``saw gateway``: what it prepares on a perimeter host, and what it prints for others to load."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest

from saw.cli.gateway import initialise, main
from saw.errors import ConfigError
from saw.gateway.config import GatekeeperConfig, load_config
from saw.gateway.nft import render_nft
from saw.gateway.notify import notify
from saw.gateway.service import listen
from saw.gateway.streams import Standing
from saw.gateway.xds import XdsWriter, envoy_arguments


@pytest.fixture
def path(tmp_path: Path) -> Path:
    config: dict[str, Any] = {
        "name": "edge",
        "broker_url": "https://10.77.0.10:8443",
        "ca_file": f"{tmp_path}/tls/ca.pem",
        "cert_file": f"{tmp_path}/tls/cert.pem",
        "key_file": f"{tmp_path}/tls/key.pem",
        "tuf_root_file": f"{tmp_path}/tls/root.json",
        "state_dir": f"{tmp_path}/state",
        "credentials_dir": f"{tmp_path}/credentials",
        "ring2": {
            "broker_address": "10.77.0.10:8443",
            "xds_dir": f"{tmp_path}/xds",
            "tls_dir": f"{tmp_path}/ring2-tls",
        },
        "nft": {"operator_networks": ["10.77.0.0/24"], "ssh_port": 2222},
    }
    file = tmp_path / "gatekeeper.json"
    file.write_text(json.dumps(config))
    return file


def test_init_makes_what_is_missing_once(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--json", "--config", str(path)]) == 0
    first = json.loads(capsys.readouterr().out)
    root = path.parent
    assert {f"{root}/tls/key.pem", f"{root}/ring2-tls/server.key", f"{root}/xds/bootstrap.json"} <= set(
        first["changed"]
    )
    assert first["csr"] == [f"{root}/tls/key.csr", f"{root}/ring2-tls/server.csr"]
    assert len(first["missing"]) == 3
    for key in ("tls/key.pem", "ring2-tls/server.key"):
        assert (root / key).stat().st_mode & 0o777 == 0o600
    assert initialise(load_config(path))["changed"] == []


def test_init_leaves_the_listeners_of_running_workspaces(path: Path) -> None:
    config = load_config(path)
    initialise(config)
    XdsWriter(config).write((3,), ())
    assert initialise(config)["changed"] == []
    assert "10.210.3.1" in (config.ring2.xds_dir / "lds.json").read_text()


def test_files_are_written_only_when_they_change_and_cuts_go_first(path: Path) -> None:
    config = load_config(path)
    initialise(config)
    writer = XdsWriter(config)
    assert writer.write((1, 2), ("private-token",)) == ["cds.json", "lds.json"]
    assert writer.write((2, 1), ("private-token",)) == []
    assert writer.write((1,), ("private-token",)) == ["lds.json", "cds.json"]
    text = (config.ring2.xds_dir / "lds.json").read_text()
    assert "private-token" in text
    assert "10.210.2.1" not in text


def test_a_credential_header_about_the_connection_is_never_copied(path: Path) -> None:
    text = XdsWriter(load_config(path)).render((1,), ("Content-Length", "X-Api-Key"))["lds.json"]
    listener = json.loads(text)["resources"][0]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    answer = manager["http_filters"][0]["typed_config"]["http_service"]["authorization_response"]
    names = {pattern["exact"] for pattern in answer["allowed_upstream_headers"]["patterns"]}
    assert {"authorization", "x-api-key", "x-saw-upstream"} <= names
    assert "content-length" not in names


@pytest.mark.control("RUN-05")
@pytest.mark.parametrize("reviews", [False, True])
def test_answers_of_mcp_servers_are_looked_at_whether_or_not_there_are_reviews(path: Path, reviews: bool) -> None:
    config = load_config(path)
    if reviews:
        config = msgspec.structs.replace(config, review_socket=path.parent / "review.sock")
    files = XdsWriter(config).render((1,), ())
    listeners = {item["name"]: json.dumps(item) for item in json.loads(files["lds.json"])["resources"]}
    clusters = {item["name"]: json.dumps(item) for item in json.loads(files["cds.json"])["resources"]}
    assert str(config.sockets().mcp) in clusters["mcp"]
    routed = '{"exact": "mcp"}' in listeners["ring2-1"], '{"exact": "mcp"}' in listeners["ring2-approved"]
    assert routed == (True, False), "what comes from the gatekeeper never comes back to it"
    assert ("review" in clusters) == reviews


def test_render_and_nft_print_what_they_are_asked_for(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "--numbers", "1,7", "--config", str(path)]) == 0
    assert {"cds.json", "lds.json"} <= json.loads(capsys.readouterr().out).keys()
    with pytest.raises(ConfigError, match="does not serve number 2000"):
        main(["render", "--numbers", "1,2000", "--config", str(path)])
    assert main(["nft", "--config", str(path)]) == 0
    rules = capsys.readouterr().out
    assert "ip saddr { 10.77.0.0/24 } tcp dport 2222" in rules


def test_removed_listeners_drain_at_once(path: Path) -> None:
    arguments = envoy_arguments(load_config(path))
    assert arguments[arguments.index("--drain-time-s") + 1] == "1"
    assert arguments[arguments.index("--drain-strategy") + 1] == "immediate"


@pytest.mark.control("CRED-01")
def test_only_its_user_and_group_can_reach_the_authorisation_socket(tmp_path: Path) -> None:
    server = listen(tmp_path / "authz.sock", "root")
    assert (tmp_path / "authz.sock").stat().st_mode & 0o777 == 0o660
    server.close()
    with pytest.raises(ConfigError, match="group"):
        listen(tmp_path / "authz.sock", "no-such-group")
    with pytest.raises(ConfigError, match="cannot listen"):
        listen(tmp_path / "missing" / "authz.sock", "")


def test_the_service_manager_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        assert notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert manager.recv(100) == b"READY=1"
    assert not notify("READY=1", {})


# --- Numbers that a perimeter serves ------------------------------------------------------------------------------------


def configured(path: Path, numbers: dict[str, int] | None = None, **ring2: Any) -> GatekeeperConfig:
    raw = json.loads(path.read_text())
    raw["ring2"] |= ring2
    path.write_text(json.dumps({**raw, **({"numbers": numbers} if numbers else {})}))
    return load_config(path)


def listeners(config: GatekeeperConfig, *numbers: int) -> dict[str, tuple[str, int]]:
    resources = json.loads(XdsWriter(config).render(numbers, ())["lds.json"])["resources"]
    places = {item["name"]: item["address"].get("socket_address") for item in resources}
    return {name: (place["address"], place["port_value"]) for name, place in places.items() if place}


def test_only_the_numbers_that_a_perimeter_serves_have_listeners(path: Path) -> None:
    config = configured(
        path, {"first": 251, "last": 10_001}, ingress_address="192.0.2.7", ingress_blocks={"1": "192.0.2.8"}
    )
    assert listeners(config, 250, 251, 10_001, 10_002) == {
        "ring2-251": ("10.210.1.5", 8443), "broker-251": ("10.210.1.5", 8444), "ingress-251": ("192.0.2.7", 22_251),
        "ring2-10001": ("10.210.1.161", 8443), "broker-10001": ("10.210.1.161", 8444), "ingress-10001": ("192.0.2.8", 22_001),
    }  # fmt: skip


def test_a_block_without_an_address_has_no_ingress(path: Path) -> None:
    found = listeners(configured(path, {"first": 1, "last": 20_000}), 10_001)
    assert sorted(found) == ["broker-10001", "ring2-10001"]


def test_what_was_written_out_before_is_as_it_would_be_anew(path: Path) -> None:
    writer = XdsWriter(load_config(path))
    for numbers, names, streams in (
        ((1, 2, 3), (), None), ((1, 3), (), None), ((1, 3), ("x-api",), None), ((3,), ("x-api",), {3: Standing("a", True)}),
        ((3,), ("x-api",), {3: Standing("b", True)}), ((3,), ("x-api",), {3: Standing("b", False)}), ((1, 2, 3), (), None),
    ):  # fmt: skip
        assert writer.render(numbers, names, streams) == XdsWriter(load_config(path)).render(numbers, names, streams)


def test_the_filter_admits_operators_to_the_ingress_ports_of_these_numbers_and_no_others(path: Path) -> None:
    def admitted(config: GatekeeperConfig) -> list[str]:
        rules = render_nft(["192.0.2.0/24"], numbers=config.numbers, ingress_of=config.ring2.ingress_of)
        return [line.split("} ", 1)[1] for line in rules.splitlines() if "saddr {" in line and "dport 22 " not in line]

    assert admitted(load_config(path)) == ["tcp dport 22001-23000 counter accept"]
    two = {"ingress_address": "192.0.2.7", "ingress_blocks": {"1": "192.0.2.8"}}
    assert admitted(configured(path, {"first": 9000, "last": 10_500}, **two)) == [
        "ip daddr 192.0.2.7 tcp dport 31000-32000 counter accept",
        "ip daddr 192.0.2.8 tcp dport 22001-22500 counter accept",
    ]


@pytest.mark.parametrize(
    ("numbers", "ring2", "words"),
    [
        ({"first": 2, "last": 1}, {}, "numbers.first is above"),
        ({"first": 0, "last": 1}, {}, ">= 1"),
        ({"first": 1, "last": 64_001}, {}, "<= 64000"),
        (None, {"ingress_blocks": {"1": "192.0.2.8"}}, "ingress_address must be one address"),
        (
            None,
            {"ingress_address": "192.0.2.8", "ingress_blocks": {"1": "192.0.2.8"}},
            "names ring2.ingress_address again",
        ),
        (None, {"ingress_address": "192.0.2.8", "ingress_blocks": {"1": "0.0.0.0"}}, "is not an address of this host"),
        (None, {"ingress_address": "192.0.2.8", "ingress_blocks": {"1": "edge"}}, "is not an address of this host"),
        (None, {"ingress_address": "192.0.2.8", "ingress_blocks": {"7": "192.0.2.9"}}, "is no block"),
    ],
)
def test_numbers_and_addresses_that_cannot_be_are_refused(
    path: Path, numbers: dict[str, int] | None, ring2: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        configured(path, numbers, **ring2)
