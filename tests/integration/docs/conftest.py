from __future__ import annotations

import sys
from pathlib import Path

# The rig of a real broker.
sys.path.append(str(Path(__file__).parents[1] / "broker"))
# The maker of a signed bundle of Agent Policy Fabric.
sys.path.append(str(Path(__file__).parents[2] / "unit" / "policy"))
# The rig of a real bastion.
sys.path.append(str(Path(__file__).parents[1] / "sessions"))
