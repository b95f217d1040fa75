"""Placeholders: what stands for a credential inside a sandbox. None leaves the perimeter in a header or in the query.

A placeholder is no secret, so texts that speak of one may be sent: bodies are not looked at.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from urllib.parse import unquote

PLACEHOLDER = "openshell:resolve:env:"
"""How every placeholder begins."""
_BASIC = "basic"
_NO_BASE64 = re.compile(r"[^A-Za-z0-9+/]+")


def holds_placeholder(value: str) -> bool:
    """Return whether a value has a placeholder in it: as it is, percent-encoded, or in the Base64 of Basic (RFC 7617).

    Base64 is read as the most lenient service may: without padding, in both alphabets, over signs that are in neither.
    """
    if PLACEHOLDER in value or PLACEHOLDER in unquote(value):
        return True
    if value[: len(_BASIC)].lower() != _BASIC:
        return False
    encoded = value[len(_BASIC) :].replace("-", "+").replace("_", "/")
    return any(PLACEHOLDER.encode() in _decoded(part) for part in (encoded, *encoded.split("=")))


def _decoded(text: str) -> bytes:
    kept = _NO_BASE64.sub("", text)
    whole = kept[:-1] if len(kept) % 4 == 1 else kept
    return base64.b64decode(whole + "=" * (-len(whole) % 4))


def headers_with_placeholder(headers: Mapping[str, str]) -> frozenset[str]:
    """Return the names of the headers that hold a placeholder."""
    return frozenset(name for name, value in headers.items() if holds_placeholder(value))


def target_with_placeholder(target: str) -> bool:
    """Return whether path or query hold a placeholder."""
    return holds_placeholder(target)
