"""What decides in a simulation: the port between a fleet and a policy, and Prism behind it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from prism_api.control import Admission
from prism_operator.plan import budget, demand, replicas
from prism_operator.plan.types import (
    BudgetPlan,
    BudgetState,
    DemandState,
    Observation,
    ReplicaPlan,
    ReplicaState,
    ServicePolicy,
)


@dataclass(frozen=True, slots=True)
class PodSignals:
    """One ready pod as a metrics endpoint shows it."""

    name: str
    running: int
    waiting: int
    token_s: float | None
    """Mean time per output token since the last tick; None without a step."""
    oldest_wait_s: float
    """Age of the request at the head of the queue."""
    kv_used: float
    """Share of the KV cache."""
    waiting_prompt_tokens: int
    age_s: float
    """Since it became ready."""


@dataclass(frozen=True, slots=True)
class Signals:
    """What a controller may look at, at one of its ticks.

    observation   what Prism's operator sees, if it is wanted: counters since the last tick, lost reports missing
    pods          the ready pods
    provisioned   pods that the Deployment counts: ordered, not told to stop
    first_tokens  (time, TTFT) of first tokens since the controller's last tick
    predictions   (time, predicted TTFT) of arrivals since then, if the controller wants them
    offered       requests that arrived since the controller's last tick
    """

    now_s: float
    observation: Observation | None
    pods: Sequence[PodSignals]
    provisioned: int
    first_tokens: Sequence[tuple[float, float]]
    predictions: Sequence[tuple[float, float]]
    offered: int


@dataclass(frozen=True, slots=True)
class Orders:
    """What a controller wants. None or absent: as it was."""

    replicas: int | None = None
    points: Mapping[str, str] = field(default_factory=dict)
    """Class -> operating point, of all pods."""
    floors: Mapping[str, str] = field(default_factory=dict)
    """Class -> lowest point that a pod's governor may sink to; none for a class that is absent."""
    pod_points: Mapping[str, str] = field(default_factory=dict)
    """Pod -> operating point of all its classes; wins over `points`."""
    admission: Mapping[str, Admission] = field(default_factory=dict)
    out_of_traffic: frozenset[str] | None = None
    """Pods that get no new requests, and go first when replicas are given up."""


class Controller(Protocol):
    """A policy. `period_s` is the time between its ticks; state is its own.

    `wants_reports` and `wants_predictions`: it reads pods' reports (`Signals.observation`), or a router's predicted
    latencies (`Signals.predictions`). What nobody reads is not made up, for it costs most of a tick.
    """

    @property
    def name(self) -> str: ...

    @property
    def period_s(self) -> float: ...

    @property
    def wants_reports(self) -> bool: ...

    @property
    def wants_predictions(self) -> bool: ...

    def decide(self, signals: Signals) -> Orders: ...


@dataclass(frozen=True, slots=True)
class Tick:
    """What the operator decided at one second."""

    at_s: float
    ready: int
    ordered: int
    plan: BudgetPlan
    replica_plan: ReplicaPlan | None


class Prism:
    """The operator's two loops: `plan.demand`, `plan.budget` every tick, `plan.replicas` every slow period."""

    wants_reports, wants_predictions = True, False

    def __init__(self, policy: ServicePolicy, name: str = "prism") -> None:
        self.name = name
        self.policy = policy
        self.ticks: list[Tick] = []
        self._decided_s = -math.inf
        self.forget()

    @property
    def period_s(self) -> float:
        return self.policy.loop.fast_period_s

    def forget(self) -> None:
        """Restart: all that the operator remembers is lost."""
        self.demand, self.budget, self.replicas = DemandState(), BudgetState(), ReplicaState()

    def decide(self, signals: Signals) -> Orders:
        observation, policy = signals.observation, self.policy
        assert observation is not None, "Prism asks for reports"
        self.demand = demand.update(self.demand, observation, policy)
        plan, self.budget = budget.decide(observation, self.demand, policy, self.budget)
        replica_plan = None
        since_s = observation.now_s - self._decided_s
        if since_s >= policy.loop.slow_period_s or replicas.urgent(plan, policy, since_s, observation.ordered_replicas):
            self._decided_s = observation.now_s
            replica_plan, self.replicas = replicas.decide(observation, self.demand, policy, self.replicas)
        ordered = observation.ordered_replicas or 0
        if replica_plan is not None:
            ordered = replica_plan.replicas
        self.ticks.append(Tick(observation.now_s, len(observation.ready), ordered, plan, replica_plan))
        return Orders(
            replicas=None if replica_plan is None else replica_plan.replicas,
            points={target.name: target.point for target in plan.classes},
            floors={target.name: target.floor for target in plan.classes},
            admission={target.name: target.admission for target in plan.classes},
            out_of_traffic=None if replica_plan is None else frozenset(replica_plan.out_of_traffic),
        )
