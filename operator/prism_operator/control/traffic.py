"""Rehearsed scale-downs, carried out: who is in traffic is a label of the pod, and nothing else of it changes.

A pod that is to be given up loses the label that the Service selects, finishes what it has, and stays warm. Its
deletion cost makes it the one that the ReplicaSet removes when the count falls. A rehearsal that fails undoes both.
What is to be is the plan's, what is are the pods' own labels, so a process that starts anew mends what it finds.
"""

from prism_operator.control.informer import REHEARSED_ANNOTATION, PodRecord
from prism_operator.control.resources import Object
from prism_operator.control.world import ServiceWorld
from prism_operator.plan.pod_template import SERVING_LABEL

DELETION_COST_ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"
"""Of ready pods a ReplicaSet removes the one with the lowest first (Kubernetes documentation, "ReplicaSet")."""
REMOVED_FIRST = "-1000"


def changes(service: ServiceWorld) -> list[tuple[PodRecord, Object]]:
    """Merge patches that bring pods' labels to what was planned; none before this process has planned.

    A pod that lacks the label without having been taken out by the operator stays as it is: somebody looks at it.
    """
    if service.replica_plan is None:
        return []
    away = service.replica_plan.out_of_traffic
    records = [pod.record for pod in service.pods.values() if not pod.record.deleting]
    leaving = [one for one in records if one.uid in away and not one.rehearsed]
    returning = [one for one in records if one.uid not in away and one.rehearsed]
    return [
        *((one, _patch(one, None, "true", REMOVED_FIRST)) for one in leaving),
        *((one, _patch(one, "true", None, None)) for one in returning),
    ]


def _patch(record: PodRecord, serving: str | None, rehearsed: str | None, cost: str | None) -> Object:
    """None removes. The uid is a precondition: a new pod of the same name is another pod."""
    return {
        "metadata": {
            "uid": record.uid,
            "labels": {SERVING_LABEL: serving},
            "annotations": {REHEARSED_ANNOTATION: rehearsed, DELETION_COST_ANNOTATION: cost},
        }
    }
