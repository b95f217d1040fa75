"""Every field says what it means and shows an example that loads; schemas and reference page are what the code says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from jsonschema import Draft202012Validator

from saw.policy.casefile import CASE_CHECKS, load_cases
from saw.policy.checks_governance import GOVERNANCE_CHECKS
from saw.policy.checks_policy import POLICY_CHECKS
from saw.policy.decode import Checks, Decoder
from saw.policy.loader import load_bundle_folder, load_members
from saw.policy.partial import is_whole
from saw.policy.reach_invariants import INVARIANT_CHECKS, load_invariants
from saw.policy.schema import KINDS, schema_of
from saw.policy.yamltree import parse

pytestmark = pytest.mark.control("POL-01")

ROOT = Path(__file__).resolve().parents[3]
CHECKS: dict[str, Checks] = {
    "policy": POLICY_CHECKS,
    "governance": GOVERNANCE_CHECKS,
    "tests": CASE_CHECKS,
    "invariants": INVARIANT_CHECKS,
}


def structures(kind: type[msgspec.Struct], seen: dict[str, type[msgspec.Struct]] | None = None) -> dict[str, Any]:
    """The structures that ``kind`` is made of, by name."""
    seen = {} if seen is None else seen
    seen[kind.__name__] = kind

    def walk(shape: object) -> None:
        if isinstance(shape, msgspec.inspect.StructType) and shape.cls.__name__ not in seen:
            structures(shape.cls, seen)
        for name in ("type", "item_type", "value_type"):
            if (inner := getattr(shape, name, None)) is not None:
                walk(inner)
        for inner in getattr(shape, "types", ()):
            walk(inner)

    for field in msgspec.inspect.type_info(kind).fields:  # type: ignore[attr-defined]
        walk(field.type)
    return seen


def every_field() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    for kind in KINDS:
        for name, component in schema_of(kind)["$defs"].items():
            for field, value in component["properties"].items():
                yield kind, name, field, value


def whole_example(kind: str) -> dict[str, Any]:
    """A whole file made of the examples of its fields."""
    return {field: value["examples"][0] for _, name, field, value in every_field() if name == KINDS[kind].__name__}


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_field_has_a_meaning_and_an_example(kind: str) -> None:
    silent = [
        f"{name}.{field}" for k, name, field, value in every_field() if k == kind and not value.get("description")
    ]
    bare = [f"{name}.{field}" for k, name, field, value in every_field() if k == kind and not value.get("examples")]
    assert (silent, bare) == ([], [])
    assert schema_of(kind)["$id"].endswith(f"/{kind}.schema.json")
    assert all(component.get("description") for component in schema_of(kind)["$defs"].values())


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_example_fits_the_schema_and_the_loader_takes_it(kind: str) -> None:
    schema = schema_of(kind)
    kinds = structures(KINDS[kind])
    Draft202012Validator.check_schema(schema)
    for _, name, field, value in (entry for entry in every_field() if entry[0] == kind):
        here = {**schema, "$ref": f"#/$defs/{name}/properties/{field}"}
        for example in value["examples"]:
            Draft202012Validator(here).validate(example)
            decoder = Decoder("example", CHECKS[kind])
            root, _ = parse(json.dumps({"x": example}).encode(), "example")
            read = decoder.field(root.pairs["x"][1], kinds[name], field, f"{name}.{field}")
            assert decoder.problems == []
            assert is_whole(read)


def test_an_example_that_the_loader_refuses_would_be_found() -> None:
    decoder = Decoder("example", POLICY_CHECKS)
    root, _ = parse(b'{"x": "*.com"}', "example")
    decoder.field(root.pairs["x"][1], structures(KINDS["policy"])["Endpoint"], "host", "Endpoint.host")
    assert [problem.field for problem in decoder.problems] == ["Endpoint.host"]


def test_whole_files_of_examples_load() -> None:
    policy, governance = whole_example("policy"), whole_example("governance")
    governance["plaintext"] = []  # An endpoint of its own would be needed.
    route = governance["inference"]["routes"][0]
    route["budget"] = governance["budgets"][0]["id"]
    route["limits"] = [governance["limits"][0]["id"]]
    load_members({"policy.yaml": json.dumps(policy).encode(), "governance.yaml": json.dumps(governance).encode()})
    load_cases(json.dumps(whole_example("tests")).encode(), "tests.yaml")
    load_invariants(json.dumps(whole_example("invariants")).encode())


@pytest.mark.parametrize("kind", ["policy", "governance", "tests"])
def test_the_blueprints_fit_their_schema_and_name_it_to_editors(kind: str) -> None:
    validator = Draft202012Validator(schema_of(kind))
    files = sorted((ROOT / "policies").glob(f"*/{kind}.yaml"))
    assert len(files) == 7
    for path in files:
        text = path.read_text(encoding="utf-8")
        validator.validate(yaml.safe_load(text))
        named = text.partition("\n")[0].removeprefix("# yaml-language-server: $schema=")
        assert (path.parent / named).resolve() == ROOT / f"policies/schema/{kind}.schema.json"
        load_bundle_folder(path.parent)


def test_the_invariants_and_the_vectors_fit_their_schemas() -> None:
    defaults = ROOT / "policies/invariants.yaml"
    Draft202012Validator(schema_of("invariants")).validate(yaml.safe_load(defaults.read_text(encoding="utf-8")))
    vectors = sorted((ROOT / "tests/conformance/vectors").glob("*.yaml"))
    assert vectors
    for path in vectors:
        Draft202012Validator(schema_of("tests")).validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_schemas_and_reference_page_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/policy_reference.py", "--check"], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), "run `python scripts/policy_reference.py`"
