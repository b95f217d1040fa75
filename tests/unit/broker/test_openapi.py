"""The document about the operator API says what the broker serves, and by which types it parses."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator
from review_world import World

from saw.broker.apps import operator_app
from saw.broker.errors import NotFoundError
from saw.broker.http import refusal
from saw.broker.openapi import ABOUT, Call, document
from saw.broker.operator_roles import ALLOWED
from saw.broker.operator_routes import described


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def told(world: World) -> dict[str, Any]:
    return msgspec.json.decode(msgspec.json.encode(described(world.broker)))


def test_every_call_that_is_served_is_told_and_no_other(world: World, told: dict[str, Any]) -> None:
    served = {
        (method, route.path)
        for route in operator_app(world.broker).routes
        for method in route.methods - {"HEAD"}
        if route.path.startswith("/v1/")
    }
    said = {(method.upper(), path) for path, calls in told["paths"].items() for method in calls}
    assert said == served
    assert {f"{method} {path}" for method, path in served} == set(ABOUT), "nothing is said about what is not there"
    names = [call["operationId"] for calls in told["paths"].values() for call in calls.values()]
    assert len(set(names)) == len(names)
    assert all(call["summary"] for calls in told["paths"].values() for call in calls.values())
    with pytest.raises(KeyError):
        document([Call("GET", "/v1/elsewhere", None)], lambda *_: ())


def test_roles_and_parameters_are_those_of_the_call(told: dict[str, Any]) -> None:
    for path, calls in told["paths"].items():
        for method, call in calls.items():
            assert call["x-saw-roles"] == sorted(ALLOWED.get((method.upper(), path), ()))
            assert ("security" in call) is bool(call["x-saw-roles"])
            named = [one["name"] for one in call.get("parameters", []) if one["in"] == "path"]
            assert named == re.findall(r"\{(\w+)\}", path)
    listed = told["paths"]["/v1/workspaces"]["get"]["parameters"]
    assert {"after", "limit", "state"} <= {one["name"] for one in listed}


def test_bodies_are_refused_by_the_document_as_by_the_broker(told: dict[str, Any]) -> None:
    components = told["components"]["schemas"]
    for name, schema in components.items():
        Draft202012Validator.check_schema(schema)
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name)

    def valid(path: str, method: str, body: object) -> bool:
        schema = told["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]
        return Draft202012Validator({**schema, "components": {"schemas": components}}).is_valid(body)

    good = {"id": "ws-a", "sponsor": "ada", "blueprint": "coding", "ring": "stable", "image": "workspace"}
    assert valid("/v1/workspaces", "post", good)
    for bad in ({**good, "colour": "red"}, {**good, "sponsor": 7}, {"id": "ws-a"}, []):
        assert not valid("/v1/workspaces", "post", bad)
    assert valid("/v1/workspaces/{id}/kill", "post", {"reason": "test"})
    assert not valid("/v1/workspaces/{id}/kill", "post", {})


def test_the_answers_to_refusals_are_as_told(told: dict[str, Any]) -> None:
    said = msgspec.json.decode(refusal(NotFoundError("there is none", cure="make one"), "r-1").body)
    Draft202012Validator(told["components"]["schemas"]["Refusal"]).validate(said)
