"""Between Starlette and the broker's parts: bounded bodies, strict JSON, callers, and errors that name their cure."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Container
from typing import Any, Generic, TypeVar

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from saw import jsontext
from saw.broker.context import Caller, new_request_id
from saw.broker.errors import BrokerError, MalformedError, NotAttestedError, StorageFull, TooLargeError
from saw.errors import SawError
from saw.files import storage_error

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]
Identify = Callable[[Request], Caller]

DEFAULT_LIMIT = 64 * 1024
LONGEST_WAIT_S = 30

logger = logging.getLogger("saw.broker")


def answer(value: object, status: int = 200) -> Response:
    """Return ``value`` as JSON."""
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


def refusal(error: SawError, request_id: str = "") -> Response:
    """Return the body ``{error, code, message, cure, details, request_id}`` (and ``failures`` for an attestation)."""
    status = error.status if isinstance(error, BrokerError) else 400
    body: dict[str, Any] = {"error": error.code, **error.as_dict(), "request_id": request_id}
    if isinstance(error, NotAttestedError):
        body["failures"] = error.failures
    return answer(body, status)


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body; raise :class:`TooLargeError` as soon as it exceeds ``limit`` bytes."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise TooLargeError(f"the body exceeds {limit} bytes", cure="send less")
        chunks.append(chunk)
    return b"".join(chunks)


def decode(raw: bytes, kind: type[T]) -> T:
    """Parse ``raw`` strictly; raise :class:`MalformedError` naming the field."""
    try:
        return jsontext.decode(raw, kind=kind)
    except msgspec.DecodeError as error:
        raise MalformedError(f"the body is not valid: {error}", cure="correct the named field") from error


def filters_of(query: QueryParams, kind: type[T], repeated: Container[str], cure: str) -> T:
    """Return the filters in a query as ``kind``, in which those named in ``repeated`` are lists and all else has one value.

    Raises :class:`MalformedError` for an unknown name, a second value of one that takes one, or a value that does not fit.
    """
    given: dict[str, object] = {}
    for name in query:
        values = query.getlist(name)
        if name not in repeated and len(values) > 1:
            raise MalformedError(f"{name} is given twice", cure="give it once")
        given[name] = values if name in repeated else values[0]
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise MalformedError(f"the filter is not valid: {error}", cure=cure) from error


def whole_number(request: Request, name: str, default: int, largest: int) -> int:
    """Return query parameter ``name``, capped at ``largest``; raise :class:`MalformedError` unless it is a whole number."""
    text = request.query_params.get(name, str(default))
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise MalformedError(f"{name} must be a whole number", cure=f"use {name}={default}")
    return min(int(text), largest)


def guarded(identify: Identify, handle: Callable[[Request, Caller], Awaitable[Any]]) -> Endpoint:
    """Return an endpoint: identify the caller first, then handle, then answer; every error becomes a refusal."""

    async def endpoint(request: Request) -> Response:
        request_id = new_request_id()
        request.state.request_id = request_id
        try:
            found = await handle(request, identify(request))
            response = found if isinstance(found, Response) else answer(found)
        except SawError as error:
            response = refusal(error, request_id)
        except ClientDisconnect:
            return Response(status_code=400)
        except OSError as error:
            full = storage_error(error)
            if full is None:
                response = _failed(request_id)
            else:
                logger.error("request %s: %s", request_id, full)  # noqa: TRY400 - names places; callers get none
                response = refusal(StorageFull(), request_id)
        except Exception:  # noqa: BLE001 - a fault of ours is logged, and told without its text
            response = _failed(request_id)
        response.headers["x-request-id"] = request_id
        return response

    return endpoint


def _failed(request_id: str) -> Response:
    logger.exception("request %s failed", request_id)
    text = "the broker failed to handle the call"
    return refusal(_Internal(text, cure="see the broker's log for the request id"), request_id)


class BodyHandler(Generic[T]):
    """A handler that parses the body as ``body``, a type, and runs the blocking ``call`` in a thread."""

    def __init__(self, body: type[T], call: Callable[[Caller, T, Request], Any], limit: int) -> None:
        self.body = body
        self._call = call
        self._limit = limit

    async def __call__(self, request: Request, caller: Caller) -> Any:
        """Answer one request."""
        body = decode(await read_body(request, self._limit), self.body)
        return await run_in_threadpool(self._call, caller, body, request)


def with_body(
    kind: type[T], call: Callable[[Caller, T, Request], Any], *, limit: int = DEFAULT_LIMIT
) -> BodyHandler[T]:
    """Return a handler that parses the body as ``kind`` and runs the blocking ``call`` in a thread."""
    return BodyHandler(kind, call, limit)


def without_body(call: Callable[[Caller, Request], Any]) -> Callable[[Request, Caller], Awaitable[Any]]:
    """Return a handler that runs the blocking ``call`` in a thread."""

    async def handle(request: Request, caller: Caller) -> Any:
        return await run_in_threadpool(call, caller, request)

    return handle


class _Internal(BrokerError):
    code = "internal"
    status = 500
