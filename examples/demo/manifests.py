"""The demo's resources: the examples' manifests with this machine's images, and time compressed to pods that start in
seconds. Documents in, documents out."""

import copy
from pathlib import Path
from typing import Any

import yaml

from prism_api.from_manifest import prism_model
from prism_api.model import ImageSource, Source

EXAMPLES = Path(__file__).parents[1]
SERVICE = EXAMPLES / "prismservice.yaml"
ARTIFACT_MANIFEST = EXAMPLES / "model" / "artifact" / "prism_manifest.json"

SCALE_UP_WINDOW_S = 5
"""Instead of 30: the default waits for a demand as long as the demo's whole burst."""
SLOW_LOOP_S = 5
"""operator.slowLoopSeconds instead of 30, for the same reason."""

PACED_START = "PRISM_PACE_START_SECONDS"
FAST_START_SECONDS = 2
"""Instead of 15 in the short demo."""

Document = dict[str, Any]


HELD = "held"
"""Suffix of the name of the service whose budget is held at full."""


def service(
    *, runtime_image: str | None = None, budget_control: str = "Auto", start_seconds: int | None = None
) -> Document:
    """examples/prismservice.yaml with `budget.control` and the scale-up window replaced, and if given the runtime image
    and the time that a pod takes to start. A service with the budget off has a name of its own."""
    document: Document = yaml.safe_load(SERVICE.read_text())
    metadata, spec = document["metadata"], copy.deepcopy(document["spec"])
    if budget_control == "Off":
        metadata = metadata | {"name": f"{metadata['name']}-{HELD}"}
    spec.setdefault("budget", {})["control"] = budget_control
    scale_up = spec["scaling"].setdefault("behavior", {}).setdefault("scaleUp", {})
    scale_up["stabilizationWindowSeconds"] = SCALE_UP_WINDOW_S
    if runtime_image is not None:
        spec["runtime"]["image"] = runtime_image
    if start_seconds is not None:
        paced = {"name": PACED_START, "value": str(start_seconds)}
        for pool in spec["pools"]:
            pool["pod"]["env"] = [paced if each["name"] == PACED_START else each for each in pool["pod"]["env"]]
    return document | {"metadata": metadata, "spec": spec}


def paced_start_seconds(service: Document) -> str:
    """How long a pod of this service pretends to start."""
    return next(each["value"] for each in service["spec"]["pools"][0]["pod"]["env"] if each["name"] == PACED_START)


def model(image: str, *, manifest: Path = ARTIFACT_MANIFEST) -> Document:
    """The PrismModel of the embedded artifact, in the service's namespace and by the name that it refers to."""
    wanted = service()
    return prism_model(
        manifest.read_bytes(),
        name=wanted["spec"]["modelRef"]["name"],
        namespace=wanted["metadata"]["namespace"],
        source=Source(image=ImageSource(reference=image)),
    )


def as_yaml(*documents: Document) -> str:
    return yaml.safe_dump_all(documents, sort_keys=False)
