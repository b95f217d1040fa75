"""Compare what counts calls of inference, which models aliases stand for, and what is kept of calls."""

from __future__ import annotations

from collections.abc import Iterator

from saw.policy import globs
from saw.policy.governance import CallLimit, Governance, InferenceRoute, Record
from saw.policy.reach_item import Item, Region, Risk

_UNITS = ("requests", "tokens")
_CONTENTS = ("", "metadata", "prompts", "prompts-and-responses")
"""What may be kept of calls, from nothing on."""


def compare_inference(old: Governance, new: Governance) -> list[Item]:
    """Return the limits that ``new`` loosens or takes away, the models that it has others stand for, and what else it keeps."""
    return [
        *_taken_away(old, new),
        *_limits(old, new),
        *_counted(old, new),
        *_aliases(old, new),
        *_recorded(old, new),
    ]


def _name(route: InferenceRoute) -> str:
    return f"{route.alias.lower()}:{route.port}"


def _words(limit: CallLimit) -> str:
    most = " and ".join(f"{getattr(limit, unit)} {unit}" for unit in _UNITS if getattr(limit, unit) is not None)
    return f"{most} per {limit.per} and {limit.scope}"


def _kept(old: Governance, new: Governance) -> Iterator[tuple[int, InferenceRoute, InferenceRoute]]:
    """Yield position, old and new form of every route that both have."""
    before = {_name(route): route for route in old.inference.routes}
    for index, route in enumerate(new.inference.routes):
        if _name(route) in before:
            yield index, before[_name(route)], route


def _item(kind: str, what: str, why: str, *, region: Region, risk: Risk, rule: str, exact: bool = True) -> Item:
    return Item("budget", kind, what, why, region, risk, (rule,), exact=exact)


def _taken_away(old: Governance, new: Governance) -> Iterator[Item]:
    known = {limit.id: limit for limit in old.limits}
    for index, was, route in _kept(old, new):
        for name in was.limits:
            if name not in route.limits:
                yield _item(
                    "unlimited",
                    f"{_name(route)} without the limit {name}",
                    f"was limited to {_words(known[name])}",
                    region=Region(host=route.alias.lower(), port=route.port, budget=name),
                    risk="high",
                    rule=f"inference.routes[{index}].limits",
                )


def _limits(old: Governance, new: Governance) -> Iterator[Item]:
    known = {limit.id: limit for limit in old.limits}
    for index, now in enumerate(new.limits):
        was = known.get(now.id)
        if was is None:
            continue
        rule, region = f"limits[{index}]", Region(budget=now.id)
        for unit in _UNITS:
            most, before = getattr(now, unit), getattr(was, unit)
            if before is not None and (most is None or most > before):
                what = f"{now.id}: {'any number of' if most is None else most} {unit}"
                yield _item("limit", what, f"was {before}", region=region, risk="medium", rule=f"{rule}.{unit}")
        if now.span != was.span:
            # A longer stretch holds each shorter one, but for the same count it is tighter only where both slide.
            slides = [span for span in (was.span, now.span) if isinstance(span, int)]
            if len(slides) < 2 or slides[1] < slides[0]:
                what = f"{now.id}: per {now.per}"
                why = f"was per {was.per}"
                yield _item(
                    "period", what, why, region=region, risk="medium", rule=f"{rule}.per", exact=len(slides) == 2
                )
        if now.scope not in {was.scope, "blueprint"}:
            what, why = f"{now.id}: for each {now.scope}", f"one count was shared by each {was.scope}"
            yield _item("scope", what, why, region=region, risk="high", rule=f"{rule}.scope", exact=False)


def _counted(old: Governance, new: Governance) -> Iterator[Item]:
    """Yield where calls without a budget count as fewer tokens, so that more of them fit; with one, the budget's items say so."""
    for index, was, route in _kept(old, new):
        limited = any(limit.tokens is not None for limit in new.counting(route))
        if not limited or not was.limits or (route.budget is not None and route.budget == was.budget):
            continue
        for field in ("max_input_tokens", "max_output_tokens"):
            most, before = getattr(route, field), getattr(was, field)
            if most is not None and (before is None or most < before):
                what, why = f"{_name(route)}: {field} {most}", f"was {before}"
                region, rule = Region(host=route.alias.lower(), port=route.port), f"inference.routes[{index}].{field}"
                yield _item("bound", what, why, region=region, risk="medium", rule=rule, exact=False)


def _aliases(old: Governance, new: Governance) -> Iterator[Item]:
    for index, was, route in _kept(old, new):
        before = {way.upstream: way for way in reversed(was.ways)}
        pairs = [(was, route, "")] + [
            (before[way.upstream], way, f".upstreams[{place}]")
            for place, way in enumerate(route.ways[1:])
            if way.upstream in before
        ]
        for then_way, way, place in pairs:
            for name in dict.fromkeys((*way.aliases, *then_way.aliases)):
                now, then = way.aliases.get(name), then_way.aliases.get(name)
                if now == then:
                    continue
                if now is None and not any(globs.flat_glob(glob).fullmatch(name) for glob in way.models):
                    continue  # Nobody may ask for it any more, and the diff of calls shows that.
                what = f"{_name(route)}: {name} is sent as {name if now is None else now}"
                why = "it stood for no other model" if then is None else f"was sent as {then}"
                region = Region(host=route.alias.lower(), port=route.port, models=(name,), upstream=way.upstream)
                rule = f"inference.routes[{index}]{place}.aliases"
                yield Item("setting", "alias", what, why, region, "medium", (rule,), exact=False)


def _recorded(old: Governance, new: Governance) -> Iterator[Item]:
    """Yield where less is kept of calls than before, or for a shorter time, and where more is kept, or for longer."""
    for index, was, route in _kept(old, new):
        now, then = _amount(route.record), _amount(was.record)
        if now == then:
            continue
        region, rule = Region(host=route.alias.lower(), port=route.port), f"inference.routes[{index}].record"
        what, why = f"{_name(route)}: {_said(route.record)}", f"was: {_said(was.record)}"
        if now[0] < then[0] or (then[0] and now[1] < then[1]):
            yield Item("setting", "unrecorded", what, why, region, "high", (rule,))
        if now[0] > then[0] or (now[0] and now[1] > then[1]):
            yield Item("setting", "recorded", what, why, region, "low", (rule,))


def _amount(record: Record | None) -> tuple[int, int]:
    return (0, 0) if record is None else (_CONTENTS.index(record.content), record.keep_s)


def _said(record: Record | None) -> str:
    return "nothing of calls is kept" if record is None else f"{record.content} are kept for {record.keep}"
