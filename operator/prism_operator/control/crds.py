"""Waits for the CRDs and refuses to run on older ones than this code was written for."""

import asyncio
import logging

from prism_api import API_VERSION, GROUP
from prism_api.crd import CRD_REVISION, CRD_VERSION_ANNOTATION
from prism_operator.control.kube import Forbidden, Kube, KubeError, NotFound
from prism_operator.control.resources import CUSTOM_RESOURCE_DEFINITIONS, PRISM_MODELS, PRISM_SERVICES

RETRY_S = 2.0
REMIND_AFTER = 15
KINDS = (PRISM_SERVICES, PRISM_MODELS)

logger = logging.getLogger(__name__)


class OldCrd(Exception):
    """A CRD in the cluster lacks what this operator needs."""


async def await_crds(kube: Kube) -> None:
    """Return once the API server serves both kinds at the revision needed. Raises OldCrd."""
    attempt = 0
    while True:
        try:
            served = await kube.discover(API_VERSION)
        except NotFound:
            served = []
        except KubeError as error:
            logger.warning("API server: %s", error)
            served = []
        missing = [kind.plural for kind in KINDS if kind.plural not in served]
        if not missing:
            break
        if attempt % REMIND_AFTER == 0:
            logger.warning(
                "waiting for CRDs: %s not served yet; install them from the chart or crds/", ", ".join(missing)
            )
        attempt += 1
        await asyncio.sleep(RETRY_S)
    for kind in KINDS:
        await _check_revision(kube, f"{kind.plural}.{GROUP}")


async def _check_revision(kube: Kube, name: str) -> None:
    try:
        crd = await kube.get(CUSTOM_RESOURCE_DEFINITIONS, None, name)
    except Forbidden:
        logger.info("the revision of CRD '%s' cannot be read with the rights given; not checked", name)
        return
    found = (crd["metadata"].get("annotations") or {}).get(CRD_VERSION_ANNOTATION, "0")
    if not found.isdecimal() or int(found) < int(CRD_REVISION):
        raise OldCrd(
            f"CRD '{name}' has revision '{found}' (annotation '{CRD_VERSION_ANNOTATION}'), this operator needs "
            f"{CRD_REVISION} or newer. Apply the CRDs of this release, then restart the operator."
        )
