"""Settings of the operator: flags, each with an environment variable; a wrong value is refused with what would work."""

import argparse
import os
import re
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NoReturn

PREFIX = "PRISM_OPERATOR_"
NAMESPACE_PATTERN = re.compile(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")
AMOUNT_PATTERN = re.compile(r"^[0-9]{1,9}(\.[0-9]{1,6})?$")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

DESCRIPTION = """\
Run the MoE-Prism operator: it keeps PrismServices' objectives by moving an activation budget (every fast loop, straight
to the pods) and a replica count (every slow loop, through their Deployments).

Every flag can be set by the environment variable named beside it; a flag wins. Access to the API server comes from
--kubeconfig, else KUBECONFIG, else the pod's ServiceAccount. Of several processes one
acts and the others stand by."""


class SettingsError(ValueError):
    """A flag or variable that cannot be used: which, what was found, what would work."""


@dataclass(frozen=True, slots=True)
class Settings:
    namespace: str
    """The operator's own namespace: its Leases and its CA live there, and pods accept control calls from there."""
    identity: str
    """Pod name plus a random part per process: two processes never hold a Lease under one identity."""
    watch_namespaces: tuple[str, ...]
    """Namespaces to serve; empty: all."""
    fast_loop_s: float
    slow_loop_s: float
    rehearsal_s: float
    """How long a pod is out of traffic before a scale-down removes it; 0: scale-downs are not rehearsed."""
    fleet_max_per_hour: Decimal | None
    """What the replicas of all services may cost together; None: no such cap."""
    fleet_max_accelerators: int | None
    listen: str
    metrics_port: int
    health_port: int
    control_port: int
    log_level: str
    kubeconfig: str | None


def namespace(text: str) -> str:
    if not NAMESPACE_PATTERN.match(text):
        raise ValueError("must be a DNS label: at most 63 of a-z, 0-9 and '-', not beginning or ending with '-'")
    return text


def namespaces(text: str) -> tuple[str, ...]:
    return tuple(namespace(part.strip()) for part in text.split(",") if part.strip())


def between(low: float, high: float, kind: type[int] | type[float]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise ValueError(f"must be {'an integer' if kind is int else 'a number'} from {low:g} to {high:g}")
        return value

    return parse


def amount(text: str) -> Decimal | None:
    """An amount of money, None if empty."""
    if not text:
        return None
    if not AMOUNT_PATTERN.match(text):
        raise ValueError("must be an amount like 250 or 99.50")
    return Decimal(text)


def count(text: str) -> int | None:
    """A number of things, None if empty."""
    return None if not text else int(between(0, 1_000_000, int)(text))


def level(text: str) -> str:
    if text.upper() not in LOG_LEVELS:
        raise ValueError(f"must be one of {', '.join(LOG_LEVELS)}")
    return text.upper()


@dataclass(frozen=True, slots=True)
class _Option:
    flag: str
    variable: str
    default: str
    parse: Callable[[str], Any]
    text: str


REHEARSAL = "how long a pod is out of traffic before it is removed; 0: it is removed at once"
_port = between(0, 65535, int)
_OPTIONS = (
    _Option("--namespace", "POD_NAMESPACE", "prism-system", namespace, "the operator's own namespace"),
    _Option("--pod-name", "POD_NAME", socket.gethostname(), str, "name in the Lease and in directives"),
    _Option("--watch-namespaces", f"{PREFIX}WATCH_NAMESPACES", "", namespaces, "comma list; empty: all namespaces"),
    _Option("--fast-loop-seconds", f"{PREFIX}FAST_LOOP_SECONDS", "1", between(0.2, 10, float), "period of the budget"),
    _Option("--slow-loop-seconds", f"{PREFIX}SLOW_LOOP_SECONDS", "30", between(1, 600, float), "period of replicas"),
    _Option("--rehearsal-seconds", f"{PREFIX}REHEARSAL_SECONDS", "0", between(0, 600, float), REHEARSAL),
    _Option("--fleet-max-per-hour", f"{PREFIX}FLEET_MAX_PER_HOUR", "", amount, "cost cap over all services"),
    _Option("--fleet-max-accelerators", f"{PREFIX}FLEET_MAX_ACCELERATORS", "", count, "accelerator cap, likewise"),
    _Option("--listen", "POD_IP", "127.0.0.1", str, "address of the two ports below"),
    _Option("--metrics-port", f"{PREFIX}METRICS_PORT", "9090", _port, "/metrics; 0: any free port"),
    _Option("--health-port", f"{PREFIX}HEALTH_PORT", "8080", _port, "/healthz and /readyz; 0: any free port"),
    _Option("--control-port", f"{PREFIX}CONTROL_PORT", "8081", _port, "the pods' control port"),
    _Option("--log-level", f"{PREFIX}LOG_LEVEL", "INFO", level, f"one of {', '.join(LOG_LEVELS)}"),
    _Option("--kubeconfig", f"{PREFIX}KUBECONFIG", "", str, "kubeconfig file, outside of a cluster"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every flag; they stay unset if not given, so that the environment can be asked."""
    for option in _OPTIONS:
        default = option.default or "none"
        if option.variable == "POD_NAME":
            default = "this host's name"
        parser.add_argument(option.flag, help=f"{option.text} (default {default}; {option.variable})")


def from_arguments(arguments: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Settings:
    """Flag, else environment variable, else default. An empty variable counts as not set. Raises SettingsError."""
    values: dict[str, Any] = {}
    for option in _OPTIONS:
        name = option.flag.removeprefix("--").replace("-", "_")
        given: str | None = getattr(arguments, name)
        text = given if given is not None else environ.get(option.variable) or option.default
        try:
            values[name] = option.parse(text)
        except ValueError as error:
            source = option.flag if given is not None else f"environment variable {option.variable}"
            raise SettingsError(f"{source} {error}; found '{text}'") from None
    return Settings(
        namespace=values["namespace"],
        identity=f"{values['pod_name']}_{uuid.uuid4().hex[:8]}",
        watch_namespaces=values["watch_namespaces"],
        fast_loop_s=values["fast_loop_seconds"],
        slow_loop_s=values["slow_loop_seconds"],
        rehearsal_s=values["rehearsal_seconds"],
        fleet_max_per_hour=values["fleet_max_per_hour"],
        fleet_max_accelerators=values["fleet_max_accelerators"],
        listen=values["listen"],
        metrics_port=values["metrics_port"],
        health_port=values["health_port"],
        control_port=values["control_port"],
        log_level=values["log_level"],
        kubeconfig=values["kubeconfig"] or None,
    )


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Settings of `prism-operator run ...`; exits with a sentence on what cannot be used."""
    parser = argparse.ArgumentParser(prog="prism-operator", description="MoE-Prism's Kubernetes operator.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="run the operator until SIGTERM",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(run)
    # Parsed by prism_operator.simulate.cli; here so that --help lists it.
    commands.add_parser("simulate", help="play a trace against a simulated pool, without a cluster", add_help=False)
    arguments = parser.parse_args(argv)
    try:
        return from_arguments(arguments)
    except SettingsError as error:
        _exit(run, str(error))


def _exit(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    parser.error(message)
