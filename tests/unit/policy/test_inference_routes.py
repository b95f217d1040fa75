"""Inference routes by class of data: what loads, which service takes a call, what is refused, what is wider."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from examples import examples
from saw.policy.casefile import as_request
from saw.policy.delegation import Delegation, DelegationInvalid, Resource, check_delegation, wider
from saw.policy.errors import PolicyError
from saw.policy.explain import explain_call
from saw.policy.inference import DATA_CLASS_HEADER
from saw.policy.loader import Bundle, load_members
from saw.policy.matcher import Matcher
from saw.policy.model import Decision, Request
from saw.policy.openshell import export
from saw.policy.reach_calls import gains
from saw.policy.reach_diff import ReachDiff, diff_bundles
from saw.policy.reach_invariants import load_invariants
from saw.policy.reach_prove import prove
from saw.policy.reach_side import Side

pytestmark = pytest.mark.control("INF-01")

CLOUD = {"upstream": "https://m.example.com/v1", "credential": "cloud", "data_classes": ["public", "internal"]}
LOCAL = {
    "upstream": "https://llm.corp.example.com/v1",
    "credential": "local",
    "data_classes": ["internal", "confidential"],
    "aliases": {"fast": "local-1"},
    "models": ["local-*"],
}
CREDENTIALS = [
    {"id": name, "ref": f"file:{name}", "inject": {"header": "X-Key", "format": "{secret}"}}
    for name in ("cloud", "local")
]
DATA = {"handles": ["internal", "confidential"], "assumed": ["internal"]}


def bundle(
    data: dict[str, Any] | None = None, *ways: dict[str, Any], first: dict[str, Any] | None = None, **more: Any
) -> Bundle:
    route = {
        "alias": "i.local",
        "models": ["demo-*"],
        "aliases": {"fast": "demo-1"},
        **(CLOUD if first is None else first),
    }
    governance = {
        "schema": 1,
        "blueprint": {"name": "x", "version": "1.0.0", "owner": "team"},
        "credentials": CREDENTIALS,
        "inference": {"routes": [{**route, "upstreams": list(ways), **more}]},
        "data_classes": DATA if data is None else data,
    }
    return load_members({"policy.yaml": b"version: 1\n", "governance.yaml": json.dumps(governance).encode()})


def asked(model: str = "fast", held: str | None = None, brought: tuple[str, ...] = (), method: str = "POST") -> Request:
    body = json.dumps({"model": model}).encode() if method == "POST" else None
    path = "/v1/messages" if method == "POST" else "/v1/models"
    headers = {} if held is None else {DATA_CLASS_HEADER: held}
    return Request("https", "i.local", 443, method, path, headers=headers, body=body, data_classes=brought)


def decide(loaded: Bundle, *args: Any, **kwargs: Any) -> Decision:
    return Matcher.compile(loaded.policy, loaded.governance).decide(asked(*args, **kwargs))


def upstream(loaded: Bundle, decision: Decision) -> str:
    assert decision.allowed, decision.detail
    return loaded.governance.way("i.local", 443, decision.way).upstream_address[0]


@pytest.mark.parametrize(
    ("held", "brought", "host", "model", "classes"),
    [
        (None, (), "m.example.com", "demo-1", ("internal",)),
        ("", (), "m.example.com", "demo-1", ("internal",)),
        ("internal", (), "m.example.com", "demo-1", ("internal",)),
        ("confidential", (), "llm.corp.example.com", "local-1", ("internal", "confidential")),
        (" confidential ,internal", (), "llm.corp.example.com", "local-1", ("internal", "confidential")),
        (None, ("confidential",), "llm.corp.example.com", "local-1", ("internal", "confidential")),
        ("internal", ("confidential",), "llm.corp.example.com", "local-1", ("internal", "confidential")),
    ],
)
def test_a_call_goes_to_the_first_service_that_is_for_all_that_it_holds(
    held: str | None, brought: tuple[str, ...], host: str, model: str, classes: tuple[str, ...]
) -> None:
    loaded = bundle(None, LOCAL)
    decision = decide(loaded, "fast", held, brought)
    assert upstream(loaded, decision) == host
    assert (decision.model, decision.data_classes) == (model, classes)
    assert decision.credential == ("local" if host.startswith("llm") else "cloud")
    listed = decide(loaded, "", held, brought, method="GET")
    assert upstream(loaded, listed) == host


def test_without_a_word_about_what_is_assumed_a_call_holds_all_that_is_handled() -> None:
    loaded = bundle({"handles": ["internal", "confidential"]}, LOCAL)
    assert upstream(loaded, decide(loaded)) == "llm.corp.example.com"
    loaded = bundle({"handles": ["internal"]}, LOCAL)
    assert upstream(loaded, decide(loaded)) == "m.example.com"


def test_a_call_that_no_service_of_its_model_may_see_is_refused_and_told_what_would_pass() -> None:
    loaded = bundle(None, LOCAL)
    refused = decide(loaded, "demo-2", "confidential")
    assert (refused.verdict, refused.reason) == ("deny", "data_class_not_allowed")
    assert "m.example.com is not for confidential data" in refused.detail
    assert refused.next_steps == (
        "use one of the models fast, local-*, which internal, confidential data may be sent to",
    )
    assert decide(loaded, "demo-2").allowed
    assert decide(loaded, "local-7", "confidential").allowed
    alone = decide(bundle(None), "fast", "confidential")
    assert alone.next_steps == ("ask the policy's owner for a model service for internal, confidential data",)
    assert decide(loaded, "gigantic", "confidential").reason == "model_not_allowed"


@pytest.mark.parametrize("held", ["restricted", "Internal", "internal;confidential", "internal, restricted", "public"])
def test_a_class_that_is_not_handled_is_refused_and_never_ignored(held: str) -> None:
    loaded = bundle(None, LOCAL)
    for refused in (decide(loaded, "fast", held), decide(loaded, "fast", None, (held,))):
        assert refused.reason == "data_class_not_allowed"
        assert "does not handle" in refused.detail
        assert "(internal, confidential)" in refused.next_steps[0]


def test_a_route_that_says_nothing_of_classes_is_as_it_always_was() -> None:
    first = {"upstream": "https://m.example.com/v1"}
    assert decide(bundle({}, first=first)).allowed
    assert decide(bundle(DATA, first=first), "fast", "confidential").allowed


_CLASSES = ["internal", "confidential", "secret"]
_SETS = st.lists(st.sampled_from(_CLASSES), unique=True)


@settings(max_examples=examples(60), deadline=None)
@given(
    ways=st.lists(
        st.one_of(st.none(), st.lists(st.sampled_from(_CLASSES), unique=True, min_size=1)), min_size=1, max_size=4
    ),
    assumed=_SETS,
    named=_SETS,
    brought=_SETS,
)
def test_nothing_that_a_call_says_lowers_what_it_holds(
    ways: list[list[str] | None], assumed: list[str], named: list[str], brought: list[str]
) -> None:
    def way(place: int, classes: list[str] | None) -> dict[str, Any]:
        told = {} if classes is None else {"data_classes": classes}
        return {"upstream": f"https://m{place}.example.com/v1", "aliases": {"fast": f"demo-{place}"}, **told}

    first, *others = [way(place, classes) for place, classes in enumerate(ways)]
    loaded = bundle({"handles": _CLASSES, "assumed": assumed}, *others, first=first)
    decision = decide(loaded, "fast", ",".join(named) if named else None, tuple(brought))
    held = {*assumed, *named, *brought}
    fit = [place for place, classes in enumerate(ways) if classes is None or held <= set(classes)]
    if not fit:
        assert decision.reason == "data_class_not_allowed"
        return
    assert (decision.way, decision.model) == (fit[0], f"demo-{fit[0]}")
    assert set(decision.data_classes) == held
    assert ways[decide(loaded, "fast").way] is None or set(assumed) <= set(ways[decide(loaded, "fast").way] or ())


@pytest.mark.parametrize(
    ("data", "ways", "more", "said"),
    [
        ({}, [], {}, "no class of data is handled"),
        ({**DATA, "assumed": ["public"]}, [], {}, "public is not handled"),
        (None, [], {"data_classes": []}, "nothing could be sent there"),
        (None, [], {"data_classes": ["Internal"]}, "is not a class of data"),
        (None, [{**LOCAL, "data_classes": []}], {}, "nothing could be sent there"),
        (None, [{**LOCAL, "credential": "none"}], {}, "unknown credential none"),
        (None, [{**LOCAL, "upstream": "http://llm.corp.example.com/v1"}], {}, "must be https"),
        (None, [{**LOCAL, "upstream": "https://127.0.0.1/v1"}], {}, "upstream"),
        (None, [{**LOCAL, "aliases": {"fast": "demo-1"}}], {}, "demo-1 is not among local-*"),
        (None, [{"upstream": "https://b.example.com/v1", "data_classes": ["internal"]}], {}, "never used"),
        (None, [{"upstream": "https://b.example.com/v1"}] * 9, {}, "more than 8"),
        (None, [{**LOCAL, "weight": 1}], {}, "weight"),
        (None, [], {"record": {"content": "all", "keep": "30d"}}, "content"),
        (None, [], {"record": {"content": "prompts"}}, "keep"),
        (None, [], {"record": {"content": "prompts", "keep": "23h"}}, "is not a time from 1d to 3650d"),
        (None, [], {"record": {"content": "prompts", "keep": "3651d"}}, "is not a time from 1d to 3650d"),
        (None, [], {"record": {"content": "prompts", "keep": "soon"}}, "duration"),
        (
            {"handles": ["internal"], "only_to": {"internal": ["m.example.com"]}},
            [LOCAL],
            {},
            "llm.corp.example.com lies outside",
        ),
    ],
)
def test_what_cannot_hold_does_not_load(
    data: dict[str, Any] | None, ways: list[dict[str, Any]], more: dict[str, Any], said: str
) -> None:
    with pytest.raises(PolicyError) as refused:
        bundle(data, *ways, **more)
    assert said in str(refused.value)


def widening(old: Bundle, new: Bundle) -> set[tuple[str, str]]:
    found: ReachDiff = diff_bundles(old, new)
    return {(item.kind, item.region.upstream or item.region.setting or item.rules[0]) for item in found.gained}


def test_a_service_that_may_see_more_is_wider_and_one_that_may_see_less_is_not() -> None:
    old = bundle(None, LOCAL)
    more = bundle(None, LOCAL, first={**CLOUD, "data_classes": ["internal", "confidential"]})
    assert ("upstream", "https://m.example.com/v1") in widening(old, more)
    assert not widening(more, more)
    fewer = bundle(None)
    assert not widening(old, fewer)
    assert ("call", "https://llm.corp.example.com/v1") in {
        (k if k == "upstream" else "call", u) for k, u in widening(fewer, old)
    }


def test_a_swap_of_services_shows_for_data_that_only_a_header_names() -> None:
    first = {"upstream": "https://a.example.com/v1", "data_classes": ["internal"]}
    one = {"upstream": "https://b.example.com/v1", "data_classes": ["internal", "confidential", "secret"]}
    other = {"upstream": "https://c.example.com/v1", "data_classes": ["internal", "confidential", "finance"]}
    data = {"handles": ["internal", "confidential", "secret", "finance"], "assumed": ["internal"]}
    found = diff_bundles(bundle(data, one, other, first=first), bundle(data, other, one, first=first))
    gained = [item for item in found.gained if item.region.upstream == "https://c.example.com/v1"]
    assert gained
    assert gained[0].risk == "critical"
    assert gained[0].witness is not None
    assert gained[0].witness.call is not None
    assert gained[0].witness.call.headers[DATA_CLASS_HEADER] == "confidential, internal"


def test_assuming_less_is_wider_and_assuming_more_is_not() -> None:
    all_of_it, less = bundle({"handles": DATA["handles"]}, LOCAL), bundle(None, LOCAL)
    assert ("data", "data_classes.assumed") in widening(all_of_it, less)
    assert ("upstream", "https://m.example.com/v1") in widening(all_of_it, less)
    assert ("data", "data_classes.assumed") not in widening(less, all_of_it)


def record(content: str | None, keep: str = "30d") -> Bundle:
    return bundle(None, LOCAL, **({} if content is None else {"record": {"content": content, "keep": keep}}))


def test_less_that_is_kept_of_calls_is_told_and_so_is_more() -> None:
    at = "inference.routes[0].record"
    assert widening(record("prompts"), record(None)) == {("unrecorded", at)}
    assert widening(record("prompts"), record("metadata")) == {("unrecorded", at)}
    assert widening(record("prompts"), record("prompts", "29d")) == {("unrecorded", at)}
    assert widening(record(None), record("prompts")) == {("recorded", at)}
    assert widening(record("prompts"), record("prompts-and-responses", "60d")) == {("recorded", at)}
    assert widening(record("prompts"), record("prompts-and-responses", "10d")) == {("recorded", at), ("unrecorded", at)}
    assert not widening(record("prompts"), record("prompts"))


def test_a_credential_of_a_further_service_is_held_to_its_invariant() -> None:
    text = "schema: 1\ninvariants:\n  - {id: keys, kind: credential_only_to, credential: local, hosts: ["
    loaded = bundle(None, LOCAL)
    [broken] = prove(loaded, load_invariants((text + "m.example.com]}\n").encode()))
    assert (broken.verdict, "llm.corp.example.com" in broken.detail) == ("broken", True)
    [holds] = prove(loaded, load_invariants((text + "llm.corp.example.com]}\n").encode()))
    assert holds.verdict == "holds"


def test_explain_points_at_the_classes_and_says_that_people_decide() -> None:
    loaded = bundle(None, LOCAL)
    told = explain_call(loaded, asked("demo-2", "confidential"))
    assert told.decision.reason == "data_class_not_allowed"
    assert "people decide which service may see which data" in json.dumps(msgspec.to_builtins(told))


def test_an_export_says_what_openshell_has_no_field_for() -> None:
    loaded = bundle(None, LOCAL, record={"content": "prompts", "keep": "30d"})
    found = {finding.field.removeprefix("governance."): finding.reason for finding in export(loaded).findings}
    assert "which service may see which class of data has no field" in found["inference.i.local.data_classes"]
    assert "prompts are kept for 30d" in found["inference.i.local.record"]
    plain = {
        f.field.removeprefix("governance.")
        for f in export(bundle({}, first={"upstream": "https://m.example.com/v1"})).findings
    }
    assert not {"inference.i.local.data_classes", "inference.i.local.record"} & plain


def handed(classes: Any = msgspec.UNSET, parent: str = "") -> Delegation:
    return Delegation(
        format="saw-delegation/1", id="child" if parent else "dlg-1", sponsor="m@example.com", workspace="ws", agent="a",
        task="t", resources=(Resource(host="i.local"),), not_before=datetime(2026, 1, 1, tzinfo=UTC),
        expires=datetime(2026, 1, 2, tzinfo=UTC), parent=parent, data_classes=classes,
    )  # fmt: skip


def test_a_record_may_bring_classes_of_data_and_one_made_from_it_brings_them_too() -> None:
    parent = handed(("confidential",))
    check_delegation(parent)
    assert not wider(handed(("confidential", "secret"), "dlg-1"), parent)
    for less in (handed(parent="dlg-1"), handed((), "dlg-1"), handed(("secret",), "dlg-1")):
        assert "leaves out the confidential data" in wider(less, parent)[0]
    assert not wider(handed(("secret",), "dlg-1"), handed())
    assert b"data_classes" not in msgspec.json.encode(handed())
    for wrong in (("Confidential",), ("",), tuple(f"c{n}" for n in range(17))):
        with pytest.raises(DelegationInvalid):
            check_delegation(handed(wrong))


# -- every pair of bundles


@st.composite
def drawn(draw: st.DrawFn) -> Bundle:
    def way(first: bool) -> dict[str, Any]:
        told: dict[str, Any] = {
            "upstream": draw(st.sampled_from(["https://a.example.com/v1", "https://b.example.com/v1"]))
        }
        classes = draw(st.none() | st.lists(st.sampled_from(_CLASSES), unique=True, min_size=1))
        told |= {} if classes is None else {"data_classes": classes}
        told |= draw(st.sampled_from([{}, {"credential": "cloud"}, {"credential": "local"}]))
        models = draw(st.sampled_from([["demo-*"], ["local-*"], ["*"], []]))
        return told | ({"models": models or ["demo-*"]} if first else {"models": models} if models else {})

    handles = draw(st.lists(st.sampled_from(_CLASSES), unique=True, min_size=1))
    assumed = draw(st.none() | st.lists(st.sampled_from(handles), unique=True))
    data = {"handles": handles, **({} if assumed is None else {"assumed": assumed})}
    others = [way(first=False) for _ in range(draw(st.integers(0, 3)))]
    try:
        return bundle(data, *others, first={"aliases": {}, **way(first=True)})
    except PolicyError:
        reject()


_EVERY = [
    asked(model, ",".join(held) if held else None)
    for model in ("demo-1", "local-1", "other")
    for size in range(len(_CLASSES) + 1)
    for held in itertools.combinations(_CLASSES, size)
]


@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn(), drawn())
def test_whatever_services_may_newly_see_is_reported_and_nothing_else(before: Bundle, after: Bundle) -> None:
    diff, old, new = diff_bundles(before, after), Side(before), Side(after)
    common = set(before.governance.data_classes.handles)
    reported = [item for item in diff.gained if item.subject == "call"]
    for request in _EVERY:
        kind = gains(old.decide(request)[1], new.decide(request)[1])
        named = {*filter(None, request.headers.get(DATA_CLASS_HEADER, "").split(","))}
        if kind is not None:
            # A class that was not handled before is reported as that; what it is sent to need not be again.
            assert diff.covers(request) or not named <= common, (request, kind)
            assert diff.gained
    for item in reported:
        assert item.witness is not None
        assert item.witness.call is not None
        example = as_request(item.witness.call)
        assert gains(old.decide(example)[1], new.decide(example)[1]) == item.kind
        assert diff.covers(example)
    assert diff_bundles(before, before).widening is False
