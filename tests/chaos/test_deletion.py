"""A deleted PrismService takes everything it owned with it, also while the operator is down."""

import pytest

from tests.e2e.system import NAMESPACE, OPERATOR_NAMESPACE, SERVICE, System
from tests.e2e.test_service import OWNED

pytestmark = pytest.mark.cluster("nodes=2")


def test_everything_owned_is_gone_even_if_the_operator_is_down(system: System) -> None:
    system.apply()
    system.wait_ready()
    owner = system.cluster.get("psvc", SERVICE, "-n", NAMESPACE)["metadata"]["uid"]

    def owned() -> list[str]:
        found = []
        for kind in (*OWNED, "pod"):
            for item in system.cluster.get(kind, "-n", NAMESPACE)["items"]:
                labels = item["metadata"].get("labels", {})
                owners = [reference["uid"] for reference in item["metadata"].get("ownerReferences", ())]
                if owner in owners or (kind == "pod" and labels.get("moeprism.io/service") == SERVICE):
                    found.append(f"{kind}/{item['metadata']['name']}")
        return found

    system.cluster.kubectl("scale", "deployment", "-n", OPERATOR_NAMESPACE, "--all", "--replicas=0")
    try:
        system.wait_until(
            "the operator is gone", lambda: system.cluster.get("pods", "-n", OPERATOR_NAMESPACE)["items"] == []
        )
        assert owned(), "nothing to delete"
        system.delete()
        system.wait_until("everything owned is gone", lambda: owned() == [], timeout_s=120)
    finally:
        system.cluster.kubectl("scale", "deployment", "-n", OPERATOR_NAMESPACE, "--all", "--replicas=1")
