"""What holds for every input of the planner, not only for the examples."""

import copy
import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_operator.plan import budget, children, demand, replicas
from prism_operator.plan.capacity import ClassLoad, time_per_token_s
from prism_operator.plan.children import ChildSettings
from prism_operator.plan.recommendation import TOLERANCE, Asked, Recommendation, flat, whole
from prism_operator.plan.types import (
    BudgetState,
    ClassBudgetState,
    DemandState,
    Lengths,
    LoopSettings,
    Observation,
    PodView,
    Reason,
    ReplicaState,
    ServicePolicy,
    Status,
)
from tests.unit.plan.factories import (
    POINTS,
    QUALITY,
    delta,
    demand_of,
    load,
    model_spec,
    observation,
    pod,
    profile,
    service_class,
    service_policy,
    service_spec,
    starting_pod,
)

LADDER = list(POINTS)
NAMES = ("gold", "bulk")
NOW_S = 100.0

points = st.sampled_from(LADDER)
rates = st.integers(0, 60)


@st.composite
def policies(draw: st.DrawFn) -> ServicePolicy:
    """Two classes with any floors, any highest point that is reachable, any bounds and cap."""
    floors = [draw(points), draw(points)]
    top = draw(st.sampled_from(LADDER[max(LADDER.index(floor) for floor in floors) :]))
    least = draw(st.integers(1, 4))
    most = draw(st.integers(least, 12))
    budget_block: dict[str, Any] = {"control": draw(st.sampled_from(["Auto", "Off", "Fixed"])), "max": top}
    if budget_block["control"] == "Fixed":
        budget_block["operatingPoint"] = draw(points)
    classes = [
        service_class(
            name,
            priority=draw(st.integers(-5, 5)),
            overload=draw(st.sampled_from(["Queue", "Shed"])),
            quality={"minRelativeQuality": QUALITY[floor]},
        )
        for name, floor in zip(NAMES, floors, strict=True)
    ]
    changes: dict[str, Any] = {
        "classes": classes,
        "defaultClass": "gold",
        "budget": budget_block,
        "mode": draw(st.sampled_from(["Active", "Active", "Paused"])),
        "scaling": {"minReplicas": least, "maxReplicas": most, "maxStep": draw(st.integers(1, 6))},
    }
    if draw(st.booleans()):
        changes["cost"] = {"maxPerHour": str(draw(st.integers(least * 3, 40)))}
    return service_policy(**changes)


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    views: list[PodView] = []
    for number in range(draw(st.integers(0, 6))):
        name = f"pod-{number}"
        if draw(st.integers(0, 3)) == 0:
            views.append(starting_pod(name, NOW_S - draw(st.integers(0, 600))))
            continue
        views.append(
            pod(
                name,
                classes=NAMES,
                point=draw(points),
                stale=draw(st.booleans()),
                deleting=draw(st.integers(0, 5)) == 0,
                load=load(waiting=draw(st.integers(0, 40))),
                profile=draw(st.sampled_from([profile(), None])),
            )
        )
    ordered = draw(st.one_of(st.none(), st.integers(1, 12)))
    return observation(NOW_S, tuple(views), ordered_replicas=ordered, rollout=draw(st.booleans()))


def _history(policy: ServicePolicy, gold: int, bulk: int, tpot_ms: float = 50.0) -> DemandState:
    return demand_of(policy, {"gold": gold, "bulk": bulk}, NOW_S, tpot_ms=tpot_ms)


budget_states = st.one_of(
    st.just(BudgetState()),
    st.builds(
        lambda gold, bulk, moved: BudgetState(
            {"gold": ClassBudgetState(gold, moved), "bulk": ClassBudgetState(bulk, moved)}, ("uid-pod-0", "uid-pod-9")
        ),
        points,
        points,
        st.floats(0, NOW_S),
    ),
)


@settings(max_examples=150, deadline=None)
@given(policies(), observations(), budget_states, rates, rates, st.sampled_from([30.0, 90.0, 190.0]))
def test_no_class_leaves_its_floor_or_maximum_and_every_plan_says_why(
    policy: ServicePolicy, seen: Observation, state: BudgetState, gold: int, bulk: int, tpot_ms: float
) -> None:
    plan, after = budget.decide(seen, _history(policy, gold, bulk, tpot_ms), policy, state)
    ladder = policy.ladder
    for target in plan.classes:
        floor = ladder.index(policy.by_name(target.name).floor)
        assert floor <= ladder.index(target.floor) <= ladder.index(target.point) <= ladder.index(target.ceiling)
        assert ladder.index(target.point) <= ladder.index(policy.max_point)
        assert target.message
    assert plan.message
    assert plan.reason in Reason
    assert plan.status in Status
    json.dumps(asdict(after))


@settings(max_examples=100, deadline=None)
@given(policies(), observations(), budget_states, rates, rates)
def test_equal_observation_gives_equal_points(
    policy: ServicePolicy, seen: Observation, state: BudgetState, gold: int, bulk: int
) -> None:
    history = _history(policy, gold, bulk)
    first, state = budget.decide(seen, history, policy, state)
    second, again = budget.decide(seen, history, policy, state)
    if first.reason is Reason.ADOPTED:  # a plan that only repeats is followed by the first that decides
        second, again = budget.decide(seen, history, policy, again)
        first, state = second, again
        second, _ = budget.decide(seen, history, policy, state)
    assert [target.point for target in second.classes] == [target.point for target in first.classes]


@settings(max_examples=60, deadline=None)
@given(rates, rates, st.integers(1, 4))
def test_more_load_never_means_a_higher_point(one: int, other: int, pods: int) -> None:
    policy, state = service_policy(), BudgetState({"interactive": ClassBudgetState("full", 0.0)})
    less, more = sorted((one, other))
    chosen = [
        budget.decide(observation(NOW_S, pods), demand_of(policy, rate, NOW_S), policy, state)[0]
        for rate in (less, more)
    ]
    low, high = (LADDER.index(plan.by_name("interactive").point) for plan in chosen)
    assert low >= high


@settings(max_examples=60, deadline=None)
@given(rates, st.integers(1, 5))
def test_one_more_pod_never_means_a_lower_point(rate: int, pods: int) -> None:
    policy, state = service_policy(), BudgetState({"interactive": ClassBudgetState("full", 0.0)})
    history = demand_of(policy, rate, NOW_S)
    fewer, more = (budget.decide(observation(NOW_S, n), history, policy, state)[0] for n in (pods, pods + 1))
    assert LADDER.index(more.by_name("interactive").point) >= LADDER.index(fewer.by_name("interactive").point)


@settings(max_examples=25, deadline=None)
@given(st.integers(10, 90), st.lists(st.sampled_from([-0.1, -0.05, 0.0, 0.05, 0.1]), min_size=90, max_size=90))
def test_load_that_varies_by_a_tenth_does_not_flap(tenths: int, noise: list[float]) -> None:
    """After it has settled, the point moves in one direction only."""
    policy, state = service_policy(), BudgetState({"interactive": ClassBudgetState("full", -100.0)})
    history = demand_of(policy, 100, 0.0, 60, prompt=3, output=1)
    moves: list[int] = []
    for tick, part in enumerate(noise):
        now_s, at = float(tick + 1), state.classes["interactive"].point
        arrived = round(tenths * (1 + part))
        seen = observation(
            now_s, (pod(point=at),), classes={"interactive": delta(arrived, prompt=6, output=3, tpot_ms=20)}
        )
        history = demand.update(history, seen, policy)
        plan, state = budget.decide(seen, history, policy, state)
        moves.append(LADDER.index(plan.by_name("interactive").point) - LADDER.index(at))
    settled = [move for move in moves[60:] if move]
    assert all(move > 0 for move in settled) or all(move < 0 for move in settled), moves


@pytest.mark.parametrize("rate", range(13))
def test_constant_load_converges_to_one_point(rate: int) -> None:
    """Four steps up, each after a down window at the latest."""
    behavior = {"scaleDown": {"stabilizationWindowSeconds": 30}}
    policy = service_policy(scaling={"minReplicas": 1, "maxReplicas": 1, "behavior": behavior})
    state = BudgetState({"interactive": ClassBudgetState("b500", -100.0)})
    history, trace = demand_of(policy, rate, 0.0), []
    for tick in range(1, 181):
        at = state.classes["interactive"].point
        seen = observation(float(tick), (pod(point=at),), classes={"interactive": delta(rate)})
        history = demand.update(history, seen, policy)
        plan, state = budget.decide(seen, history, policy, state)
        trace.append(plan.by_name("interactive").point)
    assert len(set(trace[140:])) == 1, trace


@given(points, st.integers(1, 4), st.floats(0, 1e6))
def test_restart_keeps_the_point_that_pods_hold(point: str, pods: int, now_s: float) -> None:
    views = tuple(pod(f"pod-{number}", point=point) for number in range(pods))
    plan, _ = budget.decide(observation(now_s, views), DemandState(), service_policy(), BudgetState())
    assert (plan.reason, plan.by_name("interactive").point) == (Reason.ADOPTED, point)


needs = st.floats(0, 50, allow_subnormal=False)
asks = st.one_of(
    st.builds(flat, st.integers(0, 50), st.integers(0, 50)),
    st.builds(
        lambda need, burst, least: Asked(
            up=max(whole(need), whole(burst), least),
            at_once=max(whole(need / (1 + TOLERANCE)), whole(burst), least),
            nominal=need,
            kept=1.05 * need,
            burst=burst,
            least=least,
        ),
        needs,
        needs,
        st.integers(0, 50),
    ),
)
replica_states = st.builds(
    lambda since, asked, ordered_for: ReplicaState(
        since, tuple(Recommendation(NOW_S - 10 * (len(asked) - i), one) for i, one in enumerate(asked)), ordered_for
    ),
    st.one_of(st.none(), st.floats(-1000, NOW_S)),
    st.lists(asks, max_size=5),
    st.one_of(st.none(), st.integers(0, 50)),
)


@settings(max_examples=150, deadline=None)
@given(policies(), observations(), replica_states, st.integers(0, 2000), rates)
def test_replicas_keep_bounds_cap_and_step_and_every_plan_says_why(
    policy: ServicePolicy, seen: Observation, state: ReplicaState, gold: int, bulk: int
) -> None:
    plan, after = replicas.decide(seen, _history(policy, gold, bulk), policy, state)
    assert plan.message
    assert plan.replicas >= 1
    json.dumps(asdict(after))
    if policy.paused:
        assert plan.replicas == (seen.ordered_replicas or policy.min_replicas)
        return
    assert policy.max_replicas is not None
    most = min(policy.max_replicas, policy.cap_replicas or policy.max_replicas)
    assert policy.min_replicas <= plan.replicas <= most
    ordered = seen.ordered_replicas
    if ordered is not None and policy.min_replicas <= ordered <= most:
        assert -1 <= plan.replicas - ordered <= policy.effective.max_step
    assert (plan.status is Status.PROGRESS) == (plan.replicas != ordered)


@settings(max_examples=60, deadline=None)
@given(rates, rates)
def test_more_load_never_recommends_fewer_replicas(one: int, other: int) -> None:
    policy = service_policy(scaling={"minReplicas": 1, "maxReplicas": 100})
    less, more = sorted((one, other))
    few, many = (
        replicas.decide(observation(NOW_S), demand_of(policy, rate, NOW_S), policy, ReplicaState())[0]
        for rate in (less, more)
    )
    assert few.recommended <= many.recommended


@settings(max_examples=60, deadline=None)
@given(policies(), observations(), replica_states, rates)
def test_equal_observation_repeats_no_order(
    policy: ServicePolicy, seen: Observation, state: ReplicaState, rate: int
) -> None:
    history = _history(policy, rate, rate)
    _, state = replicas.decide(seen, history, policy, state)
    _, again = replicas.decide(seen, history, policy, state)
    assert again.recommendations == state.recommendations


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 25))
def test_constant_load_orders_replicas_once(rate: int) -> None:
    """No oscillation between N and N-1 at any load."""
    policy = service_policy(LoopSettings(slow_period_s=5.0), scaling={"minReplicas": 1, "maxReplicas": 10})
    state, history, ordered, orders = ReplicaState(), DemandState(), 1, []
    loads = [ClassLoad(policy.classes[0], float(rate), Lengths(64, 32))]
    for tick in range(120):
        tpot_s = time_per_token_s(loads, {"interactive": "full"}, profile(), ordered)
        grown = delta(rate * 5, tpot_ms=1000 * min(10.0, tpot_s or 0.0))
        seen = observation(5.0 * tick, ordered, classes={"interactive": grown})
        history = demand.update(history, seen, policy)
        plan, state = replicas.decide(seen, history, policy, state)
        orders += [plan.replicas] if plan.replicas != ordered else []
        ordered = plan.replicas
    assert len(orders) <= 1 + rate // 20, orders


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(1, 65535), st.sampled_from(["Enabled", "Disabled"]))
def test_rendering_children_is_repeatable_and_shares_nothing(replicas_wanted: int, port: int, policy: str) -> None:
    spec = service_spec(
        runtime={"image": "registry.example/r@sha256:1", "servicePort": port}, networking={"networkPolicy": policy}
    )
    model, options = model_spec(), ChildSettings("prism-system")
    inputs = copy.deepcopy((spec.to_wire(), model.to_wire(), asdict(options)))
    first = children.render("chat", "demo", "uid", spec, "small-moe", model, replicas_wanted, options)
    text = json.dumps(first)
    for child in first:
        child["metadata"].clear()
        child["spec"].clear()
    assert (
        json.dumps(children.render("chat", "demo", "uid", spec, "small-moe", model, replicas_wanted, options)) == text
    )
    assert (spec.to_wire(), model.to_wire(), asdict(options)) == inputs
