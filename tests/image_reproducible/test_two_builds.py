"""The image was built twice from equal inputs, at two times and places: the disks are the same, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_pair import IMAGES

from saw.image.compare import DISK, compare
from saw.image.disk import digest_of


@pytest.mark.control("IMG-01")
def test_both_builds_are_the_same_but_for_what_the_list_allows() -> None:
    found = compare(*IMAGES)
    assert found.refused == []
    assert found.identical
    assert len({digest_of(path / DISK) for path in IMAGES}) == 1
    assert {path.name for path in IMAGES} == {Path(IMAGES[0]).name}
