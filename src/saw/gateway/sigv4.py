"""Signatures of calls (AWS Signature Version 4): what goes out is signed as it goes out, with keys that stay here.

https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html. Signed are method, path, query, host,
all ``x-amz-`` headers, and the SHA-256 of the body. What cannot be signed in that way is refused: a body that was not seen whole,
a body that brings signatures of its own, and a query that services read in different ways.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import re
import sys
from collections.abc import Mapping
from urllib.parse import quote, unquote_to_bytes

import msgspec

from saw.gateway.errors import CallUnsignable, CredentialUnavailable
from saw.policy.providers import SigV4

HEADERS = ("authorization", "x-amz-content-sha256", "x-amz-date", "x-amz-security-token")
"""What a signature may set; where it does not, a client's own is removed."""
_OWN_PATH = frozenset({"s3", "s3-outposts", "s3-object-lambda"})
"""Services whose paths are signed as they are; for all others they are encoded once more."""
_KEYS = re.compile(r"([A-Za-z0-9_]{1,128}):([!-9;-~]{1,256})(?::([!-9;-~]{1,8000}))?\Z")
_SIGNED_IN_QUERY = re.compile(
    rb"x-amz-(?:algorithm|credential|date|expires|security-token|signature|signedheaders)", re.IGNORECASE
)
_UNRESERVED = "-_.~"


class Outgoing(msgspec.Struct, frozen=True):
    """A call as it will reach its service. ``target`` is path and query; ``headers`` are those of the client that go on."""

    method: str
    scheme: str
    authority: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    body_complete: bool


class Signed(msgspec.Struct, frozen=True):
    """The headers of a signature, and what of them and of the keys must not come back."""

    headers: tuple[tuple[str, str], ...]
    secrets: tuple[str, ...]


async def sign(identifier: str, wanted: SigV4, value: str, outgoing: Outgoing | None) -> Signed:
    """Return the signature of ``outgoing`` with the keys in ``value``.

    Raises :class:`CredentialUnavailable` when there are no such keys, :class:`CallUnsignable` for a call that cannot be signed.
    """
    keys = _KEYS.match(value)
    if keys is None:
        raise CredentialUnavailable(
            f"the value of credential {identifier} is no pair of keys", cure="store ACCESS_KEY_ID:SECRET_ACCESS_KEY"
        )
    if outgoing is None:
        raise _unsignable(identifier, "there is none", "nothing to do")
    if not outgoing.body_complete:
        raise _unsignable(identifier, "the body is longer than what is seen before it is decided", "send at most 1 MiB")
    url = f"{outgoing.scheme}://{outgoing.authority}{_path(wanted, outgoing)}{_query(identifier, outgoing)}"
    headers = _headers(identifier, outgoing)
    if "botocore.auth" not in sys.modules:
        # It takes a second to load, once.
        await asyncio.to_thread(importlib.import_module, "botocore.auth")
    from botocore.auth import S3SigV4Auth, SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import ReadOnlyCredentials

    request = AWSRequest(outgoing.method, url, headers=headers, data=outgoing.body)
    request.headers["X-Amz-Content-SHA256"] = hashlib.sha256(outgoing.body).hexdigest()
    kind = S3SigV4Auth if wanted.service in _OWN_PATH else SigV4Auth
    kind(ReadOnlyCredentials(keys[1], keys[2], keys[3]), wanted.service, wanted.region).add_auth(request)
    found = tuple((name, str(request.headers[name])) for name in HEADERS if name in request.headers)
    signature = dict(found)["authorization"]
    return Signed(found, tuple(filter(None, (keys[2], keys[3], signature, signature.rpartition("Signature=")[2]))))


def _path(wanted: SigV4, outgoing: Outgoing) -> str:
    path = outgoing.target.partition("?")[0]
    if wanted.service in _OWN_PATH:
        # The service decodes it and encodes it by the rules of signatures.
        return quote(unquote_to_bytes(path), safe=f"/{_UNRESERVED}")
    return path


def _query(identifier: str, outgoing: Outgoing) -> str:
    """Return the query as a service reads it, each name and value encoded by the rules of signatures."""
    _, mark, query = outgoing.target.partition("?")
    if not mark or not query:
        return ""
    if "+" in query:
        raise _unsignable(identifier, "a plus sign in the query is a space to some services", "write %20 or %2B")
    parts: list[str] = []
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        raw = unquote_to_bytes(name)
        if _SIGNED_IN_QUERY.fullmatch(raw):
            raise _unsignable(identifier, "the query brings a signature of its own", "leave it out")
        parts.append(f"{quote(raw, safe=_UNRESERVED)}={quote(unquote_to_bytes(value), safe=_UNRESERVED)}")
    return "?" + "&".join(parts)


def _headers(identifier: str, outgoing: Outgoing) -> dict[str, str]:
    """Return the client's headers that are signed: those of the service."""
    told = outgoing.headers
    streamed = told.get("x-amz-content-sha256", "").upper().startswith("STREAMING-")
    if streamed or "x-amz-trailer" in told or "aws-chunked" in told.get("content-encoding", "").lower():
        raise _unsignable(
            identifier, "the body is streamed with signatures or checksums of its own", "send it as it is"
        )
    return {name: value for name, value in told.items() if name.startswith("x-amz-") and name not in HEADERS}


def _unsignable(identifier: str, why: str, cure: str) -> CallUnsignable:
    return CallUnsignable(f"the call cannot be signed with credential {identifier}: {why}", cure=cure)
