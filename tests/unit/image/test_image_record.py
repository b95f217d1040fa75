"""The release record of a built image: what its boot must measure is computed from its bytes and held against the boot."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from uki_parts import EVIDENCE, LYNIS, PARTS, Golden, golden_folder, kernel, portable, uki

from saw.attest.image_record import PAYLOAD_TYPE, RecordInvalid, parse_record
from saw.cli.image import main
from saw.errors import SawError
from saw.image.disk import ImageError
from saw.image.expected import authenticode, differences, expected_pcrs, uki_sections, unified_kernel
from saw.image.record import make_record
from saw.policy.envelope import payload_of, read_envelope
from saw.policy.keys import create_key

ROOT = Path(__file__).resolve().parents[3]
MEASURE = Path("/usr/lib/systemd/systemd-measure")
pytestmark = pytest.mark.control("IMG-01")


@pytest.fixture
def golden(tmp_path: Path) -> Golden:
    return golden_folder(tmp_path / "image")


class Boots:
    """Counts reference boots and answers with what the image measures, but for ``pcrs``."""

    def __init__(self, golden: Golden, **pcrs: str) -> None:
        self.answer, self.count, self.said = golden.answer(**pcrs), 0, []

    def __call__(self, image: Path) -> dict[str, Any]:
        assert image.name == "image.qcow2"
        self.count += 1
        return dict(self.answer)

    def say(self, text: str) -> None:
        self.said.append(text)


# --- what follows from the bytes -------------------------------------------------------------------------------------


def test_the_boot_program_is_read_out_of_the_image(golden: Golden) -> None:
    assert unified_kernel(golden.folder / "image.qcow2") == uki()


@pytest.mark.skipif(not MEASURE.exists(), reason="systemd-measure is not installed")
def test_pcr_11_is_what_systemd_measure_computes(tmp_path: Path) -> None:
    parts = {".linux": kernel(), ".osrel": PARTS[".osrel"], ".cmdline": PARTS[".cmdline"]}
    options = []
    for name, content in parts.items():
        (tmp_path / name[1:]).write_bytes(content)
        options.append(f"--{name[1:]}={tmp_path / name[1:]}")
    told = subprocess.run(
        [str(MEASURE), "calculate", "--bank=sha256", "--phase=", *options],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert expected_pcrs(portable(parts))["11"][0] in told.stdout


def test_each_measured_part_of_the_program_changes_pcr_11_and_the_stub_pcr_4_alone() -> None:
    plain = expected_pcrs(uki())
    for changed in (
        {**PARTS, ".linux": kernel(b"other!")},
        {**PARTS, ".cmdline": b"init=/bin/sh\0", ".linux": kernel()},
    ):
        found = expected_pcrs(portable(changed))
        assert (found["4"] != plain["4"], found["11"] != plain["11"]) == (True, True)
    stub = expected_pcrs(portable({**PARTS, ".text": b"evil" * 100, ".linux": kernel()}))
    assert (stub["4"] != plain["4"], stub["11"] == plain["11"]) == (True, True)


def test_a_signature_and_a_checksum_are_not_part_of_what_firmware_measures() -> None:
    plain, signed = uki(), bytearray(portable({**PARTS, ".linux": kernel()}, signatures=b"s" * 64))
    assert authenticode(bytes(signed)) == authenticode(plain)
    (start,) = struct.unpack_from("<I", signed, 0x3C)
    struct.pack_into("<I", signed, start + 24 + 64, 1)
    assert authenticode(bytes(signed)) == authenticode(plain)
    assert authenticode(portable({**PARTS, ".linux": kernel()}, tail=b"more")) != authenticode(plain)


def test_a_section_is_measured_as_it_lies_in_memory() -> None:
    program = bytearray(portable({".osrel": b"ID=x", ".linux": kernel()}))
    (start,) = struct.unpack_from("<I", program, 0x3C)
    (optional,) = struct.unpack_from("<H", program, start + 20)
    struct.pack_into("<I", program, start + 24 + optional + 8, 600)
    assert uki_sections(bytes(program))[".osrel"] == b"ID=x".ljust(600, b"\0")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (b"", "it is cut or no EFI program"),
        (b"MZ" + b"\0" * 4096, "it is no 64-bit EFI program"),
        (portable({".text": b"x"}), "it has no kernel"),
        (portable({".linux": kernel(), ".profile": b"ID=other"}), "section .profile is not one"),
        (uki()[:0x700], "it is cut"),
        (portable({".linux": b"no program"}), "it is cut or no EFI program"),
    ],
    ids=["empty", "zeros", "no kernel", "profiles", "cut", "kernel is none"],
)
def test_what_is_no_unified_kernel_image_is_refused(program: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        expected_pcrs(program)


@given(st.binary(max_size=2048), st.integers(0, 0x5FF))
def test_a_damaged_program_is_refused_or_measured_and_nothing_else(noise: bytes, at: int) -> None:
    program = uki()
    try:
        expected_pcrs(program[:at] + noise + program[at + len(noise) :])
    except ImageError as error:
        assert error.cure


def test_a_difference_names_both_values() -> None:
    assert differences({"4": ("a", "b"), "11": ("c",)}, {"4": "b", "11": "c"}) == []
    assert differences({"4": ("a", "b"), "11": ("c",)}, {"4": "x"}) == [
        "PCR 4 is x, computed from the image is a or b", "PCR 11 is missing, computed from the image is c",
    ]  # fmt: skip


# --- the record ------------------------------------------------------------------------------------------------------


def test_an_image_gets_a_record_with_one_boot_and_a_second_run_changes_nothing(golden: Golden) -> None:
    boots = Boots(golden)
    made = make_record(golden.folder, boots, boots.say)
    assert (made.changed, made.booted, boots.count) == (True, True, 1)
    record = parse_record(json.dumps({**made.record, "not_after": "2099-01-01T00:00:00Z"}).encode())
    assert record.missing(("sbom", "provenance")) == []
    assert record.expected_pcrs()[11] == golden.expected["11"]
    assert 14 not in record.expected_pcrs()
    raw = (golden.folder / "release.json").read_bytes()
    again = make_record(golden.folder, boots, boots.say)
    assert (again.changed, again.booted, boots.count) == (False, False, 1)
    assert (golden.folder / "release.json").read_bytes() == raw
    (golden.folder / "release.json").unlink()  # as after a kill between the boot and the record
    assert (make_record(golden.folder, boots, boots.say).changed, boots.count) == (True, 1)
    assert (golden.folder / "release.json").read_bytes() == raw


def test_another_firmware_or_a_wish_boots_it_again(golden: Golden) -> None:
    boots = Boots(golden)
    make_record(golden.folder, boots, boots.say, firmware="9" * 64)
    make_record(golden.folder, boots, boots.say, firmware="9" * 64)
    assert boots.count == 1
    make_record(golden.folder, boots, boots.say, firmware="8" * 64)
    make_record(golden.folder, boots, boots.say, again=True)
    assert boots.count == 3


@pytest.mark.parametrize("pcr", ["4", "11"])
def test_a_boot_that_measured_something_else_makes_no_record(golden: Golden, pcr: str) -> None:
    boots = Boots(golden, **{pcr: "f" * 64})
    with pytest.raises(ImageError, match=f"PCR {pcr} is {'f' * 64}, computed from the image is {golden.expected[pcr]}"):
        make_record(golden.folder, boots, boots.say)
    assert not (golden.folder / "release.json").exists()
    assert not (golden.folder / "reference.json").exists()


def test_a_boot_without_the_owners_keys_is_not_kept_and_the_next_one_counts(golden: Golden) -> None:
    built = json.loads((golden.folder / "build.json").read_text())
    (golden.folder / "secure-boot.fd").write_bytes(b"store")
    store = hashlib.sha256(b"store").hexdigest()
    built["secure_boot"] = {"certificate_sha256": "3" * 64, "variables_sha256": store, "pcr_7": "7" * 64}
    built["evidence"]["secure-boot.fd"] = store
    (golden.folder / "build.json").write_text(json.dumps(built))
    wrong, right = Boots(golden), Boots(golden, **{"7": "7" * 64})
    with pytest.raises(ImageError, match=f"PCR 7 is {7:064x}, computed from the image is {'7' * 64}"):
        make_record(golden.folder, wrong, wrong.say)
    assert not (golden.folder / "reference.json").exists()
    assert make_record(golden.folder, right, right.say).record["boot"]["pcrs"]["7"] == "7" * 64
    golden.measured("reference.json")  # as an earlier release kept it
    assert make_record(golden.folder, right, right.say).booted
    assert not make_record(golden.folder, right, right.say).booted


def test_a_boot_of_another_image_or_without_a_value_makes_no_record(golden: Golden) -> None:
    boots = Boots(golden)
    boots.answer["image_sha256"] = "0" * 64
    with pytest.raises(ImageError, match="the reference boot was one of SHA-256 0000"):
        make_record(golden.folder, boots, boots.say)
    boots = Boots(golden)
    del boots.answer["pcrs"]["7"]  # type: ignore[attr-defined]
    with pytest.raises(ImageError, match="reported no PCR 7"):
        make_record(golden.folder, boots, boots.say)


@pytest.mark.parametrize("path", ["image.qcow2", *EVIDENCE])
def test_what_is_not_what_the_build_left_makes_no_record(golden: Golden, path: str) -> None:
    with (golden.folder / path).open("ab") as stream:
        stream.write(b"x")
    boots = Boots(golden)
    with pytest.raises(ImageError, match=f"{path} has SHA-256 .*, built was"):
        make_record(golden.folder, boots, boots.say)
    assert boots.count == 0


def test_a_folder_that_is_no_finished_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is no finished image"):
        make_record(tmp_path, lambda _image: {}, print)


def test_the_record_says_which_endpoint_detection_the_image_has(tmp_path: Path) -> None:
    with_edr = golden_folder(tmp_path / "edr", options={"edr": "embedded"})
    boots = Boots(with_edr)
    assert make_record(with_edr.folder, boots, boots.say).record["edr"] == "embedded"


def test_what_a_search_and_a_scanner_said_stays_and_a_report_that_was_changed_shows(golden: Golden) -> None:
    boots = Boots(golden)
    record = make_record(golden.folder, boots, boots.say).record
    report = golden.folder / f"vulnerabilities-{hashlib.sha256(b'{}').hexdigest()[:12]}.json"
    report.write_text("{}")
    record["scan"] = {"database_sha256": "4" * 64, "scanned_at": "2026-11-29T00:00:00Z", "fail_on": "high", "open": 0}
    record["evidence"][report.name] = hashlib.sha256(b"{}").hexdigest()
    (golden.folder / "release.json").write_text(json.dumps(record))
    kept = make_record(golden.folder, boots, boots.say).record
    assert (kept["scan"], kept["evidence"]) == (record["scan"], record["evidence"])
    report.write_text("{ }")
    with pytest.raises(ImageError, match="is not the report that"):
        make_record(golden.folder, boots, boots.say)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_takes_a_hypervisors_answer_and_a_scanners_report(
    golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, lynis = golden.measured("measured.json"), tmp_path / "lynis.dat"
    lynis.write_text(LYNIS.format(index=81))
    words = ["record", str(golden.folder), "--measured", str(told), "--json"]
    assert main([*words, "--baseline", str(lynis)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["changed"], answer["booted"], answer["firmware_sha256"]) == (True, True, "9" * 64)
    assert answer["record"]["baseline"] == {"scanner": "lynis", "version": "3.0.8", "score": 81, "tests": 250}
    digest, evidence = hashlib.sha256(lynis.read_bytes()).hexdigest(), answer["record"]["evidence"]
    assert {name: evidence[name] for name in evidence if name.startswith("baseline")} == {
        f"baseline-{digest[:12]}.dat": digest
    }
    assert main(words) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["changed"], again["record"]) == (False, answer["record"])
    assert main(["evidence", str(golden.folder / "release.json")]) == 0
    (golden.folder / f"baseline-{digest[:12]}.dat").write_text(LYNIS.format(index=99))
    with pytest.raises(ImageError, match="is not the report that") as changed:
        main(words)
    assert "remove " in str(changed.value.cure)
    (golden.folder / "release.json").unlink()  # the cure: the build's own report is still there
    capsys.readouterr()
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["record"]["baseline"]["score"] == 74
    told.write_text("no answer")
    with pytest.raises(SawError, match="is no answer of saw vm measure"):
        main(words)
    lynis.write_text(lynis.read_text().replace("finish=true\n", ""))
    with pytest.raises(SawError, match="is no report of a finished scan"):
        main([*words, "--baseline", str(lynis)])


def test_the_builds_own_score_is_in_the_record_and_a_report_that_was_changed_makes_none(golden: Golden) -> None:
    boots = Boots(golden)
    record = make_record(golden.folder, boots, boots.say).record
    assert record["baseline"] == {"scanner": "lynis", "version": "3.0.8", "score": 74, "tests": 250}
    assert (
        record["evidence"]["baseline.dat"] == hashlib.sha256((golden.folder / "baseline.dat").read_bytes()).hexdigest()
    )
    assert not make_record(golden.folder, boots, boots.say).changed
    (golden.folder / "baseline.dat").write_text(LYNIS.format(index=99))
    with pytest.raises(ImageError, match=r"baseline\.dat has SHA-256 .*, built was"):
        make_record(golden.folder, boots, boots.say)


def test_an_image_of_an_older_release_has_no_score_and_a_record_all_the_same(golden: Golden) -> None:
    built = json.loads((golden.folder / "build.json").read_text())
    del built["evidence"]["baseline.dat"]
    (golden.folder / "build.json").write_text(json.dumps(built))
    (golden.folder / "baseline.dat").unlink()
    boots = Boots(golden)
    assert "baseline" not in make_record(golden.folder, boots, boots.say).record


def test_a_score_without_its_report_is_refused_and_one_with_it_is_taken(golden: Golden) -> None:
    boots = Boots(golden)
    record = make_record(golden.folder, boots, boots.say).record | {"not_after": "2099-01-01T00:00:00Z"}
    bare = {name: digest for name, digest in record["evidence"].items() if name != "baseline.dat"}
    scored = {**record, "evidence": bare, "baseline": {"scanner": "lynis", "version": "3", "score": 81, "tests": 250}}
    with pytest.raises(RecordInvalid, match="states a baseline score and names no report"):
        parse_record(json.dumps(scored).encode())
    named = {**scored, "evidence": {**bare, "baseline.dat": "5" * 64}}
    found = parse_record(json.dumps(named).encode())
    assert (found.baseline is not None, found.missing(["baseline"])) == (True, [])
    without = {name: value for name, value in named.items() if name != "baseline"}
    assert parse_record(json.dumps(without).encode()).missing(["baseline"]) == ["baseline"]
    for wrong in ({"score": 101}, {"score": -1}, {"tests": 0}, {"more": 1}, {"scanner": ""}):
        bad = {**named, "baseline": {**scored["baseline"], **wrong}}
        with pytest.raises(RecordInvalid):
            parse_record(json.dumps(bad).encode())


def test_keep_signs_what_is_lacking_and_nothing_twice(
    golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boots = Boots(golden)
    file = make_record(golden.folder, boots, boots.say).file
    for name in ("ada", "ben"):
        create_key(tmp_path / "keys", name)
    out = tmp_path / "signed.json"

    def sign(*names: str, more: tuple[str, ...] = ()) -> tuple[bool, int]:
        keys = [word for name in names for word in ("--key", str(tmp_path / f"keys/{name}.key"))]
        assert main(["sign", file, "--keep", "--out", str(out), "--json", *keys, *more]) == 0
        answer = json.loads(capsys.readouterr().out)
        return answer["changed"], answer["signatures"]

    assert sign("ada") == (True, 1)
    assert sign("ada") == (False, 1)
    assert sign("ben") == (True, 2)
    raw = out.read_bytes()
    assert (sign("ada", "ben"), out.read_bytes()) == ((False, 2), raw)
    assert sign("ada", more=("--for", "400d")) == (True, 1)  # too little is left for such a wish
    record = json.loads(Path(file).read_text())
    Path(file).write_text(json.dumps({**record, "inputs_digest": "other"}))
    assert sign("ada", "ben") == (True, 2)
    assert json.loads(payload_of(read_envelope(out.read_bytes(), PAYLOAD_TYPE)))["inputs_digest"] == "other"


def test_what_was_signed_before_the_record_changed_shows(
    golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boots = Boots(golden)
    file, out = make_record(golden.folder, boots, boots.say).file, tmp_path / "signed.json"
    create_key(tmp_path / "keys", "ada")
    assert main(["sign", file, "--out", str(out), "--key", str(tmp_path / "keys/ada.key")]) == 0
    assert main(["evidence", file, "--signed", str(out)]) == 0
    Path(file).write_text(json.dumps({**json.loads(Path(file).read_text()), "inputs_digest": "other"}))
    capsys.readouterr()
    assert main(["evidence", file, "--signed", str(out), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["stale"], told["problems"]) == (True, [f"{out} holds another record than {file}: sign this one"])
    assert main(["evidence", file]) == 0


@pytest.mark.parametrize("bound", ["scan.waived_until", "not_after"])
def test_keep_keeps_signatures_of_a_record_that_ends_soon(
    golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str], bound: str
) -> None:
    boots = Boots(golden)
    file = Path(make_record(golden.folder, boots, boots.say).file)
    soon = datetime.now(UTC) + timedelta(days=14)
    scan = {"database_sha256": "4" * 64, "scanned_at": "2026-11-29T00:00:00Z", "fail_on": "high", "open": 0}
    more = {"not_after": soon.strftime("%Y-%m-%dT%H:%M:%SZ")}
    if bound != "not_after":
        more = {"scan": {**scan, "waived_until": soon.date().isoformat()}}  # type: ignore[dict-item]
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    out = tmp_path / "signed.json"
    signatures = []
    for name in ("ada", "ben", "ada"):
        if not (tmp_path / f"keys/{name}.key").exists():
            create_key(tmp_path / "keys", name)
        key = str(tmp_path / f"keys/{name}.key")
        assert main(["sign", str(file), "--keep", "--out", str(out), "--json", "--key", key]) == 0
        signatures.append(json.loads(capsys.readouterr().out)["signatures"])
    assert signatures == [1, 2, 2]


def test_make_image_goes_on_from_a_build_and_signs_with_no_key_that_nobody_gave(golden: Golden, tmp_path: Path) -> None:
    create_key(tmp_path / "keys", "ada")
    built = json.loads((golden.folder / "build.json").read_text())
    (tmp_path / "image.json").write_text(json.dumps({**built, "directory": str(golden.folder), "reason": "built"}))

    def follow(**given: str) -> str:
        done = subprocess.run(
            [str(ROOT / "scripts/image_release.sh"), str(tmp_path / "image.json")],
            capture_output=True, text=True, check=False, timeout=120,
            env={**os.environ, "MEASURED": str(golden.measured("measured.json")), **given},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = follow()
    assert "not searched: give the mirrored database" in said
    assert "not signed: no key was given" in said
    assert f"next: saw image sign {golden.folder}/release.json" in said
    assert not (golden.folder / "release.signed.json").exists()
    assert f"next: saw image register {golden.folder}/release.signed.json" in follow(
        SIGN_KEY=str(tmp_path / "keys/ada.key")
    )
    signed = (golden.folder / "release.signed.json").read_bytes()
    follow(SIGN_KEY=str(tmp_path / "keys/ada.key"))
    assert (golden.folder / "release.signed.json").read_bytes() == signed
