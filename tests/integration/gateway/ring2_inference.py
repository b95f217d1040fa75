"""Calls of a model service at ring 2: two workspaces of one release, the service's answers, and calls in both shapes."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from ring2_policy import POLICY
from ring2_rig import Answer, Rig, wait_for

CHAT = "/v1/chat/completions"
JSON, EVENTS = (b"content-type", b"application/json"), (b"content-type", b"text/event-stream; charset=utf-8")
PLACES = (5, 6)
_numbers = count(1)


def unused(kind: str) -> str:
    """Return a name that no other test has counted against, whichever file it is in: they share one gatekeeper's books."""
    return f"{kind}-{next(_numbers)}"


def place(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "number": number, "state": "active", "sponsor": "mia@example.com", "blueprint": "coding", "ring": "stable",
        "lease_expires_at": 120, "policy_digest": None, "released_digest": None, "svid_sha256": None,
        "agent": f"agent-{number}", "delegations": [], "delegation_required": False, **fields,
    }  # fmt: skip


def release(rig: Rig, governance: str, **fields: Any) -> None:
    """Release ``governance`` to our two workspaces; ``fields`` are those of their entries that are not as :func:`place` says."""
    digest, bundle = rig.signer.release(1, policy=POLICY, governance=governance)
    rig.broker.releases[digest] = bundle
    for number in PLACES:
        rig.broker.put(f"ws-{number}", **place(number, policy_digest=digest, released_digest=digest, **fields))
    rig.settled()
    rig.paying = digest  # type: ignore[attr-defined]
    wait_for(lambda: rig.listens("10.210.6.1", 8443), "the listener")
    wait_for(lambda: governed(rig), "the release")
    rig.far.arrived.clear()


def context(rig: Rig, number: int = 5) -> ssl.SSLContext:
    return rig.svid(f"ws-{number}", digest=rig.paying)  # type: ignore[attr-defined]


def governed(rig: Rig) -> bool:
    return all(rig.call(number=number, context=context(rig, number)).status == 200 for number in PLACES)


def networks(rig: Rig) -> Iterator[None]:
    """Make the networks of our workspaces, and take them away after."""
    ip = rig.namespace.ip
    for number in PLACES:
        ip("link", "add", f"sawbr{number}", "type", "bridge")
        ip("addr", "add", f"10.210.{number}.1/30", "dev", f"sawbr{number}")
        ip("addr", "add", f"10.210.{number}.2/30", "dev", f"sawbr{number}")
        ip("link", "set", f"sawbr{number}", "up")
    yield
    for number in PLACES:
        rig.broker.put(f"ws-{number}", **place(number, state="stopped"))
    rig.settled()
    wait_for(lambda: not rig.listens("10.210.6.1", 8443), "the end of the listeners")
    for number in PLACES:
        rig.broker.workspaces.pop(f"ws-{number}")
        ip("link", "del", f"sawbr{number}")


async def _set(event: threading.Event) -> None:
    async with asyncio.timeout(60):
        while not event.is_set():  # noqa: ASYNC110 - it is set by a thread
            await asyncio.sleep(0.01)


def answering(
    rig: Rig, pieces: Sequence[bytes], *headers: tuple[bytes, bytes], status: int = 200, end: bool = True
) -> threading.Event:
    """Let the far end answer with ``pieces``; without ``end`` it then hangs until the returned event is set."""
    go_on = threading.Event()

    async def respond(_scope: Mapping[str, Any], send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if not end:
            await _set(go_on)
        await send({"type": "http.response.body", "body": b""})

    rig.far.respond = respond
    return go_on


def usage(entry: int, output: int) -> bytes:
    """Return a chat completion whose text looks like usage as well."""
    text = 'he said: "usage": {"prompt_tokens": 0, "completion_tokens": 90} \\'
    return json.dumps(
        {
            "id": "c-1",
            "choices": [
                {
                    "message": {
                        "role": "assistant",
                        "content": text,
                        "usage": {"prompt_tokens": 0, "completion_tokens": 90},
                    }
                }
            ],
            "usage": {"prompt_tokens": entry, "completion_tokens": output, "total_tokens": entry + output},
            "service_tier": "default",
        }
    ).encode()


def ask(rig: Rig, target: str = CHAT, *, model: str = "demo-1", number: int = 5, **body: Any) -> Answer:
    raw = json.dumps({"model": model, "messages": [], "max_tokens": 10, **body}).encode()
    return rig.call(
        "POST",
        target,
        host="inference.local",
        headers={"accept-encoding": "gzip", "content-type": "application/json"},
        body=raw,
        number=number,
        context=context(rig, number),
    )


def event(data: str, name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + f"data: {data}\n\n".encode()


OPENAI = [
    event('{"choices": [{"delta": {"content": "data: [DONE]"}}], "usage": null}'),
    event('{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}}'),
    event("[DONE]"),
]
ANTHROPIC = [
    event('{"type": "message_start", "message": {"usage": {"input_tokens": 5, "output_tokens": 1}}}', "message_start"),
    event('{"type": "content_block_delta", "delta": {"text": "event: message_stop"}}', "content_block_delta"),
    event('{"type": "message_delta", "delta": {}, "usage": {"output_tokens": 4}}', "message_delta"),
    event('{"type": "message_stop"}', "message_stop"),
]
RESPONSES = [
    event('{"type": "response.created", "response": {"usage": null}}', "response.created"),
    event('{"type": "response.completed", "response": {"usage": {"input_tokens": 5, "output_tokens": 4}}}', "response.completed"),
]  # fmt: skip
