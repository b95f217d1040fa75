"""Runs as root in the VM of ``test_limits_in_a_vm.py`` and says on the console what happens to an agent that wants too much."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from pathlib import Path

LIB = "/usr/local/lib"
CLIENT = "/usr/lib/python3/dist-packages/saw/runtime/shell_client.py"
PROBE = ["/usr/bin/python3", f"{LIB}/limits_probe.py"]
SLICE = Path("/sys/fs/cgroup/sandbox.slice")
RUN = ["/usr/bin/python3", "-I", "-S", CLIENT, "--"]


def say(name: str, value: object) -> None:
    print("\nSAW " + json.dumps({name: value}), flush=True)


def probe(*words: str) -> dict[str, object]:
    done = subprocess.run([*RUN, *PROBE, *words], capture_output=True, text=True, check=False)
    try:
        return {"code": done.returncode, **json.loads(done.stdout)}
    except ValueError:
        return {"code": done.returncode, "errors": done.stderr[-200:]}


def main_pid(unit: str) -> str:
    words = ["systemctl", "show", "--property=MainPID", "--value", unit]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def counted(file: str, name: str) -> int:
    return int(dict(line.split() for line in (SLICE / file).read_text().splitlines())[name])


def until(ready: object, seconds: float = 300) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if ready():  # type: ignore[operator]
            return True
        time.sleep(0.1)
    return False


def peak() -> int:
    try:
        return int((SLICE / "memory.peak").read_text()) // 1024**2
    except FileNotFoundError:  # before Linux 5.19
        return 0


def main() -> None:
    for path in ("/run/saw/sandbox", "/run/saw/mcp", "/run/saw/mcp-server"):
        Path(path).mkdir(parents=True, exist_ok=True)
    for name in ("shell.json", "mcp-files.json", "apt.conf"):
        shutil.copy(f"{LIB}/{name}", "/run/saw/sandbox/")
    Path("/run/saw/sandbox/ca-bundle.pem").touch()
    units = ["neighbour.service", "saw-shell.service", "saw-mcp-server-files.socket"]
    subprocess.run(["systemctl", "start", *units], check=True)
    until(lambda: Path("/run/saw/shell/exec.sock").exists())
    before = {"neighbour": main_pid("neighbour.service"), "shell": main_pid("saw-shell.service")}
    say("before", before)
    say("oom", {name: Path(f"/proc/{pid}/oom_score_adj").read_text().strip() for name, pid in before.items()})
    say("modest memory", probe("memory", "100"))
    eaten = probe("memory", "1024")
    say("memory", {"code": eaten["code"], "oom_kills": counted("memory.events", "oom_kill"), "peak_mib": peak()})
    both()
    say("tasks", probe("tasks", "2000"))
    say("modest tasks", probe("tasks", "50"))
    bomb()
    for place in ("/tmp", "/var/tmp", "/dev/shm", "/run/saw/shell"):
        say(f"bytes {place}", probe("bytes", "100", f"{place}/x"))
        say(f"inodes {place}", probe("inodes", "3000", f"{place}/x"))
        say(f"modest {place}", probe("bytes", "8", f"{place}/x"))
    filled = subprocess.Popen([*RUN, "/bin/sh", "-c", "yes > /run/saw/shell/x; yes > /tmp/x; echo full; sleep 600"],
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
    assert filled.stdout is not None
    filled.stdout.readline()
    Path("/run/of-the-host").write_bytes(b"1" * 1024**2)
    Path("/tmp/of-the-host").write_bytes(b"1" * 1024**2)
    say("host writes", Path("/run/of-the-host").stat().st_size == Path("/tmp/of-the-host").stat().st_size == 1024**2)
    filled.kill()
    say("files", probe("files", "5000"))
    say("modest files", probe("files", "100"))
    say("cpu", {name: (SLICE / f"cpu.{name}").read_text().strip() for name in ("max", "weight")})
    files = [*SLICE.glob("*.*"), *SLICE.glob("saw-shell.service/*.*")]
    counts = ("cpu.stat", "memory.peak", "memory.events", "pids.current", "pids.events", "io.stat")
    say("groups", {str(path.relative_to(SLICE.parent)): path.read_text() for path in files if path.name in counts})
    say("after", {"neighbour": main_pid("neighbour.service"), "shell": main_pid("saw-shell.service")})
    subprocess.run(json.loads(Path(f"{LIB}/narrower.json").read_text()), check=True)
    files = (("slice", "memory.max"), ("tasks", "pids.max"), ("cpu", "cpu.max"))
    found = {name: (SLICE / file).read_text().strip() for name, file in files}
    say("narrower", found)
    say("done", True)


def both() -> None:
    """An MCP server eats while the shell holds 200 MiB of the 256."""
    script = "import sys, time\nheld = b'1' * (200 * 1024**2)\nprint('held', flush=True)\ntime.sleep(600)\n"
    holding = subprocess.Popen([*RUN, "/usr/bin/python3", "-c", script], stdout=subprocess.PIPE, text=True)
    assert holding.stdout is not None
    holding.stdout.readline()
    killed = counted("memory.events", "oom_kill")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("/run/saw/mcp-server/files.sock")
        client.settimeout(300)
        while client.recv(65536):
            pass
    until(lambda: counted("memory.events", "oom_kill") > killed)
    say("memory of both", {"oom_kills": counted("memory.events", "oom_kill"), "peak_mib": peak()})
    holding.kill()
    holding.wait()


def bomb() -> None:
    """A shell's fork bomb; the host starts programs meanwhile, and ends it."""
    refused = counted("saw-shell.service/pids.events", "max")
    bombing = subprocess.Popen([*RUN, "/bin/bash", "-c", "b() { b | b & }; b; sleep 600"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    # The event is counted where the process is that could not fork (cgroup-v2, "pids.events").
    group = SLICE / "saw-shell.service"
    at_limit = until(lambda: counted("saw-shell.service/pids.events", "max") > refused + 200)
    starts = subprocess.run(["/bin/true"], check=False).returncode == 0
    say("bomb", {"at_limit": at_limit, "host_starts": starts})
    # What was started last is ended first; the command daemon is what has to stay.
    shell = main_pid("saw-shell.service")
    (group / "cgroup.freeze").write_text("1")
    until(lambda: "frozen 1" in (group / "cgroup.events").read_text())
    names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in (group / "cgroup.procs").read_text().split()}
    for pid, name in names.items():
        if pid != shell and name == "bash":
            subprocess.run(["/bin/kill", "-9", pid], check=False)
    (group / "cgroup.freeze").write_text("0")
    bombing.kill()
    bombing.wait()
    until(lambda: int((SLICE / "pids.current").read_text()) < 20)


if __name__ == "__main__":
    main()
