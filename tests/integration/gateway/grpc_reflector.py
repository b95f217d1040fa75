"""A gRPC service over TLS that gives back the credential it was sent, in every way there is: ``ADDRESS CERTIFICATE KEY``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc


def given(context: grpc.ServicerContext) -> str:
    """Return the credential that came with the call."""
    return str(dict(context.invocation_metadata()).get("x-api-key", ""))


def hello(request: bytes, _: object) -> bytes:
    """Answer one message with one."""
    return b"hello " + request


def trailers(_: bytes, context: grpc.ServicerContext) -> bytes:
    """Refuse after the answer has begun, so that the reason travels in trailers."""
    context.send_initial_metadata((("x-begun", "yes"),))
    context.abort(grpc.StatusCode.UNAUTHENTICATED, f"invalid token {given(context)}")
    return b""


def refused(_: bytes, context: grpc.ServicerContext) -> bytes:
    """Refuse at once."""
    context.abort(grpc.StatusCode.UNAUTHENTICATED, f"invalid token {given(context)}")
    return b""


def message(_: bytes, context: grpc.ServicerContext) -> bytes:
    """Answer with the credential."""
    return f"you sent {given(context)}".encode()


def talk(requests: Iterator[bytes], _: object) -> Iterator[bytes]:
    """Answer each message when it comes."""
    for request in requests:
        yield b"hello " + request


def main(address: str, certificate: str, key: str) -> None:
    """Serve until killed."""
    server = grpc.server(ThreadPoolExecutor(16))
    one = {"Hello": hello, "Trailers": trailers, "Refused": refused, "Message": message}
    handlers = {name: grpc.unary_unary_rpc_method_handler(answer) for name, answer in one.items()}
    handlers["Talk"] = grpc.stream_stream_rpc_method_handler(talk)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("demo.Echo", handlers),))
    pair = (Path(key).read_bytes(), Path(certificate).read_bytes())
    server.add_secure_port(address, grpc.ssl_server_credentials((pair,)))
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main(*sys.argv[1:])
