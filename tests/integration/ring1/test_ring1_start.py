"""A workspace that has no policy or no identity yet: ring 1 answers, and refuses."""

from __future__ import annotations

import pytest
from ring1_rig import start_rig, until


@pytest.mark.control("POL-05")
def test_before_policy_and_identity_everything_is_refused_with_a_reason():
    rig = start_rig("b")
    try:
        closed = rig.curl("http://plain.example.com/")
        assert (closed.status, closed.json()["reason"]) == (403, "not_released")
        assert rig.curl("https://api.example.com/v1/x").connect == 403
        rig.activate()
        nameless = rig.curl("http://plain.example.com/")
        assert (nameless.status, nameless.json()["reason"]) == (503, "no_identity")
        rig.issue_svid()
        until(lambda: rig.curl("http://plain.example.com/").status == 200, "the identity is taken up")
    finally:
        rig.stop()
