"""The kit in the product's sandbox behind both rings, with far ends that play a part: they show, repeat, lie, or lie inside."""

from __future__ import annotations

import gzip
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from saw.conformance import catalogue_far

INTEGRATION = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(INTEGRATION / name) for name in ("clients", "gateway", "ring1")]
NAMES = ("api", "second", "chat", "inside", "mixed", "forged")
HOSTS = tuple(f"{name}.example.com" for name in NAMES)
FORGED = "10.99.0.7"
_WEB = "\n".join(
    f'      - {{host: {name}.example.com, port: 443, protocol: rest, rules: [{{allow: {{method: GET, path: "/v1/**"}}}}]}}'
    for name in NAMES
    if name != "chat"
)
POLICY = f"""
version: 1
filesystem_policy:
  include_workdir: true
  read_only: [/usr, /etc/ssl, /run/clients/python]
  read_write: [/tmp, HOME, /dev/null]
landlock: {{compatibility: hard_requirement}}
process: {{run_as_user: agent, run_as_group: agent}}
network_policies:
  web:
    endpoints:
{_WEB}
      - {{host: chat.example.com, port: 443, protocol: websocket, rules: [
          {{allow: {{method: GET, path: "/rooms/**"}}}}, {{allow: {{method: WEBSOCKET_TEXT, path: "/rooms/**"}}}}]}}
    binaries: [{{path: /usr/bin/curl}}, {{path: "/usr/bin/python3*"}}]
"""
GOVERNANCE = """
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team-x}
landlock: {minimum_abi: 6, allow_best_effort: false}
credentials:
  - {id: api-token, ref: "file:api-token", hosts: ["api.example.com:443"],
     inject: {header: Authorization, format: "Bearer {secret}"}}
actions:
  - {match: {host: chat.example.com, method: [WEBSOCKET_TEXT]}, class: auto}
"""


class Far:
    """A far end that writes down all that arrives, shows the headers of each request, and repeats texts of WebSockets."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def note(self, text: str) -> None:
        with self.log.open("a", encoding="utf-8") as stream:
            stream.write(text + "\n")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request or WebSocket."""
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        self.note(json.dumps([scope["raw_path"].decode(), scope["query_string"].decode(), headers]))
        if scope["type"] == "websocket":
            while (message := await receive())["type"] != "websocket.disconnect":
                if message["type"] == "websocket.connect":
                    await send({"type": "websocket.accept"})
                    continue
                self.note(repr(message))
                await send({"type": "websocket.send", "text": "heard"})
            return
        while (await receive()).get("more_body"):
            pass
        raw, head = json.dumps(headers).encode(), [(b"content-type", b"application/json")]
        if "gzip" in headers.get("accept-encoding", ""):
            raw, head = gzip.compress(raw), [*head, (b"content-encoding", b"gzip")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": raw})


@pytest.fixture(scope="module")
def rings(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import clients_rig
    from ring2_broker import Uvicorn
    from ring2_rig import Rig

    from saw.runtime.landlock import abi

    if abi() < 6:
        pytest.skip("this kernel's Landlock is older than ABI 6 (or switched off)")
    log = tmp_path_factory.mktemp("far-end") / "arrived.log"
    log.touch()
    far = Far(log)
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(clients_rig, "POLICY", POLICY.replace("HOME", clients_rig.HOME))
        patch.setattr(clients_rig, "GOVERNANCE", GOVERNANCE)
        patch.setattr(clients_rig, "HOSTS", HOSTS)
        ring2 = Rig(stack, tmp_path_factory.mktemp("ring2"))
        workspace = clients_rig.Workspace(ring2)
        workspace.far = far
        stack.callback(workspace.stop)
        workspace.open()
        ring2.namespace.ip("addr", "add", f"{FORGED}/24", "dev", "far0")
        for address, authority in ((FORGED, ring2.stranger), ("127.0.0.1", ring2.corporate)):
            certificate, key = ring2._pair(authority, HOSTS, f"kit-{address}")
            options = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
            stack.callback(Uvicorn(far, ring2.listen(address, 443), **options).close)
        known = {f"{name}_example_com": clients_rig.FAR for name in NAMES}
        special = {
            "inside_example_com": "127.0.0.1",
            "mixed_example_com": f"{clients_rig.FAR} 127.0.0.1",
            "forged_example_com": FORGED,
        }
        ring2.name_hosts(**known | special)
        inside = [clients_rig.PYTHON, "-I", "-S", f"{workspace.spec.paths.package}/shell_client.py", "--"]
        cases = [word for case in catalogue_far.cases() for word in ("--case", case.id)]
        yield kit(
            *("--target", f"cmd:{shlex.join([*workspace.ground.prefix(), *inside])}", "--ours", "--python", "/usr/bin/python3"),
            *("--arrivals", str(log), "--proxy", "10.200.0.1:3128", "--allowed-url", "https://api.example.com/v1/things"),
            *("--second-url", "https://second.example.com/v1/things", "--echo-url", "https://api.example.com/v1/echo"),
            *("--placeholder", "API_TOKEN", "--websocket-url", "https://chat.example.com/rooms/1"),
            *("--inside-url", "https://inside.example.com/v1/x", "--mixed-url", "https://mixed.example.com/v1/x"),
            *("--forged-url", "https://forged.example.com/v1/x", "--case", "http.method.delete", "--case", "address.metadata"),
            *cases,
        )  # fmt: skip


def refusals(run: Any, part: str) -> dict[str, tuple[str, str, bool | None]]:
    """Return reason, layer and arrival by case id."""
    return {
        case["id"]: (case["evidence"].get("refused_by", case["result"]), case["layer"], case["arrived"])
        for case in run.report["cases"]
        if case["id"].startswith(part)
    }


@pytest.mark.control("RUN-01")
@pytest.mark.control("NET-03")
@pytest.mark.control("CRED-01")
def test_behind_both_rings_each_is_refused_for_its_reason_by_its_layer_and_every_twin_works(rings: Any) -> None:
    assert rings.findings() == []
    assert rings.code == 0, rings.text
    assert {case["result"] for case in rings.report["cases"]} == {"refused"}
    assert {case["twin"]["result"] for case in rings.report["cases"]} == {"works"}
    assert [case["id"] for case in rings.report["cases"] if case["layer_ok"] is False] == []


@pytest.mark.control("CRED-01")
def test_what_stands_for_a_credential_leaves_in_no_form_and_nobody_puts_its_pieces_together(rings: Any) -> None:
    found = refusals(rings, "credentials.placeholder.")
    assert found.pop("credentials.placeholder.pieces")[0] == "as_sent"
    assert len(found) == 6
    assert set(found.values()) == {("placeholder_unbound", "ring2", False)}


@pytest.mark.control("CRED-01")
def test_a_credential_that_the_service_shows_comes_back_as_stars(rings: Any) -> None:
    assert {reason for reason, _, _ in refusals(rings, "credentials.reflected").values()} == {"redacted"}


@pytest.mark.control("NET-03")
def test_a_name_that_leads_inside_is_refused_by_ring_2_and_nobody_inside_is_called(rings: Any) -> None:
    found = refusals(rings, "address.name-")
    assert len(found) == 2
    assert set(found.values()) == {("destination_blocked", "ring2", False)}


def test_a_forged_certificate_is_no_service(rings: Any) -> None:
    assert refusals(rings, "http.forged") == {"http.forged": ("service_unreachable", "ring2", False)}
    detail = rings.case("http.forged")["evidence"]["detail"]
    assert "CERTIFICATE_VERIFY_FAILED" in detail, "somebody listens there, and it is the certificate that is not taken"


@pytest.mark.control("RUN-01")
def test_frames_that_the_policy_does_not_allow_end_the_websocket_and_do_not_arrive(rings: Any) -> None:
    found = refusals(rings, "http.websocket.")
    assert len(found) == 9
    assert {(reason, arrived) for reason, _, arrived in found.values()} == {("close:1008", False)}


def test_the_layer_is_that_of_the_answer(rings: Any) -> None:
    assert rings.case("http.method.delete")["layer"] == rings.case("address.metadata")["layer"] == "ring1"
    assert rings.case("http.method.delete")["layer_ok"] is True
