"""What the provider ``vault`` does when the server is away, refuses, or answers something else."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vault_far_end import POLICY, ROOT_TOKEN, Contract, FarEnd, OpenBao, bao_program

from saw.errors import ConfigError, SawError, UnavailableError
from saw.secrets.store import SecretBroken, SecretError, SecretExists, SecretMissing
from saw.secrets.vault import VaultStore
from saw.secrets.vault_calls import MAX_ANSWER, TRIES, VaultDenied

VALUE = b"the value of a secret"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contract]:
    far = Contract(tmp_path_factory.mktemp("vault"))
    yield far
    far.close()


@pytest.fixture
def far(server: Contract) -> Contract:
    server.clear()
    return server


@pytest.fixture
def store(far: Contract) -> Iterator[VaultStore]:
    opened = VaultStore(far.settings(), pause=lambda _: None)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def openbao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FarEnd]:
    far = OpenBao(tmp_path_factory.mktemp("openbao"), bao_program())
    yield far
    far.close()


@pytest.fixture(params=["contract", "openbao"])
def either(request: pytest.FixtureRequest) -> FarEnd:
    """The small server of the contract, and a real one."""
    found: FarEnd = request.getfixturevalue({"contract": "far", "openbao": "openbao"}[request.param])
    found.clear()
    return found


def test_a_role_may_do_what_its_page_says_and_nothing_else(openbao: FarEnd) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs/broker.md").read_text(encoding="utf-8")
    assert POLICY.strip() in page, "the policy of the page is the one that is tried here"
    store = VaultStore(openbao.by_role(), pause=lambda _: None)
    store.write("x509/ca-key.pem", VALUE, new=True)
    store.write("x509/ca-key.pem", VALUE * 2)
    assert (store.read("x509/ca-key.pem"), store.names()) == (VALUE * 2, ["x509/ca-key.pem"])
    elsewhere = VaultStore(msgspec.structs.replace(openbao.by_role(), prefix="saw/other"), pause=lambda _: None)
    for call in (elsewhere.names, lambda: elsewhere.read("a"), lambda: elsewhere.write("a", VALUE)):
        with pytest.raises(VaultDenied, match="refused"):
            call()
    openbao.forget_tokens()
    assert store.read("x509/ca-key.pem") == VALUE * 2, "a token that has ended is renewed"
    store.remove("x509/ca-key.pem")
    assert openbao.call("GET", "secret/metadata/saw/broker/x509/ca-key.pem").status_code == 404, "no version is left"


def test_a_wrong_secret_id_is_refused_and_the_right_one_is_not(either: FarEnd) -> None:
    settings = either.by_role()
    assert settings.approle is not None
    file = Path(settings.approle.secret_id_file)
    right = file.read_text()
    file.write_text("wrong")
    store = VaultStore(settings, pause=lambda _: None)
    with pytest.raises(VaultDenied, match="refused to log us in") as refused:
        store.read("server.pem")
    assert right not in str(refused.value) and "wrong" not in str(refused.value)
    file.write_text(right)
    with pytest.raises(SecretMissing):
        store.read("server.pem")
    store.close()


def test_what_somebody_deleted_there_is_missing_and_not_made_anew(either: FarEnd) -> None:
    store = VaultStore(either.settings(), pause=lambda _: None)
    store.write("signer.pem", VALUE)
    assert either.call("DELETE", "secret/data/saw/broker/signer.pem").status_code == 204
    with pytest.raises(SecretMissing):
        store.read("signer.pem")
    with pytest.raises(SecretExists):
        store.write("signer.pem", VALUE, new=True)
    store.write("signer.pem", VALUE)
    assert store.read("signer.pem") == VALUE
    store.remove("signer.pem")
    store.close()


def test_an_engine_that_is_not_there_is_no_empty_one(either: FarEnd) -> None:
    store = VaultStore(either.settings(mount="elsewhere"), pause=lambda _: None)
    for act, given in ((store.names, ()), (store.read, ("server.pem",)), (store.write, ("server.pem", VALUE))):
        with pytest.raises(SecretError, match="no handler for route") as refused:
            act(*given)
        assert not isinstance(refused.value, SecretMissing)
    store.close()


def test_a_token_file_is_read_for_each_call_so_that_it_can_be_renewed(far: Contract, store: VaultStore) -> None:
    token = far.base / "token"
    store.write("server.pem", VALUE)
    for content, reason in (("expired", "refused a call"), ("", "holds no token"), ("two words", "holds no token")):
        token.write_text(content)
        with pytest.raises(SawError, match=reason):
            store.read("server.pem")
    token.unlink()
    with pytest.raises(ConfigError, match="token_file cannot be read"):
        store.read("server.pem")
    token.write_text(ROOT_TOKEN)
    assert store.read("server.pem") == VALUE


def test_reading_is_tried_again_while_the_server_is_away_and_ends_with_a_reason(
    far: Contract, store: VaultStore
) -> None:
    store.write("server.pem", VALUE)
    left = [503, 429]
    far.before = lambda _method, _path: (left.pop(), {"errors": ["sealed"]}) if left else None
    assert store.read("server.pem") == VALUE
    far.calls.clear()
    far.before = lambda _method, _path: (503, {"errors": ["Vault is sealed"]})
    with pytest.raises(UnavailableError, match=r"does not answer: it answered 503"):
        store.read("server.pem")
    assert len(far.calls) == TRIES
    with pytest.raises(UnavailableError, match="does not answer"):
        store.write("server.pem", b"x")


def test_a_write_whose_answer_is_lost_is_told_and_can_be_done_again(far: Contract, store: VaultStore) -> None:
    far.lose_answers_to = "POST"
    with pytest.raises(UnavailableError, match=r"the answer to writing server\.pem was lost"):
        store.write("server.pem", VALUE, new=True)
    assert sum(call.startswith("POST") for call in far.calls) == 1, "it is sent once"
    far.lose_answers_to = ""
    assert store.read("server.pem") == VALUE
    store.write("server.pem", b"next")
    assert store.read("server.pem") == b"next"


@pytest.mark.parametrize("new", [True, False])
def test_of_two_writers_the_second_is_refused(far: Contract, store: VaultStore, new: bool) -> None:
    if not new:
        store.write("server.pem", b"old")

    def first(method: str, path: str) -> None:
        if method == "POST":  # somebody else writes between our reading and our writing
            far.held.setdefault(path.removeprefix("secret/data/"), []).append(_held(b"theirs"))

    far.before = first
    with pytest.raises(SecretError, match="somebody else wrote") as refused:
        store.write("server.pem", b"ours", new=new)
    assert refused.value.code == ("secret_exists" if new else "secret_conflict")
    far.before = lambda _method, _path: None
    assert store.read("server.pem") == b"theirs"


def _held(value: bytes) -> dict[str, str]:
    return {"value": base64.b64encode(value).decode()}


@pytest.mark.parametrize(
    "data",
    [{}, {"value": "*"}, {"value": ""}, {"other": "YQ=="}, {"value": "YQ==", "more": "YQ=="}, {"value": 7}],
    ids=["empty", "no Base64", "nothing", "another field", "two fields", "a number"],
)
def test_what_is_not_as_we_write_it_is_refused(far: Contract, store: VaultStore, data: dict[str, Any]) -> None:
    far.held["saw/broker/server.pem"] = [data]
    with pytest.raises(SecretBroken, match=r"server\.pem in the vault is not as we write it"):
        store.read("server.pem")
    far.held["saw/broker/server.pem"] = [_held(VALUE)]
    assert store.read("server.pem") == VALUE


@pytest.mark.parametrize(
    "answer",
    [
        {"data": {"data": {"value": 7}}},
        {"data": VALUE.decode()},
        [],
        {"data": {"value": "YQ=="}},
        "x" * (MAX_ANSWER + 1),
    ],
    ids=["number", "text", "list", "version 1", "too long"],
)
def test_an_answer_of_something_else_is_refused_without_its_words(
    far: Contract, store: VaultStore, answer: Any
) -> None:
    far.before = lambda _method, _path: (200, answer)
    for call in (lambda: store.read("server.pem"), lambda: store.write("server.pem", b"x")):
        words = "too long" if isinstance(answer, str) and len(answer) > MAX_ANSWER else "something else"
        with pytest.raises(SecretError, match=words) as refused:
            call()
        assert VALUE.decode() not in str(refused.value) and refused.value.__cause__ is None


def test_a_redirect_is_not_followed(far: Contract, store: VaultStore) -> None:
    far.before = lambda _method, path: None if path.endswith("elsewhere") else (307, {"errors": []})
    with pytest.raises(SecretError, match="answered 307"):
        store.read("server.pem")


def test_a_server_whose_certificate_is_not_of_the_authority_gets_no_token(far: Contract, tmp_path: Path) -> None:
    from datetime import UTC, datetime

    from saw.identity.x509 import Authority

    Authority.create(tmp_path / "ca", "other.example", datetime.now(UTC))
    settings = msgspec.structs.replace(far.settings(), ca_file=str(tmp_path / "ca/ca.pem"))
    store = VaultStore(settings, pause=lambda _: None)
    with pytest.raises(UnavailableError, match="does not answer"):
        store.read("server.pem")
    store.close()
    elsewhere = VaultStore(
        msgspec.structs.replace(far.settings(), url=far.url.replace("localhost", "127.0.0.1")), pause=lambda _: None
    )
    with pytest.raises(UnavailableError, match="does not answer"):
        elsewhere.read("server.pem")
    elsewhere.close()
    assert far.calls == [], "no request left"
    with pytest.raises(ConfigError, match=r"vault\.ca_file cannot be used"):
        VaultStore(msgspec.structs.replace(far.settings(), ca_file=str(tmp_path / "none")))


def test_no_error_repeats_a_token_or_a_value(far: Contract, store: VaultStore) -> None:
    for status in (400, 403, 404, 500):
        far.before = lambda _method, _path, status=status: (status, {"errors": ["no"], "data": VALUE.decode()})
        for call in (lambda: store.read("server.pem"), lambda: store.write("server.pem", VALUE), store.names):
            with pytest.raises(SawError) as refused:
                call()
            said = json.dumps(refused.value.as_dict())
            assert not any(secret in said for secret in (VALUE.decode(), ROOT_TOKEN, base64.b64encode(VALUE).decode()))
