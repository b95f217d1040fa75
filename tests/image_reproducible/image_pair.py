"""The two builds that the tests of this folder look at."""

from __future__ import annotations

import os
from pathlib import Path

IMAGES = tuple(Path(name) for name in os.environ.get("SAW_IMAGE_PAIR", "").split(":") if name)
"""Directories of the two builds, which the variable names with a colon between."""
