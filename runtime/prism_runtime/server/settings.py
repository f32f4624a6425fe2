"""Settings of `prism-runtime serve`: flags, environment variables, and what they become. Imports nothing heavy."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

LOG_LEVELS = ("debug", "info", "warning", "error")
POLICY_NAMES = ("slack", "paper", "fifo")
"""Those of `engine.batching.POLICIES`, whose module this one must not import."""


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Everything `serve` needs to know; fields are the flags of `add_serve_flags` by the same names."""

    artifact: Path
    served_name: str | None
    host: str
    port: int
    control_port: int
    metrics_port: int
    tls_dir: Path | None
    local_control: Path | None
    max_sequences: int | None
    max_context_tokens: int
    kv_tokens: int | None
    prefill_tokens_per_step: int | None
    policy: str
    shed_above: float | None
    threads: int
    pace: str | None
    pace_start_seconds: float
    no_profile: bool
    boot_point: str
    class_header: str
    accelerator: str | None
    service_namespace: str
    service_name: str
    service_uid: str | None
    pod_name: str
    pod_uid: str
    image_digest: str
    drain_grace: float
    drain_seconds: float
    watchdog_seconds: float
    log_level: str

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "ServeSettings":
        return cls(**{field.name: getattr(arguments, field.name) for field in fields(cls)})


class FlagsFromEnvironment:
    """Adds flags that may also be given as PRISM_* variables: the flag wins, then the variable, then the default."""

    def __init__(self, parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
        self._parser = parser
        self._environment = environment
        self._group: Any = parser

    def group(self, title: str, text: str) -> None:
        self._group = self._parser.add_argument_group(title, text)

    def add(self, flag: str, text: str, *, default: Any = None, **options: Any) -> None:
        variable = "PRISM_" + flag.removeprefix("--").upper().replace("-", "_")
        value = self._environment.get(variable) or default  # set but empty is what an unset chart value renders to
        shown = "" if default is None else f"; default {default}"
        self._group.add_argument(flag, default=value, help=f"{text} [{variable}{shown}]", **options)

    def add_switch(self, flag: str, text: str) -> None:
        variable = "PRISM_" + flag.removeprefix("--").upper().replace("-", "_")
        on = self._environment.get(variable, "").lower() in ("1", "true", "yes")
        self._group.add_argument(flag, action="store_true", default=on, help=f"{text} [{variable}=1]")


def _number(text: str, what: str, low: float, high: float, *, whole: bool) -> float:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        raise argparse.ArgumentTypeError(f"must be {what}; found '{text}'")
    return value


def _port(text: str) -> int:
    return int(_number(text, "a port, 0 to 65535", 0, 65_535, whole=True))


def _positive(text: str) -> int:
    return int(_number(text, "a whole number from 1", 1, 2**31, whole=True))


def _seconds(text: str) -> float:
    return _number(text, "seconds, 0 to 86400", 0, 86_400, whole=False)


def _ratio(text: str) -> float:
    return _number(text, "a number from 1 to 1000", 1, 1000, whole=False)


def _policy(text: str) -> str:
    if text not in POLICY_NAMES:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(POLICY_NAMES)}; found '{text}'")
    return text


def _log_level(text: str) -> str:
    if text not in LOG_LEVELS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(LOG_LEVELS)}; found '{text}'")
    return text


def add_serve_flags(parser: argparse.ArgumentParser, default_socket: Path) -> None:
    """Flags of `serve`."""
    flags = FlagsFromEnvironment(parser, os.environ)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder made by 'prism-runtime refactor'")

    flags.group("addresses", "Where it listens. Port 0 takes a free one; the log line 'serving' names it.")
    flags.add("--host", "address to bind; pods pass their own IP", default="127.0.0.1")
    flags.add("--port", "OpenAI-compatible API, /health, /ready, /metrics", default="8000", type=_port)
    flags.add("--metrics-port", "/metrics alone", default="8082", type=_port)
    flags.add("--control-port", "control API, mutual TLS; only with --tls-dir", default="8081", type=_port)
    flags.add(
        "--tls-dir",
        "folder with ca.crt, tls.crt, tls.key; waited for if empty, re-read when it changes",
        type=Path,
    )
    flags.add(
        "--local-control",
        f"Unix socket for 'prism-runtime budget' on this machine, without a path: {default_socket}",
        type=Path,
        nargs="?",
        const=default_socket,
        metavar="SOCKET",
    )

    flags.group("model and engine", "Sizes bound memory; a pace profile sets those that are not given.")
    flags.add("--served-name", "model name in the API; default: the artifact's source model")
    flags.add("--max-sequences", "requests that run at once (16)", type=_positive)
    flags.add("--max-context-tokens", "prompt and answer together", default="512", type=_positive)
    flags.add("--kv-tokens", "tokens the KV cache holds; default: max-sequences x max-context-tokens", type=_positive)
    flags.add("--prefill-tokens-per-step", "prompt tokens read in one step (512)", type=_positive)
    flags.add(
        "--policy",
        f"who runs in a step at which operating point: {', '.join(POLICY_NAMES)}; the first goes by promises and costs",
        default="slack",
        type=_policy,
        metavar="POLICY",
    )
    flags.add(
        "--shed-above",
        "answer 429 to a request whose first token would come later than so many times its class's objective, even "
        "with every budget at its floor; default: take everything in",
        type=_ratio,
        metavar="TIMES",
    )
    flags.add("--threads", "CPU threads of the model", default="1", type=_positive)
    flags.add("--boot-point", "operating point until the first directive", default="full")
    flags.add("--class-header", "request header that names the service class", default="x-prism-class")
    flags.add("--watchdog-seconds", "longest step before /health fails", default="30", type=_seconds)

    flags.group(
        "profile and pace",
        "Without a pace, step times are the artifact's own for the accelerator (prism_profiles/NAME.json, from "
        "'prism-runtime profile'), corrected by some steps, or measured at start; the report publishes them.",
    )
    flags.add("--pace", "prescribe step times: a shipped profile's name ('demo') or a JSON file", metavar="PROFILE")
    flags.add("--pace-start-seconds", "not ready before this long after start", default="0", type=_seconds)
    flags.add_switch("--no-profile", "publish no profile, and measure none at start")
    flags.add("--accelerator", "name that profile and report carry; default: the pace profile's, else 'cpu'")

    flags.group("pod", "Who this is; the operator sets these.")
    flags.add("--service-namespace", "namespace of the service", default="local")
    flags.add("--service-name", "name of the service", default="local")
    flags.add("--service-uid", "directives of any other service are refused")
    flags.add("--pod-name", "name in reports", default="local")
    flags.add("--pod-uid", "uid in reports", default="local")
    flags.add("--image-digest", "image digest in reports", default="unknown")
    flags.add("--drain-grace", "after SIGTERM: not ready, still accepting, for so long", default="5", type=_seconds)
    flags.add("--drain-seconds", "then: finish what was accepted, for at most so long", default="45", type=_seconds)
    flags.add("--log-level", ", ".join(LOG_LEVELS), default="info", type=_log_level)
