"""CRDs from the typed resources: pydantic's JSON schema turned into Kubernetes' structural schema.

    python -m prism_api.crd crds helm/prism/files/crds     # writes the same files into every folder named
    python -m prism_api.crd --check crds ...               # exits 1 if a file differs
"""

import argparse
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from prism_api import GROUP, VERSION
from prism_api.base import Document
from prism_api.model import PrismModelSpec, PrismModelStatus
from prism_api.service import PrismServiceSpec, PrismServiceStatus

NAME_RULE = {
    "rule": "size(self.metadata.name) <= 40 && !self.metadata.name.contains('.')",
    "message": "metadata.name must have at most 40 characters and no dot; names of pods and certificates derive from it",
}
CRD_VERSION_ANNOTATION = "moeprism.io/crd-version"
CRD_REVISION = "1"
"""Raised with every change of a schema; the operator refuses to start on an older one."""


def structural(model: type[Document]) -> dict[str, Any]:
    """Structural schema of a document: references inlined, optional unions unwrapped, enums and defaults plain."""
    schema = model.model_json_schema(by_alias=True, mode="validation")
    definitions = schema.pop("$defs", {})
    result: dict[str, Any] = _structure(schema, definitions)
    return result


def _structure(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_structure(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    node = dict(node)
    if "$ref" in node:
        target = deepcopy(definitions[node.pop("$ref").rsplit("/", 1)[1]])
        node = {**target, **node}
    if "allOf" in node and len(node["allOf"]) == 1:
        node = {**node, **_structure(node.pop("allOf")[0], definitions)}
    if "anyOf" in node:
        (member,) = [m for m in node.pop("anyOf") if m.get("type") != "null"]
        node = _merge(_structure(member, definitions), node)
    node.pop("title", None)
    if node.get("default", ...) is None:
        node.pop("default")
    if "const" in node:
        node["enum"] = [node.pop("const")]
    if "properties" in node:
        node["properties"] = {name: _structure(child, definitions) for name, child in node["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            node[key] = _structure(node[key], definitions)
    node.pop("additionalProperties", None) if node.get("additionalProperties") in (True, False) else None
    return node


def _merge(member: dict[str, Any], outer: dict[str, Any]) -> dict[str, Any]:
    """The outer node's description wins over the member's own."""
    return {**member, **{key: value for key, value in outer.items() if key != "title"}}


def custom_resource_definition(
    kind: str,
    plural: str,
    short_name: str,
    spec: type[Document],
    status: type[Document],
    columns: list[dict[str, Any]],
    **subresources: Any,
) -> dict[str, Any]:
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
                    "metadata": {"type": "object"},
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


def all_definitions() -> dict[str, dict[str, Any]]:
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m prism_api.crd", description="Write or check the CRD files.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    parser.add_argument("folders", nargs="+", type=Path, help="folders that hold the CRD files")
    arguments = parser.parse_args()
    stale = []
    for folder in arguments.folders:
        for name, definition in all_definitions().items():
            text = "# Generated by `make generate`.\n" + yaml.safe_dump(definition, sort_keys=False, width=120)
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
