"""A gRPC service over TLS, without generated code: ``ADDRESS CERTIFICATE KEY``. It greets in all four shapes of a call."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc


def hello(request: bytes, _: object) -> bytes:
    """Answer one message with one."""
    return b"hello " + request


def count(request: bytes, _: object) -> Iterator[bytes]:
    """Answer one message with many."""
    for number in range(3):
        yield request + b" " + str(number).encode()


def collect(requests: Iterator[bytes], _: object) -> bytes:
    """Answer many messages with one."""
    return b"+".join(requests)


def talk(requests: Iterator[bytes], _: object) -> Iterator[bytes]:
    """Answer each message when it comes."""
    for request in requests:
        yield b"hello " + request


def main(address: str, certificate: str, key: str) -> None:
    """Serve until killed."""
    server = grpc.server(ThreadPoolExecutor(8))
    handlers = {
        "Hello": grpc.unary_unary_rpc_method_handler(hello), "Count": grpc.unary_stream_rpc_method_handler(count),
        "Collect": grpc.stream_unary_rpc_method_handler(collect), "Talk": grpc.stream_stream_rpc_method_handler(talk),
    }  # fmt: skip
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("demo.Greeter", handlers),))
    pair = (Path(key).read_bytes(), Path(certificate).read_bytes())
    server.add_secure_port(address, grpc.ssl_server_credentials((pair,)))
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main(*sys.argv[1:])
