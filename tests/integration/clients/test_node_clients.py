"""Node.js inside the sandbox: its own fetch, https and WebSocket where it knows proxies, and axios in every version."""

from __future__ import annotations

import json
from typing import Any

import pytest
from clients_rig import NEWER_NODE, NPM, Workspace

NEWER = "/run/clients/node/bin/node"
CALLS = {
    "fetch": "fetch(process.argv[1]).then(async r => console.log(r.status, await r.text()))",
    "https": "require('https').get(process.argv[1], r => { let b = ''; r.on('data', d => b += d); "
             "r.on('end', () => console.log(r.statusCode, b)) })",
    "axios": "require('/run/clients/node_modules/axios').get(process.argv[1], {validateStatus: null})"
             ".then(r => console.log(r.status, JSON.stringify(r.data)))",
}  # fmt: skip
STREAM = """
const stream = new WebSocket(process.argv[1])
stream.onopen = () => stream.send('hi')
stream.onmessage = message => { console.log(message.data); stream.close() }
stream.onerror = error => console.log('refused', error.message)
"""


def need(*folders: Any) -> None:
    """Skip where npm's packages of the tests are not there."""
    if not all(folder.is_dir() for folder in folders):
        pytest.skip("scripts/bootstrap.sh installs these clients from npm")


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize(("node", "name"), [(NEWER, "fetch"), (NEWER, "https"), (NEWER, "axios"), ("node", "axios")])
def test_a_call_is_allowed_or_refused_with_a_body_to_act_on(workspace: Workspace, node: str, name: str) -> None:
    need(*([NEWER_NODE] if node == NEWER else []), *([NPM] if name == "axios" else []))
    done = workspace.client(node, "-e", CALLS[name], "https://api.example.com/v1/things")
    assert (done.code, done.out.split()[0]) == (0, "200"), done.words
    assert json.loads(done.out[4:])["path"] == "/v1/things"
    refused = workspace.client(node, "-e", CALLS[name], "https://api.example.com/v2/things")
    assert refused.out.split()[0] == "403", refused.words
    body = json.loads(refused.out[4:])
    assert (body["reason"], bool(body["next_steps"])) == ("method_or_path_not_allowed", True)
    workspace.client(node, "-e", CALLS[name], "https://hidden.example.com/")
    assert workspace.told() == ("host_not_allowed", "hidden.example.com")


@pytest.mark.control("RUN-01")
def test_nodes_own_websocket_is_opened_or_refused(workspace: Workspace) -> None:
    need(NEWER_NODE)
    done = workspace.client(NEWER, "-e", STREAM, "wss://chat.example.com/rooms/1")
    assert (done.code, done.out) == (0, "you said hi\n"), done.words
    refused = workspace.client(NEWER, "-e", STREAM, "wss://chat.example.com/elsewhere")
    assert refused.out.startswith("refused"), refused.words
    assert workspace.told() == ("method_or_path_not_allowed", "chat.example.com")


GRPC = """
const grpc = require('/run/clients/node_modules/@grpc/grpc-js')
const client = new grpc.Client('grpc.example.com:443', grpc.credentials.createSsl())
client.makeUnaryRequest(process.argv[1], said => said, said => said, Buffer.from('ann'), (error, answer) => {
  console.log(error ? `refused ${error.code} ${error.details}` : answer.toString())
  client.close()
})
"""


@pytest.mark.control("RUN-01")
def test_a_grpc_call_is_allowed_or_refused(workspace: Workspace) -> None:
    need(NPM)
    done = workspace.client("node", "-e", GRPC, "/demo.Greeter/Hello")
    assert (done.code, done.out) == (0, "hello ann\n"), done.words
    refused = workspace.client("node", "-e", GRPC, "/demo.Other/Hello")
    assert refused.out.startswith("refused 7 "), refused.words
    assert workspace.told() == ("method_or_path_not_allowed", "grpc.example.com")
