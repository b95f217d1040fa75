"""The command that builds an image, run by itself so that it can be killed: its own code but for what needs root or a network.

    python killed_build.py REPOSITORY BUILD MARKER [POINT]

The programs that it starts (mmdebstrap, tar, packer) come from PATH, where the test put small ones that halt at POINT. At the
points of our own code it halts here. Whatever halts makes the file MARKER first.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from saw.image import build as image_build
from saw.image import package_state, usage
from saw.image.packages import PackageSet
from saw.lab.nspawn import LabNetwork, LightHost

repository, folder, marker = (Path(word) for word in sys.argv[1:4])
point = sys.argv[4] if len(sys.argv) > 4 else ""
PACKAGES = PackageSet("trixie", "2026-01-01T00:00:00+00:00", "", {"bash": "5.2-1"})
_replace, _remove = os.replace, usage.remove


def halt() -> None:
    """Say that the point was reached, and wait to be killed."""
    marker.touch()
    signal.pause()


def wheels(_: Path, cache: Path, **__: object) -> Path:
    """Stand in for the wheelhouse, which needs a network."""
    made = cache / "wheelhouse-1"
    made.mkdir(exist_ok=True)
    return made


def replace(source: Path, target: Path) -> None:
    """Rename, and halt before that of the base tree, or before or after that of the finished image."""
    ours = Path(target).parent.name == "images"
    if Path(target).suffix == ".tar" and point == "before the name of the base":
        halt()
    if ours and point == "before the rename":
        halt()
    _replace(source, target)
    if ours and point == "after the rename":
        halt()


package_state.ask_base = lambda *_, **__: PACKAGES
image_build.wheelhouse = wheels
image_build.make_sboms = lambda *_, **__: {}
image_build.score_tree = lambda *_: {}
image_build.ImageBuild.mcp_servers = wheels
os.replace = replace
LightHost.up = lambda self, tar: self.unpack(tar)
LightHost.down = lambda self, **_: self.remove_tree()
LabNetwork.down = lambda _: None
sys.exit(image_build.main(["image", "--repository", str(repository), "--build", str(folder), "--json"]))
