"""The fleet-wide epoch: one counter that only rises, kept in an annotation of a Lease and moved by compare-and-swap.

A Lease's `leaseTransitions` is not enough: it does not rise when the same identity acquires again, and it starts over
when the Lease is deleted. Pods refuse directives of a lower epoch, so a leader that wakes up late cannot command them.
"""

from prism_operator.control.kube import Conflict, Kube, NotFound
from prism_operator.control.resources import LEASES, Object

FENCE_NAME = "prism-fence"
EPOCH_ANNOTATION = "moeprism.io/epoch"
ATTEMPTS = 10


def epoch_of(lease: Object) -> int:
    """The counter; 0 where the annotation is missing. Raises ValueError for one that somebody garbled."""
    text = (lease["metadata"].get("annotations") or {}).get(EPOCH_ANNOTATION, "0")
    if not text.isascii() or not text.isdecimal():
        raise ValueError(
            f"annotation '{EPOCH_ANNOTATION}' of Lease '{FENCE_NAME}' must be a non-negative integer; found '{text}'. "
            "Delete the Lease: the next leader starts a new counter above what the pods hold."
        )
    return int(text)


async def raise_epoch(kube: Kube, namespace: str, above: int = 0) -> int:
    """Raise the counter above itself and above `above` (an epoch seen at a pod) and return its new value.

    Raises Conflict when other processes moved it ten times in a row.
    """
    for attempt in range(ATTEMPTS):
        try:
            try:
                lease = await kube.get(LEASES, namespace, FENCE_NAME)
            except NotFound:
                epoch = above + 1
                await kube.create_or_conflict(_fence(namespace, epoch))
                return epoch
            epoch = max(epoch_of(lease), above) + 1
            lease["metadata"].setdefault("annotations", {})[EPOCH_ANNOTATION] = str(epoch)
            await kube.replace_if(lease)
            return epoch
        except Conflict:
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("the loop returns or raises")


def _fence(namespace: str, epoch: int) -> Object:
    return {
        "apiVersion": LEASES.api_version,
        "kind": LEASES.kind,
        "metadata": {"name": FENCE_NAME, "namespace": namespace, "annotations": {EPOCH_ANNOTATION: str(epoch)}},
        "spec": {},
    }
