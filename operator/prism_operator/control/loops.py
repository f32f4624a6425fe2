"""The two loops of a service: every second budget and directives, every slow period the replica count.

Each service has one task, so that everything about it happens in order; services do not wait for each other. A tick
never waits for a slow pod or for the API server: polls have a deadline, statuses and orders are only handed over.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from prism_api.control import Directive, EnvelopeState, ServiceReference
from prism_operator import metrics
from prism_operator.control import guard, reporting, traffic
from prism_operator.control.channel import Channel, Peer
from prism_operator.control.events import Events, Regarding
from prism_operator.control.leadership import Leadership
from prism_operator.control.recorder import Move, Recorder
from prism_operator.control.tenants import Tenants
from prism_operator.control.world import ServiceKey, ServiceWorld
from prism_operator.plan import budget, demand, directive, replicas
from prism_operator.plan.types import BudgetPlan, Observation, ReplicaPlan, ServicePolicy

POLL_DEADLINE_S = 0.3
ACKNOWLEDGE_DEADLINE_S = 0.3

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ports:
    """What the loops act through."""

    channel: Channel
    leadership: Leadership
    events: Events
    recorder: Recorder
    tenants: Tenants
    order_reconcile: Callable[[ServiceKey], None]
    offer_status: Callable[[ServiceWorld], None]


class Loops:
    """One task per service; `ensure` and `stop` are idempotent."""

    def __init__(self, ports: Ports, clock: Callable[[], float] = time.monotonic) -> None:
        self._ports, self._clock = ports, clock
        self._loops: dict[ServiceKey, tuple[ServiceLoop, asyncio.Task[None]]] = {}

    def ensure(self, service: ServiceWorld) -> None:
        """Run the service's loops; a new spec, or a wish to be woken, makes the slow loop decide at its next tick."""
        known = self._loops.get(service.key)
        if known is not None and known[0].service is service and not known[1].done():
            known[0].spec_may_have_changed()
            return
        self.stop(service.key)
        loop = ServiceLoop(service, self._ports, self._clock)
        task = asyncio.create_task(loop.run(), name=f"loops of {service.key[0]}/{service.key[1]}")
        self._loops[service.key] = (loop, task)

    def stop(self, key: ServiceKey) -> None:
        if known := self._loops.pop(key, None):
            known[1].cancel()

    async def close(self) -> None:
        tasks = [task for _, task in self._loops.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._loops.clear()


class ServiceLoop:
    def __init__(self, service: ServiceWorld, ports: Ports, clock: Callable[[], float]) -> None:
        self.service, self._ports, self._clock = service, ports, clock
        self._regarding = Regarding(*service.key, service.uid)
        self._decided_s = float("-inf")
        self._asked = (service.generation, service.woken_unix_s)
        self._last_tick_s: float | None = None

    def spec_may_have_changed(self) -> None:
        asked = (self.service.generation, self.service.woken_unix_s)
        if asked != self._asked:
            self._asked = asked
            self._decided_s = float("-inf")

    async def run(self) -> None:
        """Tick until cancelled. A tick that fails is logged and does not end the loop: the envelopes need renewal."""
        due_s = self._clock() + random.uniform(0.0, 0.2)  # services created together do not tick together
        while True:
            await asyncio.sleep(max(0.0, due_s - self._clock()))
            policy = self.service.usable()
            period_s = policy.loop.fast_period_s if policy else 1.0
            try:
                await self.fast_tick()
                if self._slow_is_due():
                    self.slow_tick()
            except Exception:
                logger.exception("tick of %s/%s failed", *self.service.key)
            due_s = max(due_s + period_s, self._clock())

    async def fast_tick(self) -> None:
        """Poll, plan, guard, send. Late answers reach the world by themselves and count in the next tick."""
        service, ports = self.service, self._ports
        policy = service.usable()
        if policy is None or not (ports.leadership.may_act() and ports.tenants.synced(service.key[0])):
            return
        started_s = self._clock()
        await ports.channel.poll(service.peers(), POLL_DEADLINE_S)
        if not service.has_looked():
            return  # the first directive repeats what pods hold: they must have said it
        if service.highest_epoch_held > ports.leadership.epoch:
            ports.leadership.raise_above(service.highest_epoch_held)
            return
        now_s = self._clock()
        observation = service.observation = service.observe(now_s)
        service.demand = demand.update(service.demand, observation, policy)
        plan, service.budget = budget.decide(observation, service.demand, policy, service.budget)
        self._record(service.budget_plan, plan, policy)
        service.budget_plan = plan
        if self._renew_directive(plan, policy):
            await ports.channel.send(self._due(policy, self._clock()), ACKNOWLEDGE_DEADLINE_S)
        self._report(policy, observation)
        metrics.TICK_DURATION.labels("fast").observe(self._clock() - started_s)
        ports.offer_status(service)

    def slow_tick(self) -> None:
        """Decide the replica count and hand the order to reconcile."""
        service, ports = self.service, self._ports
        policy, observation = service.usable(), service.observation
        if policy is None or observation is None or observation.ordered_replicas is None:
            return
        if not (ports.leadership.may_act() and ports.tenants.fresh(service.key[0])):
            return
        started_s = self._clock()
        self._decided_s = started_s
        policy = replace(policy, granted_replicas=service.granted_replicas)
        plan, service.replicas = replicas.decide(observation, service.demand, policy, service.replicas)
        reporting.post_rehearsal(ports.events, self._regarding, service.replica_plan, plan)
        service.replica_plan = plan
        self._order(plan, observation.ordered_replicas)
        if traffic.changes(service):
            ports.order_reconcile(service.key)
        metrics.TICK_DURATION.labels("slow").observe(self._clock() - started_s)

    def _slow_is_due(self) -> bool:
        service, since_s = self.service, self._clock() - self._decided_s
        policy, plan = service.usable(), service.budget_plan
        if policy is None:
            return False
        if since_s >= policy.loop.slow_period_s:
            return True
        policy = replace(policy, granted_replicas=service.granted_replicas)
        return plan is not None and replicas.urgent(plan, policy, since_s, service.desired_replicas)

    def _order(self, plan: ReplicaPlan, ordered: int) -> None:
        service, (namespace, name) = self.service, self.service.key
        metrics.RECOMMENDED_REPLICAS.labels(namespace, name).set(plan.recommended)
        if plan.stuck_pods:
            note = f"pods {', '.join(plan.stuck_pods)} start for too long and get no credit; {plan.message}"
            self._ports.events.post(self._regarding, "ScaleUpBlocked", "PlanReplicas", note)
        if plan.replicas == ordered:
            return
        assert service.spec is not None, "a resolved policy comes from a spec"
        if violation := guard.replicas_violation(plan.replicas, service.spec):
            self._withhold(f"order of {plan.replicas} replicas withheld: {violation}")
            return
        event = "ScaledUp" if plan.replicas > ordered else "ScaledDown"
        move = Move("Replicas", None, str(ordered), str(plan.replicas), plan.reason, plan.message, event)
        service.decisions = self._ports.recorder.record(self._regarding, [move], service.decisions)
        service.desired_replicas = plan.replicas
        self._ports.order_reconcile(service.key)

    def _renew_directive(self, plan: BudgetPlan, policy: ServicePolicy) -> bool:
        """Make the plan the directive in force; False if there is none to send, then pods live on their envelope."""
        service, epoch = self.service, self._ports.leadership.epoch
        assert service.spec is not None
        assert service.model is not None
        last = service.directive
        candidate = self._directive(plan, policy, epoch, 1 if last is None or last.epoch != epoch else last.sequence)
        if candidate is None:
            return False
        if last is not None and _same_orders(last, candidate):
            return True
        if last is not None and last.epoch == epoch:
            candidate = candidate.model_copy(update={"sequence": last.sequence + 1})
        violation = guard.directive_violation(
            candidate, service.spec, service.model, epoch, last.fence if last else None
        )
        if violation:
            metrics.DIRECTIVES.labels("Withheld").inc()
            self._withhold(f"directive withheld: {violation}")
            return False
        service.directive = candidate
        return True

    def _due(self, policy: ServicePolicy, now_s: float) -> dict[Peer, Directive]:
        """Pods that must be told: those that hold something else, and those whose envelope is a third used up."""
        service, current = self.service, self.service.directive
        assert current is not None, "a directive is in force once _renew_directive said so"
        renewal_s = policy.effective.envelope_ttl_s / 3
        due: dict[Peer, Directive] = {}
        for peer in service.peers():
            pod = service.pods[peer.uid]
            if pod.report is None or not service.runs_this_model(pod):
                continue
            refusal = pod.refusal
            if refusal and refusal.directive.fence == current.fence and now_s - refusal.received_s < renewal_s:
                continue  # it has said no to this very directive: asking again every second changes nothing
            holds = pod.report.held.fence == current.fence and pod.report.held.state is EnvelopeState.MANAGED
            if not holds or pod.acknowledged_s is None or now_s - pod.acknowledged_s >= renewal_s:
                due[peer] = current
        return due

    def _directive(self, plan: BudgetPlan, policy: ServicePolicy, epoch: int, sequence: int) -> Directive | None:
        namespace, name = self.service.key
        return directive.build(
            plan,
            policy,
            service=ServiceReference(namespace=namespace, name=name, uid=self.service.uid),
            holder=self._ports.leadership.identity,
            epoch=epoch,
            sequence=sequence,
        )

    def _record(self, last: BudgetPlan | None, plan: BudgetPlan, policy: ServicePolicy) -> None:
        service, ports = self.service, self._ports
        moves = reporting.budget_moves(last, plan, policy.ladder)
        if moves:
            service.switched_unix_s = time.time()
            service.decisions = ports.recorder.record(self._regarding, moves, service.decisions)
        reporting.post_bridge(ports.events, self._regarding, last, plan)
        reporting.post_spent_quality(ports.events, self._regarding, last, plan)

    def _report(self, policy: ServicePolicy, observation: Observation) -> None:
        elapsed_s = 0.0 if self._last_tick_s is None else observation.now_s - self._last_tick_s
        self._last_tick_s = observation.now_s
        reporting.export(self.service, policy, observation, elapsed_s)
        reporting.post_pod_problems(self._ports.events, self._regarding, self.service, observation)

    def _withhold(self, message: str) -> None:
        logger.error("%s/%s: %s", *self.service.key, message)
        self._ports.events.post(self._regarding, "DirectiveWithheld", "Guard", message)


def _same_orders(left: Directive, right: Directive) -> bool:
    """Equal but for the fence and the reason: a new reason alone is no new order."""
    neutral = {"epoch": 0, "sequence": 0, "reason": "-"}
    return left.epoch == right.epoch and left.model_copy(update=neutral) == right.model_copy(update=neutral)
