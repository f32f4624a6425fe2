"""Addresses inside a cluster's namespaces. Nothing outside sees them, so every cluster uses the same ones."""

HOST = "10.250.0.1"
"""Control plane and registry, on the bridge that joins the nodes."""
SERVICES = "10.96.0.0/16"
KUBERNETES_SERVICE = "10.96.0.1"
DNS_SERVICE = "10.96.0.10"
PODS = "10.244.0.0/16"
API_PORT = 6443
REGISTRY_PORT = 5000


def node_name(index: int) -> str:
    return f"node-{index}"


def node_address(index: int) -> str:
    return f"10.250.0.{10 + index}"


def pod_range(index: int) -> str:
    return f"10.244.{index}.0/24"
