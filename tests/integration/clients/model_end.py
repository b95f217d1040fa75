"""A model service that says what a test wrote down, in the two shapes that agents speak: OpenAI's chat and Anthropic's messages.

On the first question it asks for one tool, on the next one it says goodbye; :attr:`Model.results` is what the tool answered.
"""

from __future__ import annotations

import json
from typing import Any

from clients_far_ends import Answer

GOODBYE = "goodbye from the model"


class Model:
    """Both shapes, streamed as server-sent events. ``tools`` maps a path to the tool to ask for and its arguments."""

    def __init__(self, tools: dict[str, tuple[str, dict[str, Any]]]) -> None:
        self.tools = tools
        self.results: list[str] = []

    async def __call__(self, scope: Any, body: bytes) -> Answer:
        """Answer one question."""
        path = scope["raw_path"].decode()
        if path not in self.tools:
            return 404, "application/json", b"{}"
        asked = json.loads(body)
        found = _results(asked["messages"])
        self.results += found
        name, arguments = self.tools[path]
        if path.endswith("/messages"):
            return 200, "text/event-stream", _messages(asked["model"], None if found else (name, json.dumps(arguments)))
        return 200, "text/event-stream", _chat(asked["model"], None if found else (name, json.dumps(arguments)))


def _results(messages: list[dict[str, Any]]) -> list[str]:
    said: list[str] = []
    for message in messages:
        parts = message["content"] if isinstance(message["content"], list) else []
        if message["role"] == "tool":
            said.append(json.dumps(message["content"]))
        said += [json.dumps(part) for part in parts if part["type"] == "tool_result"]
    return said


def _chat(model: str, call: tuple[str, str] | None) -> bytes:
    delta: dict[str, Any] = {"role": "assistant", "content": None if call else GOODBYE}
    if call:
        function = {"name": call[0], "arguments": call[1]}
        delta["tool_calls"] = [{"index": 0, "id": "call_1", "type": "function", "function": function}]
    pieces: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls" if call else "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}},
    ]
    head = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": model}
    return (
        b"".join(b"data: " + json.dumps({**head, **piece}).encode() + b"\n\n" for piece in pieces) + b"data: [DONE]\n\n"
    )


def _messages(model: str, call: tuple[str, str] | None) -> bytes:
    usage = {"input_tokens": 1, "output_tokens": 1}
    message = {"id": "m1", "type": "message", "role": "assistant", "model": model, "content": [], "usage": usage,
               "stop_reason": None, "stop_sequence": None}  # fmt: skip
    if call:
        block: dict[str, Any] = {"type": "tool_use", "id": "toolu_1", "name": call[0], "input": {}}
        delta = {"type": "input_json_delta", "partial_json": call[1]}
    else:
        block, delta = {"type": "text", "text": ""}, {"type": "text_delta", "text": GOODBYE}
    stop = {"stop_reason": "tool_use" if call else "end_turn", "stop_sequence": None}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": block},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": stop, "usage": {"output_tokens": 1}},
        {"type": "message_stop"},
    ]
    return b"".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events)
