"""Manifests that the API server must refuse, and what its answer must say: the field, and what would work.

A row is a valid object plus edits, so that nothing but the edit can be the reason. Rows of `UPDATES` are refused as a
change of an object that exists.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from tests.cluster.manifests import ABSENT, CLASS, POINT, Manifest, edited, prism_model, prism_service


@dataclass(frozen=True)
class Invalid:
    """One refusal: the edit that makes a valid object invalid, and phrases that the answer must contain."""

    title: str
    valid: Manifest
    edits: Mapping[str, Any]
    answers: tuple[str, ...]
    manifest: Manifest = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", MappingProxyType(dict(self.edits)))
        object.__setattr__(self, "manifest", edited(self.valid, self.edits))

    def __str__(self) -> str:
        return self.title


def _service(title: str, edits: Mapping[str, Any], *answers: str, **base: Any) -> Invalid:
    return Invalid(title, prism_service(**base), edits, answers)


def _model(title: str, edits: Mapping[str, Any], *answers: str) -> Invalid:
    return Invalid(title, prism_model(), edits, answers)


_EXTERNAL = {"spec.scaling.control": "External", "spec.replicas": 2}
_NAME_RULE = "metadata.name must have at most 40 characters and no dot"

CREATIONS = (
    # metadata and references
    _service("a service's name is too long", {"metadata.name": "a" * 41}, "metadata.name", _NAME_RULE),
    _service("a service's name has a dot", {"metadata.name": "chat.v2"}, "metadata.name", _NAME_RULE),
    _model("a model's name has a dot", {"metadata.name": "olmoe-1.5b"}, "metadata.name", _NAME_RULE),
    _service("no model is named", {"spec.modelRef": ABSENT}, "spec.modelRef", "Required value"),
    # classes
    _service("no class", {"spec.classes": []}, "spec.classes", "should have at least 1 items"),
    _service(
        "nine classes",
        {"spec.defaultClass": "c0", "spec.classes": [{"name": f"c{i}", **CLASS} for i in range(9)]},
        "spec.classes",
        "must have at most 8 items",
    ),
    _service(
        "two classes of one name",
        {"spec.defaultClass": "standard", "spec.classes.1": {"name": "standard", **CLASS}},
        "spec.classes[1]",
        "Duplicate value",
    ),
    _service(
        "two classes without default",
        {"spec.classes.1": {"name": "gold", **CLASS}},
        "spec.defaultClass",
        "defaultClass must name one of `classes`, and is required with two or more classes",
    ),
    _service(
        "the default class does not exist",
        {"spec.defaultClass": "gold"},
        "spec.defaultClass",
        "defaultClass must name one of `classes`",
    ),
    _service(
        "a class name in capitals", {"spec.classes.0.name": "Gold"}, "spec.classes[0].name", "should match '^[a-z0-9]"
    ),
    _service(
        "a class without objective",
        {"spec.classes.0.objectives": {}},
        "spec.classes[0].objectives",
        "objectives must set `ttftMilliseconds`, `tpotMilliseconds`, or both",
    ),
    _service(
        "an objective of zero",
        {"spec.classes.0.objectives.ttftMilliseconds": 0},
        "spec.classes[0].objectives.ttftMilliseconds",
        "should be greater than or equal to 1",
    ),
    _service(
        "an objective as a float",
        {"spec.classes.0.objectives.tpotMilliseconds": 0.5},
        "spec.classes[0].objectives.tpotMilliseconds",
        "must be of type integer",
    ),
    _service(
        "an attainment target of one",
        {"spec.classes.0.attainmentTarget": "1"},
        "spec.classes[0].attainmentTarget",
        "attainmentTarget must be greater than 0 and less than 1, for example '0.95'",
    ),
    _service(
        "an attainment target of zero",
        {"spec.classes.0.attainmentTarget": "0"},
        "spec.classes[0].attainmentTarget",
        "attainmentTarget must be greater than 0",
    ),
    _service(
        "a priority out of bounds",
        {"spec.classes.0.priority": 5000},
        "spec.classes[0].priority",
        "should be less than or equal to 1000",
    ),
    _service(
        "a window below a minute",
        {"spec.classes.0.windowSeconds": 30},
        "spec.classes[0].windowSeconds",
        "should be greater than or equal to 60",
    ),
    _service(
        "an unknown overload behaviour",
        {"spec.classes.0.overload": "Drop"},
        "spec.classes[0].overload",
        'supported values: "Queue", "Shed"',
    ),
    _service(
        "a ratio without quotes",
        {"spec.classes.0.quality.minRelativeQuality": 0.995},
        "spec.classes[0].quality.minRelativeQuality",
        "must be of type string",
    ),
    _service(
        "a ratio in per cent",
        {"spec.classes.0.quality.minRelativeQuality": "98%"},
        "spec.classes[0].quality.minRelativeQuality",
        "should match '^(0",
    ),
    _service(
        "a ratio above one",
        {"spec.classes.0.quality.minRelativeQuality": "1.01"},
        "spec.classes[0].quality.minRelativeQuality",
        "should match '^(0",
    ),
    # budget
    _service(
        "a fixed budget without operating point",
        {"spec.budget.control": "Fixed"},
        "spec.budget.operatingPoint",
        "operatingPoint must be set when budget.control is 'Fixed'",
    ),
    _service(
        "an operating point without fixed budget",
        {"spec.budget.operatingPoint": "b750"},
        "spec.budget.operatingPoint",
        "must not be set otherwise (budget.min and budget.max bound the points there)",
    ),
    _service(
        "an unknown budget control",
        {"spec.budget.control": "auto"},
        "spec.budget.control",
        'supported values: "Auto", "Fixed", "Off"',
    ),
    _service(
        "an envelope that expires before its renewal",
        {"spec.budget.envelopeTTLSeconds": 3},
        "spec.budget.envelopeTTLSeconds",
        "should be greater than or equal to 5",
    ),
    _service(
        "a negative dwell",
        {"spec.budget.dwell.upMilliseconds": -1},
        "spec.budget.dwell.upMilliseconds",
        "should be greater than or equal to 0",
    ),
    _service(
        "a boolean where an enum stands",
        {"spec.budget.bridgeScaleUp": True},
        "spec.budget.bridgeScaleUp",
        "must be of type string",
    ),
    # scaling
    _service(
        "replicas of a managed service",
        {"spec.replicas": 2},
        "spec.replicas",
        "must not be set when it is 'Managed' (set scaling.minReplicas and scaling.maxReplicas there)",
    ),
    _service(
        "external scaling without replicas",
        {"spec.scaling.control": "External"},
        "spec.replicas",
        "replicas must be set when scaling.control is 'External' or 'Fixed'",
    ),
    _service(
        "fixed scaling without replicas",
        {"spec.scaling.control": "Fixed"},
        "spec.replicas",
        "replicas must be set when scaling.control is 'External' or 'Fixed'",
    ),
    _service(
        "zero replicas",
        {**_EXTERNAL, "spec.replicas": 0},
        "spec.replicas",
        "should be greater than or equal to 1",
    ),
    _service(
        "managed scaling without upper bound",
        {"spec.scaling": ABSENT},
        "spec.scaling.maxReplicas",
        "scaling.maxReplicas must be set when scaling.control is 'Managed'",
    ),
    _service(
        "a lower bound above the upper one",
        {"spec.scaling.minReplicas": 4},
        "spec.scaling.minReplicas",
        "minReplicas must be less than or equal to maxReplicas; raise maxReplicas or lower minReplicas",
    ),
    _service(
        "a lower bound of zero",
        {"spec.scaling.minReplicas": 0},
        "spec.scaling.minReplicas",
        "minReplicas must be greater than 0 unless idle.scaleToZero is 'Enabled'",
    ),
    _service(
        "a schedule over midnight",
        {"spec.scaling.schedules": [{"name": "night", "start": "22:00", "end": "06:00", "minReplicas": 1}]},
        "spec.scaling.schedules[0].start",
        "start must be before end; write a span over midnight as two schedules",
    ),
    _service(
        "more headroom than twice the demand",
        {"spec.scaling.headroom": "2.5"},
        "spec.scaling.headroom",
        "headroom must be less than or equal to 2, for example '0.10'",
    ),
    _service(
        "a step of a hundred replicas",
        {"spec.scaling.maxStep": 100},
        "spec.scaling.maxStep",
        "should be less than or equal to 64",
    ),
    _service(
        "a static count for lost signals without a count",
        {"spec.scaling.onSignalLoss": {"behavior": "Static"}},
        "spec.scaling.onSignalLoss.replicas",
        "replicas must be set when onSignalLoss.behavior is not 'Current', and must not be set otherwise",
    ),
    _service(
        "an unknown rule for lost signals",
        {"spec.budget.onSignalLoss": "Panic"},
        "spec.budget.onSignalLoss",
        'supported values: "Hold", "HoldThenSafePoint", "SafePoint"',
    ),
    # cost
    _service(
        "a cost target above the cap",
        {"spec.cost": {"maxPerHour": "10", "targetPerHour": "11"}},
        "spec.cost.targetPerHour",
        "targetPerHour must be less than or equal to maxPerHour",
    ),
    _service("a negative cost cap", {"spec.cost.maxPerHour": "-1"}, "spec.cost.maxPerHour", "should match '^[0-9]"),
    _service(
        "a cost cap without quotes", {"spec.cost.maxPerHour": 10}, "spec.cost.maxPerHour", "must be of type string"
    ),
    # pods
    _service(
        "two pools",
        {"spec.pools.1": {"name": "other", "accelerator": {"name": "cpu"}}},
        "spec.pools",
        "must have at most 1 item",
    ),
    _service(
        "an accelerator without count",
        {"spec.pools.0.accelerator.resource": {"name": "nvidia.com/gpu", "count": 0}},
        "spec.pools[0].accelerator.resource.count",
        "should be greater than or equal to 1",
    ),
    _service(
        "memory in words",
        {"spec.pools.0.pod.resources": {"memory": "2 GB"}},
        "spec.pools[0].pod.resources.memory",
        "should match '^[0-9]+",
    ),
    _service(
        "one variable twice",
        {"spec.pools.0.pod": {"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}},
        "spec.pools[0].pod.env[1]",
        "Duplicate value",
    ),
    _service("no image", {"spec.runtime.image": ""}, "spec.runtime.image", "should be at least 1 chars long"),
    _service(
        "a port out of range",
        {"spec.runtime.servicePort": 70000},
        "spec.runtime.servicePort",
        "should be less than or equal to 65535",
    ),
    # rollout, disruption, networking, mode
    _service(
        "a rollout that cannot move",
        {"spec.rollout": {"maxSurge": 0, "maxUnavailable": 0}},
        "spec.rollout.maxUnavailable",
        "rollout.maxSurge and rollout.maxUnavailable must not both be 0; set maxUnavailable to 1",
    ),
    _service(
        "a grace period that cuts the drain",
        {"spec.rollout": {"drainSeconds": 50}},
        "spec.rollout.terminationGracePeriodSeconds",
        "rollout.terminationGracePeriodSeconds must be at least drainSeconds + 15",
    ),
    _service(
        "a disruption budget that blocks every drain",
        {"spec.disruption.maxUnavailable": 0},
        "spec.disruption.maxUnavailable",
        "should be greater than or equal to 1",
    ),
    _service(
        "a class header with a space",
        {"spec.networking.classHeader": "prism class"},
        "spec.networking.classHeader",
        "should match '^[A-Za-z0-9-]+$'",
    ),
    _service(
        "an unknown mode", {"spec.mode": "active"}, "spec.mode", 'supported values: "Active", "Advisory", "Paused"'
    ),
    # model
    _model(
        "two sources",
        {"spec.source.persistentVolumeClaim": {"claimName": "models"}},
        "spec.source",
        "source must have exactly one of `image` and `persistentVolumeClaim`",
    ),
    _model("no source", {"spec.source": {}}, "spec.source", "source must have exactly one of"),
    _model(
        "a path that leaves the image",
        {"spec.source.image.path": "/models/../../etc"},
        "spec.source.image.path",
        "path must not contain '..'; name the folder from the root",
    ),
    _model("a short digest", {"spec.digest": "sha256:12"}, "spec.digest", "should match '^sha256:[0-9a-f]{64}$'"),
    _model("no model name", {"spec.servedName": ""}, "spec.servedName", "should be at least 1 chars long"),
    _model(
        "no full point",
        {"spec.operatingPoints.0": ABSENT},
        "spec.operatingPoints",
        "operatingPoints must contain `full` with budgetPermille 1000",
    ),
    _model(
        "a full point below the whole budget",
        {"spec.operatingPoints.0.budgetPermille": 900},
        "spec.operatingPoints",
        "operatingPoints must contain `full` with budgetPermille 1000",
    ),
    _model(
        "two points of one budget",
        {"spec.operatingPoints.2": {"name": "other", **POINT}},
        "spec.operatingPoints",
        "operatingPoints must have distinct budgetPermille values",
    ),
    _model(
        "two points of one name",
        {"spec.operatingPoints.2": {"name": "b750", **POINT, "budgetPermille": 500}},
        "spec.operatingPoints[2]",
        "Duplicate value",
    ),
    _model(
        "more points than a ladder holds",
        {"spec.operatingPoints": [{"name": f"b{i}", **POINT, "budgetPermille": i} for i in range(1, 34)]},
        "spec.operatingPoints",
        "must have at most 32 items",
    ),
    _model(
        "a budget as a share",
        {"spec.operatingPoints.1.budgetPermille": 0.75},
        "spec.operatingPoints[1].budgetPermille",
        "must be of type integer",
    ),
    _model(
        "a budget of zero",
        {"spec.operatingPoints.1.budgetPermille": 0},
        "spec.operatingPoints[1].budgetPermille",
        "should be greater than or equal to 1",
    ),
    _model(
        "a quality above one",
        {"spec.operatingPoints.1.relativeQuality": "1.2"},
        "spec.operatingPoints[1].relativeQuality",
        "should match '^(0",
    ),
)

UPDATES = (
    _service(
        "another model",
        {"spec.modelRef.name": "other"},
        "spec.modelRef",
        "modelRef is immutable; create a new PrismService for a new model revision",
    ),
    _model(
        "another digest",
        {"spec.digest": "sha256:" + "1" * 64},
        "spec.digest",
        "digest is immutable; create a new PrismModel for a new artifact",
    ),
    _model(
        "another source",
        {"spec.source.image.reference": "model:2"},
        "spec.source",
        "source is immutable; create a new PrismModel for a new artifact",
    ),
)
