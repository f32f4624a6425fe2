"""Between the engine's thread and the event loop: hands each request its events, and counts every request once."""

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from prism_runtime.engine.governor import ServiceClass
from prism_runtime.engine.loop import EngineLoop, SwapDone
from prism_runtime.engine.types import Event, Finished, FinishReason, Overloaded, Promise, Request, Sampling, Token
from prism_runtime.server.accounting import Accounting, Passage
from prism_runtime.server.errors import ApiError
from prism_runtime.server.metrics import Latencies

Argument = TypeVar("Argument")

SHED_RETRY_AFTER_S = 5
"""The operator revises admission within seconds; retries before that only add load."""


class Generation:
    """One request on the event loop: its events in order; the last one is `Finished`."""

    def __init__(self, dispatcher: "Dispatcher", request: Request, passage: Passage) -> None:
        self.request = request
        self.passage = passage
        self._dispatcher = dispatcher
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()

    async def next(self) -> Event:
        """The next event; one reader at a time."""
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        return self._events.popleft()

    def take_finished(self) -> Finished | None:
        """The final event if it is next already: the engine sends it with the last token."""
        if self._events and isinstance(event := self._events[0], Finished):
            self._events.popleft()
            return event
        return None

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()

    def complete(self) -> None:
        """The answer is whole before the engine says so: a stop string. Frees the engine's slot."""
        self._dispatcher.end(self, FinishReason.STOP)

    def abandon(self) -> None:
        """The client is gone. Without effect once the request has ended."""
        self._dispatcher.end(self, FinishReason.CANCELLED)


class Dispatcher:
    """Admits requests and follows each to its one outcome. Lives on the event loop; the engine thread's `Listener`."""

    def __init__(
        self,
        engine_loop: EngineLoop,
        accounting: Accounting,
        latencies: Latencies,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine_loop = engine_loop
        self._accounting = accounting
        self._latencies = latencies
        self._clock = clock
        self._event_loop = asyncio.get_running_loop()
        self._generations: dict[str, Generation] = {}
        self._ids = itertools.count(1)
        self._plan_swapped = asyncio.Event()
        self._emptied = asyncio.Event()

    # -- the door -----------------------------------------------------------------------------------------------

    def submit(self, prompt: tuple[int, ...], sampling: Sampling, service_class: ServiceClass) -> Generation:
        """Admit a request. Raises ApiError 429 if it or its class is being shed, Rejected if the engine refuses it."""
        if service_class.shed:
            raise self._shed(service_class, "takes no requests for now", "class_shed", SHED_RETRY_AFTER_S)
        request = Request(
            f"r{next(self._ids)}",
            prompt,
            sampling,
            service_class=service_class.slot,
            priority=service_class.priority,
            promise=Promise(service_class.ttft_s, service_class.tpot_s, service_class.floor),
        )
        try:
            self.engine_loop.submit(request, service_class.name)
        except Overloaded as overloaded:
            after_s = max(1, math.ceil(overloaded.retry_after_s))
            raise self._shed(service_class, f"has no room: {overloaded}", "overloaded", after_s) from overloaded
        passage = self._accounting.arrived(service_class, len(prompt), self._clock())
        generation = Generation(self, request, passage)
        self._generations[request.request_id] = generation
        return generation

    def _shed(self, service_class: ServiceClass, why: str, code: str, after_s: int) -> ApiError:
        self._accounting.shed(service_class)
        message = f"class '{service_class.name}' {why}; retry in {after_s} s"
        return ApiError(429, message, kind="rate_limit_error", code=code, retry_after_s=after_s)

    @property
    def in_flight(self) -> int:
        return len(self._generations)

    def end(self, generation: Generation, reason: FinishReason) -> None:
        """End a request from this side: complete by a stop string, or abandoned by its client."""
        if self._generations.get(generation.request.request_id) is generation:
            self._settle(generation, reason)
            self.engine_loop.cancel(generation.request.request_id)

    def fail_all(self, error: str) -> int:
        """Give every request in flight a failing last event; returns how many there were."""
        generations = list(self._generations.values())
        for generation in generations:
            self._settle(generation, FinishReason.FAILED)
            self.engine_loop.cancel(generation.request.request_id)
            generation.put(Finished(generation.request.request_id, FinishReason.FAILED, error))
        return len(generations)

    async def emptied(self) -> None:
        """Returns once no request is in flight."""
        while self._generations:
            self._emptied.clear()
            await self._emptied.wait()

    async def settled(self, timeout_s: float) -> None:
        """Returns once the decided plan is live in the engine, or after `timeout_s`: the report tells which."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self.engine_loop.settled:
                    self._plan_swapped.clear()
                    await self._plan_swapped.wait()

    # -- Listener: called on the engine's thread ------------------------------------------------------------------

    def swapped(self, swap: SwapDone) -> None:
        self._on_event_loop(self._take_swap, swap)

    def stepped(self, events: tuple[Event, ...]) -> None:
        self._on_event_loop(self._take_events, events)

    def _on_event_loop(self, callback: Callable[[Argument], None], argument: Argument) -> None:
        with suppress(RuntimeError):  # the event loop is closed: the process is ending and nobody is left to tell
            self._event_loop.call_soon_threadsafe(callback, argument)

    # -- on the event loop --------------------------------------------------------------------------------------

    def _take_swap(self, swap: SwapDone) -> None:
        self._latencies.observe_swap(swap)
        self._plan_swapped.set()

    def _take_events(self, events: tuple[Event, ...]) -> None:
        now_s = self._clock()
        for event in events:
            generation = self._generations.get(event.request_id)
            if generation is None:
                continue  # ended on this side; the engine heard of it after this step
            if isinstance(event, Token):
                self._accounting.token(generation.passage, event.point, now_s)
            else:
                self._settle(generation, event.reason)
            generation.put(event)

    def _settle(self, generation: Generation, reason: FinishReason) -> None:
        del self._generations[generation.request.request_id]
        if not self._generations:
            self._emptied.set()
        passage, now_s = generation.passage, self._clock()
        if reason is FinishReason.CANCELLED:
            self._accounting.cancelled(passage, now_s)
        elif reason is FinishReason.FAILED:
            self._accounting.failed(passage)
        else:
            self._accounting.finished(passage, now_s)
            self._latencies.observe_answer(passage, now_s)
