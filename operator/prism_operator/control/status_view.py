"""From the world to statuses: gathers what `plan.status` renders and offers the result to the writer."""

import time
from collections.abc import Callable
from datetime import UTC, datetime

from pydantic import ValidationError

from prism_api.model import PrismModelSpec
from prism_operator.control.resources import PRISM_MODELS, PRISM_SERVICES, Object
from prism_operator.control.status_writer import StatusWriter
from prism_operator.control.world import ServiceKey, ServiceWorld
from prism_operator.plan import status as plan_status


def rfc3339(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class StatusView:
    def __init__(
        self,
        writer: StatusWriter,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self._writer, self._unix_clock = writer, unix_clock

    def remember(self, service: ServiceWorld) -> None:
        self._writer.remember(PRISM_SERVICES, *service.key, service.status)

    def offer(self, service: ServiceWorld) -> None:
        """Render the service's status and hand it to the writer; never waits."""
        assert service.policy is not None, "a visit resolves the policy before anything is shown"
        service.status = plan_status.render(
            plan_status.Inputs(
                service_name=service.key[1],
                generation=service.generation,
                now=rfc3339(self._unix_clock()),
                policy=service.policy,
                observation=service.observation,
                demand=service.demand,
                budget_plan=service.budget_plan,
                replica_plan=service.replica_plan,
                directive=service.directive,
                desired_replicas=service.desired_replicas,
                refusing_pods=service.refusing_pods(),
                last_switch=self._last_switch(service),
                decisions=tuple(service.decisions),
                problems=dict(service.problems),
                previous=service.status,
            )
        )
        self._writer.offer(PRISM_SERVICES, *service.key, service.status)

    def offer_model(self, obj: Object, users: int) -> None:
        """The status of a PrismModel as read."""
        metadata, spec, problem = obj["metadata"], None, None
        try:
            spec = PrismModelSpec.model_validate(obj["spec"])
        except ValidationError as error:
            problem = f"The spec cannot be read: {error.errors()[0]['msg']}."
        previous = obj.get("status") or {}
        status = plan_status.render_model_status(
            generation=metadata.get("generation", 0),
            spec=spec,
            problem=problem,
            services_using=users,
            now=rfc3339(self._unix_clock()),
            previous=previous,
        )
        if status != previous:
            self._writer.offer(PRISM_MODELS, metadata["namespace"], metadata["name"], status)

    @staticmethod
    def _last_switch(service: ServiceWorld) -> str | None:
        """Of this process, else as an earlier one wrote it."""
        if service.switched_unix_s is not None:
            return rfc3339(service.switched_unix_s)
        earlier: str | None = (service.status.get("budget") or {}).get("lastSwitchTime")
        return earlier

    def forget(self, key: ServiceKey) -> None:
        self._writer.forget(PRISM_SERVICES, *key)

    def forget_model(self, namespace: str, name: str) -> None:
        self._writer.forget(PRISM_MODELS, namespace, name)
