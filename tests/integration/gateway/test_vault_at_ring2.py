"""A gatekeeper that reads credentials from a vault: rotation at the next call, and refusals when it is away or not there."""

from __future__ import annotations

import json
import ssl
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from ring2_rig import Rig

sys.path.append(str(Path(__file__).parents[2] / "unit" / "secrets"))

from vault_far_end import ROOT_TOKEN, Contract, _handler

PLACE = "keys/mia%40example.com"
TARGET = "/store/vault/x"


class Inside(Contract):
    """The small server of the contract, where the gatekeeper of the rig reaches it."""

    def __init__(self, base: Path, rig: Rig) -> None:
        super().__init__(base)
        self.inside = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self), bind_and_activate=False)
        self.inside.socket.close()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(base / "server.pem")
        listening = rig.listen("127.0.0.1", 8200)
        self.inside.socket = context.wrap_socket(listening, server_side=True)
        self.inside.daemon_threads = True
        threading.Thread(target=self.inside.serve_forever, daemon=True).start()
        self.url = "https://localhost:8200"

    def close(self) -> None:
        self.inside.shutdown()
        self.inside.server_close()
        super().close()


def keep(far: Contract, value: str) -> None:
    far.held[PLACE] = [*far.held.get(PLACE, []), {"value": value}]


@pytest.fixture
def far(rig: Rig, tmp_path: Path) -> Iterator[Contract]:
    vault = Inside(tmp_path, rig)
    token = tmp_path / "vault-token"
    token.write_text(ROOT_TOKEN)
    token.chmod(0o600)
    before = rig.config_path.read_text()
    told = {"url": vault.url, "ca_file": str(vault.ca_file), "token_file": str(token)}
    rig.stop_gatekeeper()
    rig.config_path.write_text(json.dumps(json.loads(before) | {"vault": told}))
    rig.start_gatekeeper()
    yield vault
    rig.stop_gatekeeper()
    rig.config_path.write_text(before)
    rig.start_gatekeeper()
    vault.close()


@pytest.mark.control("CRED-01")
def test_a_secret_of_the_vault_is_sent_exchanged_at_the_next_call_and_never_kept_when_it_is_away(
    rig: Rig, far: Contract
) -> None:
    keep(far, "first-value-of-mia")
    assert rig.call(target=TARGET).status == 200
    assert dict(rig.far.arrived[-1]["headers"])["x-api-key"] == "first-value-of-mia"
    keep(far, "second-value-of-mia")
    assert rig.call(target=TARGET).status == 200
    assert dict(rig.far.arrived[-1]["headers"])["x-api-key"] == "second-value-of-mia"
    rig.far.arrived.clear()
    far.before = lambda _method, _path: (503, {"errors": ["Vault is sealed"]})
    answer = rig.call(target=TARGET)
    assert answer.outcome == (403, "credential_unavailable")
    assert answer.json["detail"] == "credential vault-key is not at hand: the vault does not answer"
    far.before = lambda _method, _path: None
    far.held.clear()
    assert rig.call(target=TARGET).outcome == (403, "credential_unavailable")
    assert rig.far.arrived == []


@pytest.mark.control("CRED-01")
def test_a_gatekeeper_without_a_vault_refuses_what_lies_in_one(rig: Rig) -> None:
    answer = rig.call(target=TARGET)
    assert answer.outcome == (403, "credential_unavailable")
    assert "a store that this perimeter host has not: vault" in answer.json["detail"]
    assert rig.far.arrived == []
