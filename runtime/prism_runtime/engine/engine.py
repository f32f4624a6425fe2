"""The engine: continuous batching over an elastic model, one iteration per `step()`."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prism_api.manifest import Manifest
from prism_api.points import Ladder
from prism_runtime.engine.backlog import Ahead
from prism_runtime.engine.batching import POLICIES
from prism_runtime.engine.blocks import BlockPool, blocks_for
from prism_runtime.engine.costs import StepCosts
from prism_runtime.engine.drift import DriftGuard, HeldBudget
from prism_runtime.engine.model import Chunk, ElasticModel, load_pretrained
from prism_runtime.engine.prefix_cache import BLOCK_TOKENS
from prism_runtime.engine.sampler import NO_HISTORY, History, log_probabilities, sample
from prism_runtime.engine.scheduler import Scheduler
from prism_runtime.engine.sequence import Slice
from prism_runtime.engine.types import (
    EngineLoad,
    Event,
    Finished,
    FinishReason,
    Overloaded,
    Plan,
    Rejected,
    Request,
    StepReport,
    Token,
)
from prism_runtime.engine.validation import check_request
from prism_runtime.kernels.contract import GatedLayer
from prism_runtime.kernels.plan import THRESHOLD, PlanTables
from prism_runtime.refactor.artifact import open_artifact

NO_LOGITS = torch.empty(0, 0)


@dataclass(frozen=True, slots=True)
class _Ran:
    """A forward: the slices that ran with their logits [pieces, V], and those that failed with what went wrong."""

    pieces: Sequence[Slice] = ()
    logits: Tensor = NO_LOGITS
    failed: Sequence[tuple[Slice, str]] = ()


class Engine:
    """Runs requests to their end. `submit`, `cancel`, `set_plan` and `load` may be called from any thread; one thread
    calls `step`.

    model                    packed in place; belongs to the engine afterwards
    tables                   the operating points' meaning to the kernels, in the order of `manifest.ladder`
    kv_tokens                cache size in tokens; None gives every sequence a full context
    prefill_tokens_per_step  most prompt tokens in one step: bounds how long decoding sequences wait for a prompt
    classes                  rows of the plan
    seed                     source of the seeds of requests that bring none
    gates                    needed if the tables have threshold or batch points, one for each MoE layer
    policy                   key of `batching.POLICIES`: who runs in a step, at which operating point
    shed_above               refuse a request whose first token would come later than so many times its objective, even
                             with every budget at its floor; None takes everything in
    clock                    of deadlines; with another one steps depend on nothing but their requests and the seed

    `costs` price steps for the policy, once they have a profile. `drift` holds the budget of threshold points at the
    nominal one, and tells what is realised.
    Raises ValueError if the model's window is smaller than `max_context_tokens` or the cache than one such context.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tables: PlanTables,
        manifest: Manifest,
        tokenizer: Any,
        *,
        max_sequences: int = 16,
        max_context_tokens: int = 512,
        kv_tokens: int | None = None,
        prefill_tokens_per_step: int = 512,
        classes: int = 1,
        seed: int = 0,
        gates: Sequence[GatedLayer] = (),
        policy: str = "slack",
        shed_above: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check_limits(model, max_sequences, max_context_tokens, kv_tokens, prefill_tokens_per_step)
        self.manifest = manifest
        self.ladder: Ladder = manifest.ladder
        self.tokenizer = tokenizer
        self.max_context_tokens = max_context_tokens
        self.vocabulary_size: int = model.config.get_text_config().vocab_size
        blocks = max_sequences * blocks_for(max_context_tokens) if kv_tokens is None else kv_tokens // BLOCK_TOKENS
        self.model = ElasticModel(
            model,
            tables,
            classes=classes,
            blocks=blocks,
            gates=gates,
        )
        self.drift = DriftGuard(
            {
                point: self.ladder.points[point].budget_permille / 1000
                for point, mode in enumerate(tables.mode.tolist())
                if mode == THRESHOLD
            }
        )
        self.costs = StepCosts(self.ladder)
        arranging = POLICIES[policy](self.costs)
        self.scheduler = Scheduler(
            BlockPool(blocks), max_sequences, prefill_tokens_per_step, seed, arranging, len(self.ladder)
        )
        self.plan = Plan(version=0, class_point=(len(self.ladder) - 1,) * classes)
        self._clock = clock
        self._shed_above = shed_above
        self._lock = threading.Lock()
        self._submitted: deque[tuple[Request, float]] = deque()
        self._cancelled: dict[str, None] = {}
        self._in_flight: set[str] = set()
        self._pending_plan: Plan | None = None
        self._begun: list[Slice] = []
        """Got their first token in the last step, which ends, its pace included, when the next one begins."""

    @classmethod
    def from_artifact(
        cls,
        artifact_dir: Path,
        *,
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        **settings: Any,
    ) -> "Engine":
        """An engine over an artifact; `settings` are the constructor's. Sets torch's thread count for the process.

        Raises ArtifactRefused if a file of the artifact is missing, damaged or of an unknown version.
        """
        torch.set_num_threads(threads)
        artifact = open_artifact(artifact_dir)
        model, tokenizer = load_pretrained(artifact_dir, dtype)
        return cls(model, artifact.tables(), artifact.manifest, tokenizer, gates=artifact.gates(), **settings)

    # -- from any thread ----------------------------------------------------------------------------------------

    def validate(self, request: Request) -> None:
        """Raises Rejected if the request could not run to its end, whatever else runs."""
        check_request(
            request,
            vocabulary_size=self.vocabulary_size,
            max_context_tokens=self.max_context_tokens,
            classes=len(self.plan.class_point),
            points=len(self.ladder),
        )

    def submit(self, request: Request) -> None:
        """Queue a request for the next step. Raises Rejected or Overloaded, and then nothing was queued."""
        self.validate(request)
        with self._lock:
            self._refuse_if_hopeless(request)
            if request.request_id in self._in_flight:
                raise Rejected("a request of this id is in flight already", "request_id")
            self._in_flight.add(request.request_id)
            self._submitted.append((request, self._clock()))

    def _refuse_if_hopeless(self, request: Request) -> None:
        """Shedding comes after the last means: the wait is that with every budget at its floor."""
        ttft_s = request.promise.ttft_s
        if self._shed_above is None or ttft_s is None or not self._in_flight:
            return
        others = [Ahead(one.priority, len(one.prompt), running=False) for one, _ in self._submitted]
        wait_s = self.scheduler.backlog.wait_s(request.priority, len(request.prompt), others)
        if wait_s is not None and wait_s > self._shed_above * ttft_s:
            raise Overloaded(wait_s, ttft_s)

    def cancel(self, request_id: str) -> None:
        """End a request in the next step, with Finished(CANCELLED). Unknown and finished ids are ignored."""
        with self._lock:
            if request_id in self._in_flight:
                self._cancelled[request_id] = None

    def set_plan(self, plan: Plan) -> None:
        """Make `plan` live at the start of the next step. Raises ValueError if it does not fit the tables."""
        self.model.check_points(plan.class_point)
        with self._lock:
            self._pending_plan = plan

    @property
    def has_work(self) -> bool:
        with self._lock:
            return bool(self._in_flight)

    def load(self) -> EngineLoad:
        """Queue and cache as of the last step."""
        with self._lock:
            running, pool, counts = len(self.scheduler.running), self.scheduler.pool, self.scheduler.counts
            return EngineLoad(
                running=running,
                waiting=len(self._in_flight) - running,
                kv_blocks=pool.blocks,
                kv_blocks_used=pool.used,
                preemptions=counts.preemptions,
                kv_blocks_kept=pool.prefixes.kept,
                prompt_tokens=counts.prompt_tokens,
                prompt_tokens_known=counts.prompt_tokens_known,
            )

    def budgets(self) -> Sequence[HeldBudget]:
        """What threshold points realise of their nominal budgets, as of their last correction."""
        return self.drift.held()

    # -- on the stepping thread ---------------------------------------------------------------------------------

    def step(self) -> StepReport:
        """One iteration: take what arrived, decode and read prompts as the policy arranges it, sample, finish.

        The plan is swapped here and nowhere else, so every token has exactly one plan version. A request whose forward
        raises ends as FAILED; the others go on.
        """
        events: list[Event] = self._take_arrivals()
        now_s = self._clock()
        while self._begun:
            self._begun.pop().sequence.first_token_s = now_s
        decode, prefill = self.scheduler.schedule(self.plan.class_point, now_s)
        context = sum(piece.sequence.cached for piece in decode)
        ran = [self._run(decode), self._run(prefill)]
        self._hold_budgets()
        for piece, error in chain.from_iterable(each.failed for each in ran):
            self.model.cache.clear(self.scheduler.unfinished_blocks(piece))
            events.append(self._finish(piece, FinishReason.FAILED, error))
        for each in ran:
            events += self._sample(each.pieces, each.logits)
        return StepReport(
            events=tuple(events),
            plan=self.plan,
            decode_at=_tokens_by_point(decode),
            context_tokens=context,
            prefill_at=_tokens_by_point(prefill),
        )

    def _take_arrivals(self) -> list[Event]:
        with self._lock:
            if self._pending_plan is not None:
                self.plan, self._pending_plan = self._pending_plan, None
                self.model.set_points(self.plan.class_point)
            while self._submitted:
                self.scheduler.enqueue(*self._submitted.popleft())
            cancelled = list(self._cancelled)
            self._cancelled.clear()
            for request_id in cancelled:
                self.scheduler.withdraw(request_id)
                self._in_flight.remove(request_id)
        return [Finished(request_id, FinishReason.CANCELLED) for request_id in cancelled]

    def _hold_budgets(self) -> None:
        """Shift thresholds by what was realised. Between forwards, so all rows and layers of one see the same."""
        plan = self.model.plan
        for point in self.drift.points:
            if self.drift.due(point, tokens := plan.gated_tokens(point)):
                spent, routed = plan.spent[point].tolist()
                plan.shift[point] = self.drift.correct(point, tokens, spent, routed)

    def _run(self, pieces: Sequence[Slice]) -> _Ran:
        """Forward the slices together; if that raises, each alone, so that only the ones at fault are lost."""
        if not pieces:
            return _Ran()
        try:
            logits = self.model.logits([self._chunk(piece) for piece in pieces])
        except Exception as error:
            if len(pieces) == 1:
                return _Ran(failed=((pieces[0], f"the model's forward raised {type(error).__name__}"),))
            parts = [self._run([piece]) for piece in pieces]
            whole = [part for part in parts if part.pieces]
            return _Ran(
                [piece for part in whole for piece in part.pieces],
                torch.cat([part.logits for part in whole]) if whole else NO_LOGITS,
                [failure for part in parts for failure in part.failed],
            )
        # A sum is finite only if all of its terms are: one pass instead of several while nothing is wrong.
        if bool(logits.sum(-1).isfinite().all()):
            return _Ran(pieces, logits)
        finite = logits.isfinite().all(-1)
        return _Ran(
            [piece for piece, fine in zip(pieces, finite.tolist(), strict=True) if fine],
            logits[finite],
            [
                (piece, "the model's logits are not finite")
                for piece, fine in zip(pieces, finite.tolist(), strict=True)
                if not fine
            ],
        )

    def _chunk(self, piece: Slice) -> Chunk:
        sequence, service_class = piece.sequence, piece.sequence.request.service_class
        assert sequence.context, "what runs has memory"
        tokens = sequence.tokens[sequence.cached : sequence.cached + piece.length]
        own = piece.point == self.plan.class_point[service_class]
        row = service_class if own else self.model.row_of_point(piece.point)
        return Chunk(sequence.context.blocks, sequence.cached, tokens, row)

    def _sample(self, pieces: Sequence[Slice], logits: Tensor) -> Iterable[Event]:
        """Advance the sequences by what ran, with logits [pieces, V]; one token for each that is complete."""
        complete = [index for index, piece in enumerate(pieces) if piece.completes]
        for piece in pieces:
            self.scheduler.advance(piece)
        if not complete:
            return
        if len(complete) < len(pieces):
            pieces, logits = [pieces[index] for index in complete], logits[complete]
        sequences = [piece.sequence for piece in pieces]
        tokens = sample(
            logits,
            [sequence.request.sampling for sequence in sequences],
            [sequence.draws.random() for sequence in sequences],
            [_history(piece) for piece in pieces],
        )
        for row, (piece, sequence, token) in enumerate(zip(pieces, sequences, tokens, strict=True)):
            request, sampling = sequence.request, sequence.request.sampling
            sequence.tokens.append(token)
            if sequence.generated == 1:
                self._begun.append(piece)
            top = sampling.top_logprobs
            likely = None if top is None else log_probabilities(logits[row], token, top)
            yield Token(request.request_id, token, self.plan.version, piece.point, likely)
            if token in sampling.stop_token_ids:
                yield self._finish(piece, FinishReason.STOP)
            elif sequence.generated == sampling.max_tokens:
                yield self._finish(piece, FinishReason.LENGTH)

    def _finish(self, piece: Slice, reason: FinishReason, error: str | None = None) -> Finished:
        request_id = piece.sequence.request.request_id
        with self._lock:
            self.scheduler.finish(piece.sequence)
            self._in_flight.remove(request_id)
            # The id is free again: a cancel that came during this step must not hit its next bearer.
            self._cancelled.pop(request_id, None)
        return Finished(request_id, reason, error)


def _history(piece: Slice) -> History:
    """Copied for those alone whose penalties count it."""
    request = piece.sequence.request
    if not request.sampling.reshapes:
        return NO_HISTORY
    return History(request.prompt, piece.sequence.tokens[len(request.prompt) :])


def _tokens_by_point(pieces: Sequence[Slice]) -> Counter[int]:
    tokens = Counter[int]()
    for piece in pieces:
        tokens[piece.point] += piece.length
    return tokens


def _check_limits(
    model: PreTrainedModel,
    max_sequences: int,
    max_context_tokens: int,
    kv_tokens: int | None,
    prefill_tokens_per_step: int,
) -> None:
    window = getattr(model.config.get_text_config(), "max_position_embeddings", max_context_tokens)
    if max_context_tokens > window:
        raise ValueError(f"max_context_tokens is {max_context_tokens}, the model's window is {window}")
    if max_sequences < 1 or prefill_tokens_per_step < 1:
        raise ValueError(
            f"max_sequences and prefill_tokens_per_step must be at least 1; "
            f"found {max_sequences} and {prefill_tokens_per_step}"
        )
    if kv_tokens is not None and kv_tokens // BLOCK_TOKENS < blocks_for(max_context_tokens):
        raise ValueError(
            f"kv_tokens is {kv_tokens}, one context of max_context_tokens {max_context_tokens} needs "
            f"{blocks_for(max_context_tokens) * BLOCK_TOKENS}; raise the one or lower the other"
        )
