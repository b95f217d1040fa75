"""The programs of the hypervisor that the driver calls."""

from __future__ import annotations

import subprocess

from saw.vm.spec import VmError


def run(*argv: str, timeout: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``argv``; raise :class:`VmError` with the end of its error output unless ``check`` is false."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=timeout)
    except FileNotFoundError as error:
        raise VmError(f"{argv[0]} is not installed", cure="run the hypervisor role on this host") from error
    except subprocess.TimeoutExpired as error:
        raise VmError(f"`{' '.join(argv[:2])}` did not end within {timeout:.0f} s") from error
    if check and done.returncode:
        raise VmError(f"`{' '.join(argv)}` failed ({done.returncode}): {(done.stderr or done.stdout).strip()[-600:]}")
    return done
