"""Make two repositories signed with a key that is made here: security updates of two packages, and a vendor's of a third.

python repository.py FOLDER     leaves FOLDER/{security,acme}, FOLDER/archive.asc and the old packages in FOLDER/old
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests/integration/patching"))
from patching_rig import ACME, SECURITY, Repository, Signer, package


def main(folder: str) -> None:
    """Make them anew."""
    place = Path(folder)
    shutil.rmtree(place, ignore_errors=True)
    (place / "old").mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        signer = Signer(Path(scratch) / "gpg")
        (place / "archive.asc").write_text(signer.public)
        security = Repository(place / "security", SECURITY, signer)
        acme = Repository(place / "acme", ACME, signer)
        for name, repository in (("plain", security), ("kept", security), ("other", acme)):
            shutil.copy(package(Path(scratch), name, "1"), place / "old")
            repository.add(package(Path(scratch), name, "2"))
        signer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
