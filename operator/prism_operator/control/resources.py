"""Kinds of objects that the operator reads or writes, and their places in the API."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from prism_api import API_VERSION

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of object and its place in the API."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        root = "/api/" if "/" not in self.api_version else "/apis/"
        parts = [root + self.api_version]
        if self.namespaced and namespace:
            parts += ["namespaces", quote(namespace, safe="")]
        parts.append(self.plural)
        parts += [quote(part, safe="") for part in (name, subresource) if part]
        return "/".join(parts)


PRISM_SERVICES = Resource(API_VERSION, "PrismService", "prismservices")
PRISM_MODELS = Resource(API_VERSION, "PrismModel", "prismmodels")
DEPLOYMENTS = Resource("apps/v1", "Deployment", "deployments")
PODS = Resource("v1", "Pod", "pods")
SERVICES = Resource("v1", "Service", "services")
SECRETS = Resource("v1", "Secret", "secrets")
POD_DISRUPTION_BUDGETS = Resource("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
NETWORK_POLICIES = Resource("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
EVENTS = Resource("events.k8s.io/v1", "Event", "events")
LEASES = Resource("coordination.k8s.io/v1", "Lease", "leases")
CUSTOM_RESOURCE_DEFINITIONS = Resource(
    "apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions", namespaced=False
)

_BY_KIND = {
    (r.api_version, r.kind): r
    for r in (DEPLOYMENTS, SERVICES, SECRETS, POD_DISRUPTION_BUDGETS, NETWORK_POLICIES, LEASES, PODS)
}


def resource_of(obj: Mapping[str, Any]) -> Resource:
    """The resource of a rendered object. Raises KeyError for a kind that the operator has no business with."""
    return _BY_KIND[obj["apiVersion"], obj["kind"]]
