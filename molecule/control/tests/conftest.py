from __future__ import annotations

import sys
from pathlib import Path

# The rigs of a sign-in and of a terminal in the browser.
TESTS = Path(__file__).parents[3] / "tests/integration"
sys.path += [str(TESTS / name) for name in ("broker", "sessions")]
