"""What every test of the kit's parts here has."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_collection() -> Iterator[None]:
    """No garbage is collected meanwhile: a finalizer that parses (tracebacks do) breaks the depth count of CPython 3.11's ast."""
    gc.disable()
    yield
    gc.enable()
