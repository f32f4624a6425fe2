"""Leadership: the Lease and the epoch together. Whoever acts asks `may_act` first and fences with `epoch`."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from prism_operator import metrics
from prism_operator.control.fence import raise_epoch
from prism_operator.control.kube import Kube, KubeError
from prism_operator.control.lease import Elector

SHARD = "0"

logger = logging.getLogger(__name__)


class Leadership:
    """Runs the election; `epoch` is 0 and `may_act` False until this process leads."""

    def __init__(self, kube: Kube, namespace: str, identity: str) -> None:
        self._kube, self._namespace = kube, namespace
        self._elector = Elector(kube, namespace, identity)
        self._raising: asyncio.Task[None] | None = None
        self.identity = identity
        self.epoch = 0

    def may_act(self) -> bool:
        return self.epoch > 0 and self._elector.may_act()

    async def run(self, on_leading: Callable[[], Awaitable[None]]) -> None:
        """Acquire, raise the epoch, call `on_leading`, renew. Raises LeaseLost; never returns otherwise."""
        metrics.LEADER.labels(SHARD).set(0)
        await self._elector.acquire()
        holding = asyncio.create_task(self._elector.hold(), name="renew lease")
        try:
            self.epoch = await raise_epoch(self._kube, self._namespace)
            metrics.EPOCH.set(self.epoch)
            metrics.LEADER.labels(SHARD).set(1)
            logger.info("leading as '%s' with epoch %d", self.identity, self.epoch)
            await on_leading()
            await holding
        finally:
            metrics.LEADER.labels(SHARD).set(0)
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)

    def raise_above(self, held: int) -> None:
        """A pod holds a higher epoch although this process leads: the counter was lost. Raise it in background."""
        if held < self.epoch or (self._raising is not None and not self._raising.done()):
            return
        self._raising = asyncio.create_task(self._raise(held), name="raise epoch")

    async def release(self) -> None:
        """Stop acting and give the Lease back."""
        if self._raising is not None:
            self._raising.cancel()
        self.epoch = 0
        await self._elector.release()

    async def _raise(self, held: int) -> None:
        try:
            epoch = await raise_epoch(self._kube, self._namespace, above=held)
        except KubeError as error:
            logger.warning("epoch not raised above %d: %s", held, error)
            return
        if self.may_act():
            logger.warning("a pod holds epoch %d; raised the epoch from %d to %d", held, self.epoch, epoch)
            self.epoch = epoch
            metrics.EPOCH.set(epoch)
