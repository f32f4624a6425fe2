"""The kopf edge: resource events become keys in the queue, its startup and cleanup start and stop the operator.

Only low-level `on.event` handlers: the others keep bookkeeping in annotations and finalizers of users' objects, PATCH
every object once, and hold up deletion while the operator is down.
"""

import logging
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import kopf

from prism_api import GROUP, VERSION
from prism_operator.control.kube import PAGE_SIZE, Connection
from prism_operator.control.resources import PRISM_MODELS, PRISM_SERVICES

TOKEN_REREAD = timedelta(minutes=10)
"""ServiceAccount tokens rotate within the hour: kopf logs in again, with the new one, after this time."""

logger = logging.getLogger(__name__)


class Application(Protocol):
    """What the handlers drive."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def connection(self) -> Connection: ...

    def service_changed(self, namespace: str, name: str) -> None: ...

    def model_changed(self, namespace: str, name: str) -> None: ...


def registry_for(application: Application) -> kopf.OperatorRegistry:
    """Handlers bound to one application, in a registry of their own."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        access = await application.connection()
        return kopf.ConnectionInfo(
            server=access.server,
            ca_path=access.ca_path,
            certificate_path=access.certificate_path,
            private_key_path=access.private_key_path,
            token=access.token,
            insecure=access.insecure,
            expiration=datetime.now(UTC) + TOKEN_REREAD,
        )

    @kopf.on.startup(registry=registry, errors=kopf.ErrorsMode.PERMANENT)  # by default kopf tries again for ever
    async def startup(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings)
        await application.start()

    @kopf.on.cleanup(registry=registry)
    async def cleanup(**_: Any) -> None:
        await application.stop()

    @kopf.on.event(GROUP, VERSION, PRISM_SERVICES.plural, registry=registry)
    async def service_event(namespace: str | None, name: str | None, **_: Any) -> None:
        if namespace and name:
            application.service_changed(namespace, name)

    @kopf.on.event(GROUP, VERSION, PRISM_MODELS.plural, registry=registry)
    async def model_event(namespace: str | None, name: str | None, **_: Any) -> None:
        if namespace and name:
            application.model_changed(namespace, name)

    return registry


def configure(settings: kopf.OperatorSettings) -> None:
    """kopf's settings, each for a reason."""
    settings.posting.enabled = False  # its log lines would become Events on users' objects
    settings.scanning.disabled = True  # the CRDs are checked before kopf starts; else it watches CRDs and namespaces
    settings.watching.inactivity_timeout = 70.0  # a silent watch is a dead one: bookmarks come every minute
    settings.watching.chunk_size = PAGE_SIZE  # an unchunked list of thousands blocks the loop while it is parsed
    settings.networking.request_timeout = 30.0
    settings.networking.connect_timeout = 10.0
    settings.queueing.idle_timeout = 5.0  # workers of quiet objects end; without a worker limit, which would throttle
    settings.persistence.finalizer = f"{GROUP}/unused"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=GROUP)
