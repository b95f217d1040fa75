"""Routed inference: the local alias, the calls it takes, and the models that may be asked."""

from __future__ import annotations

import json
import re
from functools import lru_cache

import msgspec

from saw.policy import globs, strict_json
from saw.policy.governance import Budget, InferenceRoute, Price
from saw.policy.model import ALLOW, DENY, Decision, Request

_POST = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/responses"})
_GET = frozenset({"/v1/models"})
MAX_BODY = 64 * 1024 * 1024
"""Largest request body that is parsed (bytes)."""


class Unreadable(ValueError):
    """The body does not name a model in a way that every parser reads alike."""


def requested_model(body: bytes | None, *, complete: bool, encoding: str = "") -> str:
    """Return the ``model`` of a JSON request body; raise :class:`Unreadable` when two parsers could disagree on it.

    Duplicate keys, spellings of ``model`` in other case, other encodings than plain UTF-8 and incomplete bodies are refused.
    """
    if body is None or not complete:
        raise Unreadable("the whole body was not seen, so the model is not known")
    if encoding.strip().lower() not in {"", "identity"}:
        raise Unreadable("the body is compressed")
    try:
        value = strict_json.loads(body, limit=MAX_BODY)
    except strict_json.NotStrict as error:
        raise Unreadable(f"the body cannot be read: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("model"), str):
        raise Unreadable("the body has no text field model")
    if any(key != "model" and key.casefold() == "model" for key in value):
        raise Unreadable("the body has the field model in two spellings")
    return str(value["model"])


class Edit(msgspec.Struct, frozen=True):
    """Bytes ``start`` to ``end`` (exclusive) of a body of ``size`` bytes, and the ``text`` that takes their place."""

    start: int
    end: int
    size: int
    text: str

    def apply(self, body: bytes) -> bytes:
        """Return the body with the text in place."""
        return body[: self.start] + self.text.encode() + body[self.end :]


def edit_of(route: InferenceRoute, body: bytes | None) -> Edit | None:
    """Return what is written into an allowed call of ``route`` so that it asks for the model that an alias stands for.

    None where it names no alias. Nothing else of the body changes, down to its spaces.
    """
    if not route.aliases or body is None:
        return None
    model = requested_model(body, complete=True)
    target = route.model(model)
    if target == model:
        return None
    text = body.decode("utf-8")
    decoder, at = json.JSONDecoder(), _past(text, text.index("{") + 1)
    while True:  # The body was read as an object with this key before, so it is there.
        key, at = decoder.raw_decode(text, at)
        at = _past(text, _past(text, at) + 1)
        _, end = decoder.raw_decode(text, at)
        if key == "model":
            start = len(text[:at].encode())
            return Edit(start, start + len(text[at:end].encode()), len(body), json.dumps(target))
        at = _past(text, _past(text, end) + 1)


def _past(text: str, at: int) -> int:
    """Return the place of the next character that is no white space of JSON."""
    while text[at] in " \t\n\r":
        at += 1
    return at


def unenforced(route: InferenceRoute, budget: Budget | None) -> str:
    """Return why nobody can hold the calls of ``route`` to its ``budget``, or an empty text (also where it has none)."""
    if budget is None:
        return ""
    if not route.prices:
        return f"the budget {budget.id} of this route cannot be enforced: the route has no prices, so calls are not metered"
    return ""


@lru_cache(maxsize=4096)
def _glob(text: str) -> re.Pattern[str]:
    return globs.flat_glob(text)


def price_of(route: InferenceRoute, model: str) -> Price | None:
    """Return the first price of ``route`` that fits ``model``, or None where none does."""
    for price in route.prices:
        if any(_glob(text).fullmatch(model) for text in price.models):
            return price
    return None


def passing(route: InferenceRoute, budget: Budget | None) -> object:
    """Return what of budget and prices bears on which calls pass; two equal values let the same calls pass.

    What a call may cost at most is not looked at: that is decided at the perimeter, on what was spent before.
    """
    if budget is None or unenforced(route, budget):
        return budget is None
    return tuple(text for price in route.prices for text in price.models)


class CompiledRoute(msgspec.Struct, frozen=True):
    """One inference route, ready to decide; ``shut`` says why its budget refuses every call, if it does."""

    route: InferenceRoute
    models: tuple[re.Pattern[str], ...]
    shut: str

    @classmethod
    def compile(cls, route: InferenceRoute, budget: Budget | None) -> CompiledRoute:
        """Return the compiled form of ``route``, which draws on ``budget``."""
        return cls(route, tuple(globs.flat_glob(glob) for glob in route.models), unenforced(route, budget))

    def decide(self, request: Request, method: str, target: str) -> Decision:
        """Return the decision on a call to this alias; ``target`` is canonical, with the query."""
        route = self.route
        path, model = target.partition("?")[0], None
        if method == "POST" and path in _POST:
            try:
                model = requested_model(
                    request.body, complete=request.body_complete, encoding=request.headers.get("content-encoding", "")
                )
            except Unreadable as error:
                return self._deny("model_not_allowed", str(error), target, "send one plain JSON object with one model")
            model = route.model(model)
            if not any(pattern.fullmatch(model) for pattern in self.models):
                allowed = ", ".join([*route.aliases, *route.models])
                detail = f"the model {model[:80]!r} is not among {allowed}"
                return self._deny("model_not_allowed", detail, target, f"use one of the models {allowed}")
        elif not (method == "GET" and path in _GET):
            detail = f"{method} {path} is not a call of an inference route"
            return self._deny("method_or_path_not_allowed", detail, target, f"use POST {', '.join(sorted(_POST))}")
        if self.shut:
            # A limit that nobody counts is no limit.
            return self._deny("budget_unenforced", self.shut, target, "ask the policy's owner for prices")
        if route.budget is not None and model is not None and price_of(route, model) is None:
            detail = f"the model {model[:80]!r} has no price, so the budget {route.budget} cannot pay for it"
            return self._deny(
                "price_unknown", detail, target, "use a model with a price, or ask the policy's owner for one"
            )
        return Decision(
            verdict=ALLOW,
            policy="inference",
            rule=route.alias,
            credential=route.credential,
            inference=route.alias,
            canonical_path=target,
        )

    def _deny(self, reason: str, detail: str, target: str, step: str) -> Decision:
        return Decision(
            verdict=DENY,
            reason=reason,
            detail=detail,
            policy="inference",
            rule=self.route.alias,
            inference=self.route.alias,
            canonical_path=target,
            next_steps=(step,),
        )
