"""The digest of a reviewed call: what approvers sign, and what is compared again before anything is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from saw.review.messages import ReviewedCall

_DOMAIN = b"saw-reviewed-call/1"


def request_digest(workspace_id: str, call: ReviewedCall) -> str:
    """Return the SHA-256 (lower-case hex) of ``call`` as made by ``workspace_id``.

    Hashed are, in order: the name of this form, workspace, method, scheme, host, port, path, the number of headers, each
    header's name and value in order, and the body. Each is preceded by its length in bytes (8 bytes, big-endian), so no two
    calls share an encoding. Texts count in UTF-8, numbers in decimal.
    """
    digest = hashlib.sha256()
    for part in _parts(workspace_id, call):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def _parts(workspace_id: str, call: ReviewedCall) -> Iterator[bytes]:
    yield _DOMAIN
    for text in (workspace_id, call.method, call.scheme, call.host, str(call.port), call.path, str(len(call.headers))):
        yield text.encode("utf-8", "surrogatepass")
    for name, value in call.headers:
        yield name.encode("utf-8", "surrogatepass")
        yield value.encode("utf-8", "surrogatepass")
    yield call.body
