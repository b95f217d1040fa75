"""Attestation against a real TPM: the whole round, and each attack on it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess

import msgspec
import pytest
from attest_lab import CURRENT, EARLIER, NONCE, boot_events, event_log, spki
from swtpm_lab import Machine

from saw.attest.policy_log import measurement
from saw.attest.tpm import Tpm, TpmError, read_ek
from saw.attest.verifier import make_credential, quote_binding, verify_evidence

pytestmark = pytest.mark.control("POL-03")
replace = msgspec.structs.replace


def codes(evidence, expected):
    verdict = verify_evidence(evidence, expected)
    assert verdict.ok is (not verdict.failures)
    return sorted({failure.code for failure in verdict.failures})


def test_whole_round(machine):
    secret = os.urandom(32)
    assert machine.tpm.activate_credential(*make_credential(machine.ek_pem, machine.ak_pub, secret)) == secret
    machine.tpm.extend_policy(EARLIER)
    machine.tpm.extend_policy(CURRENT)
    verdict = verify_evidence(machine.evidence(EARLIER, CURRENT), machine.expectation(EARLIER, CURRENT))
    assert verdict.failures == ()
    assert verdict.policy_digest == CURRENT
    assert verdict.clock.reset_count > 0

    # Over and over without a resource manager: objects that stay loaded are flushed when the TPM is full.
    clocks = [verdict.clock.clock]
    for number in range(5):
        nonce = bytes([number]) * 32
        expected = replace(
            machine.expectation(EARLIER, CURRENT, nonce=nonce),
            last_clock=clocks[-1],
            last_reset_count=verdict.clock.reset_count,
            last_restart_count=verdict.clock.restart_count,
        )
        again = verify_evidence(machine.evidence(EARLIER, CURRENT, nonce=nonce), expected)
        assert again.failures == ()
        clocks.append(again.clock.clock)


def test_the_endorsement_key_read_at_creation_is_the_one_found_later(machine):
    assert read_ek(machine.swtpm.tcti).encode() == machine.ek_pem


@pytest.mark.regression("CVE-2022-1053")
def test_an_attestation_key_of_one_tpm_does_not_pass_with_the_endorsement_key_of_another(machine, new_tpm, tmp_path):
    other = Machine(new_tpm("second"), tmp_path / "other")
    assert other.ek_pem != machine.ek_pem
    secret = os.urandom(32)
    # A software key with another's endorsement key; and the other way round: a challenge for another key's name.
    for challenge in (
        make_credential(other.ek_pem, machine.ak_pub, secret),
        make_credential(machine.ek_pem, other.ak_pub, secret),
    ):
        with pytest.raises(TpmError, match="activatecredential"):
            machine.tpm.activate_credential(*challenge)
    assert machine.tpm.activate_credential(*make_credential(machine.ek_pem, machine.ak_pub, secret)) == secret


def test_a_replayed_quote_and_a_reused_nonce_are_refused(machine):
    machine.tpm.extend_policy(CURRENT)
    evidence, expected = machine.evidence(CURRENT), machine.expectation(CURRENT)
    assert codes(evidence, expected) == []
    assert codes(evidence, machine.expectation(CURRENT, nonce=b"n" * 32)) == ["nonce_mismatch"]
    assert codes(replace(evidence, nonce=b"n" * 32), machine.expectation(CURRENT, nonce=b"n" * 32)) == [
        "nonce_mismatch"
    ]
    # Even with a broker that let the nonce pass twice, the clock of the same quote does not move forward.
    clock = verify_evidence(evidence, expected).clock
    used = replace(
        expected,
        last_clock=clock.clock,
        last_reset_count=clock.reset_count,
        last_restart_count=clock.restart_count,
    )
    assert codes(evidence, used) == ["clock_back"]
    assert codes(machine.evidence(CURRENT), used) == []


def test_another_boot_is_refused_whatever_its_log_says(machine):
    machine.tpm.extend_policy(CURRENT)
    assert codes(machine.evidence(CURRENT), machine.expectation(CURRENT)) == []
    machine.swtpm.boot([(4, 13, b"another boot loader")])
    assert codes(machine.evidence(CURRENT), machine.expectation(CURRENT)) == ["event_log_mismatch", "pcr_mismatch"]
    machine.events = [*boot_events(), (4, 13, b"another boot loader")]
    assert codes(machine.evidence(CURRENT), machine.expectation(CURRENT)) == ["pcr_mismatch"]


def test_a_cut_reordered_or_padded_event_log_is_refused(machine):
    machine.tpm.extend_policy(CURRENT)
    evidence, expected = machine.evidence(CURRENT), machine.expectation(CURRENT)
    events = boot_events()
    assert codes(replace(evidence, event_log=event_log(events)), expected) == []
    for doctored in (events[:-1], [events[1], events[0], *events[2:]], [*events, (11, 13, b"more")]):
        assert codes(replace(evidence, event_log=event_log(doctored)), expected) == ["event_log_mismatch"]
    for raw in (evidence.event_log[:-1], evidence.event_log + b"\0", b"\0" * 600_000, b""):
        assert codes(replace(evidence, event_log=raw), expected) == ["event_log_malformed"]


def test_a_wrong_digest_in_the_policy_pcr_stays_visible(machine):
    machine.tpm.extend_policy(CURRENT)
    assert codes(machine.evidence(CURRENT), machine.expectation(CURRENT)) == []
    wrong = hashlib.sha256(b"everything is allowed").hexdigest()
    machine.tpm.extend_policy(wrong)
    machine.tpm.extend_policy(CURRENT)
    assert codes(machine.evidence(CURRENT), machine.expectation(CURRENT)) == ["policy_pcr_mismatch"]
    assert codes(machine.evidence(CURRENT, CURRENT), machine.expectation(CURRENT)) == ["policy_pcr_mismatch"]
    assert codes(machine.evidence(CURRENT, wrong, CURRENT), machine.expectation(CURRENT)) == ["policy_not_released"]


def test_software_cannot_reset_the_policy_pcr(machine):
    machine.tpm.extend_policy(CURRENT)
    before = machine.tpm.read_policy_pcr()
    assert before == hashlib.sha256(bytes(32) + measurement(CURRENT)).digest()
    with pytest.raises(subprocess.CalledProcessError):
        machine.swtpm.tool("tpm2_pcrreset", "14")
    machine.swtpm.tool("tpm2_pcrreset", "16")
    assert machine.tpm.read_policy_pcr() == before


def test_a_quote_over_a_resettable_pcr_is_refused(machine, tmp_path):
    machine.tpm.extend_policy(CURRENT)
    good = machine.evidence(CURRENT)
    selection = "sha256:0,1,2,3,4,5,7,8,9,11,16"
    machine.swtpm.tool("tpm2_flushcontext", "-t")
    machine.swtpm.tool(
        "tpm2_quote",
        *("-c", str(machine.tpm.directory / "ak.ctx"), "-l", selection, "-g", "sha256", "-f", "tss", "-F", "values"),
        *("-q", quote_binding(NONCE, spki(good.csr_pem.encode())).hex(), "-o", str(tmp_path / "pcrs")),
        *("-m", str(tmp_path / "quote"), "-s", str(tmp_path / "signature")),
    )
    forged = replace(good, quote=(tmp_path / "quote").read_bytes(), signature=(tmp_path / "signature").read_bytes())
    assert codes(good, machine.expectation(CURRENT)) == []
    assert codes(forged, machine.expectation(CURRENT)) == ["pcr_selection"]


def test_an_older_tpm_state_is_refused(machine, new_tpm, tmp_path):
    """Somebody keeps a copy of the TPM's state and brings it back after the workspace went on."""
    swtpm = machine.swtpm
    swtpm.stop()
    shutil.copytree(swtpm.state, tmp_path / "copy")

    def boot_and_attest(last):
        swtpm.start()
        again = Machine(swtpm, tmp_path / f"boot{swtpm.port}")
        again.tpm.extend_policy(CURRENT)
        verdict = verify_evidence(again.evidence(CURRENT), replace(again.expectation(CURRENT), **last))
        swtpm.stop()
        return verdict

    def after(clock):
        return {
            "last_clock": clock.clock,
            "last_reset_count": clock.reset_count,
            "last_restart_count": clock.restart_count,
        }

    first = boot_and_attest({})
    second = boot_and_attest(after(first.clock))
    assert second.ok
    assert second.clock.reset_count == first.clock.reset_count + 1
    shutil.rmtree(swtpm.state)
    shutil.copytree(tmp_path / "copy", swtpm.state)
    restored = boot_and_attest(after(second.clock))
    assert [failure.code for failure in restored.failures] == ["reset_count_back"]


def test_keys_from_before_a_reset_are_not_usable(machine):
    machine.quote()
    machine.swtpm.reset()
    machine.tpm = Tpm(machine.tpm.directory, machine.swtpm.tcti)
    with pytest.raises(TpmError, match="tpm2_quote failed"):
        machine.quote()
    machine.tpm.forget_keys()
    assert not machine.tpm.has_attestation_key()
    machine.tpm.create_keys()
    assert machine.quote()


def test_a_tpm_that_lost_power_again_and_again_still_attests(machine, tmp_path):
    """Each loss of power counts as a guess at the keys that were in use, and three lock the TPM, unless the keys are exempt."""
    for number in range(5):
        machine.swtpm.lose_power()
        again = Machine(machine.swtpm, tmp_path / f"boot{number}")
        again.tpm.extend_policy(CURRENT)
        assert verify_evidence(again.evidence(CURRENT), again.expectation(CURRENT)).ok


def test_the_attestation_key_of_each_boot_is_new(machine, tmp_path):
    assert Tpm(tmp_path / "again", machine.swtpm.tcti).create_keys()[1] != machine.ak_pub


def test_a_missing_tpm_is_named(tmp_path):
    with pytest.raises(TpmError, match="tpm2_createek failed"):
        Tpm(tmp_path / "keys", "swtpm:host=127.0.0.1,port=1").create_keys()


def test_a_key_directory_open_to_others_is_refused(tmp_path):
    (tmp_path / "keys").mkdir(mode=0o755)
    with pytest.raises(TpmError, match="open to group"):
        Tpm(tmp_path / "keys", "device:/dev/null")
    assert (tmp_path / "keys2").exists() is False
    Tpm(tmp_path / "keys2", "device:/dev/null")
    assert (tmp_path / "keys2").stat().st_mode & 0o777 == 0o700
