"""Two builds of the golden image and two machines on it: ``make image-reproducible`` builds the images that these tests look at.

Not part of ``make test``: the image is built twice and booted twice for this alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from image_pair import IMAGES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without two builds there is nothing to test."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and len(IMAGES) != 2:
            item.add_marker(pytest.mark.skip(reason="run `make image-reproducible`: it builds the image twice"))
