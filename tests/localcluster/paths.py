"""Where the local cluster keeps things: what is expensive survives in the cache folder, what is state does not."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
MODULES = Path(__file__).with_name("modules")
REGISTRY_NAME = "registry.local:5000"


def cache() -> Path:
    """`PRISM_CACHE`, else `XDG_CACHE_HOME/moe-prism`, else `~/.cache/moe-prism`."""
    if chosen := os.environ.get("PRISM_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moe-prism"


def run_folder(name: str) -> Path:
    """State of one running cluster: fresh on every start, removed on stop."""
    return cache() / "run" / name


def node_store(name: str, node: str) -> Path:
    """Unpacked images of one node; survives a stop, so that the next start pulls nothing."""
    return cache() / "nodes" / name / node


def registry_store() -> Path:
    return cache() / "registry"
