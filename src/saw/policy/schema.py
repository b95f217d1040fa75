"""The JSON Schemas of the files people write, made from the structures that the loader reads.

``policies/schema/*.schema.json`` are its output, kept for editors and reviewers; descriptions and examples come from the
annotations of the fields. The loader is stricter than a schema can say (globs, addresses, agreement of the two files);
``saw policy check`` is the judge.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from saw import jsontext
from saw.policy.casefile import CaseFile
from saw.policy.governance import Governance
from saw.policy.model import Policy
from saw.policy.reach_invariants import Invariants

KINDS: dict[str, type[msgspec.Struct]] = {
    "policy": Policy,
    "governance": Governance,
    "tests": CaseFile,
    "invariants": Invariants,
}
"""The files that have a schema, by name without ``.yaml``, and the structure of each."""

_BASE = "https://github.com/secure-agent/workspace/blob/main/policies/schema"


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("``", "")).strip()


def schema_of(kind: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of one of :data:`KINDS`; raise ``KeyError`` for another name."""
    (reference,), components = msgspec.json.schema_components([KINDS[kind]])
    for component in components.values():
        if "description" in component:
            component["description"] = _plain(component["description"])
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"{_BASE}/{kind}.schema.json",
        "title": f"{kind}.yaml",
        **reference,
        "$defs": components,
    }
    # Through text, so that tuples of defaults become the lists that a reader of the file sees.
    plain: dict[str, Any] = jsontext.decode(msgspec.json.encode(schema))
    return plain
