"""`prism-runtime`: serve an elastic model, turn its budget, measure it, make one.

Only parsing happens here; each command imports what it needs when it runs, so that `--help` and `budget` are instant.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prism_runtime.refactor import cli as refactor_cli
from prism_runtime.refactor import convert_cli, evaluate_cli
from prism_runtime.server import budget_cli
from prism_runtime.server.settings import ServeSettings, add_serve_flags


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prism-runtime",
        description="Serves a mixture-of-experts model with an activation budget that turns while it runs.",
        epilog="Start here: prism-runtime serve examples/model/artifact --local-control, then, in another terminal, "
        "prism-runtime budget set b500.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="OpenAI-compatible server",
        description="Every flag may also be set by the environment variable in brackets; the flag wins.",
    )
    add_serve_flags(serve, budget_cli.default_socket())
    serve.set_defaults(run=_serve)
    budget_cli.add_parser(commands)
    _add_profile(commands)
    refactor_cli.add_parser(commands)
    evaluate_cli.add_parser(commands)
    convert_cli.add_parser(commands)
    return parser


def _add_profile(commands: Any) -> None:
    profile = commands.add_parser(
        "profile",
        help="measure step times at every operating point",
        description="Short runs of the real engine, a least-squares fit, and the profile as JSON on standard output.",
    )
    profile.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder made by 'prism-runtime refactor'")
    profile.add_argument("--accelerator", default="cpu", help="name the profile carries (default cpu)")
    profile.add_argument("--max-sequences", type=int, default=16, help="largest batch measured (default 16)")
    profile.add_argument("--max-context-tokens", type=int, default=512, help="longest context (default 512)")
    profile.add_argument("--threads", type=int, default=1, help="CPU threads of the model (default 1)")
    profile.set_defaults(run=_profile)


def _serve(arguments: argparse.Namespace) -> int:
    from prism_runtime.server.serve import serve

    return serve(ServeSettings.of(arguments))


def _profile(arguments: argparse.Namespace) -> int:
    from prism_runtime.server.serve import print_profile

    return print_profile(
        arguments.artifact,
        accelerator=arguments.accelerator,
        max_sequences=arguments.max_sequences,
        max_context_tokens=arguments.max_context_tokens,
        threads=arguments.threads,
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
