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

Document = dict[str, Any]


def service(*, runtime_image: str | None = None, budget_control: str = "Auto") -> Document:
    """examples/prismservice.yaml with the runtime image, `budget.control` and the scale-up window replaced."""
    document: Document = yaml.safe_load(SERVICE.read_text())
    spec = copy.deepcopy(document["spec"])
    spec.setdefault("budget", {})["control"] = budget_control
    scale_up = spec["scaling"].setdefault("behavior", {}).setdefault("scaleUp", {})
    scale_up["stabilizationWindowSeconds"] = SCALE_UP_WINDOW_S
    if runtime_image is not None:
        spec["runtime"]["image"] = runtime_image
    return document | {"spec": spec}


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
