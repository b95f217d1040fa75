"""Attack cases from inside the confined process, each against the same call outside (which is not refused)."""

from __future__ import annotations

import json

import pytest

from conftest import PROBE, PYTHON

CALLS = [
    "ptrace",
    "process_vm_readv",
    "pidfd_getfd",
    "io_uring",
    "keyctl",
    "bpf",
    "userfaultfd",
    "perf",
    "mount",
    "fsopen",
    "unshare-user",
    "unshare-net",
    "clone-user",
    "setns",
    "open_by_handle",
    "personality",
    "tiocsti",
    "raw",
    "packet",
    "netlink",
    "netlink-audit",
    "vsock",
    "sctp",
    "mptcp",
    "udplite",
    "alg",
    "bluetooth",
    "dccp",
    "fast-open",
]
REFUSED = dict.fromkeys(CALLS, "EPERM") | {
    "clone3": "ENOSYS",
    "fileless-exec": "ENOSYS",
    "i386-entry": "signal:SIGSYS",
    "x32-entry": "signal:SIGSYS",
    "read-shadow": "EACCES",
    "write-usr": "EACCES",
    "write-etc": "EACCES",
    "write-cron": "EACCES",
    "make-device": "EACCES",
    "proxy-other-port": "EACCES",
    "direct-tcp": "EACCES",
    "metadata": "EACCES",
    "abstract-unix": "EPERM",
    "setuid": "EPERM",
    "netlink-nft": "EPERM",
    "write-generation": "EACCES",
    "replace-generation": "EACCES",
    "write-ring1-ca": "EACCES",
    "read-ring1-ca": "EACCES",
    "replace-ca-bundle": "EACCES",
    "write-unit": "EACCES",
    "write-unit-etc": "EACCES",
}
ALLOWED = (
    "native-entry",
    "fork-exec",
    "sealed-memory",
    "terminal-size",
    "personality-query",
    "tcp-socket",
    "unix-pair",
    "read-passwd",
    "write-tmp",
    "write-shm",
    "read-ca-bundle",
    "replace-own-file",
    "proxy",
    "udp-loopback",
)


@pytest.fixture(scope="module")
def inside(networked, launch):
    answer = networked.confined(launch, PYTHON, "/run/saw/sandbox/probe.py")
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.fixture(scope="module")
def outside(networked):
    return json.loads(networked.run(PYTHON, str(PROBE), netns=True).stdout)


@pytest.mark.thorough
@pytest.mark.control("RUN-03")
@pytest.mark.parametrize("case", sorted(REFUSED))
def test_refused_inside_for_this_reason_and_not_outside(case, inside, outside):
    assert inside[case] == REFUSED[case]
    assert outside[case] != REFUSED[case]


@pytest.mark.control("RUN-03")
@pytest.mark.parametrize("case", ALLOWED)
def test_ordinary_work_is_not_refused(case, inside):
    assert inside[case] == "ok"


@pytest.mark.control("RUN-02")
def test_listed_paths_work_and_others_do_not_exist_for_writing(networked, launch):
    script = (
        "echo kept >/run/home/file && cat /run/home/file && ln /run/home/file /run/home/second && ls /usr >/dev/null"
    )
    assert networked.confined(launch, "/bin/sh", "-ec", script).stdout == "kept\n"
    for attempt in (
        "cat /run/saw-secret",
        "ln -s /run/saw-secret /run/home/l && cat /run/home/l",
        "echo x >/run/saw/sandbox/shell.json",
    ):
        networked.write("/run/saw-secret", b"secret\n")
        answer = networked.confined(launch, "/bin/sh", "-c", attempt)
        assert answer.returncode != 0
        assert "Permission denied" in answer.stderr
        assert "secret\n" not in answer.stdout


@pytest.mark.control("RUN-03")
def test_the_launcher_refuses_root_and_a_broken_launch_file(networked, launch):
    words = (PYTHON, "-m", "saw.runtime.launcher", "--launch", launch, "--", "/usr/bin/true")
    assert networked.run(*words, netns=True, user=True).returncode == 0
    as_root = networked.run(*words, netns=True)
    assert (as_root.returncode, "must be 2000" in as_root.stderr) == (125, True)
    networked.write("/run/saw/sandbox/broken.json", b'{"uid": 2000, "unknown": 1}')
    broken = networked.confined("/run/saw/sandbox/broken.json", "/usr/bin/true")
    assert (broken.returncode, "not a usable launch file" in broken.stderr) == (125, True)


@pytest.mark.control("RUN-02")
def test_a_higher_requirement_than_the_kernel_has_stops_the_start(networked, launch):
    content = json.loads(networked.run("cat", launch).stdout) | {"minimum_abi": 99}
    networked.write("/run/saw/sandbox/future.json", json.dumps(content).encode())
    answer = networked.confined("/run/saw/sandbox/future.json", "/usr/bin/echo", "started")
    assert (answer.returncode, answer.stdout) == (125, "")
    assert "Landlock ABI 99 is required" in answer.stderr


@pytest.mark.control("RUN-03")
def test_inherited_descriptors_are_closed(networked, launch):
    with PROBE.open("rb") as stream:
        answer = networked.confined(launch, "/bin/ls", "/proc/self/fd", pass_fds=[stream.fileno()])
    assert answer.stdout.split() == ["0", "1", "2", "3"]  # 3 is the listing itself
