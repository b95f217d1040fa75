"""Make a repository of packages that have the names of NVIDIA's driver in Debian, and what the role needs of them.

python packages.py FOLDER     leaves FOLDER/archive.asc and FOLDER/packages

The real ones are large and compile for long; images of the variant gpu are built with them. What is Debian's own here: apt, dpkg,
modprobe, modinfo and systemd. What stands in: the source of the modules, DKMS, which makes a module of one section and signs it
as ``scripts/sign-file`` of the kernel does, and programs that find no GPU, as the real ones do without one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

sys.path.append(str(Path(__file__).resolve().parents[1] / "shared"))
from stand_ins import repository

ROLE = yaml.safe_load((Path(__file__).resolve().parents[2] / "roles/gpu_driver/vars/main.yml").read_text())
VERSION, SOURCE = ROLE["gpu_driver_version"], ROLE["gpu_driver_source"]
KERNEL = "6.12.0-test-cloud-amd64"
NO_GPU = "#!/bin/sh\necho 'No devices were found' >&2\nexit 9\n"
#: As Debian's package does it, unless it is told not to; here it would build unsigned modules.
BY_ITSELF = f"#!/bin/sh\n[ -e /etc/dkms/no-autoinstall ] || dkms install {SOURCE}/{VERSION} -k {KERNEL}\n"
FILES = {
    "dkms": {"usr/sbin/dkms": (Path(__file__).parent / "dkms.py").read_text()},
    "nvidia-open-kernel-dkms": {
        f"usr/src/{SOURCE}-{VERSION}/dkms.conf": f"PACKAGE_NAME={SOURCE}\n",
        "DEBIAN/postinst": BY_ITSELF,
    },
    "firmware-nvidia-gsp": {f"usr/lib/firmware/nvidia/{VERSION}/gsp_ga10x.bin": "not firmware\n"},
    "nvidia-persistenced": {
        "usr/bin/nvidia-persistenced": NO_GPU,
        "usr/lib/systemd/system/nvidia-persistenced.service":
            "[Service]\nExecStart=/usr/bin/nvidia-persistenced\n[Install]\nWantedBy=multi-user.target\n",
    },
    "nvidia-modprobe": {"usr/bin/nvidia-modprobe": NO_GPU},
    "nvidia-smi": {"usr/bin/nvidia-smi": NO_GPU},
    f"linux-headers-{KERNEL}": {f"usr/lib/modules/{KERNEL}/build": "headers\n"},
}  # fmt: skip
NEEDS = {
    "nvidia-open-kernel-dkms": "dkms",
    "linux-headers-cloud-amd64": f"linux-headers-{KERNEL}, gcc-99",
    "gcc-99": "cpp-99",
}

if __name__ == "__main__":
    names = {*ROLE["gpu_driver_packages"], *FILES, *NEEDS, "cpp-99"}
    repository(Path(sys.argv[1]), f"{VERSION}-1", {name: FILES.get(name, {}) for name in sorted(names)}, NEEDS)
