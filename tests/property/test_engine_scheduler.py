"""Whatever arrives and leaves: requests and blocks are conserved, only equal text is shared, nobody starves."""

from collections import Counter
from decimal import Decimal

from hypothesis import given, settings
from hypothesis import strategies as st

from prism_api.points import Ladder, OperatingPoint
from prism_runtime.engine.batching import Slack
from prism_runtime.engine.blocks import BlockPool, blocks_for
from prism_runtime.engine.costs import StepCosts
from prism_runtime.engine.prefix_cache import BLOCK_TOKENS
from prism_runtime.engine.scheduler import Scheduler
from prism_runtime.engine.sequence import Sequence, Slice
from prism_runtime.engine.types import Request, Sampling

FULL_POINT = OperatingPoint(
    name="full", budget_permille=1000, policy="full", relative_quality=Decimal(1), relative_quality_low=Decimal(1)
)
SEQUENCES, BLOCKS, CAP, POINTS = 3, 8, 10, 3

arrival = st.tuples(
    st.just("arrive"), st.integers(1, 60), st.integers(1, 60), st.integers(-1, 1), st.integers(0, 1), st.integers(0, 2)
)
departure = st.tuples(st.just("withdraw"), st.integers(0, 30))
switch = st.tuples(st.just("switch"), st.integers(0, POINTS - 1))
step = st.tuples(st.just("step"))
history = st.lists(st.one_of(arrival, arrival, departure, switch, step, step), max_size=60)


class World:
    """Drives a scheduler as the engine does and checks the invariants after each move.

    In place of keys and values, `memory` holds for each place of a block what was computed for it: the tokens up to
    there, and the smallest point that any of them were computed at.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        policy = Slack(StepCosts(Ladder([FULL_POINT])))
        self.scheduler = Scheduler(BlockPool(BLOCKS), SEQUENCES, CAP, 0, policy, POINTS)
        self.class_point = [POINTS - 1, POINTS - 1]
        self.requests: dict[str, Request] = {}
        self.ended: list[str] = []
        self.memory: dict[int, tuple[tuple[int, ...], int]] = {}
        self.stopped: set[str] = set()

    def arrive(self, prompt: int, max_tokens: int, priority: int, service_class: int, text: int) -> None:
        """Texts 0 and 1 differ from the 20th token on, 2 is another from the first."""
        tokens = [2 if text == 2 else 1 if text == 1 and i >= 20 else 0 for i in range(prompt)]
        name = f"r{len(self.requests)}"
        request = Request(name, tuple(tokens), Sampling(max_tokens), service_class=service_class, priority=priority)
        self.requests[name] = request
        self.scheduler.enqueue(request, self.now_s)

    def withdraw(self, index: int) -> None:
        name = f"r{index}"
        if name in self.requests and name not in self.ended:
            self.scheduler.withdraw(name)
            self.ended.append(name)

    def switch(self, point: int) -> None:
        self.class_point[1] = point

    def step(self) -> None:
        before = {name: sequence.prefilling for name, sequence in self.scheduler.running.items()}
        decode, prefill = self.scheduler.schedule(self.class_point, self.now_s)
        running = self.scheduler.running
        self.stopped |= before.keys() - running.keys()
        # One that was stopped and at once found its text in another's blocks reads the rest of it as a prompt.
        decoding = {n for n, reading in before.items() if not reading and n in running and not running[n].prefilling}
        assert {piece.sequence.request.request_id for piece in decode} == decoding
        assert sum(piece.length for piece in prefill) <= CAP
        assert all(piece.length > 0 for piece in prefill)
        self.check()
        for piece in (*decode, *prefill):
            self.compute(piece)
            complete = piece.completes
            self.scheduler.advance(piece)
            if complete:
                piece.sequence.tokens.append(0)
                if piece.sequence.generated == piece.sequence.request.sampling.max_tokens:
                    self.scheduler.finish(piece.sequence)
                    self.ended.append(piece.sequence.request.request_id)

    def compute(self, piece: Slice) -> None:
        sequence, point = piece.sequence, piece.point
        for position in range(sequence.cached, sequence.cached + piece.length):
            place = self.place(sequence, position)
            at = min([point, *[self.memory[self.place(sequence, i)][1] for i in range(position)]])
            self.memory[place] = (tuple(sequence.tokens[: position + 1]), at)

    def place(self, sequence: Sequence, position: int) -> int:
        assert sequence.context
        return sequence.context.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS

    def check(self) -> None:
        running = self.scheduler.running.values()
        assert len(self.ended) == len(set(self.ended))
        assert len(running) + self.scheduler.waiting + len(self.ended) == len(self.requests)
        assert len(running) <= SEQUENCES
        held = Counter(block for sequence in running for block in sequence.context.blocks)
        assert self.scheduler.pool.used == len(held) <= BLOCKS
        assert 0 <= self.scheduler.pool.prefixes.kept <= BLOCKS - len(held)
        for sequence in running:
            assert sequence.cached <= len(sequence.context.blocks) * BLOCK_TOKENS
            for position in range(sequence.cached):
                written, _ = self.memory[self.place(sequence, position)]
                assert written == tuple(sequence.tokens[: position + 1]), "somebody else's text"

    def drain(self) -> None:
        # A request needs at most 60 steps and 12 to be read; one of higher rank may stop it, once for each of them.
        for _ in range(80 * 60):
            if len(self.ended) == len(self.requests):
                return
            self.step()
            self.check()
        raise AssertionError("starved")


@settings(max_examples=200, deadline=None)
@given(history)
def test_requests_and_blocks_are_conserved_text_is_ones_own_and_everything_ends(moves: list[tuple]) -> None:
    world = World()
    for name, *arguments in moves:
        getattr(world, name)(*arguments)
        world.check()
    world.drain()
    assert world.scheduler.pool.used == 0
    assert world.scheduler.pool.available == BLOCKS


@settings(max_examples=100, deadline=None)
@given(history)
def test_what_is_found_was_computed_at_the_requests_point_or_a_larger_budget(moves: list[tuple]) -> None:
    world = World()
    started: set[str] = set()
    for name, *arguments in [*moves, ("step",), ("step",)]:
        at = list(world.class_point)
        getattr(world, name)(*arguments)
        for request_id, sequence in world.scheduler.running.items():
            if request_id not in started and request_id not in world.stopped:
                found = sequence.context.nodes[: (len(sequence.request.prompt) - 1) // BLOCK_TOKENS]
                own = at[sequence.request.service_class]
                assert all(node.point >= min(own, world.class_point[sequence.request.service_class]) for node in found)
                for node in found:
                    last = node.block * BLOCK_TOKENS + BLOCK_TOKENS - 1
                    assert world.memory[last][1] >= own
        started |= world.scheduler.running.keys()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(-2, 2)), min_size=1, max_size=20))
def test_of_requests_that_came_together_higher_priority_ends_reading_first_then_earlier_arrival(
    arrivals: list[tuple[int, int]],
) -> None:
    world = World()
    for prompt, priority in arrivals:
        world.arrive(prompt, 5, priority, 0, 2)
    started: list[str] = []
    while len(world.ended) < len(world.requests):
        world.step()
        started += [name for name in (*world.scheduler.running, *world.ended) if name not in started]
    by_priority = sorted(world.requests.values(), key=lambda request: (-request.priority, int(request.request_id[1:])))
    assert started == [request.request_id for request in by_priority]


def test_a_request_of_higher_priority_takes_the_place_of_the_newest_of_the_lowest_and_that_one_goes_on_later() -> None:
    world = World()
    for priority in (0, -1, -1):
        world.arrive(20, 30, priority, 0, 2)
    for _ in range(10):
        world.step()
    assert list(world.scheduler.running) == ["r0", "r1", "r2"]
    world.arrive(20, 30, 1, 0, 0)
    world.step()
    assert list(world.scheduler.running) == ["r0", "r1", "r3"]
    world.drain()
    assert sorted(world.ended) == ["r0", "r1", "r2", "r3"]


def test_a_stopped_sequence_finds_its_complete_blocks_again_while_memory_lasts() -> None:
    world = World()
    for _ in range(3):
        world.arrive(17, 60, 0, 0, 2)
    while not world.scheduler.counts.preemptions:
        world.step()
    (waiting,) = world.scheduler._waiting.values()
    stopped_at = len(waiting.tokens)
    assert stopped_at > 2 * BLOCK_TOKENS
    assert world.scheduler.pool.prefixes.match(waiting.tokens, [POINTS - 1])
    world.drain()


def test_prompts_that_begin_alike_share_memory_and_are_read_once() -> None:
    world = World()
    for _ in range(3):
        world.arrive(40, 4, 0, 0, 0)
    read = 0
    while len(world.ended) < 3:
        before = {name: sequence.cached for name, sequence in world.scheduler.running.items()}
        world.step()
        read += sum(sequence.cached - before.get(name, 0) for name, sequence in world.scheduler.running.items())
        assert world.scheduler.pool.used <= blocks_for(40) + 2 * 1 + 3
    counts = world.scheduler.counts
    assert (counts.prompt_tokens, counts.prompt_tokens_known) == (120, 2 * 32)
