"""Python's clients and curl inside the sandbox: allowed without being taught about us, refused with what to do."""

from __future__ import annotations

import pytest
from clients_rig import Workspace

CLIENTS = {
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
r = requests.get(sys.argv[1], timeout=60)
print(r.status_code, r.text)
""",
    "httpx": """
import sys, httpx
r = httpx.get(sys.argv[1], timeout=60)
print(r.status_code, r.text)
""",
    "aiohttp": """
import asyncio, sys, aiohttp
async def main():
    async with aiohttp.ClientSession(trust_env=True) as session, session.get(sys.argv[1]) as answer:
        print(answer.status, await answer.text())
asyncio.run(main())
""",
}


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize("name", sorted(CLIENTS))
def test_a_python_client_is_allowed_and_refused(workspace: Workspace, name: str) -> None:
    done = workspace.python(CLIENTS[name], "https://api.example.com/v1/things")
    assert (done.code, done.out.split()[0]) == (0, "200"), done.words
    assert '"path": "/v1/things"' in done.out
    refused = workspace.python(CLIENTS[name], "https://api.example.com/v2/things")
    assert refused.out.split()[0] == "403", refused.words
    assert "method_or_path_not_allowed" in refused.out
    assert "next_steps" in refused.out
    start = len(workspace.log("decide"))
    hidden = workspace.python(CLIENTS[name], "https://hidden.example.com/")
    assert hidden.code != 0
    assert "403" in hidden.words, hidden.words
    assert [line["reason"] for line in workspace.refusals(start)] == ["host_not_allowed"]
