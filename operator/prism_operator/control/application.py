"""The operator as a whole: builds its parts, starts them in order, stops them in reverse."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from prism_operator.control import exposition
from prism_operator.control.arbitration import Arbitration
from prism_operator.control.certificates import Certificates
from prism_operator.control.channel import Channel
from prism_operator.control.crds import OldCrd, await_crds
from prism_operator.control.events import Events
from prism_operator.control.informer import DeploymentRecord, PodRecord
from prism_operator.control.kube import Connection, Kube
from prism_operator.control.leadership import Leadership
from prism_operator.control.lease import LeaseLost
from prism_operator.control.loops import Loops, Ports
from prism_operator.control.queue import KeyedQueue
from prism_operator.control.reconcile import Key, Reconciler
from prism_operator.control.recorder import Recorder
from prism_operator.control.status_view import StatusView
from prism_operator.control.status_writer import StatusWriter
from prism_operator.control.tenants import Tenants
from prism_operator.control.world import ServiceKey, World
from prism_operator.plan.children import ChildSettings
from prism_operator.plan.fleet import Caps
from prism_operator.plan.types import LoopSettings
from prism_operator.settings import Settings

CLIENT_LEAF_CHECK_S = 300.0
DRAIN_S = 5.0

logger = logging.getLogger(__name__)


class Operator:
    """`start` returns once it stands by, leading happens in background; `must_exit` is set when it cannot go on."""

    def __init__(self, settings: Settings, kube: Kube) -> None:
        self._settings, self._kube = settings, kube
        self.must_exit = asyncio.Event()
        self.failure: str | None = None
        self._world = World()
        self._channel = Channel(self._world.see_outcome, port=settings.control_port)
        self._leadership = Leadership(kube, settings.namespace, settings.identity)
        self._certificates = Certificates(kube, settings.namespace)
        self._events = Events(kube, settings.identity)
        self._writer = StatusWriter(kube)
        self._tenants = Tenants(kube, self._pod_changed, self._deployment_changed)
        status = StatusView(self._writer)
        ports = Ports(
            channel=self._channel,
            leadership=self._leadership,
            events=self._events,
            recorder=Recorder(self._events),
            tenants=self._tenants,
            order_reconcile=lambda key: self._queue.add(Key("PrismService", *key)),
            offer_status=status.offer,
        )
        self._loops = Loops(ports)
        self._reconciler = Reconciler(
            kube,
            self._world,
            self._tenants,
            self._loops,
            self._leadership,
            self._certificates,
            self._events,
            status,
            LoopSettings(
                fast_period_s=settings.fast_loop_s,
                slow_period_s=settings.slow_loop_s,
                rehearsal_s=settings.rehearsal_s,
            ),
            ChildSettings(operator_namespace=settings.namespace),
        )
        caps = Caps(settings.fleet_max_per_hour, settings.fleet_max_accelerators)
        self._arbitration = Arbitration(self._world, caps, self._leadership, self._events)
        self._queue: KeyedQueue[Key] = KeyedQueue(self._visit)
        self._exposition = exposition.Exposition(lambda: self._started, lambda: self.failure)
        self._started = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Raises OSError for a port that is taken, and OldCrd."""
        settings = self._settings
        try:
            await self._exposition.start(settings.listen, settings.metrics_port, settings.health_port)
            ports = (self._exposition.metrics_port, self._exposition.health_port)
            logger.info("metrics on port %d, probes on port %d", *ports)
            await await_crds(self._kube)
        except (OSError, OldCrd) as error:
            self.failure = str(error)
            raise
        self._started = True
        self._spawn(exposition.measure_loop_lag(), "loop lag")
        self._spawn(self._lead(), "leadership")

    async def stop(self) -> None:
        """Finish what runs, then give the Lease back, so that a standby takes over within seconds."""
        await self._queue.drain(DRAIN_S)
        await self._loops.close()
        await self._tenants.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._leadership.release()
        await self._channel.close()
        await self._writer.close()
        await self._events.close()
        await self._exposition.close()
        self.must_exit.set()  # kopf waits for whoever waits for it

    async def connection(self) -> Connection:
        return await self._kube.connection()

    def service_changed(self, namespace: str, name: str) -> None:
        self._tenants.ensure(namespace)  # a standby keeps its picture warm
        self._queue.add(Key("PrismService", namespace, name))

    def model_changed(self, namespace: str, name: str) -> None:
        self._queue.add(Key("PrismModel", namespace, name))
        for key in self._reconciler.services_of_model(namespace, name):
            self.service_changed(*key)

    async def _lead(self) -> None:
        await self._leadership.run(self._begin_acting)

    async def _begin_acting(self) -> None:
        await self._certificates.load_authority()
        self._renew_client_leaf()
        self._spawn(self._keep_client_leaf(), "client certificate")
        self._spawn(self._arbitration.run(), "arbitration")
        self._queue.resume()

    def _renew_client_leaf(self) -> None:
        if context := self._certificates.client_context():
            self._channel.use(context)

    async def _keep_client_leaf(self) -> None:
        while True:
            await asyncio.sleep(CLIENT_LEAF_CHECK_S)
            self._renew_client_leaf()

    async def _visit(self, key: Key) -> float | None:
        visit = self._reconciler.service if key.kind == "PrismService" else self._reconciler.model
        look_again_s = await visit(key.namespace, key.name)
        if look_again_s is None:
            self._queue.forget(key)
        return look_again_s

    def _pod_changed(self, old: PodRecord | None, new: PodRecord | None) -> None:
        self._world.see_pod(old, new)
        if new is None and old is not None:
            self._channel.forget(old.uid)

    def _deployment_changed(self, old: DeploymentRecord | None, new: DeploymentRecord | None) -> None:
        key: ServiceKey | None = self._world.see_deployment(old, new)
        orders_changed = (
            old is None or new is None or (old.replicas, old.intent_hash) != (new.replicas, new.intent_hash)
        )
        if key is not None and orders_changed:
            self.service_changed(*key)

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """None of these tasks may end by itself: whatever ends one ends the process, and a standby takes over."""
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, LeaseLost):
            logger.error("%s; exiting, a standby acts now", error)
        else:
            logger.error("%s ended", task.get_name(), exc_info=error)
        self.failure = f"{task.get_name()}: {error}"
        self.must_exit.set()
