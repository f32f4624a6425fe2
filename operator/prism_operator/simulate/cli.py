"""`prism-operator simulate`: what would Prism have done with my traffic, and what would it have cost?"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from prism_api import FULL
from prism_api.model import PrismModelSpec
from prism_api.profile import PointProfile, Profile
from prism_api.service import PrismServiceSpec
from prism_operator.plan.fleet import Caps, PriceUnknown
from prism_operator.plan.policy import resolve
from prism_operator.plan.types import LoopSettings, ServicePolicy, Unusable
from prism_operator.simulate import page, report, services
from prism_operator.simulate.policies import BASELINES, POLICIES
from prism_operator.simulate.score import score
from prism_operator.simulate.services import Member
from prism_operator.simulate.study import Study, run
from prism_operator.simulate.traces import Reading, TraceError, read
from prism_operator.simulate.workload import SimRequest
from prism_operator.simulate.world import World

DESCRIPTION = f"""\
Play a trace of your traffic against a simulated pool and print what the operator, and whatever you could use instead,
would have made of it. Needs no cluster and no accelerator; the code that decides is the operator's own.

  --trace     a CSV of requests (t_s, input_tokens, output_tokens, and class if you have several), a CSV of arrivals
              alone (t_s), a CSV of rates (t_s, total_rps), or what Prometheus answers to a range query of a rate:
                curl -G http://PROMETHEUS/api/v1/query_range --data-urlencode 'query=sum(rate(requests_total[1m]))' \\
                  -d start=2026-01-01T00:00:00Z -d end=2026-01-01T12:00:00Z -d step=15 > trace.json
  --service   your PrismService; its PrismModel may stand in the same file, or in the one that --model names
  --profile   what a step costs on your accelerator: JSON as `prism-runtime profile` prints it, or one that comes along:
              {{profiles}}
  --speed-up  if the profile has the point 'full' alone: how much faster a step is at the model's lowest point

Several services that share accelerators or money: give --trace and --service once for each, in the same order, and the
caps that the operator would have (chart values `operator.fleet`); --model and --profile once for all, or once for each.

Policies:
{chr(10).join(f"  {name:14} {text}" for name, (_, text) in POLICIES.items())}

Example, with the files of this repository:
  prism-operator simulate --trace examples/traces/azure2023_code_burst.csv --service examples/prismservice.yaml \\
    --model examples/prismmodel.yaml --profile runtime/prism_runtime/profiles/demo.json --start-seconds 20 \\
    --baseline replicas-only --baseline hpa --html report.html
  prism-operator simulate --service chat.yaml --trace chat.csv --service code.yaml --trace code.csv \
    --profile l4-olmoe --speed-up 1.5 --max-accelerators 8

Read the result with care. Simulated are arrivals, batching, prefill, KV cache, pod starts and drains, and the channel
to the operator; not the network and prefix caches. What pods of this project's runtime do better than others (--order
deadline, --governors) and what a plain Service does worse than a router (--routing random) is not assumed. Every figure
is as good as the profile. A star in the table marks a policy that is no worse than prism in attainment and
replica-hours, and better in one.
"""


class Unfit(ValueError):
    """Input that cannot be simulated; the message says what would work."""


def shipped() -> dict[str, str]:
    """Names of the profiles of this package, and their JSON."""
    folder = files(__package__).joinpath("profiles")
    found = {entry.name: entry.read_text() for entry in folder.iterdir() if entry.name.endswith(".json")}
    return {name.removesuffix(".json"): text for name, text in sorted(found.items())}


def load_profile(name: str) -> Profile:
    """A shipped profile by name, or a JSON file. Raises Unfit."""
    known = shipped()
    try:
        text = known[name] if name in known else Path(name).read_text()
        return Profile.model_validate_json(text)
    except OSError as error:
        raise Unfit(f"--profile {name}: no such file ({error.strerror}); known names: {', '.join(known)}") from error
    except ValidationError as error:
        raise Unfit(f"--profile {name}: {error}") from error


@dataclass(frozen=True, slots=True)
class Specs:
    """A PrismService by its namespace and name, and the PrismModel it names."""

    name: str
    service: PrismServiceSpec
    model: PrismModelSpec


def load_specs(service: Path, model: Path | None) -> Specs:
    """The first PrismService of a file and its PrismModel. Raises Unfit."""
    documents: list[dict[str, Any]] = []
    for path in (service, *([] if model is None else [model])):
        try:
            documents += [one for one in yaml.safe_load_all(path.read_text()) if isinstance(one, dict)]
        except (OSError, yaml.YAMLError) as error:
            raise Unfit(f"{path}: cannot be read: {error}") from error
    try:
        first = next((one for one in documents if one.get("kind") == "PrismService"), None)
        if first is None:
            raise Unfit(f"{service}: holds no PrismService")
        parsed = PrismServiceSpec.model_validate(first["spec"])
        wanted = parsed.model_ref.name
        found = next(
            (one for one in documents if one.get("kind") == "PrismModel" and one["metadata"]["name"] == wanted), None
        )
        if found is None:
            raise Unfit(f"no PrismModel '{wanted}' in {service}; name the file that has it with --model")
        named = f"{first['metadata'].get('namespace', 'default')}/{first['metadata']['name']}"
        return Specs(named, parsed, PrismModelSpec.model_validate(found["spec"]))
    except (ValidationError, KeyError) as error:
        raise Unfit(f"{service}: {error}") from error


def fitted(profile: Profile, model: PrismModelSpec, speed_up: float | None) -> Profile:
    """The profile with every point of the model; costs between `full` and the lowest are linear in the budget."""
    missing = [point.name for point in model.ladder.points if point.name not in profile.points]
    if not missing:
        return profile
    if speed_up is None or FULL not in profile.points:
        raise Unfit(
            f"profile '{profile.accelerator}' has no cost for {', '.join(missing)}; measure them with "
            "`prism-runtime profile`, or say with --speed-up how much faster a step is at the lowest point"
        )
    full, lowest = profile.points[FULL], model.ladder.points[0].budget_permille
    costs = full.model_dump(exclude={"fit_error_permille"})
    points = {}
    for point in model.ladder.points:
        below = (1000 - point.budget_permille) / (1000 - lowest)
        share = 1 - (1 - 1 / speed_up) * below
        points[point.name] = PointProfile(**{field: round(cost * share) for field, cost in costs.items()})
    return profile.model_copy(update={"points": points})


def parser() -> argparse.ArgumentParser:
    description = DESCRIPTION.replace("{profiles}", ", ".join(shipped()))
    made = argparse.ArgumentParser(
        prog="prism-operator simulate", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--trace", type=Path, action="append", required=True, metavar="FILE")
    made.add_argument("--service", type=Path, action="append", required=True, metavar="YAML")
    made.add_argument("--model", type=Path, action="append", metavar="YAML")
    made.add_argument("--profile", action="append", required=True, metavar="NAME|FILE")
    made.add_argument("--speed-up", type=float, metavar="FACTOR")
    made.add_argument(
        "--baseline",
        action="append",
        choices=BASELINES,
        metavar="NAME",
        help="repeatable (default: replicas-only, hpa)",
    )
    made.add_argument("--all", action="store_true", help="every policy of the list above")
    made.add_argument("--seeds", type=int, default=3, help="runs of each policy, with seeds 0, 1, ... (default 3)")
    made.add_argument("--start-seconds", type=float, default=100, help="median time from order to ready (default 100)")
    made.add_argument("--start-p90-seconds", type=float, help="its 90 %% quantile (default: no variance)")
    made.add_argument("--initial", type=int, help="replicas at the start (default: scaling.minReplicas)")
    made.add_argument("--from", type=float, default=0, dest="start_s", help="begin at this second (default 0)")
    made.add_argument("--span", type=float, default=math.inf, help="seconds to play (default: all)")
    made.add_argument("--factor", type=float, default=1, help="requests per request of the trace (default 1)")
    made.add_argument("--prompt", type=float, default=512, help="mean prompt where the trace has none (default 512)")
    made.add_argument("--output", type=float, default=128, help="mean output where the trace has none (default 128)")
    made.add_argument("--longest-prompt", type=int, default=10**9, help="clip prompts to this many tokens")
    made.add_argument("--longest-output", type=int, default=10**9, help="clip outputs to this many tokens")
    made.add_argument("--report-loss", type=float, default=0, help="share of pods' reports that get lost (default 0)")
    made.add_argument("--report-lag", type=float, default=0, help="age in seconds of what a policy sees (default 0)")
    made.add_argument("--crashes-per-hour", type=float, default=0, help="crashes of one pod in an hour (default 0)")
    made.add_argument("--never-ready", type=float, default=0, help="share of new pods that never start (default 0)")
    made.add_argument(
        "--routing",
        choices=("least-busy", "random"),
        default="least-busy",
        help="who gets a request: the pod with the fewest, or any, as behind a plain Service (default least-busy)",
    )
    made.add_argument(
        "--order",
        choices=("arrival", "deadline"),
        default="arrival",
        help="in which pods start waiting requests; this project's runtime goes by deadline (default arrival)",
    )
    made.add_argument("--governors", action="store_true", help="pods move inside their envelope, as this runtime's do")
    made.add_argument("--max-accelerators", type=int, help="that the replicas of all services may take together")
    made.add_argument("--max-per-hour", type=Decimal, help="what the replicas of all services may cost together")
    made.add_argument("--price", type=Decimal, help="of a replica-hour (default: pools[].pricePerHour)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every run")
    made.add_argument("--html", type=Path, metavar="FILE", help="write one page with tables and plots")
    return made


def members(arguments: argparse.Namespace) -> list[Member]:
    """The services that the command line names, each with its load. Raises Unfit or TraceError."""
    traces, count = arguments.trace, len(arguments.trace)
    if len(arguments.service) != count:
        raise Unfit(f"--service is given {len(arguments.service)} times and --trace {count} times; give one for each")
    models, profiles = (_for_each(name, getattr(arguments, name), count) for name in ("model", "profile"))
    made = [
        _member(arguments, trace, load_specs(service, model), profile)
        for trace, service, model, profile in zip(traces, arguments.service, models, profiles, strict=True)
    ]
    names = [member.name for member in made]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise Unfit(f"two of --service name the same PrismService, {', '.join(sorted(doubled))}; they must differ")
    return made


def _for_each(name: str, given: Sequence[Any] | None, count: int) -> Sequence[Any]:
    """One value for all, or one for each. Raises Unfit."""
    values = given or [None]
    if len(values) not in (1, count):
        raise Unfit(f"--{name} is given {len(values)} times; give it once, or once for each of the {count} services")
    return values if len(values) == count else list(values) * count


def _member(arguments: argparse.Namespace, trace: Path, specs: Specs, profile_name: str) -> Member:
    profile = fitted(load_profile(profile_name), specs.model, arguments.speed_up)
    policy = resolve(specs.service, specs.model, LoopSettings(pod_ready_s=arguments.start_seconds))
    if isinstance(policy, Unusable):
        raise Unfit(str(policy))
    if policy.max_replicas is None:
        raise Unfit("scaling.control must be 'Managed', for Prism's own replica loop is simulated")
    if arguments.price is not None:
        policy = replace(policy, price_per_hour=arguments.price)
    reading = Reading(
        service_class=policy.default_class,
        start_s=arguments.start_s,
        span_s=arguments.span,
        factor=arguments.factor,
        prompt=arguments.prompt,
        output=arguments.output,
        longest_prompt=arguments.longest_prompt,
        longest_output=arguments.longest_output,
    )
    study = Study(
        policy=policy,
        profile=profile,
        workload=lambda seed: _of_known_classes(read(trace, replace(reading, seed=seed)), policy),
        start_median_s=arguments.start_seconds,
        start_p90_s=arguments.start_p90_seconds or arguments.start_seconds,
        initial=arguments.initial or policy.min_replicas,
        world=World(
            report_loss=arguments.report_loss,
            report_lag_s=arguments.report_lag,
            crashes_per_hour=arguments.crashes_per_hour,
            never_ready=arguments.never_ready,
            random_routing=arguments.routing == "random",
            by_deadline=arguments.order == "deadline",
            governors=arguments.governors,
        ),
    )
    resource = specs.service.pool.accelerator.resource
    return Member(specs.name, study, 0 if resource is None else resource.count)


def _of_known_classes(requests: list[SimRequest], policy: ServicePolicy) -> list[SimRequest]:
    """A class that the service does not know is its default class, as for the runtime's class header."""
    known = {one.name for one in policy.classes}
    for request in requests:
        if request.service_class not in known:
            request.service_class = policy.default_class
    return requests


def main(argv: Sequence[str] | None = None) -> int:
    made = parser()
    arguments = made.parse_args(argv)
    caps = Caps(arguments.max_per_hour, arguments.max_accelerators)
    try:
        asked = members(arguments)
        if len(asked) > 1 or caps != Caps():
            return _together(arguments, asked, caps)
        return _alone(arguments, asked[0].study)
    except (Unfit, TraceError, PriceUnknown) as error:
        made.error(str(error))


def _alone(arguments: argparse.Namespace, asked: Study) -> int:
    """One service, beside what could be used instead."""
    names = BASELINES if arguments.all else tuple(arguments.baseline or ("replicas-only", "hpa"))
    results = run(asked, names, range(arguments.seeds))
    print(report.table(results))
    trace = arguments.trace[0].name
    first = results.scores["prism"][0]
    facts = {
        "trace": trace,
        "requests": first.requests,
        "seconds": round(first.seconds),
        "seeds": arguments.seeds,
        "profile": f"{asked.profile.accelerator}: {asked.profile.provenance}",
        "pods ready after": f"{asked.start_median_s:g} s",
    }
    if arguments.json is not None:
        arguments.json.write_text(report.as_json(results, facts))
    if arguments.html is not None:
        arguments.html.write_text(page.page(results, asked.policy, f"Simulation of {trace}", facts))
    return 0


def _together(arguments: argparse.Namespace, asked: Sequence[Member], caps: Caps) -> int:
    """Several services, or one under the fleet's caps, each under Prism. Raises Unfit for what tells of one alone."""
    for flag in ("baseline", "all"):
        if getattr(arguments, flag):
            raise Unfit(f"--{flag} compares policies for one service; leave it out, or simulate each service by itself")
    runs = [services.play(asked, caps, seed) for seed in range(arguments.seeds)]
    scores = {
        member.name: [score(taken.fleets[place], "prism", seed) for seed, taken in enumerate(runs)]
        for place, member in enumerate(asked)
    }
    print(report.services_table(scores))
    accelerators, cost = max(one.most_accelerators for one in runs), max(one.most_per_hour for one in runs)
    print(f"at one time ordered at most: {accelerators} accelerators, {cost:.2f} an hour")
    traces = [trace.name for trace in arguments.trace]
    facts = {
        "traces": traces,
        "max_accelerators": caps.accelerators,
        "max_per_hour": None if caps.per_hour is None else str(caps.per_hour),
        "most_accelerators": accelerators,
        "most_per_hour": cost,
    }
    if arguments.json is not None:
        arguments.json.write_text(report.services_json(scores, facts))
    if arguments.html is not None:
        shown = {
            "seeds": arguments.seeds,
            "accelerators": f"{accelerators} at most at one time, cap {caps.accelerators or 'none'}",
            "cost an hour": f"{cost:.2f} at most at one time, cap {caps.per_hour or 'none'}",
        }
        title = f"Simulation of {', '.join(traces)}"
        arguments.html.write_text(page.services_page(scores, runs[0], caps, title, shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
