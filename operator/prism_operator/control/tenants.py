"""Informers per namespace: started when a namespace gets its first PrismService, so that no right is needed elsewhere.

The operator may read pods and Deployments only where it was let in. A namespace that does not let it in is known by its
refusal, and does not keep others from being served.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from prism_operator.control.informer import (
    DeploymentRecord,
    Informer,
    PodRecord,
    deployment_record,
    pod_record,
)
from prism_operator.control.kube import Forbidden, Kube
from prism_operator.control.resources import DEPLOYMENTS, PODS

STALE_S = 150.0
"""Informers hear a bookmark about every minute; after two missed ones replicas are not decided any more."""


@dataclass(frozen=True, slots=True)
class _Tenant:
    pods: Informer[PodRecord]
    deployments: Informer[DeploymentRecord]
    tasks: tuple[asyncio.Task[None], ...]

    @property
    def informers(self) -> tuple[Informer[PodRecord], Informer[DeploymentRecord]]:
        return self.pods, self.deployments


class Tenants:
    """Live copies of pods and Deployments of every namespace with a PrismService."""

    def __init__(
        self,
        kube: Kube,
        on_pod: Callable[[PodRecord | None, PodRecord | None], None],
        on_deployment: Callable[[DeploymentRecord | None, DeploymentRecord | None], None],
    ) -> None:
        self._kube, self._on_pod, self._on_deployment = kube, on_pod, on_deployment
        self._tenants: dict[str, _Tenant] = {}

    def ensure(self, namespace: str) -> None:
        """Watch the namespace; idempotent."""
        if namespace in self._tenants:
            return
        pods = Informer(self._kube, PODS, namespace, pod_record, self._on_pod)
        deployments = Informer(self._kube, DEPLOYMENTS, namespace, deployment_record, self._on_deployment)
        tasks = tuple(
            asyncio.create_task(informer.run(), name=f"informer of {namespace}") for informer in (pods, deployments)
        )
        self._tenants[namespace] = _Tenant(pods, deployments, tasks)

    def stop(self, namespace: str) -> None:
        """Watch it no longer. What was seen there is reported as gone: nobody would hear of its end."""
        if tenant := self._tenants.pop(namespace, None):
            for task in tenant.tasks:
                task.cancel()
            for informer in tenant.informers:
                informer.forget()

    async def close(self) -> None:
        tasks = [task for tenant in self._tenants.values() for task in tenant.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tenants.clear()

    async def until_synced(self, namespace: str, timeout_s: float) -> bool:
        """Wait for the first lists; False if they are not there in time."""
        waits = [informer.synced.wait() for informer in self._tenants[namespace].informers]
        try:
            await asyncio.wait_for(asyncio.gather(*waits), timeout_s)
        except TimeoutError:
            return False
        return True

    def synced(self, namespace: str) -> bool:
        """Everything was listed once: before that an absent pod means nothing."""
        tenant = self._tenants.get(namespace)
        return tenant is not None and all(informer.synced.is_set() for informer in tenant.informers)

    def fresh(self, namespace: str) -> bool:
        """The API server was heard not long ago: replicas are not decided on an old picture."""
        tenant, now_s = self._tenants.get(namespace), asyncio.get_running_loop().time()
        return tenant is not None and all(
            informer.last_contact_s is not None and now_s - informer.last_contact_s < STALE_S
            for informer in tenant.informers
        )

    def refusal(self, namespace: str) -> Forbidden | None:
        """What the API server refused at the last try."""
        tenant = self._tenants.get(namespace)
        refusals = [informer.refusal for informer in tenant.informers] if tenant else []
        return next((refusal for refusal in refusals if refusal is not None), None)
