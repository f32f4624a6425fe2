import pytest

from prism_operator.control.ownership import contains, controller_uid, is_current, owner_reference


def child(hash_="h", **spec):
    return {"metadata": {"annotations": {"moeprism.io/intent-hash": hash_}}, "spec": spec}


@pytest.mark.parametrize(
    ("live", "intent"),
    [
        ({"replicas": 1, "paused": False}, {"replicas": 1}),
        ({"ports": [{"port": 80, "nodePort": 0}]}, {"ports": [{"port": 80}]}),
        ({"selector": {"a": "b"}}, {"selector": {"a": "b"}, "empty": {}, "none": None, "list": []}),
    ],
)
def test_defaults_that_the_api_server_adds_are_no_difference(live, intent):
    assert contains(live, intent)


@pytest.mark.parametrize(
    ("live", "intent"),
    [
        ({"replicas": 2}, {"replicas": 1}),
        ({}, {"replicas": 1}),
        ({"ports": [{"port": 80}, {"port": 22}]}, {"ports": [{"port": 80}]}),
        ({"ports": [{"port": 22}]}, {"ports": [{"port": 80}]}),
        ({"ports": None}, {"ports": [{"port": 80}]}),
        ({"selector": "a=b"}, {"selector": {"a": "b"}}),
    ],
)
def test_a_changed_removed_or_added_value_is_a_difference(live, intent):
    assert not contains(live, intent)


def test_a_child_is_current_only_with_the_same_intent_and_unchanged_content():
    assert is_current(child(replicas=1, paused=False), child(replicas=1))
    assert not is_current(child(replicas=2), child(replicas=1))
    assert not is_current(child("other", replicas=1), child(replicas=1))


def test_only_the_controller_owns_an_object():
    service = {"apiVersion": "v1", "kind": "K", "metadata": {"name": "chat", "uid": "u1"}}
    reference = owner_reference(service)
    assert controller_uid({"metadata": {"ownerReferences": [{"uid": "u0"}, reference]}}) == "u1"
    assert controller_uid({"metadata": {"ownerReferences": [{"uid": "u0"}]}}) is None
    assert controller_uid({"metadata": {}}) is None
    assert reference["blockOwnerDeletion"] is False
