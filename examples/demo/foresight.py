"""What a replay should show before it is run: the planner itself, on a simulated fleet of paced pods.

Used to choose the shipped slices (`python -m examples.demo.trace choose`), and to tell what is expected of one
(`describe`). The simulation sends each request to the pod with the least outstanding ones and has no governor in its
pods; kube-proxy sends at random, and the governor moves between the operator's ticks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from examples.demo import manifests
from examples.demo.results import burst_of
from examples.demo.trace import Arrival, Cut, cut
from prism_api.model import PrismModelSpec
from prism_api.profile import Profile
from prism_api.service import PrismServiceSpec
from prism_operator.plan import capacity
from prism_operator.plan.demand import Lengths
from prism_operator.plan.policy import resolve
from prism_operator.plan.types import LoopSettings, ServicePolicy
from prism_operator.simulate.fleet import Fleet
from prism_operator.simulate.workload import SimRequest

SHIPPED_PROFILES = Path(__file__).parents[2] / "runtime" / "prism_runtime" / "profiles"
POD_READY_S = 20.0
"""Start of a paced pod of examples/prismservice.yaml: 15 s of pretended loading, and the rest for the container."""
TAIL_S = 20.0
"""Simulated after the last arrival, so that every request ends."""


def read_profile(name_or_path: str) -> Profile:
    """A shipped pace profile by name, or a JSON file."""
    is_path = "/" in name_or_path or name_or_path.endswith(".json")
    path = Path(name_or_path) if is_path else SHIPPED_PROFILES / f"{name_or_path}.json"
    return Profile.model_validate_json(path.read_text())


def policy(profile: Profile, budget_control: str) -> ServicePolicy:
    """What the operator makes of the demo's service and the embedded model: its points and its quality floors.

    Raises ValueError for a point of the model that the profile does not price.
    """
    spec = PrismServiceSpec.model_validate(manifests.service(budget_control=budget_control)["spec"])
    model = PrismModelSpec.model_validate(manifests.model("not pulled")["spec"])
    missing = [point.name for point in model.operating_points if point.name not in profile.points]
    if missing:
        raise ValueError(f"profile '{profile.accelerator}' has no cost for {', '.join(missing)}")
    resolved = resolve(spec, model, LoopSettings(slow_period_s=manifests.SLOW_LOOP_S))
    assert isinstance(resolved, ServicePolicy), resolved
    return resolved


def foresee(arrivals: Sequence[Arrival], policy: ServicePolicy, profile: Profile) -> Fleet:
    """The fleet after the replay; `attainment()` and `ticks` tell how it went."""
    fleet = Fleet(policy, profile, pods=policy.min_replicas, start_s=lambda n: POD_READY_S)
    requests = [SimRequest(a.at_s, policy.default_class, a.prompt_tokens, a.output_tokens) for a in arrivals]
    fleet.run(requests, arrivals[-1].at_s + TAIL_S)
    return fleet


def burst_over_capacity(arrivals: Sequence[Arrival], policy: ServicePolicy, profile: Profile) -> float | None:
    """Rate of the burst over what one replica holds at full, as the planner computes it; None without a burst."""
    burst = burst_of([a.at_s for a in arrivals])
    if burst is None or burst.end_s == burst.onset_s:
        return None
    count = len(arrivals)
    lengths = Lengths(sum(a.prompt_tokens for a in arrivals) / count, sum(a.output_tokens for a in arrivals) / count)
    objectives = policy.by_name(policy.default_class)
    holds = capacity.sustainable_rate(profile.points["full"], profile, objectives, lengths).per_s
    inside = sum(burst.onset_s <= a.at_s <= burst.end_s for a in arrivals)
    return inside / (burst.end_s - burst.onset_s) / holds


@dataclass(frozen=True, slots=True)
class Choice:
    """A slice that is for the knob, and what is expected of it."""

    how: Cut
    requests: int
    over: float
    at_full: float
    elastic: float


OVER, BURST_S, CALM_REQUESTS = (1.1, 1.6), (10.0, 22.0), 10
"""What makes a slice one that the knob is for: a burst so much above one replica for so long, after a calm start."""
KEEPS, SEEDS, GRID_S = (0.22, 0.26, 0.3, 0.34, 0.38, 0.42, 0.46, 0.5), range(3), 4


def choices(source: Sequence[Arrival], profile: Profile, *, span_s: float, calm_s: float) -> Iterator[Choice]:
    """Slices on a grid of starts and thinnings whose budget stays at full until the burst and falls in it."""
    held, elastic = policy(profile, "Off"), policy(profile, "Auto")
    for start_s in range(0, int(source[-1].at_s - span_s), GRID_S):
        for how in (Cut(start_s, span_s, keep, seed) for keep in KEEPS for seed in SEEDS):
            kept = cut(source, how)
            burst = burst_of([a.at_s for a in kept])
            if burst is None or not calm_s <= burst.onset_s <= calm_s + 2 * GRID_S:
                continue
            if not BURST_S[0] <= burst.end_s - burst.onset_s <= BURST_S[1]:
                continue
            over = burst_over_capacity(kept, held, profile)
            if over is None or not OVER[0] <= over <= OVER[1]:
                continue
            if sum(a.at_s < burst.onset_s for a in kept) < CALM_REQUESTS:
                continue
            fleet = foresee(kept, elastic, profile)
            fell_s = lowered_s(fleet)
            if fell_s is None or fell_s < burst.onset_s:
                continue
            yield Choice(how, len(kept), over, foresee(kept, held, profile).attainment(), fleet.attainment())


def lowered_s(fleet: Fleet) -> float | None:
    """When the budget of the default class first fell."""
    points = fleet.points(fleet.policy.default_class)
    return next((later[0] for earlier, later in pairwise(points) if earlier[1] == "full" != later[1]), None)


def print_choices(source: Sequence[Arrival], profile: Profile, *, span_s: float, calm_s: float, most: int = 20) -> None:
    found = sorted(choices(source, profile, span_s=span_s, calm_s=calm_s), key=lambda c: c.at_full - c.elastic)
    print("start_s  keep  seed  requests  burst/capacity  attainment at full -> with the knob")
    for c in found[:most]:
        slice_ = f"{c.how.start_s:7g}  {c.how.keep:4g}  {c.how.seed:4}"
        print(f"{slice_}  {c.requests:8}  {c.over:14.2f}  {c.at_full:.2f} -> {c.elastic:.2f}")


def print_description(arrivals: Sequence[Arrival], profile: Profile) -> None:
    held, elastic = policy(profile, "Off"), policy(profile, "Auto")
    burst, over = burst_of([a.at_s for a in arrivals]), burst_over_capacity(arrivals, held, profile)
    when = "no burst"
    if burst is not None and over is not None:
        when = f"burst from {burst.onset_s:.0f} s to {burst.end_s:.0f} s at {over:.2f} times one replica's capacity"
    print(f"{len(arrivals)} requests in {arrivals[-1].at_s:.0f} s; {when}")
    for name, each in (("budget held at full", held), ("budget moved by the planner", elastic)):
        fleet = foresee(arrivals, each, profile)
        second_s = next((tick.at_s for tick in fleet.ticks if tick.ready > 1), None)
        print(
            f"{name:28} attainment {fleet.attainment():.2f}, first lower point at {lowered_s(fleet)} s, "
            f"second replica ready at {second_s} s"
        )
