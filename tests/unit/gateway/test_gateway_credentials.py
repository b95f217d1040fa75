"""Credentials: their files, their shapes, and what may never become a header."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import pytest

from saw.gateway.credentials import CredentialStore, Injection, fill
from saw.gateway.errors import CredentialUnavailable
from saw.policy.governance import Credential, Inject

MIA = {"sponsor": "mia", "workspace": "ws-1"}


def credential(
    ref: str = "file:token", header: str = "Authorization", form: str = "Bearer {secret}", identifier: str = "any"
) -> Credential:
    return Credential(id=identifier, ref=ref, inject=Inject(header=header, format=form))


def put(directory: Path, name: str, value: bytes, mode: int = 0o600) -> None:
    path = directory / name
    path.write_bytes(value)
    path.chmod(mode)


def injected(place: CredentialStore | Path, wanted: Credential, **caller: str) -> Injection:
    store = CredentialStore(place) if isinstance(place, Path) else place
    return asyncio.run(store.injection(wanted, MIA | caller))


def sent(place: CredentialStore | Path, wanted: Credential, **caller: str) -> str:
    ((_, value),) = injected(place, wanted, **caller).headers
    return value


def store(tmp_path: Path, value: bytes, mode: int = 0o600) -> CredentialStore:
    put(tmp_path, "token", value, mode)
    return CredentialStore(tmp_path)


def test_the_formats_of_the_policy_page() -> None:
    assert fill("Bearer {secret}", "abc") == "Bearer abc"
    assert fill("Basic {b64:x-access-token:{secret}}", "abc") == "Basic eC1hY2Nlc3MtdG9rZW46YWJj"
    assert fill("{secret}", "{secret}{b64:{secret}}") == "{secret}{b64:{secret}}"


@pytest.mark.control("CRED-01")
def test_a_private_file_gives_the_header(tmp_path: Path) -> None:
    found = injected(store(tmp_path, b"abc\n"), credential())
    assert (found.headers, found.reflections) == ((("authorization", "Bearer abc"),), ())


@pytest.mark.control("CRED-01")
def test_every_form_in_which_the_value_could_come_back_is_named_the_longest_first(tmp_path: Path) -> None:
    form = "Basic {b64:agent:{secret}}"
    found = injected(store(tmp_path, b'k/y+"12345'), credential(form=form)).reflections
    encoded = base64.b64encode(b'agent:k/y+"12345').decode()
    assert set(found) == {'k/y+"12345', 'k/y+\\"12345', 'k\\/y+"12345', "k%2Fy%2B%2212345", encoded}
    assert [len(one) for one in found] == sorted((len(one) for one in found), reverse=True)


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize("value", [b"", b"\n", b"a\r\nx-evil: 1", b"a\x00b", b"a\xc3\xa9", b"a" * 9000])
def test_a_value_that_could_break_a_header_is_refused_without_being_shown(tmp_path: Path, value: bytes) -> None:
    with pytest.raises(CredentialUnavailable) as caught:
        injected(store(tmp_path, value), credential())
    assert "x-evil" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(CredentialUnavailable, match="open to group or others"):
        injected(store(tmp_path, b"abc", mode), credential())


@pytest.mark.parametrize(
    "ref", ["file:../token", "file:", "file:.token", "file:missing", "file:token/token", "token", "ftp:token"]
)
def test_a_reference_that_is_no_file_of_the_store_is_refused(tmp_path: Path, ref: str) -> None:
    with pytest.raises(CredentialUnavailable):
        injected(store(tmp_path, b"abc"), credential(ref))


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_text("abc")
    target.chmod(0o600)
    (tmp_path / "token").symlink_to(target)
    with pytest.raises(CredentialUnavailable):
        injected(tmp_path, credential())


@pytest.mark.parametrize("header", ["Host", "Content-Length", "Connection", "x-saw-upstream", "X-Envoy-Foo", "a b", ""])
def test_headers_that_steer_the_proxy_are_never_set(tmp_path: Path, header: str) -> None:
    with pytest.raises(CredentialUnavailable, match="may not set"):
        injected(store(tmp_path, b"abc"), credential(header=header))


@pytest.mark.control("CRED-01")
def test_the_ref_says_which_secret_it_is_and_not_the_id(tmp_path: Path) -> None:
    put(tmp_path, "one", b"secret of one")
    put(tmp_path, "two", b"secret of two")
    put(tmp_path, "token", b"secret of the id")
    assert sent(tmp_path, credential("file:one", identifier="token")) == "Bearer secret of one"
    assert sent(tmp_path, credential("file:two", identifier="token")) == "Bearer secret of two"
    assert sent(tmp_path, credential("local:two", identifier="token")) == "Bearer secret of two"


@pytest.mark.control("CRED-01")
def test_a_ref_into_a_store_that_this_host_has_not_is_refused_and_no_file_takes_its_place(tmp_path: Path) -> None:
    put(tmp_path, "git", b"of the file")
    put(tmp_path, "token", b"of the id")
    with pytest.raises(CredentialUnavailable, match="a store that this perimeter host has not: vault"):
        injected(tmp_path, credential("vault:kv/git", identifier="token"))


@pytest.mark.control("CRED-01")
def test_each_sponsor_and_each_workspace_gets_its_own_secret_and_never_one_of_another_name(tmp_path: Path) -> None:
    put(tmp_path, "git:mia", b"of mia")
    put(tmp_path, "git:ws-1", b"of the first workspace")
    put(tmp_path, "git:..%2Fgit:mia", b"never")
    put(tmp_path, "git:a%2Fb", b"of a/b")
    put(tmp_path, "git:a", b"of a")
    assert sent(tmp_path, credential("file:git/{sponsor}")) == "Bearer of mia"
    assert sent(tmp_path, credential("file:git/{workspace}")) == "Bearer of the first workspace"
    assert sent(tmp_path, credential("file:git/{sponsor}"), sponsor="a/b") == "Bearer of a/b"
    for stranger in ("noa", "../git:mia", "mia:", "Mia", "", "x" * 300, "\ud800"):
        with pytest.raises(CredentialUnavailable):
            injected(tmp_path, credential("file:git/{sponsor}"), sponsor=stranger)


@pytest.mark.control("CRED-01")
def test_an_exchanged_value_is_sent_by_the_next_call_and_a_removed_one_by_none(tmp_path: Path) -> None:
    held = store(tmp_path, b"before")
    assert sent(held, credential()) == "Bearer before"
    put(tmp_path, "token", b"after")
    assert sent(held, credential()) == "Bearer after"
    (tmp_path / "token").unlink()
    with pytest.raises(CredentialUnavailable, match="not at hand"):
        injected(held, credential())
