"""The builders of what a TPM says lie beside the tests of attestation."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "attest"))
