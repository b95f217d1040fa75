"""Quotes checked per second on one core, beside the cost of nothing but the ECDSA verification, measured in the same run.

    python benchmarks/quote_verify.py [--seconds 3]

*quote* is signature, structure, binding, PCR selection and PCR digest; *evidence* is the broker's whole decision, with
request parsing, certificate request and replay of an event log of 150 events. The ratios say what the checks cost on top
of the signature and are comparable between machines; the absolute figures are not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests" / "unit" / "attest")]

from attest_lab import EV_IPL, NONCE, SoftTpm, boot_events, event_log, soft_evidence, spki  # noqa: E402 - lies with the tests
from results import Goal, Result, fastest, result, table  # noqa: E402

from saw.attest.event_log import parse  # noqa: E402
from saw.attest.messages import parse_evidence  # noqa: E402
from saw.attest.structures import parse_signature  # noqa: E402
from saw.attest.verifier import quote_binding, verify_evidence, verify_quote  # noqa: E402

GOAL = Goal("value", "least", 2000)


def measure(seconds: float) -> list[Result]:
    """Measure each figure for ``seconds``."""
    tpm = SoftTpm()
    evidence, expected = soft_evidence(tpm)
    # Events of PCRs that no check covers lengthen the replay to that of a real boot.
    events = boot_events()
    evidence = msgspec.structs.replace(
        evidence, event_log=event_log([*events, *((10, EV_IPL, bytes(200)) for _ in range(150 - len(events)))])
    )
    assert len(parse(evidence.event_log)) == 150
    assert verify_evidence(evidence, expected).ok
    raw = msgspec.json.encode(evidence)
    signature, key = parse_signature(evidence.signature), tpm.key.public_key()
    binding = quote_binding(NONCE, spki(evidence.csr_pem.encode()))
    pcrs = {int(pcr): bytes.fromhex(value) for pcr, value in evidence.pcrs.items()}
    ecdsa = ec.ECDSA(hashes.SHA256())

    kinds: list[Callable[[], object]] = [
        lambda: key.verify(signature, evidence.quote, ecdsa),
        lambda: verify_quote(expected.ak_pub, evidence.quote, evidence.signature, binding, pcrs),
        lambda: verify_evidence(parse_evidence(raw), expected),
    ]
    baseline, quote, whole = (1 / each for each in fastest(kinds, seconds))
    return [
        result(
            "quote_checks", quote, "/s", baseline=baseline, goal=GOAL, note="baseline: bare ECDSA P-256 verification"
        ),
        result("evidence_decisions", whole, "/s", baseline=baseline, note="the broker's whole decision, 150 events"),
    ]


def main() -> int:
    """Measure and print; exit 1 when the quote check misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each figure")
    rows = measure(parser.parse_args().seconds)
    print(table(rows))
    return 0 if rows[0].met else 1


if __name__ == "__main__":
    sys.exit(main())
