"""Resource to children: Deployment, Service, PodDisruptionBudget and NetworkPolicy as plain dicts, complete intents.

Each call builds new dicts and reads frozen input. Every child has an ownerReference, so that deleting the service needs
no finalizer, and a hash of its intent, so that applying an unchanged one can be skipped. The Secret of the control
channel is issued elsewhere; `control_secret_name` is its name.
"""

import copy
import hashlib
import json

from prism_api import API_VERSION
from prism_api.model import PrismModelSpec
from prism_api.scaling import Switch
from prism_api.service import PrismServiceSpec
from prism_operator.plan import pod_template
from prism_operator.plan.pod_template import SERVICE_LABEL, SERVING_LABEL, ChildSettings, Object, control_secret_name

__all__ = ["INTENT_HASH", "ChildSettings", "control_secret_name", "intent_hash", "render", "selector"]

INTENT_HASH = "moeprism.io/intent-hash"
REVISIONS_KEPT = 2
_STARTUP_S = pod_template.STARTUP_PERIOD_S * pod_template.STARTUP_FAILURES
_PROGRESS_DEADLINE_S = _STARTUP_S + 300
"""A rollout is not given up before a slow start has had its time, image pull included."""


def render(
    service_name: str,
    namespace: str,
    uid: str,
    spec: PrismServiceSpec,
    model_name: str,
    model_spec: PrismModelSpec,
    replicas: int,
    settings: ChildSettings,
) -> list[Object]:
    """All children of a service. `uid` is the PrismService's, `replicas` what the Deployment is to order."""
    template = pod_template.render(service_name, namespace, uid, spec, model_name, model_spec, settings)
    children = [
        _service(spec, service_name),
        _deployment(spec, service_name, template, replicas),
        _disruption_budget(spec, service_name),
    ]
    if spec.networking.network_policy is Switch.ENABLED:
        children.append(_network_policy(spec, service_name, settings))
    for child in children:
        child["metadata"] = {
            "name": service_name,
            "namespace": namespace,
            "labels": pod_template.labels(service_name, model_name),
            "ownerReferences": [_owner(service_name, uid)],
        }
        child["metadata"]["annotations"] = {INTENT_HASH: intent_hash(child)}
    return children


def intent_hash(child: Object) -> str:
    """Hash of everything that an intent says, its own hash left out."""
    bare = copy.deepcopy(child)
    bare["metadata"].get("annotations", {}).pop(INTENT_HASH, None)
    if not bare["metadata"].get("annotations"):
        bare["metadata"].pop("annotations", None)
    text = json.dumps(bare, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def selector(service_name: str) -> dict[str, str]:
    """Labels that select a service's pods, whether they are in traffic or not."""
    return {SERVICE_LABEL: service_name}


def _owner(service_name: str, uid: str) -> Object:
    return {
        "apiVersion": API_VERSION,
        "kind": "PrismService",
        "name": service_name,
        "uid": uid,
        "controller": True,
        # True would need a right on finalizers, and nothing here must hold up a deletion.
        "blockOwnerDeletion": False,
    }


def _deployment(spec: PrismServiceSpec, service_name: str, template: Object, replicas: int) -> Object:
    rollout = spec.rollout
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "spec": {
            "replicas": replicas,
            "revisionHistoryLimit": REVISIONS_KEPT,
            "progressDeadlineSeconds": _PROGRESS_DEADLINE_S,
            "selector": {"matchLabels": selector(service_name)},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": rollout.max_surge, "maxUnavailable": rollout.max_unavailable},
            },
            "template": template,
        },
    }


def _service(spec: PrismServiceSpec, service_name: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "spec": {
            "type": "ClusterIP",
            # A pod leaves traffic by losing the serving label, without being killed.
            "selector": {**selector(service_name), SERVING_LABEL: "true"},
            "ports": [{"name": "http", "port": spec.runtime.service_port, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def _disruption_budget(spec: PrismServiceSpec, service_name: str) -> Object:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "spec": {
            "maxUnavailable": spec.disruption.max_unavailable,
            "selector": {"matchLabels": selector(service_name)},
        },
    }


def _network_policy(spec: PrismServiceSpec, service_name: str, settings: ChildSettings) -> Object:
    """Nothing comes in but requests, scrapes from inside the cluster, and the operator's calls."""
    operator = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": settings.operator_namespace}},
        "podSelector": {"matchLabels": dict(settings.operator_labels)},
    }
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "spec": {
            "podSelector": {"matchLabels": selector(service_name)},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"ports": [_port(spec.runtime.service_port)]},
                {"ports": [_port(settings.metrics_port)], "from": [{"namespaceSelector": {}}]},
                {"ports": [_port(settings.control_port)], "from": [operator]},
            ],
        },
    }


def _port(number: int) -> Object:
    return {"protocol": "TCP", "port": number}
