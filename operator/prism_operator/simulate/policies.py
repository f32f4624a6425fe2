"""Every policy by name, set up for one service on one workload: what is tuned, and from what, is decided here.

Nothing is tuned on the run itself: targets of the baselines follow from the profile's capacity at `full` and the
workload's mean lengths, as a careful user would set them; all else is the default of the source. What Prism's defaults
were chosen on is told in docs/simulator.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from prism_api import FULL
from prism_api.profile import Profile
from prism_api.service import BudgetControl
from prism_operator.plan import capacity
from prism_operator.plan.demand import Lengths
from prism_operator.plan.types import ClassPolicy, ServicePolicy
from prism_operator.simulate.baselines.dynamo import Dynamo
from prism_operator.simulate.baselines.hpa import Hpa
from prism_operator.simulate.baselines.keda_slo import KedaSlo
from prism_operator.simulate.baselines.knative import Knative
from prism_operator.simulate.baselines.proteus import Choice, Proteus
from prism_operator.simulate.baselines.slackfit import SlackFit
from prism_operator.simulate.baselines.static import Static
from prism_operator.simulate.control import Controller, Prism
from prism_operator.simulate.workload import SimRequest

BUSY = 0.7
"""Share of a pod's capacity that concurrency targets aim at: Knative's default, and a common choice for an HPA."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A service, the cost of its pods, and what is known about its requests before the run."""

    policy: ServicePolicy
    profile: Profile
    lengths: Lengths
    fixed: int
    """Replicas of the policies that do not scale."""

    @property
    def main(self) -> ClassPolicy:
        """The class that laws which know only one are set up for."""
        return self.policy.by_name(self.policy.default_class)

    def capacity_per_s(self, point: str) -> float:
        return capacity.sustainable_rate(self.profile.points[point], self.profile, self.main, self.lengths).per_s

    @property
    def concurrency(self) -> float:
        """Requests in a pod that runs at its capacity at `full`: Little's law."""
        rate = self.capacity_per_s(FULL)
        load = capacity.ClassLoad(self.main, rate, self.lengths)
        token_s = capacity.time_per_token_s([load], {self.main.name: FULL}, self.profile, 1)
        assert token_s is not None, "`full` has a profile, and there is a load"
        return max(1.0, min(rate * self.lengths.output_tokens * token_s, self.profile.max_sequences))

    @property
    def bounds(self) -> tuple[int, int]:
        return self.policy.min_replicas, self.policy.max_replicas or self.policy.min_replicas


def lengths_of(requests: Sequence[SimRequest]) -> Lengths:
    count = max(1, len(requests))
    return Lengths(
        sum(request.prompt_tokens for request in requests) / count,
        sum(request.output_tokens for request in requests) / count,
    )


def _prism(setting: Setting) -> Controller:
    return Prism(setting.policy)


def _replicas_only(setting: Setting) -> Controller:
    return Prism(replace(setting.policy, budget=BudgetControl.OFF, max_point=FULL), "replicas-only")


def _budget_only(setting: Setting) -> Controller:
    fixed = replace(setting.policy, min_replicas=setting.fixed, max_replicas=setting.fixed)
    return Prism(fixed, "budget-only")


def _hpa(setting: Setting) -> Controller:
    return Hpa(BUSY * setting.concurrency, *setting.bounds)


def _hpa_waiting(setting: Setting) -> Controller:
    return Hpa(1.0, *setting.bounds, waiting_only=True)


def _knative(setting: Setting) -> Controller:
    return Knative(setting.concurrency, *setting.bounds)


def _keda(setting: Setting) -> Controller:
    return KedaSlo(setting.main.ttft_s, setting.main.tpot_s, *setting.bounds)


def _dynamo(setting: Setting) -> Controller:
    full = setting.profile.points[FULL]
    prefill_s = full.prefill_per_token_nanoseconds * 1e-9
    return Dynamo(setting.main.ttft_s, setting.main.tpot_s, setting.capacity_per_s(FULL), prefill_s, *setting.bounds)


def _allowed(setting: Setting) -> list[str]:
    """Points from the class's floor up."""
    ladder = setting.policy.ladder
    return [point.name for point in ladder.points[ladder.index(setting.main.floor) :]]


def _proteus(setting: Setting) -> Controller:
    ladder = setting.policy.ladder
    choices = [
        Choice(name, float(ladder[name].relative_quality), setting.capacity_per_s(name)) for name in _allowed(setting)
    ]
    return Proteus(setting.fixed, choices)


def _slackfit(setting: Setting) -> Controller:
    full = setting.profile.points[FULL]
    speeds = {
        name: setting.profile.points[name].step_base_nanoseconds / full.step_base_nanoseconds
        for name in _allowed(setting)
    }
    prefill_s = full.prefill_per_token_nanoseconds * 1e-9
    return SlackFit(setting.fixed, setting.main.ttft_s, setting.main.tpot_s, prefill_s, speeds)


def _static(setting: Setting) -> Controller:
    return Static(setting.fixed)


def _static_peak(setting: Setting) -> Controller:
    return Static(setting.bounds[1])


POLICIES: Mapping[str, tuple[Callable[[Setting], Controller], str]] = {
    "prism": (_prism, "this operator: budget and replicas"),
    "replicas-only": (_replicas_only, "this operator's replica loop, every pod at 'full'"),
    "budget-only": (_budget_only, "this operator's budget loop on a fixed number of replicas"),
    "static": (_static, "a fixed number of replicas: the mean that prism used"),
    "static-peak": (_static_peak, "scaling.maxReplicas all the time"),
    "hpa": (_hpa, "Kubernetes HPA v2 on running + waiting requests"),
    "hpa-waiting": (_hpa_waiting, "Kubernetes HPA v2 on waiting requests"),
    "knative": (_knative, "Knative pod autoscaler on concurrency"),
    "keda-slo": (_keda, "KEDA with the latency law of llm-d's SLO-aware guide"),
    "dynamo": (_dynamo, "NVIDIA Dynamo's load and throughput loops"),
    "proteus": (_proteus, "accuracy scaling after Proteus, fixed replicas"),
    "slackfit": (_slackfit, "after SuperServe's SlackFit, fixed replicas"),
}
BASELINES = tuple(name for name in POLICIES if name != "prism")


def build(name: str, setting: Setting) -> Controller:
    """The policy of that name. Raises KeyError that lists the known ones."""
    try:
        make, _ = POLICIES[name]
    except KeyError:
        raise KeyError(f"unknown policy '{name}'; known: {', '.join(POLICIES)}") from None
    return make(setting)


def starts_at_fixed(name: str) -> bool:
    """Whether the policy begins with its fixed number of replicas rather than with the minimum."""
    return name in ("static", "budget-only", "proteus", "slackfit")
