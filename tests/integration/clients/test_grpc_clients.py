"""gRPC inside the sandbox: all four shapes of a call, and refusals that the client shows."""

from __future__ import annotations

import pytest
from clients_rig import Workspace

CALL = """
import queue, sys, grpc
channel = grpc.secure_channel(sys.argv[3] if len(sys.argv) > 3 else "grpc.example.com:443", grpc.ssl_channel_credentials())
shape, method = sys.argv[1], "/demo." + sys.argv[2]
try:
    if shape == "unary":
        print(channel.unary_unary(method)(b"ann", timeout=60).decode())
    elif shape == "answers":
        print(*(one.decode() for one in channel.unary_stream(method)(b"ann", timeout=60)))
    elif shape == "questions":
        print(channel.stream_unary(method)(iter([b"a", b"b"]), timeout=60).decode())
    else:
        asked = queue.Queue()
        asked.put(b"a")
        answers = channel.stream_stream(method)(iter(asked.get, None), timeout=60)
        print(next(answers).decode())
        asked.put(b"b")
        print(next(answers).decode())
        asked.put(None)
        print(list(answers))
except grpc.RpcError as error:
    sys.exit(f"{error.code().name}: {error.details()}")
"""


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize(
    ("shape", "method", "said"),
    [
        ("unary", "Hello", "hello ann\n"),
        ("answers", "Count", "ann 0 ann 1 ann 2\n"),
        ("questions", "Collect", "a+b\n"),
        ("talk", "Talk", "hello a\nhello b\n[]\n"),
    ],
)
def test_every_shape_of_a_call_is_allowed_and_refused_by_its_path(
    workspace: Workspace, shape: str, method: str, said: str
) -> None:
    done = workspace.python(CALL, shape, f"Greeter/{method}")
    assert (done.code, done.out) == (0, said), done.words
    refused = workspace.python(CALL, shape, f"Other/{method}")
    assert (refused.code, refused.err[:17]) == (1, "PERMISSION_DENIED"), refused.words
    assert '"reason": "method_or_path_not_allowed"' in refused.err
    assert '"next_steps": ["' in refused.err


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize(("shape", "method"), [("unary", "Hello"), ("talk", "Talk")])
def test_a_call_that_a_person_would_decide_on_is_refused_and_does_not_stall(
    workspace: Workspace, shape: str, method: str
) -> None:
    refused = workspace.python(CALL, shape, f"Held/{method}")
    assert (refused.code, refused.err[:17]) == (1, "PERMISSION_DENIED"), refused.words
    assert "a gRPC client cannot wait for that" in refused.err


@pytest.mark.control("RUN-01")
def test_no_body_that_must_be_read_goes_out_as_a_grpc_call(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A content type is the caller's own word: what a decision needs the body for is refused under this one."""
    url, prompt = "https://inference.local/v1/chat/completions", '{"model": "demo-1", "messages": []}'
    sent = ("curl", "-sS", "-d", prompt, url)
    # The far end is shared by all tests: it forgets this with the end of this one.
    answer = ("application/json", b'{"said": "yes"}')
    monkeypatch.setitem(workspace.far.files, ("models.example.com", "/v1/chat/completions"), answer)
    assert workspace.client(*sent, "-H", "content-type: application/json").out == '{"said": "yes"}'
    before = len(workspace.far.arrived)
    for kind in (
        "application/grpc",
        "application/grpc+proto",
        "APPLICATION/GRPC",
        "application/grpc;x=application/json",
    ):
        refused = workspace.client(*sent, "-H", f"content-type: {kind}")
        assert "said" not in refused.out, refused.words
        assert workspace.told() == ("model_not_allowed", "inference.local")
    assert len(workspace.far.arrived) == before
