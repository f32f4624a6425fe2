"""The pod template of a service: what a replica runs, under the `restricted` Pod Security Standard.

Nothing in it depends on operating points, classes or the replica count: a template that changes restarts every pod, and
those are to change within a second.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from prism_api import FULL
from prism_api.model import PrismModelSpec
from prism_api.service import PrismServiceSpec

Object = dict[str, Any]

SERVING_LABEL = "moeprism.io/serving"
SERVICE_LABEL = "moeprism.io/service"
SHARDS = 64
"""Virtual shards: their number never changes, so the number of operator shards never touches a pod template."""
USER = 65532
MODEL_PATH, TLS_PATH, SCRATCH_PATH = "/model", "/tls", "/tmp"
STARTUP_PERIOD_S, STARTUP_FAILURES = 2, 300
"""Ten minutes: cold starts of large models take 98 to 280 s."""


@dataclass(frozen=True, slots=True)
class ChildSettings:
    """What children need to know about the operator and the runtime's fixed ports."""

    operator_namespace: str
    operator_labels: dict[str, str] = field(default_factory=lambda: {"app.kubernetes.io/name": "prism-operator"})
    """Labels of the operator's pods: nobody else may reach the control port."""
    control_port: int = 8081
    metrics_port: int = 8082
    drain_grace_s: int = 5
    """How long a stopping pod still accepts requests, until every node has taken it out of the Service."""


def control_secret_name(service: str) -> str:
    """Name of the Secret with the pods' certificate of the control channel."""
    return f"{service}-control-tls"


def shard_of(uid: str) -> int:
    return int.from_bytes(hashlib.sha256(uid.encode()).digest()[:8], "big") % SHARDS


def labels(service: str, model: str) -> dict[str, str]:
    """Labels of every child."""
    return {
        "app.kubernetes.io/name": "prism-runtime",
        "app.kubernetes.io/instance": service,
        "app.kubernetes.io/component": "runtime",
        "app.kubernetes.io/part-of": "moe-prism",
        "app.kubernetes.io/managed-by": "prism-operator",
        SERVICE_LABEL: service,
        "moeprism.io/model": model,
    }


def render(
    service: str,
    namespace: str,
    uid: str,
    spec: PrismServiceSpec,
    model_name: str,
    model: PrismModelSpec,
    settings: ChildSettings,
) -> Object:
    """PodTemplateSpec as a plain dict."""
    pod = spec.pool.pod
    template_spec: Object = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": spec.rollout.termination_grace_period_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {SERVICE_LABEL: service}},
            }
        ],
        "containers": [_container(service, namespace, uid, spec, model, settings)],
        "volumes": [
            {"name": "model", **_model_volume(model)},
            {
                "name": "tls",
                # Optional: a pod may start before its certificate is issued; the runtime waits for the files.
                "secret": {"secretName": control_secret_name(service), "optional": True, "defaultMode": 0o440},
            },
            {"name": "scratch", "emptyDir": {}},
        ],
    }
    if pod.node_selector:
        template_spec["nodeSelector"] = dict(pod.node_selector)
    if pod.tolerations:
        template_spec["tolerations"] = [toleration.to_wire() for toleration in pod.tolerations]
    if pod.priority_class_name:
        template_spec["priorityClassName"] = pod.priority_class_name
    return {
        "metadata": {
            "labels": {
                **labels(service, model_name),
                "moeprism.io/shard": str(shard_of(uid)),
                SERVING_LABEL: "true",
            }
        },
        "spec": template_spec,
    }


def _container(
    service: str,
    namespace: str,
    uid: str,
    spec: PrismServiceSpec,
    model: PrismModelSpec,
    settings: ChildSettings,
) -> Object:
    return {
        "name": "runtime",
        "image": spec.runtime.image,
        "imagePullPolicy": "IfNotPresent",
        "args": _arguments(spec, model, settings),
        "env": _environment(service, namespace, uid, spec),
        "ports": [
            {"name": "http", "containerPort": spec.runtime.service_port, "protocol": "TCP"},
            {"name": "control", "containerPort": settings.control_port, "protocol": "TCP"},
            {"name": "metrics", "containerPort": settings.metrics_port, "protocol": "TCP"},
        ],
        "resources": _resources(spec),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "startupProbe": {
            **_get("/health"),
            "periodSeconds": STARTUP_PERIOD_S,
            "failureThreshold": STARTUP_FAILURES,
            "timeoutSeconds": 2,
        },
        "readinessProbe": {**_get("/ready"), "periodSeconds": 2, "failureThreshold": 1, "timeoutSeconds": 2},
        # The watchdog behind /health answers for the engine's thread; load alone never fails it.
        "livenessProbe": {**_get("/health"), "periodSeconds": 10, "failureThreshold": 3, "timeoutSeconds": 5},
        "volumeMounts": [
            {"name": "model", "mountPath": MODEL_PATH, "readOnly": True},
            {"name": "tls", "mountPath": TLS_PATH, "readOnly": True},
            {"name": "scratch", "mountPath": SCRATCH_PATH},
        ],
    }


def _arguments(spec: PrismServiceSpec, model: PrismModelSpec, settings: ChildSettings) -> list[str]:
    engine = spec.runtime.engine
    arguments = ["serve", _artifact_path(model), "--served-name", model.served_name]
    arguments += ["--host", "$(POD_IP)", "--port", str(spec.runtime.service_port)]
    arguments += ["--control-port", str(settings.control_port), "--metrics-port", str(settings.metrics_port)]
    arguments += ["--tls-dir", TLS_PATH]
    arguments += ["--drain-seconds", str(spec.rollout.drain_seconds), "--drain-grace", str(settings.drain_grace_s)]
    if engine.max_sequences is not None:
        arguments += ["--max-sequences", str(engine.max_sequences)]
    if engine.max_context_tokens is not None:
        arguments += ["--max-context-tokens", str(engine.max_context_tokens)]
    return arguments


def _environment(service: str, namespace: str, uid: str, spec: PrismServiceSpec) -> list[Object]:
    """The user's variables first: of two entries of a name the last one counts, and these are ours."""
    from_pod = {"POD_IP": "status.podIP", "PRISM_POD_NAME": "metadata.name", "PRISM_POD_UID": "metadata.uid"}
    values = {
        "PRISM_SERVICE_NAMESPACE": namespace,
        "PRISM_SERVICE_NAME": service,
        "PRISM_SERVICE_UID": uid,
        "PRISM_ACCELERATOR": spec.pool.accelerator.name,
        "PRISM_CLASS_HEADER": spec.networking.class_header,
        "PRISM_IMAGE_DIGEST": spec.runtime.image.rpartition("@")[2],
        # Not `budget.safePoint`: a change of that must not restart pods, and the first directive comes in a second.
        "PRISM_BOOT_POINT": FULL,
    }
    ours = from_pod.keys() | values.keys()
    return [
        *({"name": one.name, "value": one.value} for one in spec.pool.pod.env if one.name not in ours),
        *({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in from_pod.items()),
        *({"name": name, "value": value} for name, value in values.items()),
    ]


def _resources(spec: PrismServiceSpec) -> Object:
    asked, accelerator = spec.pool.pod.resources, spec.pool.accelerator.resource
    requests = {"cpu": asked.cpu, "memory": asked.memory}
    limits = {"memory": asked.memory}
    if accelerator is not None:
        requests[accelerator.name] = limits[accelerator.name] = str(accelerator.count)
    return {"requests": requests, "limits": limits}


def _get(path: str) -> Object:
    return {"httpGet": {"path": path, "port": "http", "scheme": "HTTP"}}


def _artifact_path(model: PrismModelSpec) -> str:
    source = model.source.image or model.source.persistent_volume_claim
    assert source is not None, "a source without member is refused by the CRD"
    inside = source.path.strip("/")
    return f"{MODEL_PATH}/{inside}" if inside else MODEL_PATH


def _model_volume(model: PrismModelSpec) -> Object:
    image, claim = model.source.image, model.source.persistent_volume_claim
    if image is not None:
        return {"image": {"reference": image.reference, "pullPolicy": "IfNotPresent"}}
    assert claim is not None, "a source without member is refused by the CRD"
    return {"persistentVolumeClaim": {"claimName": claim.claim_name, "readOnly": True}}
