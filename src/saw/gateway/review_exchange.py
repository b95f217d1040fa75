"""A stored call on its way: in the words of the judge, and through ring 2's Envoy, once."""

from __future__ import annotations

from pathlib import Path

import httpx

from saw.gateway.envoy_parts import LOCAL_MARK
from saw.gateway.judge import DEFAULT_PORT, Call
from saw.gateway.review_answers import safe_headers
from saw.review.messages import MAX_REVIEWED_ANSWER, ReviewedAnswer, ReviewedCall


def call_of(call: ReviewedCall, binary: str, request_id: str) -> Call:
    """Return a stored call in the words of the judge."""
    headers: dict[str, str] = {}
    for name, value in call.headers:
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    authority = call.host if call.port == DEFAULT_PORT[call.scheme] else f"{call.host}:{call.port}"
    return Call(
        listener="", peer="", scheme=call.scheme, authority=authority, port=str(call.port), method=call.method,
        target=call.path, binary=binary, ancestors=(), request_id=request_id, headers=headers, body=call.body,
        body_complete=True,
    )  # fmt: skip


async def exchange(
    socket: Path, call: ReviewedCall, headers: list[tuple[str, str]], *, most: int = MAX_REVIEWED_ANSWER
) -> tuple[ReviewedAnswer, str | None]:
    """Send a call to the Unix socket once; return the answer, ``most`` bytes of it, and Envoy's flags when Envoy answered itself.

    The target, the headers and the body go as they are; nothing is followed, unpacked or tried again. Raises
    ``httpx.HTTPError`` and ``OSError``.
    """
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    request = httpx.Request(
        call.method,
        httpx.URL(scheme="http", host="ring2", path="/"),
        headers=encoded,
        content=call.body,
        extensions={"target": call.path.encode("latin-1"), "timeout": httpx.Timeout(None, connect=5.0).as_dict()},
    )
    async with httpx.AsyncHTTPTransport(uds=str(socket), retries=0) as transport:
        response = await transport.handle_async_request(request)
        response.request = request
        try:
            body, truncated = bytearray(), False
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > most:
                    truncated = True
                    break
        finally:
            await response.aclose()
    fields = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in response.headers.raw]
    mark = response.headers.get(LOCAL_MARK)
    answer = ReviewedAnswer(
        status=response.status_code,
        headers=safe_headers(fields),
        body=bytes(body[:most]),
        truncated=truncated,
    )
    return answer, mark
