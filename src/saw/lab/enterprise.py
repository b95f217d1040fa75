"""The far end of the demonstration: a ticket API and a model endpoint, as an enterprise would run them.

They stand outside the governed world, so they are simple; what counts is what arrives at them. nginx in front ends TLS,
serves git through git-http-backend and records every request with its credential. Run as
``uvicorn saw.lab.enterprise:app --uds /run/saw-enterprise/app.sock``.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


async def items(_: Request) -> JSONResponse:
    """The ticket list."""
    return JSONResponse({"items": [{"id": 1, "title": "Printer on fire"}]})


async def notes(request: Request) -> JSONResponse:
    """Take a note."""
    return JSONResponse({"stored": len(await request.body())}, status_code=201)


async def admin(_: Request) -> JSONResponse:
    """Something that an agent must never reach."""
    return JSONResponse({"users": ["root"]})


async def completions(request: Request) -> JSONResponse:
    """A chat completion in the shape of the common API, with token usage."""
    body = await request.json()
    return JSONResponse(
        {
            "id": "cmpl-1",
            "object": "chat.completion",
            "model": body.get("model"),
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5},
        }
    )


app = Starlette(
    routes=[
        Route("/v1/items", items, methods=["GET", "DELETE"]),
        Route("/v1/notes", notes, methods=["POST"]),
        Route("/v1/admin/users", admin),
        Route("/v1/chat/completions", completions, methods=["POST"]),
    ]
)
