"""Every attack on a policy's way to a workspace has tests, and each test that is named here is there.

The attacks come first, word for word; a new attack without a test, or a test that was renamed, makes this file fail.
"""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

ATTACKS = (
    "unsigned",
    "wrong key",
    "too few signatures",
    "expired",
    "not yet valid",
    "rolled back",
    "replayed to another workspace",
    "truncated",
    "member swapped",
    "duplicate keys",
    "unknown fields",
    "alias bomb",
    "revoked key",
    "metadata frozen (stale timestamp)",
    "client state wiped",
    "revision floor lowered by root",
    "clock set back",
    "clock set forward",
    "suspend and resume",
    "policyd killed",
    "policyd stopped (SIGSTOP)",
    "partition longer than the lease",
    "crash between switch and acknowledge",
    "proxy that does not follow the switch",
    "agent editing policy",
    "agent editing CA",
    "agent editing unit files",
    "agent editing nft files",
)

BUNDLE = "tests/unit/policy/test_policy_bundle.py"
TUF = "tests/unit/policy/test_policy_tuf.py"
TUF_ATTACKS = "tests/unit/policy/test_tuf_attacks.py"
REPLAY = "tests/unit/policy/test_attack_policy_replay.py"
LOADER = "tests/unit/policy/test_policy_loader.py"
PARTS = "tests/unit/runtime/test_policyd_parts.py"
RING1 = "tests/unit/runtime/test_ring1_decisions.py"
ACTIVATION = "tests/integration/policyd/test_policyd_activation.py"
ROLLOUT = "tests/integration/policyd/test_policyd_rollout.py"
STOPS = "tests/integration/policyd/test_policyd_stops.py"
INSIDE = "tests/integration/sandbox/test_sandbox_attacks.py::test_refused_inside_for_this_reason_and_not_outside"
BOOTED = "tests/integration/sandbox/test_booted_units.py"
EDITS = f"{BOOTED}::test_the_agent_cannot_edit_policy_authority_units_or_packet_filter"

COVERAGE: dict[str, tuple[str, ...]] = {
    "unsigned": (f"{BUNDLE}::test_unsigned",),
    "wrong key": (f"{BUNDLE}::test_wrong_key", f"{BUNDLE}::test_wrong_key_under_a_trusted_id"),
    "too few signatures": (
        f"{BUNDLE}::test_too_few_and_then_enough",
        f"{TUF_ATTACKS}::test_too_few_signatures_wherever_they_are_counted",
        f"{ACTIVATION}::test_metadata_without_enough_officers_is_refused",
    ),
    "expired": (f"{BUNDLE}::test_window",),
    "not yet valid": (
        f"{BUNDLE}::test_window",
        f"{ROLLOUT}::test_a_release_that_does_not_verify_is_told_offered_and_refused_with_its_digest",
    ),
    "rolled back": (f"{BUNDLE}::test_rolled_back", f"{ACTIVATION}::test_a_repository_set_back_is_refused"),
    "replayed to another workspace": (
        f"{REPLAY}::test_a_release_counts_for_its_own_blueprint",
        f"{REPLAY}::test_a_release_of_another_deployment_is_not_taken",
        f"{TUF_ATTACKS}::test_a_bundle_of_one_ring_is_not_served_for_another",
        f"{ACTIVATION}::test_a_policy_of_another_blueprint_is_refused",
    ),
    "truncated": (f"{BUNDLE}::test_truncated_anywhere",),
    "member swapped": (f"{BUNDLE}::test_member_swapped", f"{BUNDLE}::test_member_added_or_removed"),
    "duplicate keys": (
        f"{BUNDLE}::test_duplicate_keys_in_the_envelope",
        f"{LOADER}::test_duplicate_keys",
        f"{REPLAY}::test_signed_trouble_is_not_loaded",
    ),
    "unknown fields": (
        f"{BUNDLE}::test_unknown_fields_in_the_envelope",
        f"{LOADER}::test_unknown_fields_are_told_with_place_and_cure",
        f"{REPLAY}::test_signed_trouble_is_not_loaded",
    ),
    "alias bomb": (
        f"{LOADER}::test_alias_bomb",
        "tests/unit/policy/test_fuzz_bounds.py::test_hostile_files_are_refused_in_bounded_time_and_memory",
    ),
    "revoked key": (
        f"{TUF_ATTACKS}::test_a_revoked_key_releases_nothing_at_the_broker_and_loads_nothing_at_the_client",
        f"{TUF_ATTACKS}::test_a_revoked_key_cannot_bring_itself_back",
    ),
    "metadata frozen (stale timestamp)": (
        f"{TUF}::test_a_frozen_repository_is_noticed",
        f"{ACTIVATION}::test_a_frozen_repository_is_refused",
    ),
    "client state wiped": (
        f"{REPLAY}::test_a_client_without_memory_still_has_the_floor",
        f"{ACTIVATION}::test_an_old_policy_is_refused_even_when_the_tuf_state_was_wiped",
        f"{ROLLOUT}::test_an_older_signed_release_is_refused_by_the_tpm_when_all_of_the_disk_was_wiped",
    ),
    "revision floor lowered by root": (
        f"{PARTS}::test_root_cannot_lower_the_floor_in_the_tpm",
        f"{PARTS}::test_nobody_can_write_a_value_into_the_counter",
    ),
    "clock set back": (
        f"{REPLAY}::test_a_clock_set_back_brings_no_old_policy",
        f"{RING1}::test_setting_the_clock_back_does_not_lengthen_a_lease",
        f"{STOPS}::test_a_clock_that_was_set_loads_nothing_new_and_a_right_one_does",
        f"{STOPS}::test_a_clock_that_was_set_before_a_start_without_a_broker_takes_up_nothing",
    ),
    "clock set forward": (
        f"{REPLAY}::test_a_clock_set_back_or_forward_loads_nothing",
        f"{RING1}::test_setting_the_clock_forward_ends_a_lease",
        f"{STOPS}::test_a_clock_that_was_set_loads_nothing_new_and_a_right_one_does",
    ),
    "suspend and resume": (f"{STOPS}::test_after_a_suspend_nothing_is_allowed_before_the_agent_went_round",),
    "policyd killed": (f"{STOPS}::test_without_a_running_agent_every_call_is_denied_until_it_runs_again",),
    "policyd stopped (SIGSTOP)": (f"{STOPS}::test_without_a_running_agent_every_call_is_denied_until_it_runs_again",),
    "partition longer than the lease": (
        f"{RING1}::test_a_lease_runs_until_its_end",
        "tests/integration/ring1/test_ring1_calls.py::test_without_a_running_lease_nothing_leaves",
        "tests/integration/gateway/test_perimeter_outage.py::test_a_restart_without_broker_keeps_kills_and_ends_leases",
        "tests/integration/gateway/test_perimeter_outage.py::test_time_offline_that_policy_grants_counts_in_an_outage_and_ends",
        "tests/e2e/test_3_kill_and_lease.py::test_without_the_broker_calls_go_on_within_the_lease_and_not_beyond",
    ),
    "crash between switch and acknowledge": (
        f"{ACTIVATION}::test_a_kill_at_any_step_leaves_the_old_or_the_new_generation",
        f"{ROLLOUT}::test_a_kill_between_the_steps_leaves_the_old_or_the_new_generation",
    ),
    "proxy that does not follow the switch": (
        f"{ACTIVATION}::test_a_proxy_that_dies_on_the_new_generation_is_not_acknowledged",
        f"{ACTIVATION}::test_when_enforcement_does_not_follow_the_old_generation_returns",
    ),
    "agent editing policy": (INSIDE, EDITS, f"{ACTIVATION}::test_a_changed_generation_is_found_restored_and_reported"),
    "agent editing CA": (INSIDE, EDITS),
    "agent editing unit files": (INSIDE, EDITS),
    "agent editing nft files": (INSIDE, EDITS),
}


@pytest.fixture(autouse=True)
def _no_collection() -> Iterator[None]:
    """No garbage is collected meanwhile: a finalizer that parses (tracebacks do) breaks the depth count of CPython 3.11's ast."""
    gc.disable()
    yield
    gc.enable()


@cache
def names_in(path: str) -> frozenset[str]:
    """Return the names of the test functions of a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return frozenset(
        node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


def missing(coverage: dict[str, tuple[str, ...]]) -> list[str]:
    """Return the attacks without a test, and the tests that are not there."""
    found = [attack for attack in ATTACKS if not coverage.get(attack)]
    for names in coverage.values():
        for name in names:
            path, _, function = name.partition("::")
            if not (ROOT / path).is_file() or function not in names_in(path):
                found.append(name)
    return found


def test_every_attack_has_tests_that_exist() -> None:
    assert missing(COVERAGE) == []
    assert set(COVERAGE) == set(ATTACKS)


@pytest.mark.parametrize(
    ("attack", "tests"),
    [
        ("unsigned", ()),
        ("unsigned", (f"{BUNDLE}::test_that_was_renamed",)),
        ("unsigned", ("tests/unit/policy/test_gone.py::test_unsigned",)),
    ],
)
def test_a_gap_is_noticed(attack: str, tests: tuple[str, ...]) -> None:
    assert missing({**COVERAGE, attack: tests}) == [*(tests or (attack,))]
