"""Placeholders: what stands for a credential inside a sandbox. None leaves the perimeter in a header or in the query.

A placeholder is no secret, so texts that speak of one may be sent: bodies are not looked at.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from urllib.parse import unquote

PLACEHOLDER = "openshell:resolve:env:"
"""How every placeholder begins."""
_BASIC = "basic "


def holds_placeholder(value: str) -> bool:
    """Return whether a value has a placeholder in it: as it is, percent-encoded, or in the Base64 of Basic (RFC 7617)."""
    if PLACEHOLDER in value or PLACEHOLDER in unquote(value):
        return True
    if value[: len(_BASIC)].lower() != _BASIC:
        return False
    try:
        return PLACEHOLDER.encode() in base64.b64decode(value[len(_BASIC) :].strip())
    except (binascii.Error, ValueError):
        return False


def headers_with_placeholder(headers: Mapping[str, str]) -> frozenset[str]:
    """Return the names of the headers that hold a placeholder."""
    return frozenset(name for name, value in headers.items() if holds_placeholder(value))


def target_with_placeholder(target: str) -> bool:
    """Return whether path or query hold a placeholder."""
    return holds_placeholder(target)
