"""Credentials: their files, their shapes, and what may never become a header."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from saw.gateway.credentials import CredentialStore, fill
from saw.gateway.errors import CredentialUnavailable
from saw.policy.governance import Credential, Inject


def credential(identifier: str = "token", header: str = "Authorization", form: str = "Bearer {secret}") -> Credential:
    return Credential(id=identifier, ref="local:x", inject=Inject(header=header, format=form))


def store(tmp_path: Path, value: bytes, mode: int = 0o600) -> CredentialStore:
    path = tmp_path / "token"
    path.write_bytes(value)
    path.chmod(mode)
    return CredentialStore(tmp_path)


def test_the_formats_of_the_policy_page() -> None:
    assert fill("Bearer {secret}", "abc") == "Bearer abc"
    assert fill("Basic {b64:x-access-token:{secret}}", "abc") == "Basic eC1hY2Nlc3MtdG9rZW46YWJj"
    assert fill("{secret}", "{secret}{b64:{secret}}") == "{secret}{b64:{secret}}"


@pytest.mark.control("CRED-01")
def test_a_private_file_gives_the_header(tmp_path: Path) -> None:
    found = store(tmp_path, b"abc\n").injection(credential())
    assert (found.name, found.value, found.reflections) == ("authorization", "Bearer abc", ())


@pytest.mark.control("CRED-01")
def test_every_form_in_which_the_value_could_come_back_is_named_the_longest_first(tmp_path: Path) -> None:
    form = "Basic {b64:agent:{secret}}"
    found = store(tmp_path, b'k/y+"12345').injection(credential(form=form)).reflections
    encoded = base64.b64encode(b'agent:k/y+"12345').decode()
    assert set(found) == {'k/y+"12345', 'k/y+\\"12345', 'k\\/y+"12345', "k%2Fy%2B%2212345", encoded}
    assert [len(one) for one in found] == sorted((len(one) for one in found), reverse=True)


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize("value", [b"", b"\n", b"a\r\nx-evil: 1", b"a\x00b", b"a\xc3\xa9", b"a" * 9000])
def test_a_value_that_could_break_a_header_is_refused_without_being_shown(tmp_path: Path, value: bytes) -> None:
    with pytest.raises(CredentialUnavailable) as caught:
        store(tmp_path, value).injection(credential())
    assert "x-evil" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(CredentialUnavailable, match="open to group or others"):
        store(tmp_path, b"abc", mode).injection(credential())


@pytest.mark.parametrize("identifier", ["../token", "", ".token", "a/b", "missing"])
def test_an_id_that_is_no_file_of_the_store_is_refused(tmp_path: Path, identifier: str) -> None:
    with pytest.raises(CredentialUnavailable):
        store(tmp_path, b"abc").injection(credential(identifier))


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_text("abc")
    target.chmod(0o600)
    (tmp_path / "token").symlink_to(target)
    with pytest.raises(CredentialUnavailable):
        CredentialStore(tmp_path).injection(credential())


@pytest.mark.parametrize("header", ["Host", "Content-Length", "Connection", "x-saw-upstream", "X-Envoy-Foo", "a b", ""])
def test_headers_that_steer_the_proxy_are_never_set(tmp_path: Path, header: str) -> None:
    with pytest.raises(CredentialUnavailable, match="may not set"):
        store(tmp_path, b"abc").injection(credential(header=header))
