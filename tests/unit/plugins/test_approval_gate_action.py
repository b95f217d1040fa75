"""The action approval_gate itself: what it documents, what it binds of Ansible's values, and what it refuses to show."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import yaml
from ansible._internal._datatag._tags import Origin
from ansible.parsing.vault import VaultedValue
from ansible_collections.secure_agent.workspace.plugins.action import approval_gate as action
from ansible_collections.secure_agent.workspace.plugins.doc_fragments import broker as fragment
from ansible_collections.secure_agent.workspace.plugins.modules import approval_gate as documented

from saw.review.gate import GateRefused, GateView


def test_options_are_documented_as_they_are_taken():
    options = yaml.safe_load(documented.DOCUMENTATION)["options"]
    options |= yaml.safe_load(fragment.ModuleDocFragment.DOCUMENTATION)["options"]
    told = {
        name: {key: item[key] for key in ("type", "elements", "default", "choices") if key in item}
        for name, item in options.items()
    }
    taken = {name: {key: value for key, value in item.items() if key != "no_log"} for name, item in action.SPEC.items()}
    assert {n: {**v, "choices": sorted(v.get("choices", []))} for n, v in told.items()} == {
        n: {**v, "choices": sorted(v.get("choices", []))} for n, v in taken.items()
    }


def test_every_returned_value_is_documented():
    returned = yaml.safe_load(documented.RETURN)
    assert set(GateView.__struct_fields__) | {"claim", "rendering", "statement", "waiting", "failure"} == set(returned)


def test_a_value_out_of_a_vault_is_refused_wherever_it_is():
    secret = VaultedValue(ciphertext="$ANSIBLE_VAULT;1.1;AES256").tag("hunter2")
    for value in (secret, {"key": [secret]}, [{"a": secret}]):
        with pytest.raises(GateRefused, match="channel comes out of a vault") as caught:
            action.refuse_secrets(value, "channel")
        assert "hunter2" not in str(caught.value)
    action.refuse_secrets({"key": ["stable"], "n": 7}, "channel")


@pytest.mark.parametrize("name", ["db_password", "API_KEY", "token", "tls_private_key", "client_secret"])
def test_a_variable_with_the_name_of_a_secret_is_refused(name):
    with pytest.raises(GateRefused, match="has the name of a secret"):
        action.refuse_secrets("hunter2", name)
    action.refuse_secrets("stable", "keyboard")


def test_tags_of_ansible_do_not_count():
    tagged = Origin(path="/vars.yml", line_num=3).tag("stable")
    assert type(tagged) is not str
    found = action.plain({"channel": tagged, "list": [tagged, 7, True, None, 1.5]})
    assert found == {"channel": "stable", "list": ["stable", 7, True, None, 1.5]}
    assert {type(item) for item in found["list"]} == {str, int, bool, type(None), float}


def test_the_person_who_asks_is_named_or_the_play_is_refused():
    assert action.requester({"requested_by": "ada"}, {"awx_user_email": "ben@example.com"}) == "ada"
    assert action.requester({"requested_by": None}, {"awx_user_email": "ben@example.com"}) == "ben@example.com"
    assert action.requester({"requested_by": None}, {"awx_user_name": "ben"}) == "ben"
    with pytest.raises(GateRefused, match="nobody is named"):
        action.requester({"requested_by": None}, {})


def test_a_host_is_bound_with_the_address_that_ansible_connects_to():
    names = {"hostvars": {"ws-1": {"ansible_host": "10.0.0.1"}, "ws-2": SimpleNamespace(get=lambda _name: None)}}
    assert [action.address(names, name) for name in ("ws-1", "ws-2", "ws-3")] == ["10.0.0.1", "", ""]
