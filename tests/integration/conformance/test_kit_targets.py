"""The kit against sandboxes that run here: it sees failure where there is no sandbox, and success in ours."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def bare(kit):
    return kit("--target", "bare")


@pytest.fixture(scope="module")
def ours(kit):
    from saw.runtime.landlock import abi

    if abi() < 6:
        pytest.skip("this kernel's Landlock is older than ABI 6 (or switched off)")
    return kit("--target", "local-sandbox")


def test_without_a_sandbox_the_kit_sees_that_attacks_succeed_and_arrive(bare):
    assert bare.code == 1, bare.text
    network = bare.by(suite="network")
    tried = [result for result in network.values() if result != "not_applicable"]
    assert tried.count("allowed") >= 0.8 * len(tried), network
    for name in ("net.tcp.direct", "net.metadata.direct", "net.udp.direct", "net.dns.udp", "net.dns.system", "unix.docker",
                 "net.icmp.ping", "process.host.signal"):  # fmt: skip
        case = bare.case(name)
        assert (case["result"], case["arrived"]) == ("allowed", True), case
        assert case["evidence"]["arrived"]
    for name in ("process.host.environment", "files.host.tmp", "files.descriptors", "files.persist.bashrc", "process.ptrace",
                 "net.inbound.tcp"):  # fmt: skip
        assert bare.case(name)["result"] == "allowed", bare.case(name)
    assert bare.report["problems"] == []
    assert {case["twin"]["result"] for case in bare.report["cases"]} <= {"works", "not_applicable", "none"}


@pytest.mark.control("NET-01")
@pytest.mark.control("RUN-02")
@pytest.mark.control("RUN-03")
@pytest.mark.control("RUN-04")
def test_in_our_sandbox_everything_is_refused_for_the_right_reason_and_every_twin_works(ours):
    assert ours.findings() == []
    assert ours.code == 0, ours.text
    counts = ours.report["summary"]["suites"]
    for suite in ("network", "sockets", "credentials", "process", "files"):
        assert counts[suite]["right"] + counts[suite]["not_applicable"] == len(ours.by(suite=suite))
    recorded = [case for case in ours.report["cases"] if case["suite"] == "network" and case["arrived"] is not None]
    assert len(recorded) >= 40
    assert not any(case["arrived"] for case in recorded)


def test_every_case_of_ours_that_is_not_tried_says_why(ours):
    why = {c["id"]: c["evidence"]["problem"] for c in ours.report["cases"] if c["result"] == "not_applicable"}
    assert {name.split(".")[0] for name in why} == {"address", "http", "credentials", "process"}
    cgroup = "resource limits of the cgroup are not part of this target"
    assert why.pop("process.limit.tasks") == cgroup
    assert why.pop("process.limit.memory") == f"how much the policy gives is not known (--governance), {cgroup}"
    known = (
        "no allowed URL is known (--allowed-url)",
        "no GraphQL address is known (--graphql-url)",
        "no MCP server is known (--mcp-url)",
        "the target has no HTTP proxy with a policy (--allowed-url)",
        "no service is known that shows a credential (--echo-url)",
        "only one allowed host is known (--second-url)",
    )
    assert [text for text in set(why.values()) if not any(reason in text for reason in known)] == []


def test_what_bubblewrap_leaves_open_is_seen(kit):
    if shutil.which("bwrap") is None:
        refused = kit("--target", "bubblewrap")
        assert (refused.code, "apt-get install bubblewrap" in refused.text) == (1, True)
        return
    found = kit("--target", "bubblewrap", "--suite", "network", "--suite", "process", "--suite", "sockets")
    assert found.code == 1
    assert "allowed" not in found.by(suite="network").values(), found.by(suite="network")
    assert found.case("process.host.see")["result"] == "refused"
    for name in ("process.io-uring", "process.unshare-user", "socket.netlink-nft"):
        assert found.case(name)["result"] == "allowed"


def test_a_unit_is_refused_with_its_cause_where_systemd_does_not_run(kit):
    if Path("/run/systemd/system").is_dir():
        found = kit("--target", "systemd-unit", "--suite", "process")
        assert found.case("process.setuid")["result"] == "refused"
        return
    refused = kit("--target", "systemd-unit")
    assert (refused.code, refused.report) == (1, {})
    assert "systemd does not run here as process 1" in refused.text


LIAR = r"""
import re, sys
program = sys.stdin.read()
token = re.search(r'token[\\": ]+([0-9a-f]{24})', program).group(1)
names = re.findall(r'id[\\": ]+((?:twin\.|net\.)[a-z0-9.-]+)', program)
import contextlib, io, json
said = io.StringIO()
with contextlib.redirect_stdout(said):
    exec(program)
for name in names:
    print("saw-probe:" + token + " " + json.dumps({"id": name, "outcome": "refused", "errno": "EPERM"}))
print("saw-probe:" + token + " " + json.dumps({"end": len(names)}))
"""


def test_a_sandbox_that_lies_is_caught_by_the_recorder(kit, tmp_path):
    liar = tmp_path / "liar.py"
    liar.write_text(LIAR, encoding="utf-8")
    words = ("--recorder", "127.0.0.1", "--case", "net.tcp.high", "--suite", "network")
    lying = kit("--target", f"cmd:{sys.executable} {liar}", *words)
    case = lying.case("net.tcp.high")
    assert (lying.code, case["result"], case["arrived"]) == (1, "allowed", True), lying.text
    assert case["evidence"]["problem"] == "the probe said refused, and it arrived"
    without = kit("--target", f"cmd:{sys.executable} {liar}", "--case", "net.tcp.high")
    assert without.case("net.tcp.high")["result"] == "not_applicable"


def test_a_target_that_does_not_run_python_is_named_and_leaves_no_report(kit):
    for target in ("cmd:/bin/false", "cmd:/bin/true"):
        found = kit("--target", target, "--suite", "sockets")
        assert found.code == 1
        if target == "cmd:/bin/false":
            assert "check that the command runs Python" in found.text
            assert found.report == {}
        else:
            assert set(found.by(suite="sockets").values()) == {"error"}


def test_an_interrupted_run_ends_its_children_and_writes_nothing(tmp_path, recording):
    held = tmp_path / "started"
    script = f"touch {shlex.quote(str(held))}; echo $$ >>{shlex.quote(str(held))}; exec sleep 300"
    words = [
        sys.executable,
        "-m",
        "saw.cli.main",
        "conformance",
        "run",
        "--suite",
        "sockets",
        "--recorder",
        "127.0.0.1",
    ]
    target = f"cmd:sh -c {shlex.quote(script)}"
    process = subprocess.Popen(
        [*words, "--target", target, "--output", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not (held.exists() and held.read_text().strip()):
        assert time.monotonic() < deadline, "the target did not start"
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, "interrupted" in said) == (130, True)
    assert not (tmp_path / "out").exists()
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(held.read_text().split()[0]), 0)
        pytest.fail("the target's process was left running")
