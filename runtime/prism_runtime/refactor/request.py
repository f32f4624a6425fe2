"""What a refactoring was asked to do: every argument that decides the artifact's bytes; a work folder keeps a copy.

Digests of the model, the texts and the program's libraries complete it, so two runs have the same identity exactly if
they would write the same artifact.
"""

import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prism_runtime.refactor.artifact import COPIED, digest_of, digest_of_weights
from prism_runtime.refactor.stages import Stage, WorkFolderRefused

REQUEST_NAME = "prism_request.json"
PACKAGES = ("moe-prism", "torch", "transformers")
CHOICES = {
    "policy": ("prism", "paper", "sorted", "random"),
    "metric": ("fisher", "identity"),
    "compensation": ("lockstep", "dense", "none"),
    "allocation": ("single", "layer", "dp"),
}
GATES = ("ridge", "pca", "prior")
UNSERVED_GATES = {
    "representative": "the published mean over gate neurons has another scale in every sub-expert, so no threshold can "
    "compare it. It runs as published under --policy paper",
    "neurons": "a regression on gate neurons wants those neurons before the kernels know which run. Use --gate ridge",
    "quadratic": "a low-rank product of two projections is not what the kernels evaluate, one row of weights a "
    "sub-expert. Use --gate ridge",
    "gate-first": "it runs the whole gate projection, a third of an expert, and keeps scattered neurons, while the "
    "kernels run slices. Use --gate ridge",
}
INGREDIENTS = ("token-factor", "second-pass", "adaptive-gate")
PATHS = ("model", "calibration", "evaluation")


class RecipeRefused(ValueError):
    """The arguments cannot make an artifact."""


@dataclass(frozen=True, slots=True)
class RefactorRequest:
    """One refactoring.

    evaluation       text for the points' quality; None holds every fourth calibration document out for it
    policy           how neurons become sub-experts
    metric           of the partition's objective: 'fisher' needs a backward pass, 'identity' none
    compensation     policy 'prism': trajectory that what repairs the drops is fitted on, or 'none'
    rank             policy 'prism': of the compensation; no more than the model's hidden width
    gate             policy 'prism': what predicts a sub-expert's output norm
    allocation       policy 'prism': a 'single' threshold, one a 'layer' at equal budgets, or at budgets by 'dp'
    without          policy 'prism': ingredients to leave out
    points_permille  budgets to measure; None takes the policy's default
    seed             of everything random
    threads          CPU threads of tensor operations: sums in another order are other bytes
    """

    model: Path
    calibration: Path
    evaluation: Path | None = None
    policy: str = "prism"
    sub_experts: int = 8
    points_permille: tuple[int, ...] | None = None
    metric: str = "fisher"
    compensation: str = "lockstep"
    rank: int = 8
    gate: str = "ridge"
    allocation: str = "single"
    without: tuple[str, ...] = ()
    licence: str = "unspecified"
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if not (self.model / "config.json").is_file():
            raise RecipeRefused(
                f"'{self.model}' has no config.json; MODEL must be the folder of a Hugging Face checkpoint"
            )
        for text in (self.calibration, self.evaluation):
            if text is not None and not text.is_file():
                raise RecipeRefused(f"there is no text file '{text}'")
        for name, known in CHOICES.items():
            if (found := getattr(self, name)) not in known:
                raise RecipeRefused(f"{name} is one of {', '.join(known)}; found '{found}'")
        if reason := UNSERVED_GATES.get(self.gate):
            raise RecipeRefused(f"gate '{self.gate}' cannot be served: {reason}")
        if self.gate not in GATES:
            raise RecipeRefused(f"gate is one of {', '.join(GATES)}; found '{self.gate}'")
        if unknown := set(self.without) - set(INGREDIENTS):
            raise RecipeRefused(f"ingredients are {', '.join(INGREDIENTS)}; found {sorted(unknown)}")
        if self.sub_experts < 1:
            raise RecipeRefused(f"--sub-experts must be at least 1; found {self.sub_experts}")
        if self.rank < 1:
            raise RecipeRefused(f"--rank must be at least 1; found {self.rank}. '--compensation none' fits none")
        if self.threads < 1:
            raise RecipeRefused(f"--threads must be at least 1; found {self.threads}")

    def identity(self) -> Stage:
        """The stage that every other one depends on. Reads all weights and texts once."""
        source = self.model
        copied = sorted({path for pattern in COPIED for path in source.glob(pattern)})
        content = {
            "tools": tools(),
            "weights": digest_of_weights(source),
            "files": {path.name: digest_of(path) for path in copied},
            "texts": [None if text is None else digest_of(text) for text in (self.calibration, self.evaluation)],
            "arguments": {name: value for name, value in self.to_json().items() if name not in PATHS},
            "names": [source.resolve().name, self.calibration.name],
        }
        return Stage.of("request", content)

    def require_same(self, work: Path) -> None:
        """Raise WorkFolderRefused if the folder holds the work of another request."""
        if (work / REQUEST_NAME).exists() and (different := _differences(RefactorRequest.read(work), self)):
            raise WorkFolderRefused(
                f"'{work}' holds the work of other arguments: {'; '.join(different)}. Give another --work, "
                f"or remove the folder"
            )

    def write(self, work: Path) -> None:
        """Keep the request in the work folder, for `merge` and for a later start."""
        path = work / REQUEST_NAME
        temporary = path.with_name(f".{REQUEST_NAME}.{uuid.uuid4().hex}")
        temporary.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        os.replace(temporary, path)

    @classmethod
    def read(cls, work: Path) -> "RefactorRequest":
        """The request of a work folder. Raises WorkFolderRefused if there is none of this version."""
        path = work / REQUEST_NAME
        try:
            content = json.loads(path.read_bytes())
            if unknown := set(content) ^ {field.name for field in fields(cls)}:
                raise ValueError(f"its arguments are not those of this version: {sorted(unknown)}")
            paths = {name: content[name] and Path(content[name]) for name in PATHS}
            points = content["points_permille"]
            return cls(
                **content | paths | {"points_permille": points and tuple(points), "without": tuple(content["without"])}
            )
        except FileNotFoundError:
            raise WorkFolderRefused(
                f"'{work}' has no {REQUEST_NAME}: it is no folder that 'prism-runtime refactor --work' has filled"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise WorkFolderRefused(f"'{path}' cannot be used: {error}") from error

    def to_json(self) -> dict[str, Any]:
        paths = {name: path and str(path.resolve()) for name in PATHS for path in [getattr(self, name)]}
        return (
            asdict(self)
            | paths
            | {
                "points_permille": self.points_permille and list(self.points_permille),
                "without": sorted(self.without),
            }
        )


def same_request(works: Sequence[Path]) -> RefactorRequest:
    """The one request that all work folders serve. Raises WorkFolderRefused that names two which differ, and where."""
    first = RefactorRequest.read(works[0])
    for work in works[1:]:
        if different := _differences(first, RefactorRequest.read(work)):
            raise WorkFolderRefused(f"'{works[0]}' and '{work}' are shards of different runs: {'; '.join(different)}")
    return first


def tools() -> dict[str, str]:
    """Versions of what makes an artifact."""
    return {package: version(package) for package in PACKAGES}


def _differences(found: RefactorRequest, asked: RefactorRequest) -> list[str]:
    there, here = found.to_json(), asked.to_json()
    return [f"{name} is {there[name]} there, {here[name]} here" for name in here if there[name] != here[name]]
