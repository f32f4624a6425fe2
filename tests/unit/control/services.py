"""Valid specs and models for tests; a test sets only what it is about."""

from decimal import Decimal

from prism_api.model import PrismModelSpec
from prism_api.service import PrismServiceSpec
from tests.unit.control.pod_server import DIGEST

POINTS = {"b500": ("0.97", 500), "b750": ("0.985", 750), "full": ("1", 1000)}


def model_spec(**changes) -> PrismModelSpec:
    wire = {
        "source": {"image": {"reference": "registry.example/model@sha256:0"}},
        "digest": DIGEST,
        "servedName": "small-moe",
        "operatingPoints": [
            {
                "name": name,
                "budgetPermille": budget,
                "policy": "dp",
                "relativeQuality": quality,
                "relativeQualityLow": quality,
            }
            for name, (quality, budget) in POINTS.items()
        ],
    }
    return PrismModelSpec.model_validate({**wire, **changes})


def service_wire(**changes) -> dict:
    wire = {
        "modelRef": {"name": "small-moe"},
        "classes": [
            {
                "name": "gold",
                "objectives": {"ttftMilliseconds": 800},
                "quality": {"minRelativeQuality": "0.98"},
            }
        ],
        "scaling": {"minReplicas": 1, "maxReplicas": 3},
        "pools": [{"name": "main", "accelerator": {"name": "cpu"}, "pricePerHour": "2.50"}],
        "runtime": {"image": "registry.example/runtime@sha256:0"},
    }
    return {**wire, **changes}


def service_spec(**changes) -> PrismServiceSpec:
    return PrismServiceSpec.model_validate(service_wire(**changes))


def cap(amount: str) -> dict:
    return {"cost": {"maxPerHour": str(Decimal(amount))}}
