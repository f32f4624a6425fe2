"""CRDs from the typed resources: pydantic's JSON schema turned into Kubernetes' structural schema.

python -m prism_api.crd crds helm/prism/files/crds     # writes the same files into every folder named
python -m prism_api.crd --check crds ...               # exits 1 if a file differs
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from prism_api import GROUP, VERSION
from prism_api.base import Document
from prism_api.model import PrismModelSpec, PrismModelStatus
from prism_api.service import PrismServiceSpec
from prism_api.service_status import PrismServiceStatus

NAME_RULE = {
    "rule": "size(self.metadata.name) <= 40 && !self.metadata.name.contains('.')",
    "message": "metadata.name must have at most 40 characters and no dot; pods and certificates derive names from it",
    "fieldPath": ".metadata.name",
}
CRD_VERSION_ANNOTATION = "moeprism.io/crd-version"
CRD_REVISION = "2"
"""Raised with every change of a schema; the operator refuses to start on an older one."""


Schema = dict[str, Any]


def structural(model: type[Document]) -> Schema:
    """Structural schema of a document: references inlined, `X | None` unwrapped, titles and null defaults dropped."""
    schema = model.model_json_schema(by_alias=True, mode="validation")
    return _structural(schema, schema.pop("$defs", {}))


def _structural(node: Schema, definitions: Schema) -> Schema:
    """What stands beside a `$ref` or `anyOf` (a field's own description or default) wins over what it refers to."""
    node = {key: value for key, value in node.items() if key != "title"}
    if "$ref" in node:
        target = definitions[node.pop("$ref").rsplit("/", 1)[1]]
        return _structural({**target, **node}, definitions)
    if "anyOf" in node:
        (member,) = [option for option in node.pop("anyOf") if option.get("type") != "null"]
        return _structural({**member, **node}, definitions)
    if node.get("default", ...) is None:
        del node["default"]
    if "const" in node:
        node["enum"] = [node.pop("const")]
    if isinstance(node.get("additionalProperties"), bool):
        del node["additionalProperties"]
    for key in ("items", "additionalProperties"):
        if key in node:
            node[key] = _structural(node[key], definitions)
    if "properties" in node:
        node["properties"] = {name: _structural(child, definitions) for name, child in node["properties"].items()}
    return node


def custom_resource_definition(
    kind: str,
    plural: str,
    short_name: str,
    spec: type[Document],
    status: type[Document],
    columns: list[dict[str, Any]],
    **subresources: Any,
) -> Schema:
    """One CRD with a status subresource, printer columns and the shared naming rule."""
    version: dict[str, Any] = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "additionalPrinterColumns": columns,
        "subresources": {"status": {}, **subresources},
        "schema": {
            "openAPIV3Schema": {
                "description": (spec.__doc__ or "").strip(),
                "type": "object",
                "required": ["spec"],
                "x-kubernetes-validations": [NAME_RULE],
                "properties": {
                    "apiVersion": {"type": "string", "description": f"`{GROUP}/{VERSION}`."},
                    "kind": {"type": "string", "description": f"`{kind}`."},
                    "metadata": {"type": "object", "properties": {"name": {"type": "string"}}},
                    "spec": structural(spec),
                    "status": structural(status),
                },
            }
        },
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}", "annotations": {CRD_VERSION_ANNOTATION: CRD_REVISION}},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": [short_name],
                "categories": ["prism"],
            },
            "versions": [version],
        },
    }


def _column(name: str, path: str, kind: str = "string", priority: int = 0) -> dict[str, Any]:
    column: dict[str, Any] = {"name": name, "type": kind, "jsonPath": path}
    return {**column, "priority": priority} if priority else column


def _condition(kind: str) -> str:
    return f'.status.conditions[?(@.type=="{kind}")].status'


def all_definitions() -> dict[str, Schema]:
    """File name -> CRD."""
    service = custom_resource_definition(
        "PrismService",
        "prismservices",
        "psvc",
        PrismServiceSpec,
        PrismServiceStatus,
        [
            _column("Ready", _condition("Ready")),
            _column("Model", ".spec.modelRef.name"),
            _column("Budget", ".status.budget.meanBudgetPermille", "integer"),
            _column("Desired", ".status.desiredReplicas", "integer"),
            _column("ReadyReplicas", ".status.readyReplicas", "integer"),
            _column("Objectives", _condition("ObjectivesMet")),
            _column("Degraded", _condition("QualityDegraded")),
            _column("$/h", ".status.cost.perHour"),
            _column("Age", ".metadata.creationTimestamp", "date"),
            _column("Mode", ".spec.mode", priority=1),
            _column("Reason", ".status.recommendation.reason", priority=1),
        ],
        scale={
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        },
    )
    service["spec"]["versions"][0]["selectableFields"] = [{"jsonPath": ".spec.modelRef.name"}]
    model = custom_resource_definition(
        "PrismModel",
        "prismmodels",
        "pmodel",
        PrismModelSpec,
        PrismModelStatus,
        [
            _column("Ready", _condition("Ready")),
            _column("Served", ".spec.servedName"),
            _column("Services", ".status.servicesUsing", "integer"),
            _column("Age", ".metadata.creationTimestamp", "date"),
        ],
    )
    return {"moeprism.io_prismservices.yaml": service, "moeprism.io_prismmodels.yaml": model}


class _Dumper(yaml.SafeDumper):
    """Writes a schema that stands in several places in full each time: kubectl users read these files."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def render(definition: Schema) -> str:
    """Text of a CRD file."""
    return "# Generated by `make generate`.\n" + yaml.dump(definition, Dumper=_Dumper, sort_keys=False, width=120)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m prism_api.crd", description="Write or check the CRD files.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    parser.add_argument("folders", nargs="+", type=Path, help="folders that hold the CRD files")
    arguments = parser.parse_args()
    stale = []
    for folder in arguments.folders:
        for name, definition in all_definitions().items():
            text = render(definition)
            path = folder / name
            if path.exists() and path.read_text() == text:
                continue
            stale.append(str(path))
            if not arguments.check:
                folder.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    if stale and arguments.check:
        print(f"out of date: {', '.join(stale)}; run `make generate`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
