"""The rigs of the other folders, whose daemons are killed, stopped, partitioned and run out of disk here."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("gateway", "policyd", "ring1", "broker")]
