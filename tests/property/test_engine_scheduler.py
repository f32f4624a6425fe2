"""Whatever arrives and leaves, the scheduler conserves requests, slots and blocks, and starves nobody."""

from hypothesis import given, settings
from hypothesis import strategies as st

from prism_runtime.engine.cache import BlockBudget, blocks_for
from prism_runtime.engine.scheduler import Scheduler, context_tokens
from prism_runtime.engine.types import Request, Sampling

SLOTS, KV_TOKENS, CAP = 3, 16 * 8, 10

arrival = st.tuples(st.just("arrive"), st.integers(1, 60), st.integers(1, 60), st.integers(-1, 1))
departure = st.tuples(st.just("withdraw"), st.integers(0, 30))
step = st.tuples(st.just("step"))
history = st.lists(st.one_of(arrival, departure, step), max_size=60)


class World:
    """Drives a scheduler as the engine does, every token being 1, and checks the invariants after each move."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(BlockBudget(SLOTS, KV_TOKENS), CAP, seed=0)
        self.requests: dict[str, Request] = {}
        self.ended: list[str] = []

    def arrive(self, prompt: int, max_tokens: int, priority: int) -> None:
        request = Request(f"r{len(self.requests)}", (1,) * prompt, Sampling(max_tokens), priority=priority)
        self.requests[request.request_id] = request
        self.scheduler.enqueue(request)

    def withdraw(self, index: int) -> None:
        name = f"r{index}"
        if name in self.requests and name not in self.ended:
            self.scheduler.withdraw(name)
            self.ended.append(name)

    def step(self) -> None:
        decode, prefill = self.scheduler.schedule()
        decoding = {name for name, sequence in self.scheduler.running.items() if not sequence.prefilling}
        assert {piece.sequence.request.request_id for piece in decode} == decoding
        assert sum(piece.length for piece in prefill) <= CAP
        assert all(piece.length > 0 for piece in prefill)
        for piece in (*decode, *prefill):
            complete = piece.completes
            piece.sequence.cached += piece.length
            if complete:
                piece.sequence.tokens.append(1)
                if piece.sequence.generated == piece.sequence.request.sampling.max_tokens:
                    self.scheduler.finish(piece.sequence)
                    self.ended.append(piece.sequence.request.request_id)

    def check(self) -> None:
        running = self.scheduler.running.values()
        assert len(self.ended) == len(set(self.ended))
        assert len(running) + self.scheduler.waiting + len(self.ended) == len(self.requests)
        slots = [sequence.slot for sequence in running]
        assert len(set(slots)) == len(slots) <= SLOTS
        assert all(0 <= slot < SLOTS for slot in slots)
        reserved = sum(blocks_for(context_tokens(sequence.request)) for sequence in running)
        assert self.scheduler.budget.used == reserved <= self.scheduler.budget.blocks


@settings(max_examples=150, deadline=None)
@given(history)
def test_requests_slots_and_blocks_are_conserved_and_everything_ends(moves: list[tuple]) -> None:
    world = World()
    for name, *arguments in moves:
        getattr(world, name)(*arguments)
        world.check()
    # A request needs at most 60 steps once it runs, 6 to be read, and the requests before it are at most 60.
    for _ in range(70 * 60):
        if len(world.ended) == len(world.requests):
            break
        world.step()
        world.check()
    assert len(world.ended) == len(world.requests)
    assert world.scheduler.budget.used == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(-2, 2)), min_size=1, max_size=20))
def test_requests_start_by_priority_then_arrival_and_the_head_is_not_overtaken(arrivals: list[tuple[int, int]]) -> None:
    world = World()
    for prompt, priority in arrivals:
        world.arrive(prompt, 5, priority)
    started: list[str] = []
    while len(world.ended) < len(world.requests):
        world.step()
        started += [name for name in (*world.scheduler.running, *world.ended) if name not in started]
    by_priority = sorted(world.requests.values(), key=lambda request: (-request.priority, int(request.request_id[1:])))
    assert started == [request.request_id for request in by_priority]
