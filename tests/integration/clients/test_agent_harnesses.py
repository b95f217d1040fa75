"""Two agents from npm inside the sandbox, with a model service behind ``inference.local`` that says what is written here."""

from __future__ import annotations

import json

import pytest
from clients_rig import HOME, NEWER_NODE, NPM, Done, Workspace
from model_end import GOODBYE, Model
from test_node_clients import NEWER, need

PACKAGES = "/run/clients/node_modules"
COMMAND = {"command": "curl -sS https://api.example.com/v2/payroll"}
PROVIDER = {"baseUrl": "https://inference.local", "api": "anthropic-messages", "apiKey": "none"}


def qwen(workspace: Workspace, model: str) -> Done:
    """Run Qwen Code, which speaks OpenAI's chat."""
    told = {"OPENAI_BASE_URL": "https://inference.local/v1", "OPENAI_API_KEY": "none", "OPENAI_MODEL": model}
    program = f"{PACKAGES}/@qwen-code/qwen-code/cli.js"
    return workspace.client(NEWER, program, "--yolo", "-p", "what may I do", variables=told, timeout=240)


def pi(workspace: Workspace, model: str) -> Done:
    """Run pi, which speaks Anthropic's messages."""
    providers = {"providers": {"ours": {**PROVIDER, "models": [{"id": model}]}}}
    workspace.put(f"{HOME}/.pi/agent/models.json", json.dumps(providers).encode())
    program = f"{PACKAGES}/@mariozechner/pi-coding-agent/dist/cli.js"
    return workspace.client(NEWER, program, "--provider", "ours", "--model", model, "-p", "what may I do", timeout=240)


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize(
    ("agent", "path", "tool"),
    [(qwen, "/v1/chat/completions", "run_shell_command"), (pi, "/v1/messages", "bash")],
    ids=["qwen", "pi"],
)
def test_an_agent_works_with_the_models_of_the_policy_and_reads_why_its_command_is_refused(
    workspace: Workspace, agent, path: str, tool: str
) -> None:
    need(NEWER_NODE, NPM)
    model = Model(
        {path: (tool, {**COMMAND, "description": "try", "is_background": False} if agent is qwen else COMMAND)}
    )
    workspace.far.handlers["models.example.com"] = model
    done = agent(workspace, "demo-1")
    assert (done.code, GOODBYE in done.out) == (0, True), done.words
    assert len(model.results) == 1
    assert "method_or_path_not_allowed" in model.results[0]
    assert "next_steps" in model.results[0]
    other = agent(workspace, "other-1")
    assert "policy_denied" in other.words, other.words
    # Agents call home as well, at any time; that is refused beside this.
    assert ("model_not_allowed", "inference.local") in workspace.recent()
