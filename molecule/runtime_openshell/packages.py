"""Make a repository of packages that stand in for OpenShell's, which no archive has, and for Debian's that run containers.

python packages.py FOLDER IMAGE…     leaves FOLDER/archive.asc and FOLDER/packages; Podman says that it has the IMAGEs
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "shared"))
from stand_ins import repository

PODMAN = """#!/bin/sh
case "$*" in
  --version) echo podman version 5.4.2 ;;
  "image exists "*) grep -qxF -- "$3" /usr/share/test-podman/images ;;
  "system service "*) exec sleep infinity ;;
  *) echo "$*: no part of the test" >&2; exit 125 ;;
esac
"""
#: Reads its configuration as the account that it runs under.
GATEWAY = """#!/bin/sh -e
case "$*" in
  "config preflight")
    exec python3 -c 'import sys, tomllib; tomllib.load(sys.stdin.buffer)["openshell"]["gateway"]' < "$OPENSHELL_GATEWAY_CONFIG" ;;
  "generate-certs --output-dir "*) mkdir -p "$3" ;;
  "") exec sleep infinity ;;
  *) echo "$*: no part of the test" >&2; exit 2 ;;
esac
"""

if __name__ == "__main__":
    images = "".join(f"{image}\n" for image in sys.argv[2:])
    packages = {
        "podman": {"usr/bin/podman": PODMAN, "usr/share/test-podman/images": images},
        "openshell": {"usr/bin/openshell-gateway": GATEWAY},
        "passt": {"usr/bin/pasta": "#!/bin/sh\n"},
        "uidmap": {"usr/bin/newuidmap": "#!/bin/sh\n"},
        "crun": {},
    }
    repository(Path(sys.argv[1]), "99:5.4.2", packages, {})
