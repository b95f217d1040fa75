"""Puts this folder on the path, names the thorough run of properties, and lets go of the databases that tests made."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# The server that they may be on is described beside the tests that are about it.
sys.path[:0] = [str(Path(__file__).parent / "integration")]

import databases  # noqa: E402
import examples  # noqa: E402

examples.register()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave thorough tests out of a run of whole folders; what a test says of SQLite's files is not asked of PostgreSQL."""
    if not config.option.markexpr and any(Path(named).is_dir() for named in config.args):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("thorough")]
    if not databases.on_postgresql():
        return
    for item in items:
        if about := item.get_closest_marker("sqlite"):
            item.add_marker(pytest.mark.skip(reason=f"about SQLite: {about.args[0]}"))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
    """A database goes with the fixture that made it."""
    with databases.held() as made:
        fixturedef.addfinalizer(lambda: databases.drop(made))
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """One that the test itself made goes with the test."""
    with databases.held() as made:
        try:
            return (yield)
        finally:
            databases.drop(made)


def pytest_unconfigure() -> None:
    """The server ends with the session."""
    databases.end()
