"""Reconcile: bring a PrismService's children to what spec and plan say. Level-based: it reads, never remembers.

Observe, resolve, render, apply what differs, delete what is no longer rendered. Objects are written only if the service
controls them or they do not exist; one of that name that belongs to somebody else turns a condition and is left alone.
"""

import logging
import random
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from prism_api.model import PrismModelSpec
from prism_api.scaling import ScalingControl
from prism_api.service import PrismServiceSpec
from prism_api.service_status import Decision
from prism_operator import metrics
from prism_operator.control import guard, traffic
from prism_operator.control.certificates import Certificates, NotOurs
from prism_operator.control.events import Events, Regarding
from prism_operator.control.informer import unix_seconds
from prism_operator.control.kube import Conflict, Forbidden, Kube, KubeError, NotFound
from prism_operator.control.leadership import Leadership
from prism_operator.control.loops import Loops
from prism_operator.control.ownership import controller_uid, is_current, owner_reference
from prism_operator.control.queue import Backoff
from prism_operator.control.resources import (
    NETWORK_POLICIES,
    POD_DISRUPTION_BUDGETS,
    PODS,
    PRISM_MODELS,
    PRISM_SERVICES,
    Object,
    resource_of,
)
from prism_operator.control.status_view import StatusView
from prism_operator.control.tenants import Tenants
from prism_operator.control.world import ServiceKey, ServiceWorld, World
from prism_operator.plan import children, pod_template, policy
from prism_operator.plan.children import ChildSettings
from prism_operator.plan.types import LoopSettings, ServicePolicy, Unusable

RESYNC_S = 600.0
"""Every object is looked at again after about this time: it catches lost events, and certificates that are due."""
FORBIDDEN_BACKOFF_S = 60.0
NOT_OURS_BACKOFF_S = 60.0
SYNC_TIMEOUT_S = 5.0
WAKE_ANNOTATION = "moeprism.io/wake"
"""A new RFC 3339 time here brings a service back that sleeps at zero replicas."""
PRUNED = (NETWORK_POLICIES, POD_DISRUPTION_BUDGETS)
"""Children that a spec may switch off."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Key:
    """What the queue holds: one PrismService or PrismModel."""

    kind: Literal["PrismService", "PrismModel"]
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


class Reconciler:
    def __init__(
        self,
        kube: Kube,
        world: World,
        tenants: Tenants,
        loops: Loops,
        leadership: Leadership,
        certificates: Certificates,
        events: Events,
        status: StatusView,
        loop_settings: LoopSettings,
        child_settings: ChildSettings,
    ) -> None:
        self._kube, self._world, self._tenants = kube, world, tenants
        self._loops, self._leadership = loops, leadership
        self._certificates, self._events, self._status = certificates, events, status
        self._loop_settings, self._child_settings = loop_settings, child_settings

    async def service(self, namespace: str, name: str) -> float | None:
        """Visit a PrismService; seconds until the next visit, None once it is gone."""
        key = (namespace, name)
        try:
            obj = await self._kube.get(PRISM_SERVICES, namespace, name)
        except NotFound:
            self._forget(key)
            return None
        if "deletionTimestamp" in obj["metadata"]:
            self._forget(key)
            return None
        service = self._world.service(key, obj["metadata"]["uid"])
        await self._resolve(service, obj)
        usable = service.usable()
        if usable is None or service.spec is None or service.model is None:
            self._loops.stop(key)
            self._status.offer(service)
            return _jittered(RESYNC_S)
        try:
            await self._look_around(namespace)
            self._adopt_replicas(service, usable)
            await self._bring_about(service, obj, service.spec, service.model)
        except Forbidden as refused:
            if refused.namespace_terminating:
                self._forget(key)
                return None
            self._fail(service, "NamespaceNotEnabled", _missing_right(refused))
            raise Backoff(str(refused), FORBIDDEN_BACKOFF_S) from refused
        except NotOurs as conflict:
            self._fail(service, "ConflictingOwner", str(conflict))
            raise Backoff(str(conflict), NOT_OURS_BACKOFF_S) from conflict
        except KubeError as error:
            raise Backoff(str(error)) from error
        service.problems.pop("ScalingActive", None)
        self._loops.ensure(service)
        self._status.offer(service)
        return _jittered(RESYNC_S)

    async def _look_around(self, namespace: str) -> None:
        """Know the namespace's pods and Deployments before anything is decided. Raises Forbidden, Backoff."""
        self._tenants.ensure(namespace)
        if await self._tenants.until_synced(namespace, SYNC_TIMEOUT_S):
            return
        if refusal := self._tenants.refusal(namespace):
            raise refusal
        raise Backoff(f"pods of namespace '{namespace}' are not listed yet")

    async def model(self, namespace: str, name: str) -> float | None:
        """Visit a PrismModel: its status says who uses it and whether its points can be used."""
        try:
            obj = await self._kube.get(PRISM_MODELS, namespace, name)
        except NotFound:
            self._status.forget_model(namespace, name)
            return None
        users = [s for s in self._world.services.values() if s.key[0] == namespace and _model_name(s) == name]
        self._status.offer_model(obj, len(users))
        return _jittered(RESYNC_S)

    def services_of_model(self, namespace: str, name: str) -> list[ServiceKey]:
        """Services to visit when a model changed."""
        services = self._world.services.values()
        return [s.key for s in services if s.key[0] == namespace and _model_name(s) == name]

    async def _resolve(self, service: ServiceWorld, obj: Object) -> None:
        """Take over the spec if it can be planned. One that cannot changes a condition and nothing else: a service that
        runs keeps the last accepted spec, its loops and its children."""
        service.generation = obj["metadata"].get("generation", 0)
        service.woken_unix_s = _wake_time(obj)
        if service.policy is None:
            service.status = obj.get("status") or {}
            service.decisions = _decisions(service.status)
            self._status.remember(service)
        spec, model, resolved = await self._judge(service, obj)
        for condition in ("Accepted", "ModelResolved"):
            service.problems.pop(condition, None)
        if isinstance(resolved, ServicePolicy):
            service.spec, service.model, service.policy = spec, model, resolved
        elif service.usable() is None:
            service.spec, service.policy = spec, resolved
        else:
            service.problems[resolved.condition] = resolved
        if isinstance(resolved, Unusable):
            self._post(service, "NotAccepted", "Reconcile", str(resolved))

    async def _judge(
        self, service: ServiceWorld, obj: Object
    ) -> tuple[PrismServiceSpec | None, PrismModelSpec | None, ServicePolicy | Unusable]:
        try:
            spec = PrismServiceSpec.model_validate(obj["spec"])
        except ValidationError as error:  # a CRD of another version let it pass
            return None, None, Unusable("Accepted", "Invalid", f"The spec cannot be read: {_first(error)}.")
        model, problem = await self._model_spec(service.key[0], spec.model_ref.name)
        return spec, model, problem or policy.resolve(spec, model, self._loop_settings)

    async def _model_spec(self, namespace: str, name: str) -> tuple[PrismModelSpec | None, Unusable | None]:
        try:
            obj = await self._kube.get(PRISM_MODELS, namespace, name)
            return PrismModelSpec.model_validate(obj["spec"]), None
        except NotFound:
            return None, None
        except ValidationError as error:
            return None, Unusable("ModelResolved", "NotReady", f"PrismModel '{name}' cannot be read: {_first(error)}.")

    def _adopt_replicas(self, service: ServiceWorld, usable: ServicePolicy) -> None:
        """After a start the existing Deployment is the truth; a new service starts at its minimum."""
        assert service.spec is not None
        if usable.scaling is not ScalingControl.MANAGED:
            service.desired_replicas = usable.spec_replicas
        elif service.desired_replicas is None:
            deployment = service.deployment
            service.desired_replicas = deployment.replicas if deployment else max(1, usable.min_replicas)
        assert service.desired_replicas is not None, "External and Fixed services carry spec.replicas by CEL"
        violation = guard.replicas_violation(service.desired_replicas, service.spec)
        if violation and service.deployment is None:
            service.desired_replicas = max(1, usable.min_replicas)
        elif violation:
            logger.info("%s/%s: until the next decision: %s", *service.key, violation)

    async def _bring_about(
        self, service: ServiceWorld, obj: Object, spec: PrismServiceSpec, model: PrismModelSpec
    ) -> None:
        self._may_act()
        (namespace, name), owner = service.key, owner_reference(obj)
        assert service.desired_replicas is not None
        wanted = children.render(
            name,
            namespace,
            service.uid,
            spec,
            spec.model_ref.name,
            model,
            service.desired_replicas,
            self._child_settings,
        )
        labels = pod_template.labels(name, spec.model_ref.name)
        if await self._certificates.ensure_server_leaf(namespace, name, owner, labels):
            self._post(service, "CertificateRotated", "IssueCertificate", "issued the control channel's certificate")
        for child in wanted:
            await self._apply(service, child)
        await self._prune(service, wanted)
        await self._direct_traffic(service)

    async def _direct_traffic(self, service: ServiceWorld) -> None:
        for record, change in traffic.changes(service):
            self._may_act()
            with suppress(NotFound, Conflict):  # gone meanwhile, and perhaps replaced under its name
                await self._kube.patch(PODS, record.namespace, record.name, change)

    async def _apply(self, service: ServiceWorld, child: Object) -> None:
        resource, metadata = resource_of(child), child["metadata"]
        try:
            live = await self._kube.get(resource, metadata["namespace"], metadata["name"])
        except NotFound:
            self._may_act()
            await self._kube.apply(child, force=True)
            return
        if controller_uid(live) != service.uid:
            raise NotOurs(
                f"{child['kind']} '{metadata['name']}' exists and is not controlled by this PrismService; "
                "delete or rename it, the operator does not overwrite it"
            )
        if is_current(live, child):
            return
        self._may_act()
        self._note_reverted_replicas(service, live, child)
        await self._kube.apply(child, force=True)

    def _note_reverted_replicas(self, service: ServiceWorld, live: Object, child: Object) -> None:
        record = service.deployment
        if child["kind"] != "Deployment" or record is None or record.foreign_replica_owner is None:
            return
        found, wanted = live["spec"].get("replicas"), child["spec"]["replicas"]
        if found != wanted:
            note = (
                f"'{record.foreign_replica_owner}' set {found} replicas on the Deployment, put back to {wanted}; "
                "scale the PrismService instead (`scaling.control: External` gives its /scale to HPA or KEDA)"
            )
            self._post(service, "ReplicasReverted", "ApplyDeployment", note)

    async def _prune(self, service: ServiceWorld, wanted: list[Object]) -> None:
        rendered = {(child["kind"], child["metadata"]["name"]) for child in wanted}
        namespace, name = service.key
        for resource in PRUNED:
            if (resource.kind, name) in rendered:
                continue
            try:
                live = await self._kube.get(resource, namespace, name)
            except NotFound:
                continue
            if controller_uid(live) == service.uid:
                self._may_act()
                await self._kube.delete(resource, namespace, name, live["metadata"]["uid"])

    def _may_act(self) -> None:
        """Asked before every write: a visit may have begun before the Lease was lost."""
        if not self._leadership.may_act():
            raise Backoff("not leading any more")

    def _forget(self, key: ServiceKey) -> None:
        self._loops.stop(key)
        self._world.forget(key)
        if not any(namespace == key[0] for namespace, _ in self._world.services):
            self._tenants.stop(key[0])
        self._certificates.forget(*key)
        self._status.forget(key)
        metrics.forget_service(*key)

    def _fail(self, service: ServiceWorld, reason: str, message: str) -> None:
        """Turn the condition and say it in an Event; running pods keep their loops."""
        condition = "ScalingActive" if reason == "ConflictingOwner" else "Accepted"
        service.problems[condition] = Unusable(condition, reason, message)
        self._post(service, reason, "Reconcile", message)
        self._status.offer(service)

    def _post(self, service: ServiceWorld, reason: str, action: str, note: str) -> None:
        self._events.post(Regarding(*service.key, service.uid), reason, action, note)


def _missing_right(refused: Forbidden) -> str:
    return (
        f"The operator may not {refused.verb} {refused.path}. Let it in: add the namespace to the chart's value "
        f"`tenantNamespaces`, or bind the chart's tenant ClusterRole there. The API server said: {refused.message}"
    )


def _model_name(service: ServiceWorld) -> str | None:
    return service.spec.model_ref.name if service.spec else None


def _wake_time(obj: Object) -> float | None:
    """Seconds since the Unix epoch; a time that cannot be read wakes nobody."""
    text = (obj["metadata"].get("annotations") or {}).get(WAKE_ANNOTATION)
    if text is None:
        return None
    try:
        return unix_seconds(text)
    except (TypeError, ValueError):
        logger.info("annotation '%s' is no RFC 3339 time and is ignored", WAKE_ANNOTATION)
        return None


def _decisions(status: Object) -> list[Decision]:
    """Decisions of an earlier process, as far as they can still be read."""
    kept = []
    for raw in status.get("decisions") or []:
        try:
            kept.append(Decision.model_validate(raw))
        except ValidationError:
            logger.info("a decision in the status is of another version and is dropped")
    return kept


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.8, 1.2)
