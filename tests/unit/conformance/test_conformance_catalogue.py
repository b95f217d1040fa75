"""What holds for every case of the conformance kit, and how its parts read what they are given."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from saw.cli import conformance as command
from saw.conformance import catalogue, present, report, targets, transfer
from saw.conformance.case import FACTS, NONCE, SUITES, Case, MissingFactError, fill, new_nonce
from saw.conformance.probe import core, far, files, git, h2, net, process, web
from saw.conformance.run import destination
from saw.conformance.verdict import TwinResult, judge, judge_twin, missing
from saw.errors import ConfigError, UnavailableError
from saw.policy.errors import PolicyError

ROOT = Path(__file__).parents[3]
PROBE = (core, net, process, files, git, web, h2, far)
CONTROLS = {entry["id"] for entry in yaml.safe_load((ROOT / "docs/controls.yml").read_text(encoding="utf-8"))}
OLDEST = "python3.9"
WORKS = TwinResult("twin.x", "works")
CASE = Case(
    "x.one", "NET-01", "network", "an attack", "tcp", {}, "layer", ("EPERM", "dropped"), "twin.x", recorded=True
)


def told(outcome: str, **more) -> transfer.Told:
    return transfer.Told("x.one", outcome, **more)  # type: ignore[arg-type]


def judged(found, arrivals, *, case=CASE, ours=True, twin=WORKS):
    return judge(case, found, arrivals, twin, ours=ours, tried="an attempt")


def test_there_are_enough_cases_and_every_id_is_used_once():
    ids = [case.id for case in catalogue.attacks()] + list(catalogue.twins())
    assert len(catalogue.attacks()) >= 100
    assert len(ids) == len(set(ids))
    assert {case.suite for case in catalogue.attacks()} == set(SUITES)


@pytest.mark.parametrize("case", [*catalogue.attacks(), *catalogue.twins().values()], ids=lambda case: case.id)
def test_every_case_is_complete(case):
    assert case.control in CONTROLS
    assert case.facts() <= set(FACTS), "a fact without words for its absence"
    attempt = core.ATTEMPTS[case.attempt]
    names = attempt.__code__.co_varnames[: attempt.__code__.co_argcount]
    required = names[: len(names) - len(attempt.__defaults__ or ())]
    assert set(required) <= set(case.arguments) <= set(names)
    if not case.is_twin:
        assert case.expected
        assert case.layer
        assert case.twin in catalogue.twins() or case.no_twin
        assert not case.arrival or case.recorded, "only what is recorded can be judged by its arrival"


def test_every_attempt_is_used_and_carries_a_nonce_where_it_is_recorded():
    cases = [*catalogue.attacks(), *catalogue.twins().values()]
    assert set(core.ATTEMPTS) == {case.attempt for case in cases}
    without = [c.id for c in catalogue.attacks() if c.recorded and "${nonce}" not in json.dumps(dict(c.arguments))]
    assert without == []


def test_the_probe_imports_the_standard_library_and_itself_only():
    for path in (ROOT / "src/saw/conformance/probe").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                assert top in sys.stdlib_module_names or name.startswith("saw.conformance.probe"), (path, name)


def run_probe(python: str, *cases: dict) -> transfer.Answer:
    job = {"token": "t" * 24, "cases": list(cases)}
    done = subprocess.run([python, "-I", "-"], input=transfer.script(job), capture_output=True, check=True, timeout=60)
    return transfer.read(done.stdout, job["token"], {case["id"] for case in cases})


def test_the_probe_says_what_happened_of_each_kind():
    def case(name, attempt, **arguments):
        return {"id": name, "attempt": attempt, "arguments": arguments, "seconds": 5}

    answer = run_probe(
        sys.executable,
        case("works", "unix-pair", nonce="saw-x"),
        case("refused", "read", path="/nonexistent/file"),
        case("broken", "read"),
        case("absent", "no-such-attempt"),
        case("slow", "listen", port=0, kind="tcp", seconds=0.05),
        case("not", "interfaces", marks=[]),
    )
    assert answer.problems == []
    found = {name: one.outcome for name, one in answer.told.items()}
    assert found == {
        "works": "allowed", "refused": "refused", "broken": "error", "absent": "error", "slow": "refused", "not": "not_possible",
    }  # fmt: skip
    assert (answer.told["refused"].errno, answer.told["slow"].errno) == ("ENOENT", "timeout")


def test_more_memory_than_there_may_be_is_refused_and_what_there_is_is_had():
    def asked(name: str, mib: int) -> dict:
        return {"id": name, "attempt": "limit", "arguments": {"what": "memory", "bound": mib * 1024**2}, "seconds": 30}

    job = {"token": "t" * 24, "cases": [asked("more", 4096), asked("some", 16)]}
    words = ["prlimit", f"--as={512 * 1024**2}", sys.executable, "-I", "-"]
    done = subprocess.run(words, input=transfer.script(job), capture_output=True, check=True, timeout=60)
    answer = transfer.read(done.stdout, job["token"], {"more", "some"})
    assert (answer.told["more"].outcome, answer.told["more"].errno) == ("refused", "ENOMEM")
    assert answer.told["some"].outcome == "allowed"


def test_files_are_made_and_removed_again(tmp_path):
    def asked(name: str, **more: float) -> dict:
        arguments = {"path": str(tmp_path), "count": 50, **more}
        return {"id": name, "attempt": "fill-inodes", "arguments": arguments, "seconds": 30}

    answer = run_probe(sys.executable, asked("few"), asked("slow", patience=-1))
    assert {name: one.outcome for name, one in answer.told.items()} == {"few": "allowed", "slow": "not_possible"}
    assert list(tmp_path.iterdir()) == []


def test_an_attempt_that_is_killed_or_hangs_ends_and_is_named():
    killed = {
        "id": "killed",
        "attempt": "call",
        "arguments": {"number": 62, "arguments": [0, 9], "reached": []},
        "seconds": 5,
    }
    hangs = {"id": "hangs", "attempt": "listen", "arguments": {"port": 0, "kind": "tcp", "seconds": 60}, "seconds": 0.2}
    answer = run_probe(sys.executable, killed, hangs)
    assert answer.told["killed"].errno == "signal:SIGKILL"
    assert answer.told["hangs"].errno == "timeout"


def test_the_probe_runs_on_the_oldest_python():
    if shutil.which(OLDEST) is None or subprocess.run([OLDEST, "-c", ""], capture_output=True, check=False).returncode:
        pytest.skip("the oldest Python for the probe is not installed")
    one = {"id": "one", "attempt": "fork-exec", "arguments": {}, "seconds": 5}
    assert run_probe(OLDEST, one).told["one"].outcome == "allowed"


# --- HTTP/2 without a library


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        ("88", 200), ("8c", 400), ("4803333032", 302), ("4882 6402", 302), ("4883 640e ff", 307), ("4883 680c ff", 403),
        ("0e03353033", 503), ("3fe11f 88", 200), ("20 88", 200), ("", 0), ("82", 0), ("48", 0), ("3fff", 0),
    ],
)  # fmt: skip
def test_the_status_of_an_answer_is_read_as_rfc_7541_writes_it(raw, status):
    assert h2.status_of(bytes.fromhex(raw)) == status


def test_headers_are_sent_as_they_stand():
    assert (
        h2.block(["custom-key", "custom-header"]) == b"\0\x0acustom-key\x0dcustom-header"
    )  # RFC 7541, C.2.1, not indexed
    assert h2.block(["a", "x" * 1337])[3:6] == b"\x7f\xba\x09"
    assert h2.frame(h2.HEADERS, 5, 1, b"abc") == b"\0\0\x03\x01\x05\0\0\0\x01abc"


@given(st.binary(max_size=40))
def test_no_answer_breaks_the_reader_of_the_status(raw):
    assert h2.status_of(raw) >= 0


# --- what the pages say


def test_the_pages_count_the_cases_as_they_are():
    page = (ROOT / "docs/conformance.md").read_text(encoding="utf-8")
    told = {name: int(number) for name, number in re.findall(r"(?m)^\| `([a-z]+)` \| (\d+) \| ", page)}
    assert told == {suite: sum(case.suite == suite for case in catalogue.attacks()) for suite in SUITES}
    assert f"In all {len(catalogue.attacks())} cases." in page
    sandbox = (ROOT / "docs/sandbox.md").read_text(encoding="utf-8")
    assert f"tries {len(catalogue.attacks())} attacks from inside" in sandbox


def test_the_page_explains_every_option_of_a_run(capsys):
    with pytest.raises(SystemExit):
        command.main(["run", "--help"])
    options = set(re.findall(r"(?m)^  (--[a-z-]+)", capsys.readouterr().out))
    page = (ROOT / "docs/conformance.md").read_text(encoding="utf-8")
    assert {name for name in options if name not in page} <= {"--json"}


# --- a sandbox that lies

TOKEN = "k" * 24


def line(**content) -> bytes:
    return f"saw-probe:{TOKEN} {json.dumps(content)}\n".encode()


def test_an_honest_output_is_read_and_other_lines_mean_nothing():
    raw = b"welcome\n" + line(id="a", outcome="refused", errno="EPERM") + b"saw-probe:other {}\r\n" + line(end=1)
    answer = transfer.read(raw, TOKEN, {"a"})
    assert (answer.problems, answer.told["a"].errno) == ([], "EPERM")


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (line(end=1), "no answer for a"),
        (line(id="a", outcome="refused"), "did not come to its end"),
        (line(id="a", outcome="refused") + line(end=2), "did not come to its end"),
        (line(id="b", outcome="refused") + line(end=1), "nobody asked for"),
        (line(id="a", outcome="refused") + line(id="a", outcome="refused") + line(end=1), "told of twice"),
        (line(id="a", outcome="perfect") + line(end=1), "cannot be read"),
        (line(id="a", outcome="refused", result="pass") + line(end=1), "cannot be read"),
        (line(id="a", outcome="refused", status="403") + line(end=1), "cannot be read"),
        (line(id="a", outcome="refused", detail="x" * 9000) + line(end=1), "too long"),
        (b"x" * (transfer.LONGEST_OUTPUT + 1), "bytes were written"),
        (line(end=1).replace(TOKEN.encode(), b"k"), "no answer for a"),
        (b"", "no answer for a"),
    ],
)
def test_what_is_not_as_asked_is_a_problem_and_never_an_answer(raw, problem):
    answer = transfer.read(raw, TOKEN, {"a"})
    assert any(problem in text for text in answer.problems), answer.problems
    made = report.make("t", "now", [judged(answer.told.get("a") and None, None)], answer.problems, [])
    assert not made.ok


@given(st.binary(max_size=400))
def test_no_output_breaks_the_reader_or_passes(raw):
    answer = transfer.read(raw + b"\n" + f"saw-probe:{TOKEN} ".encode() + raw, TOKEN, {"a"})
    assert answer.told == {}
    assert answer.problems


# --- verdicts


def test_what_arrived_was_allowed_whatever_the_probe_says():
    for found in (told("refused", errno="EPERM"), told("not_possible"), told("error"), None):
        result = judged(found, ["tcp 192.0.2.10 443"])
        assert (result.result, result.finding, result.arrived) == ("allowed", True, True)
    honest = judged(told("refused", errno="EPERM"), [])
    assert (honest.result, honest.reason_ok, honest.finding, honest.arrived) == ("refused", True, False, False)


def test_the_reason_must_be_the_intended_one_in_our_own_workspaces():
    other = told("refused", errno="ENOMEM")
    assert judged(other, []).result == "wrong_reason"
    assert judged(other, []).finding
    foreign = judged(other, [], ours=False)
    assert (foreign.result, foreign.reason_ok, foreign.finding) == ("refused", None, False)
    for right in (told("refused", status=403, reason="host_not_allowed"), told("refused", status=403)):
        case = Case("x", "RUN-01", "http", "t", "connect", {}, "l", ("host_not_allowed", "status:403"), "twin.x")
        assert judged(right, None, case=case).reason_ok is True


def test_a_packet_that_the_kernel_took_is_refused_only_when_the_recorder_heard_nothing():
    case = Case("x", "NET-01", "network", "t", "udp", {}, "l", ("dropped",), "twin.x", arrival=True, recorded=True)
    assert judged(told("allowed"), [], case=case).result == "refused"
    assert judged(told("allowed"), None, case=case).result == "allowed"
    assert judged(told("allowed"), []).result == "allowed"


def test_a_broken_twin_is_a_finding_and_one_that_cannot_be_tried_is_not():
    twin = catalogue.twins()["twin.files.tmp"]
    broken = judge_twin(twin, told("refused", errno="EROFS"), None)
    assert broken.result == "broken"
    assert judged(told("refused", errno="EPERM"), [], twin=broken).finding
    assert judge_twin(twin, None, None).result == "broken"
    works = judge_twin(twin, told("allowed"), None)
    assert not judged(told("refused", errno="EPERM"), [], twin=works).finding
    web_twin = catalogue.twins()["twin.http.get"]
    assert judge_twin(web_twin, told("allowed"), []).result == "broken"
    assert judge_twin(web_twin, told("allowed"), ["log"]).result == "works"


def test_a_case_that_cannot_be_tried_is_no_pass():
    nothing = report.make("t", "now", [missing(CASE, "no recorder outside")], [], [])
    assert (nothing.ok, nothing.summary.score, nothing.summary.total.applicable) == (False, 0.0, 0)
    something = report.make("t", "now", [missing(CASE, "x"), judged(told("refused", errno="EPERM"), [])], [], [])
    assert (something.ok, something.summary.score) == (True, 100.0)


def test_facts_fill_arguments_and_their_absence_is_told():
    nonce = new_nonce()
    assert NONCE.fullmatch(nonce)
    case = Case(
        "x", "NET-01", "network", "t", "tcp", {"address": "${v4}", "port": "${proxy_port}", "payload": "a ${nonce}"}
    )
    assert fill(case, {"v4": "192.0.2.1", "proxy_port": 3128}, nonce) == {
        "address": "192.0.2.1", "port": 3128, "payload": f"a {nonce}",
    }  # fmt: skip
    with pytest.raises(MissingFactError, match="no proxy is known"):
        fill(case, {"v4": "192.0.2.1"}, nonce)


# --- reports

EVIL = "<script>alert(1)</script>\"'&\x1b[2J\u202e"


def evil_report():
    result = judged(told("refused", errno="EPERM", detail=EVIL), [EVIL], twin=TwinResult(EVIL, "broken", EVIL))
    return report.make(EVIL, EVIL, [result], [EVIL], [EVIL])


def test_pages_and_tables_escape_what_a_sandbox_wrote():
    made = evil_report()
    for page in (present.page(made), present.comparison_page([made, made])):
        assert "<script" not in page
        assert "\x1b" not in page
        assert "\u202e" not in page
        assert "default-src 'none'" in page
        assert "prefers-color-scheme:dark" in page
        assert "&lt;script&gt;" in page
    for text in (present.summary(made), present.comparison([made])):
        assert "\x1b" not in text
        assert "\u202e" not in text


def test_a_report_is_read_back_as_it_was_and_nothing_else_is(tmp_path, capsys):
    good = report.make("cmd:x", "now", [judged(told("refused", errno="EPERM"), [])], [], ["a note"])
    path = tmp_path / "report.json"
    path.write_bytes(report.encode(good))
    assert report.load(path) == good
    assert command.main(["compare", str(path), str(path), "--html", str(tmp_path / "c.html")]) == 0
    assert "1/1 (100 %)" in capsys.readouterr().out
    assert "cmd:x" in (tmp_path / "c.html").read_text(encoding="utf-8")
    for change in ({"schema": 1}, {"more": 1}, {"ok": "yes"}):
        (tmp_path / "bad.json").write_text(json.dumps({**json.loads(path.read_bytes()), **change}), encoding="utf-8")
        with pytest.raises(ConfigError):
            report.load(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="cannot read"):
        report.load(tmp_path / "none.json")


def test_the_layer_that_answered_is_told_apart_from_the_one_that_is_expected():
    case = Case("x", "RUN-01", "http", "t", "tunnel", {}, "ring 1: request", ("host_not_allowed", "EPERM"), "twin.x")
    own = judged(told("refused", reason="host_not_allowed", layer="ring1"), None, case=case)
    assert (own.layer, own.layer_ok, own.expected_layer, own.result) == ("ring1", True, "ring 1: request", "refused")
    other = judged(told("refused", reason="host_not_allowed", layer="ring2"), None, case=case)
    assert (other.layer, other.layer_ok, other.result, other.finding) == ("ring2", False, "refused", False)
    nobody = judged(told("refused", reason="host_not_allowed"), None, case=case)
    assert (nobody.layer, nobody.layer_ok) == ("", None)
    kernel = judged(told("refused", errno="EPERM"), None, case=case)
    assert (kernel.layer, kernel.layer_ok) == ("kernel", False)
    inside = judged(told("refused", errno="EPERM"), [])
    assert (inside.layer, inside.layer_ok) == ("kernel", None)  # it does not say which of its parts refused
    assert judged(told("refused", errno="timeout"), []).layer == ""
    made = report.make("t", "now", [own, other], [], [])
    assert made.ok
    assert present.elsewhere(made) == ["~ x [RUN-01] t: refused by ring2, expected of ring 1: request"]
    assert "(another layer)" in present.page(made)
    assert "(another layer)" not in present.page(report.make("t", "now", [own], [], []))


# --- behind a proxy


@pytest.mark.parametrize(
    ("authority", "place"),
    [
        ("192.0.2.10:443", ("192.0.2.10", 443)), ("3221225994:443", ("192.0.2.10", 443)), ("0xc000020a:443", ("192.0.2.10", 443)),
        ("0300.0.02.012:80", ("192.0.2.10", 80)), ("127.1:443", ("127.0.0.1", 443)), ("0:443", ("127.0.0.1", 443)),
        ("localhost.:443", ("127.0.0.1", 443)), ("[::ffff:192.0.2.10]:443", ("192.0.2.10", 443)), ("[::1]:443", ("::1", 443)),
        ("a.example.com:443", None), ("192.0.2.10", None), ("192.0.2.10:x", None), (":443", None),
        ("unlisted.invalid\t.x:443", None),
    ],
)  # fmt: skip
def test_an_address_is_known_in_whatever_form_it_is_asked_for(authority, place):
    assert destination(authority) == place


def test_a_recorder_is_at_an_address():
    assert targets.recorder_facts("192.0.2.10") == {
        "v4": "192.0.2.10",
        "v4_number": "3221225994",
        "v4_hex": "0xc000020a",
    }
    assert targets.recorder_facts("2001:db8::10") == {"v6": "2001:db8::10"}
    with pytest.raises(ConfigError, match="is no address"):
        targets.recorder_facts("host.example.com")


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ("8802 03f0", "close:1008"), ("8105 68656c6c6f 8802 03ea", "close:1002"),
        ("817e0080" + "61" * 128 + "880203f0", "close:1008"),
        ("8800", "close:0"), ("8105 6865", ""), ("81", ""), ("", ""),
    ],
)  # fmt: skip
def test_the_close_of_a_websocket_is_read_behind_other_frames(raw, told):
    assert far.closed(bytes.fromhex(raw)) == told


@given(st.binary(max_size=40))
def test_no_frame_breaks_the_reader_of_a_close(raw):
    assert far.closed(raw) == "" or far.closed(raw).startswith("close:")


# --- the command


@pytest.mark.parametrize("target", ["nothing", "bare:x", "cmd:", "ssh:", "workspace:", "cmd:'", ""])
def test_a_wrong_target_is_named(target):
    with pytest.raises(ConfigError), targets.open_target(target, targets.Options()):
        pass


def test_remote_targets_run_python_on_standard_input():
    with targets.open_target("cmd:docker exec -i box", targets.Options(python="python3.12")) as session:
        assert session.command == ["docker", "exec", "-i", "box", "python3.12", "-I", "-u", "-"]
        assert not session.ours
    with targets.open_target("workspace:ws-demo", targets.Options()) as session:
        assert session.command[1:] == ["ssh", "ws-demo", "--", "/usr/bin/python3", "-I", "-u", "-"]
        assert session.ours
    with targets.open_target("ssh:-p 22 agent@host", targets.Options(python="/opt/my python")) as session:
        assert session.command[-1] == "'/opt/my python' -I -u -"


@pytest.mark.parametrize(
    "change", [{"proxy": "10.200.0.1"}, {"allowed_url": "http://a.example/"}, {"allowed_url": "x"}]
)
def test_wrong_facts_about_the_proxy_are_refused(change):
    with pytest.raises(ConfigError), targets.open_target("cmd:env", targets.Options(**change)):
        pass
    good = targets.Options(proxy="10.200.0.1:3128", allowed_url="https://a.example/v1")
    with targets.open_target("cmd:env", good) as session:
        assert (session.facts["proxy_port"], session.facts["allowed_path"]) == (3128, "/v1")


def test_cases_are_listed_and_an_unknown_suite_or_case_is_refused(capsys):
    assert command.main(["list", "--suite", "sockets", "--json"]) == 0
    assert {row["suite"] for row in json.loads(capsys.readouterr().out)["cases"]} == {"sockets"}
    assert command.main(["list"]) == 0
    assert "net.tcp.direct" in capsys.readouterr().out
    for wrong in (["list", "--suite", "x"], ["run", "--case", "x"]):
        with pytest.raises(ConfigError):
            command.main(wrong)
    with pytest.raises(SystemExit) as stop:
        command.main([])
    assert stop.value.code == 2


def test_the_address_of_an_mcp_server_is_an_https_address() -> None:
    facts = targets.web_facts(targets.Options(mcp_url="https://a.example.com:8443/mcp"), environment=True)
    assert (facts["mcp_authority"], facts["mcp_path"]) == ("a.example.com:8443", "/mcp")
    with pytest.raises(ConfigError, match="--mcp-url is no https address"):
        targets.web_facts(targets.Options(mcp_url="http://a.example.com/mcp"), environment=True)


def test_a_graphql_address_is_an_https_address() -> None:
    facts = targets.web_facts(targets.Options(graphql_url="https://a.example.com/graphql"), environment=True)
    assert (facts["graphql_authority"], facts["graphql_path"]) == ("a.example.com:443", "/graphql")
    assert "graphql_host" not in targets.web_facts(targets.Options(), environment=True)
    with pytest.raises(ConfigError, match="--graphql-url is no https address"):
        targets.web_facts(targets.Options(graphql_url="http://a.example.com/graphql"), environment=True)


GOVERNANCE = "schema: 1\nblueprint: {name: coding, version: 1.0.0, owner: team}\nsandbox: {limits: {%s}}\n"


@pytest.mark.parametrize(
    ("limits", "tmp", "shm"),
    [
        (None, 1024, 1024),
        ("", 513, 513),
        ("tmp: 2GiB, shm: 64MiB", 2049, 65),
        ("tmp: 3GiB", None, 513),
        ("memory: 1GiB, tmp: 1023MiB, shm: 1022MiB", None, 1023),
    ],
)
def test_more_is_tried_than_a_temporary_directory_may_hold(
    tmp_path: Path, limits: str | None, tmp: int | None, shm: int | None
) -> None:
    named = tmp_path / "governance.yaml"
    if limits is not None:
        named.write_text(GOVERNANCE.replace("%s", limits))
    options = targets.Options(governance="" if limits is None else str(named))
    with targets.open_target("cmd:true", options) as session:
        facts = session.facts
    cases = {case.id: case for case in catalogue.attacks()}
    for name, sized in (("tmp", tmp), ("var-tmp", tmp), ("shm", shm)):
        case = cases[f"files.limit.{name}"]
        if sized is None:
            with pytest.raises(MissingFactError, match="as much of it as of memory"):
                fill(case, facts, "saw-x")
        else:
            assert fill(case, facts, "saw-x")["size"] == sized * 1024**2


def test_a_policy_that_cannot_be_read_says_no_size(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        targets.limit_facts(targets.Options(governance=str(tmp_path / "none.yaml")))
    (tmp_path / "bad.yaml").write_text(GOVERNANCE.replace("%s", "tmp: much"))
    with pytest.raises(PolicyError):
        targets.limit_facts(targets.Options(governance=str(tmp_path / "bad.yaml")))


# ---------------------------------------------------------------- a systemd unit


def test_systemd_knows_every_property_of_the_unit(tmp_path):
    def complaints(properties):
        unit = tmp_path / "saw-x.service"
        unit.write_text("\n".join(["[Service]", "ExecStart=/bin/true", *properties, ""]), encoding="utf-8")
        words = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120).stderr

    assert "saw-x.service" not in complaints(targets.UNIT)
    assert "ProtectProcs" in complaints([*targets.UNIT, "ProtectProcs=invisible"])


def test_a_unit_on_another_host_is_one_command_there_as_nobody_with_a_home_that_goes_with_it():
    with targets.open_target("systemd-unit:-p 2222 root@box.example.com", targets.Options()) as session:
        *way, inside = session.command
    assert way == ["ssh", "-T", "-o", "BatchMode=yes", "-p", "2222", "root@box.example.com"]
    words = shlex.split(inside)
    assert words[0] == "systemd-run" and words[-5:] == ["--", "/usr/bin/python3", "-I", "-u", "-"]
    properties = {words[index + 1] for index, word in enumerate(words) if word == "-p"}
    assert set(targets.UNIT) < properties
    home = next(word.removeprefix("--setenv=HOME=") for word in words if word.startswith("--setenv=HOME="))
    assert f"RuntimeDirectory={home.removeprefix('/run/')}" in properties and f"--uid={targets.NOBODY}" in words
    with pytest.raises(ConfigError, match="needs a command"), targets.open_target("systemd-unit: ", targets.Options()):
        pass


def test_a_host_without_the_system_bus_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "BOOTED", tmp_path)
    monkeypatch.setattr(targets, "BUS", tmp_path / "bus")
    with (
        pytest.raises(UnavailableError, match="needs the system bus") as caught,
        targets.open_target("systemd-unit", targets.Options()),
    ):
        pass
    assert caught.value.cure == "apt-get install dbus"
