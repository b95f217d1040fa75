"""Writers that load a broker until it is gone: they register and retire workspaces, open reviews, decide and cancel."""

from __future__ import annotations

import hashlib
import random
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
from broker_rig import NAME, Lab
from ledger import Ledger
from world import EDGE, GROUP, POLICY, REVIEWER, token

from saw.broker.client import BrokerContext, BrokerRefusal, Context, OperatorClient
from saw.errors import UnavailableError
from saw.policy.keys import load_private_key
from saw.review.decide import decide, look
from saw.review.digest import request_digest
from saw.review.messages import OpenReview, ReviewedCall

TOO_LATE = frozenset({"review_not_open", "bytes_removed", "rendering_differs"})
"""What somebody is told rightly who decides on, or cancels, a review that meanwhile went on."""


def wanted(workspace: str, word: str) -> OpenReview:
    """Return the call of a workspace that nobody else makes, as its perimeter asks for a review of it."""
    call = ReviewedCall(
        method="POST", scheme="https", host="api.example.com", port=443, path="/v1/pay",
        headers=(("content-type", "text/plain"),), body=word.encode(),
    )  # fmt: skip
    return OpenReview(
        workspace_id=workspace, call=call, policy_digest=POLICY, group=GROUP, quorum=1, expires_in_s=7 * 86400
    )


class Perimeter:
    """Calls of the perimeter with a connection of its own."""

    def __init__(self, lab: Lab) -> None:
        edge = lab.directory / EDGE
        context = ssl.create_default_context(cafile=str(lab.ca_file))
        context.load_cert_chain(str(edge / "cert.pem"), str(edge / "key.pem"))
        self.http = httpx.Client(
            verify=context, timeout=60, trust_env=False, base_url=f"https://127.0.0.1:{lab.config.listen.port}"
        )

    def ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Return the answer; raises as the operator's client does."""
        try:
            content = None if body is None else msgspec.json.encode(body)
            answer = self.http.request(
                method,
                path,
                content=content,
                headers={"content-type": "application/json"},
                extensions={"sni_hostname": NAME},
            )
        except httpx.HTTPError as error:
            raise UnavailableError(str(error), cure="") from error
        if answer.is_error:
            raise BrokerRefusal(answer.status_code, answer.json())
        return dict(answer.json())


class Writer:
    """One writer; ``seed`` chooses what it does."""

    def __init__(self, lab: Lab, ledger: Ledger, workspaces: int, seed: int) -> None:
        self._lab = lab
        self._ledger = ledger
        self._workspaces = workspaces
        self._chance = random.Random(seed)  # noqa: S311 - chooses work, keeps no secret
        self._key = load_private_key(Path(lab.directory) / "ben.key")
        self._client = OperatorClient(Context(BrokerContext(socket=lab.config.operator_socket)))
        self._edge: Perimeter | None = None

    def until_it_is_gone(self) -> None:
        """Write until the broker does not answer any more."""
        try:
            with self._client.session():
                while True:
                    self._choose()()
        except UnavailableError:
            return
        finally:
            if self._edge is not None:
                self._edge.http.close()

    def _choose(self) -> Callable[[], None]:
        if len(self._ledger.to_decide) > 24:
            return self._decide
        return self._chance.choice((self._register, self._open, self._decide, self._open, self._decide))

    def _register(self) -> None:
        name = f"soak-{token()}"
        body = {"id": name, "sponsor": "ada@example.com", "blueprint": "coding", "ring": "stable", "image": "workspace"}
        self._ledger.will("workspace", name)
        self._ledger.will("gone", name)
        try:
            self._client.request("POST", "/v1/workspaces", body)
        except BrokerRefusal as refusal:
            if refusal.code != "no_free_number":  # those whose acknowledgement was lost stay
                raise
            return
        self._ledger.did("workspace", name)
        self._client.request("POST", f"/v1/workspaces/{name}/transition", {"to": "decommissioned", "reason": "soak"})
        self._ledger.did("gone", name)

    def _open(self) -> None:
        if self._edge is None:
            self._edge = Perimeter(self._lab)
        workspace, word = f"ws-{self._chance.randrange(self._workspaces)}", token()
        asked = wanted(workspace, word)
        digest = request_digest(workspace, asked.call)
        self._ledger.will_open(digest, hashlib.sha256(word.encode()).hexdigest())
        try:
            review = str(self._edge.ask("POST", "/v1/perimeter/reviews", asked)["id"])
        except BrokerRefusal as refusal:
            if refusal.status != 429 and refusal.code != "busy":
                raise
            return
        self._ledger.did("opened", review, digest)
        self._ledger.to_decide.append(review)

    def _decide(self) -> None:
        try:
            review = self._ledger.to_decide.popleft()
        except IndexError:
            return self._open()
        word = self._chance.choices(("approve", "deny", "cancel", "both"), (16, 1, 1, 2))[0]
        try:
            if word != "cancel":
                said = "deny" if word == "deny" else "approve"
                seen = look(self._client, review)
                self._ledger.will(said, review, REVIEWER)
                decide(self._client, seen, self._key, said)
                self._ledger.did(said, review, REVIEWER)
            if word in {"cancel", "both"}:  # a race with the perimeters that claim it
                self._ledger.will("cancel", review)
                self._client.request("POST", f"/v1/reviews/{review}/cancel", {"reason": "soak"})
                self._ledger.did("cancel", review)
        except BrokerRefusal as refusal:
            if refusal.code not in TOO_LATE:
                raise
        except UnavailableError:
            self._ledger.to_decide.append(review)
            raise
        return None
