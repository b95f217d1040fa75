"""Publishing: the first root, officers' signatures, what clients download, and what is refused."""

from __future__ import annotations

import base64
from datetime import UTC, datetime

import pytest
from broker_rig import POLICY, encode

from databases import beside
from saw.broker.client import BrokerRefusal
from saw.policy.bundle import read_content
from saw.policy.tuf_client import fetch_target, refresh
from saw.policy.tuf_reach import bundle_diff, reach_between
from saw.policy.tuf_repository import init_repository, read_target, stage_publication


def test_a_root_is_installed_once_and_must_belong_to_this_broker(own_broker, tmp_path) -> None:
    lab = own_broker
    assert lab.operator.request("GET", "/v1/trust")["tuf_root"] is None
    foreign = init_repository(
        tmp_path / "foreign", lab.officers.keys, lab.officers.keys[0].public_key(), threshold=2, now=datetime.now(UTC)
    )
    with pytest.raises(BrokerRefusal):
        lab.operator.request("PUT", "/v1/policy/root", {"root": base64.b64encode(foreign).decode()})
    root = {"root": base64.b64encode(lab.officers.root).decode()}
    assert lab.operator.request("PUT", "/v1/policy/root", root)["changed"]
    assert not lab.operator.request("PUT", "/v1/policy/root", root)["changed"]
    assert lab.operator.request("GET", "/v1/trust")["tuf_root"]["signed"]["_type"] == "root"
    with pytest.raises(BrokerRefusal) as caught:
        lab.operator.request("PUT", "/v1/policy/root", {"root": base64.b64encode(foreign).decode()})
    assert caught.value.code == "root_exists"
    digest, publication = lab.officers.publication(1)
    answer = lab.operator.request("POST", "/v1/policy/publish", encode(publication))
    assert [item["policy_digest"] for item in answer["released"]] == [digest]


@pytest.mark.control("POL-01")
def test_what_was_published_is_what_a_client_verifies(broker, tmp_path) -> None:
    with broker.tls() as client:

        class Fetcher:
            """Downloads with the lab's TLS client."""

        from tuf.api.exceptions import DownloadHTTPError
        from tuf.ngclient.fetcher import FetcherInterface

        class TlsFetcher(FetcherInterface):
            def _fetch(self, url: str):
                answer = client.get(url)
                if answer.status_code != 200:
                    raise DownloadHTTPError(url, answer.status_code)
                yield answer.content

        for name in ("metadata", "targets"):
            (tmp_path / name).mkdir()
        base = f"https://127.0.0.1:{broker.port}/tuf"
        updater = refresh(tmp_path / "metadata", tmp_path / "targets", base, broker.officers.root, TlsFetcher())
        raw, custom = fetch_target(updater, "rings/stable/coding.bundle.json")
    assert custom["policy_digest"] == broker.digest
    assert b"saw-bundle/1" in raw


@pytest.mark.control("POL-01")
def test_too_few_signatures_are_refused_and_audited_and_enough_are_taken(own_broker) -> None:
    lab = own_broker
    _, publication = lab.officers.publication(1)
    lab.operator.request("POST", "/v1/policy/publish", encode(publication))
    base = lab.config.tuf_dir
    digest, good = lab.officers.publication(2, base=base)
    path = "rings/stable/coding.bundle.json"
    alone = stage_publication(base, path, good.targets[path], lab.officers.keys[:1], datetime.now(UTC))
    with pytest.raises(BrokerRefusal) as caught:
        lab.operator.request("POST", "/v1/policy/publish", encode(alone))
    assert caught.value.code == "threshold"
    assert lab.events()[-1]["event"]["status_detail"] == "threshold"
    assert lab.operator.request("GET", "/v1/policy/state")["releases"][0]["revision"] == 1
    lab.operator.request("POST", "/v1/policy/publish", encode(good))
    assert lab.operator.request("GET", "/v1/policy/state")["releases"][0]["policy_digest"] == digest


@pytest.mark.control("POL-01")
def test_a_widening_that_the_signers_did_not_sign_is_refused_and_audited_and_a_signed_one_taken(own_broker) -> None:
    lab = own_broker
    digest, publication = lab.officers.publication(1)
    lab.operator.request("POST", "/v1/policy/publish", encode(publication))
    base, path = lab.config.tuf_dir, "rings/stable/coding.bundle.json"
    wider = POLICY.replace("read-only", "full")
    _, good = lab.officers.publication(2, base=base, content=wider)
    now, keys = datetime.now(UTC), lab.officers.keys[:2]
    # Signed by enough officers, as a change that they did not see, or as another one than it is.
    other = read_content(lab.officers.publication(2, base=base)[1].targets[path])
    untrue = reach_between(read_target(base, path), other, bundle_diff())
    for reach in (None, untrue):
        unseen = stage_publication(base, path, good.targets[path], keys, now, reach=reach)
        with pytest.raises(BrokerRefusal) as caught:
            lab.operator.request("POST", "/v1/policy/publish", encode(unseen))
        assert caught.value.code == "unsigned_widening"
        assert caught.value.cure
        assert lab.events()[-1]["event"]["status_detail"] == "unsigned_widening"
        assert lab.operator.request("GET", "/v1/policy/state")["releases"][0]["policy_digest"] == digest
    lab.operator.request("POST", "/v1/policy/publish", encode(good))
    assert lab.operator.request("GET", "/v1/policy/state")["releases"][0]["revision"] == 2


def test_a_publication_survives_a_restart_and_a_lost_registry_row_is_restored(own_broker) -> None:
    lab = own_broker
    digest, publication = lab.officers.publication(1)
    lab.operator.request("POST", "/v1/policy/publish", encode(publication))
    lab.stop()
    # What a crash between repository and registry leaves behind.
    with beside(lab.config) as database:
        database.execute("DELETE FROM releases")
    lab.start()
    assert lab.operator.request("GET", "/v1/policy/state")["releases"][0]["policy_digest"] == digest
    assert lab.operator.request("GET", "/v1/audit/verify")["complete"]
