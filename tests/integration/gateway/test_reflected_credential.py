"""A service that sends the injected credential back: the workspace gets stars in its place, and everything else as it was."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from ring2_rig import SECRET, Answer, Rig

VALUE = SECRET["api-token"]
STARS = "*" * len(VALUE)


def answering(rig: Rig, pieces: Sequence[bytes], *headers: tuple[bytes, bytes]) -> None:
    """Let the far end answer with ``pieces``, each sent by itself."""

    async def respond(_scope: Mapping[str, Any], send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(headers)})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    rig.far.respond = respond


@pytest.fixture(autouse=True)
def _as_before(rig: Rig) -> Iterator[None]:
    yield
    rig.far.respond = None


def asked(rig: Rig, pieces: Sequence[bytes], *headers: tuple[bytes, bytes], **options: Any) -> Answer:
    answering(rig, pieces, *headers)
    answer = rig.call(**options)
    assert answer.status == 200
    return answer


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize(
    "pieces",
    [
        [f"you sent {VALUE}, and {VALUE}".encode()],
        [bytes([byte]) for byte in f"you sent {VALUE}, and {VALUE}".encode()],
        [f"you sent {VALUE[:5]}".encode(), f"{VALUE[5:]}, and {VALUE}".encode()],
    ],
    ids=["at once", "byte by byte", "cut in the middle"],
)
def test_the_value_never_comes_back_however_it_is_cut(rig: Rig, pieces: list[bytes]) -> None:
    assert asked(rig, pieces).body == f"you sent {STARS}, and {STARS}".encode()
    assert dict(rig.far.arrived[-1]["headers"])["x-api-key"] == VALUE


@pytest.mark.control("CRED-01")
def test_what_only_looks_like_the_value_arrives_as_it_was(rig: Rig) -> None:
    for text in (f"ends like it: {VALUE[:-1]}", VALUE[:3], f"{VALUE[:6]}{VALUE[:6]}", "", "nothing of it"):
        assert asked(rig, [text.encode()]).body == text.encode()
        length = (b"content-length", str(len(text)).encode())
        assert asked(rig, [text.encode()], length).body == text.encode()


@pytest.mark.control("CRED-01")
def test_headers_are_looked_at_like_the_body_and_long_answers_like_short_ones(rig: Rig) -> None:
    filling = b"x" * 1_500_000
    body = [filling, VALUE.encode(), filling]
    length = (b"content-length", str(len(VALUE) + 2 * len(filling)).encode())
    cookies = [(b"set-cookie", b"a=1"), (b"set-cookie", f"b={VALUE}; secure".encode()), (b"x-echo", VALUE.encode())]
    answer = asked(rig, body, length, *cookies)
    assert answer.body == filling + STARS.encode() + filling
    assert answer.headers["x-echo"] == STARS
    assert VALUE not in str(answer.headers) and STARS in str(answer.headers["set-cookie"])


@pytest.mark.control("CRED-01")
def test_encoded_forms_are_known_and_nothing_is_compressed(rig: Rig) -> None:
    token = base64.b64encode(f"x-access-token:{SECRET['git-token']}".encode())
    service = {"target": "/team/app.git/info/refs", "host": "git.example.com", "binary": "/usr/bin/git"}
    encodings = (("accept-encoding", "gzip, br"), ("grpc-accept-encoding", "gzip"))
    answer = asked(rig, [b"Basic ", token, b" ", SECRET["git-token"].encode()], headers=dict(encodings), **service)
    assert answer.body == b"Basic " + b"*" * len(token) + b" " + b"*" * len(SECRET["git-token"])
    sent = dict(rig.far.arrived[-1]["headers"])
    assert {name for name, _ in encodings} & set(sent) == set()
    assert [name for name in sent if name.startswith("x-saw-")] == []


@pytest.mark.control("CRED-01")
def test_a_call_without_a_credential_is_left_alone(rig: Rig) -> None:
    text = f"a text that happens to hold {VALUE}".encode()
    headers = {"x-saw-scheme": "http", "x-saw-port": "8080", "accept-encoding": "gzip", "x-saw-redact": "happens"}
    answer = asked(rig, [text], target="/plain/a", headers=headers)
    assert answer.body == text
    assert dict(rig.far.arrived[-1]["headers"])["accept-encoding"] == "gzip"
