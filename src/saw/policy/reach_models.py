"""Which classes of data calls of a model can hold, so far as some service of a route tells them apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

from saw.policy.inference import DATA_CLASS_HEADER
from saw.policy.reach_side import PathView


def holding(views: Iterable[PathView]) -> list[tuple[tuple[str, ...], Mapping[str, str]]]:
    """Return sets of classes, each as a key and as the header of a call; the empty one is a call that says nothing.

    They suffice: where two bundles send what holds some set to the services p and q, they do so with everything that p and q are
    both for, because what an earlier service may see then, it may see of the smaller set as well.
    """
    views = tuple(views)
    if all(way.data_classes is None for view in views if view.route is not None for way in view.route.ways):
        return [((), {})]
    most = set(_most(views))
    found = {frozenset[str](), *most, *(left & right for left, right in itertools.combinations(most, 2))}
    keys = sorted(tuple(sorted(one)) for one in found)
    return [(key, {DATA_CLASS_HEADER: ", ".join(key)} if key else {}) for key in keys]


def _most(views: Iterable[PathView]) -> Iterator[frozenset[str]]:
    """Yield for each service the classes that a call to it can hold at most."""
    for view in views:
        handled = frozenset(view.data.handles)
        for way in () if view.route is None else view.route.ways:
            yield handled if way.data_classes is None else handled & frozenset(way.data_classes)
