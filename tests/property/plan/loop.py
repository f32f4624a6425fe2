"""Both loops of one service over time, without requests: arrivals as counts, latencies from the closed form."""

from typing import Any

from prism_operator.plan import budget, demand, replicas
from prism_operator.plan.capacity import ClassLoad, time_per_token_s
from prism_operator.plan.types import (
    BudgetPlan,
    BudgetState,
    DemandState,
    Lengths,
    LoopSettings,
    PodView,
    ReplicaPlan,
    ReplicaState,
    ServicePolicy,
)
from tests.unit.plan.factories import delta, observation, pod, profile, service_policy, starting_pod

NAME, TICK_S = "interactive", 5.0
LOOP = LoopSettings(slow_period_s=TICK_S, fast_period_s=TICK_S)


def loop_policy(**scaling: Any) -> ServicePolicy:
    """Ticks of five seconds for both loops: an hour is 720 of them."""
    return service_policy(LOOP, scaling={"minReplicas": 1, "maxReplicas": 20, **scaling})


class Loop:
    """Ordered pods are ready after `start_s`, those in `broken` never. Points are acknowledged at the next tick."""

    def __init__(self, policy: ServicePolicy, ordered: int = 1, start_s: float = 60.0) -> None:
        self.policy, self.start_s, self.now_s = policy, start_s, 0.0
        self.demand, self.budget, self.state = DemandState(), BudgetState(), ReplicaState()
        self.point = "full"
        self.pods = [pod(f"pod-{n}") for n in range(ordered)]
        self.orders: list[tuple[float, int]] = []
        self.plans: list[ReplicaPlan] = []
        self.points: list[BudgetPlan] = []
        self.broken: set[str] = set()
        self._created = ordered

    @property
    def ordered(self) -> int:
        return len(self.pods)

    def run(self, per_s: float, seconds: float) -> None:
        for _ in range(int(seconds / TICK_S)):
            self.tick(per_s)
            self.now_s += TICK_S

    def restart_operator(self) -> None:
        """Forget everything that the operator remembers; pods run on."""
        self.demand, self.budget, self.state = DemandState(), BudgetState(), ReplicaState()

    def tick(self, per_s: float) -> None:
        self.pods = [self._at_now(one) for one in self.pods]
        ready = sum(one.ready for one in self.pods)
        loads = [ClassLoad(self.policy.classes[0], per_s, Lengths(64, 32))]
        tpot_s = time_per_token_s(loads, {NAME: self.point}, profile(), ready) or 0.05
        grown = delta(round(per_s * TICK_S), tpot_ms=1000 * min(10.0, tpot_s), point=self.point)
        seen = observation(self.now_s, tuple(self.pods), classes={NAME: grown} if ready else {})
        self.demand = demand.update(self.demand, seen, self.policy)
        points, self.budget = budget.decide(seen, self.demand, self.policy, self.budget)
        self.points.append(points)
        if points.classes:
            self.point = points.by_name(NAME).point
        plan, self.state = replicas.decide(seen, self.demand, self.policy, self.state)
        self.plans.append(plan)
        if plan.replicas != self.ordered:
            self.orders.append((self.now_s, plan.replicas))
            self._scale(plan.replicas)

    def _at_now(self, one: PodView) -> PodView:
        due = one.name not in self.broken and self.now_s - one.created_s >= self.start_s
        if not one.ready and not due:
            return one
        return pod(one.name, point=self.point, created_s=one.created_s, ready_s=one.ready_s or self.now_s)

    def _scale(self, replicas_wanted: int) -> None:
        while len(self.pods) < replicas_wanted:
            self.pods.append(starting_pod(f"pod-{self._created}", self.now_s))
            self._created += 1
        # As a ReplicaSet does: what is not ready goes first, then the newest.
        self.pods.sort(key=lambda one: (not one.ready, one.created_s))
        del self.pods[replicas_wanted:]
