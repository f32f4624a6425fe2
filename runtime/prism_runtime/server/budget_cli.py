"""`prism-runtime budget get|set`: reads and turns the budget of a `serve --local-control` on this machine.

Standard library alone, so that it starts in the blink of an eye.
"""

import argparse
import http.client
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any


def default_socket() -> Path:
    """`moe-prism/control.sock` in the user's runtime folder, else in their cache folder."""
    folder = os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(folder) / "moe-prism" / "control.sock"


class BudgetError(Exception):
    """The budget was not read or not set; the message says why and what would work."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=5)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def add_parser(subparsers: Any) -> None:
    """The `budget` command."""
    parser = subparsers.add_parser(
        "budget",
        help="show or turn the activation budget of the model that serves on this machine",
        description="Works while requests run: the next step of the engine is already on the new operating point.",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    getting = actions.add_parser("get", help="list the operating points and mark the live one")
    setting = actions.add_parser(
        "set",
        help="switch to an operating point",
        epilog="Example: prism-runtime budget set b500; prism-runtime budget set --permille 600",
    )
    wanted = setting.add_mutually_exclusive_group(required=True)
    wanted.add_argument("point", nargs="?", metavar="POINT", help="an operating point, for example b500 or full")
    wanted.add_argument(
        "--permille", type=int, metavar="N", help="the largest operating point with a budget of at most N per-mille"
    )
    setting.add_argument("--class", dest="class_name", metavar="NAME", help="only this service class; default: all")
    for action in (getting, setting):
        action.add_argument(
            "--socket", type=Path, default=default_socket(), help="the serving process's --local-control (%(default)s)"
        )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        budget = _call(arguments.socket, "GET")
        if arguments.action == "set":
            point = arguments.point or point_within(budget["points"], arguments.permille)
            wanted = {"point": point} | ({"class": arguments.class_name} if arguments.class_name else {})
            budget = _call(arguments.socket, "PUT", wanted)
    except BudgetError as error:
        print(f"prism-runtime budget: {error}", file=sys.stderr)
        return 1
    print(table(budget))
    return 0


def point_within(points: list[dict[str, Any]], permille: int) -> str:
    """Name of the largest point with a budget of at most `permille`. Raises BudgetError if there is none."""
    within = [point for point in points if point["budgetPermille"] <= permille]
    if not within:
        smallest = min(point["budgetPermille"] for point in points)
        raise BudgetError(f"--permille {permille} is below the smallest operating point of this model, {smallest}")
    return str(max(within, key=lambda point: point["budgetPermille"])["name"])


def table(budget: dict[str, Any]) -> str:
    """The ladder, largest budget first, with the classes that run at each point."""
    lines = [f"{'point':8} {'budget':>7}  {'relative quality (95 % low)':28} live"]
    for point in sorted(budget["points"], key=lambda point: -point["budgetPermille"]):
        classes = [c["name"] for c in budget["classes"] if c["point"] == point["name"]]
        quality = f"{point['relativeQuality']} ({point['relativeQualityLow']})"
        live = "<- " + ", ".join(classes) if classes else ""
        lines.append(f"{point['name']:8} {point['budgetPermille'] / 10:5.1f} %  {quality:28} {live}".rstrip())
    return "\n".join([*lines, f"plan version {budget['planVersion']}"])


def _call(path: Path, method: str, body: dict[str, str] | None = None) -> dict[str, Any]:
    connection = _UnixConnection(path)
    try:
        connection.request(method, "/v1/budget", json.dumps(body) if body else None)
        response = connection.getresponse()
        answer = json.loads(response.read())
    except FileNotFoundError:
        raise BudgetError(
            f"nothing serves at '{path}'; start 'prism-runtime serve ARTIFACT --local-control', or name its --socket"
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise BudgetError(f"the process at '{path}' does not answer: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise BudgetError(answer.get("error", f"status {response.status}"))
    return dict(answer)
