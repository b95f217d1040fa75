"""Python's clients inside the sandbox: allowed without being taught about us, refused with what to do."""

from __future__ import annotations

import json

import pytest
from clients_rig import Workspace

CALLS = {
    "urllib": """
import sys, urllib.request, urllib.error
try:
    print(200, urllib.request.urlopen(sys.argv[1], timeout=60).read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
except OSError as error:
    sys.exit(str(error))
""",
    "requests": """
import sys, requests
answer = requests.get(sys.argv[1], timeout=60)
print(answer.status_code, answer.text)
""",
    "httpx": """
import sys, httpx
answer = httpx.get(sys.argv[1], timeout=60)
print(answer.status_code, answer.text)
""",
    "aiohttp": """
import asyncio, sys, aiohttp
async def main():
    async with aiohttp.ClientSession(trust_env=True) as session, session.get(sys.argv[1]) as answer:
        print(answer.status, await answer.text())
asyncio.run(main())
""",
}
STREAMS = {
    "websockets": """
import sys
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
try:
    with connect(sys.argv[1], open_timeout=60, close_timeout=60) as stream:
        stream.send(b"raw" if "binary" in sys.argv else "hi")
        print(stream.recv(timeout=60))
except InvalidStatus as error:
    print(error.response.status_code, error.response.body.decode())
""",
    "aiohttp": """
import asyncio, sys, aiohttp
async def main():
    async with aiohttp.ClientSession(trust_env=True) as session, session.ws_connect(sys.argv[1]) as stream:
        await (stream.send_bytes(b"raw") if "binary" in sys.argv else stream.send_str("hi"))
        print((await stream.receive()).data)
asyncio.run(main())
""",
}


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_call_is_allowed_or_refused_with_a_body_to_act_on(workspace: Workspace, name: str) -> None:
    done = workspace.python(CALLS[name], "https://api.example.com/v1/things")
    assert (done.code, done.out.split()[0]) == (0, "200"), done.words
    assert json.loads(done.out[4:])["path"] == "/v1/things"
    refused = workspace.python(CALLS[name], "https://api.example.com/v2/things")
    assert refused.out.split()[0] == "403", refused.words
    body = json.loads(refused.out[4:])
    assert (body["reason"], body["path"]) == ("method_or_path_not_allowed", "/v2/things")
    assert body["next_steps"]
    hidden = workspace.python(CALLS[name], "https://hidden.example.com/")
    assert hidden.code != 0
    assert "403" in hidden.words, hidden.words
    assert workspace.told() == ("host_not_allowed", "hidden.example.com")


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize("name", sorted(STREAMS))
def test_a_websocket_is_opened_and_held_to_what_may_be_sent(workspace: Workspace, name: str) -> None:
    done = workspace.python(STREAMS[name], "wss://chat.example.com/rooms/1")
    assert (done.code, done.out) == (0, "you said hi\n"), done.words
    binary = workspace.python(STREAMS[name], "wss://chat.example.com/rooms/1", "binary")
    assert "1008" in binary.words, binary.words
    refused = workspace.python(STREAMS[name], "wss://chat.example.com/elsewhere")
    assert "403" in refused.words, refused.words
    assert workspace.told() == ("method_or_path_not_allowed", "chat.example.com")
