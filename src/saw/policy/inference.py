"""Routed inference: the local alias, the calls it takes, and the models that may be asked."""

from __future__ import annotations

import json
import re
from functools import lru_cache

import msgspec

from saw.policy import globs, strict_json
from saw.policy.governance import Budget, DataClasses, InferenceRoute, Price
from saw.policy.model import ALLOW, DENY, Decision, Request

_POST = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/responses"})
_GET = frozenset({"/v1/models"})
MAX_BODY = 64 * 1024 * 1024
"""Largest request body that is parsed (bytes)."""
DATA_CLASS_HEADER = "saw-data-class"
"""The header in which a call of a model says what it holds beyond what policy assumes: classes, separated by commas."""
DATA_CLASS = "data_class_not_allowed"
"""The reason of a refusal because no model service may see the data that a call holds."""


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


class NotHandled(ValueError):
    """A call or a delegation names a class of data that the workspace does not work with."""


def held_classes(data: DataClasses, request: Request) -> tuple[str, ...]:
    """Return the classes of data that a call of a model holds, in the order of ``handles``.

    They are those that policy assumes, and what delegations and the call's own header add. Nothing takes one away: a header that
    is empty or names fewer changes nothing. Raises :class:`NotHandled` for a class that the workspace does not work with.
    """
    named = [name.strip() for name in request.headers.get(DATA_CLASS_HEADER, "").split(",")]
    added = {*request.data_classes, *filter(None, named)}
    strange = sorted(added - set(data.handles))
    if strange:
        raise NotHandled(f"the call is said to hold {strange[0][:63]!r} data, which this workspace does not handle")
    held = added | set(data.held)
    return tuple(name for name in data.handles if name in held)


class CompiledRoute(msgspec.Struct, frozen=True):
    """One inference route, ready to decide; ``shut`` says why its budget refuses every call, if it does.

    ``ways`` has the route once for each of its services, with the patterns of its models and the classes it is for (None: all).
    """

    route: InferenceRoute
    ways: tuple[tuple[InferenceRoute, tuple[re.Pattern[str], ...], frozenset[str] | None], ...]
    shut: str
    data: DataClasses

    @classmethod
    def compile(cls, route: InferenceRoute, budget: Budget | None, data: DataClasses) -> CompiledRoute:
        """Return the compiled form of ``route``, which draws on ``budget``, in a bundle that says ``data`` of data."""
        ways = tuple(
            (
                way,
                tuple(globs.flat_glob(glob) for glob in way.models),
                None if way.data_classes is None else frozenset(way.data_classes),
            )
            for way in route.ways
        )
        return cls(route, ways, unenforced(route, budget), data)

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
        elif not (method == "GET" and path in _GET):
            detail = f"{method} {path} is not a call of an inference route"
            return self._deny("method_or_path_not_allowed", detail, target, f"use POST {', '.join(sorted(_POST))}")
        serving = [place for place in range(len(self.ways)) if model is None or self._serves(place, model)]
        if not serving:
            allowed = ", ".join(dict.fromkeys(name for way, *_ in self.ways for name in (*way.aliases, *way.models)))
            detail = f"the model {route.model(model or '')[:80]!r} is not among {allowed}"
            return self._deny("model_not_allowed", detail, target, f"use one of the models {allowed}")
        try:
            held = held_classes(self.data, request)
        except NotHandled as error:
            handled = ", ".join(self.data.handles) or "no class"
            step = f"name only classes of data that this workspace handles ({handled})"
            return self._deny(DATA_CLASS, str(error), target, step)
        place = next((one for one in serving if self._is_for(one, held)), None)
        if place is None:
            return self._unfit(serving, held, model, target)
        way = self.ways[place][0]
        if self.shut:
            # A limit that nobody counts is no limit.
            return self._deny("budget_unenforced", self.shut, target, "ask the policy's owner for prices")
        sent = None if model is None else way.model(model)
        if route.budget is not None and sent is not None and price_of(route, sent) is None:
            detail = f"the model {sent[:80]!r} has no price, so the budget {route.budget} cannot pay for it"
            return self._deny(
                "price_unknown", detail, target, "use a model with a price, or ask the policy's owner for one"
            )
        return Decision(
            verdict=ALLOW,
            policy="inference",
            rule=route.alias,
            credential=way.credential,
            inference=route.alias,
            canonical_path=target,
            way=place,
            data_classes=held,
            model=sent or "",
        )

    def _serves(self, place: int, model: str) -> bool:
        way, patterns, _ = self.ways[place]
        sent = way.model(model)
        return any(pattern.fullmatch(sent) for pattern in patterns)

    def _is_for(self, place: int, held: tuple[str, ...]) -> bool:
        classes = self.ways[place][2]
        return classes is None or classes.issuperset(held)

    def _unfit(self, serving: list[int], held: tuple[str, ...], model: str | None, target: str) -> Decision:
        """Return the refusal of a call that no service of its model may see."""
        what = "the list of models" if model is None else f"the model {model[:80]!r}"
        why = "; ".join(
            f"{way.upstream_address[0]} is not for {', '.join(name for name in held if name not in classes)} data"
            for way, _, classes in (self.ways[place] for place in serving)
            if classes is not None
        )
        others = [self.ways[place][0] for place in range(len(self.ways)) if self._is_for(place, held)]
        names = ", ".join(dict.fromkeys(name for way in others for name in (*way.aliases, *way.models)))
        step = f"ask the policy's owner for a model service for {', '.join(held)} data"
        if names:
            step = f"use one of the models {names}, which {', '.join(held)} data may be sent to"
        return self._deny(DATA_CLASS, f"{what} is not for this call: {why}", target, step)

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
