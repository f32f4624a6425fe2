"""A scripted engine for tests of the server: real batching, plans and events, no model. A test says the answers."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from prism_api.manifest import Manifest
from prism_api.points import Ladder, OperatingPoint
from prism_runtime.engine.costs import StepCosts
from prism_runtime.engine.drift import HeldBudget
from prism_runtime.engine.types import (
    EngineLoad,
    Event,
    Finished,
    FinishReason,
    LogProbabilities,
    Overloaded,
    Plan,
    Rejected,
    Request,
    StepReport,
    Token,
)

MODEL = "scripted"
POINTS = (("b500", 500, "0.97", "0.968"), ("b750", 750, "0.99", "0.989"), ("full", 1000, "1", "1"))
END = 256
VOCABULARY = 257


def ladder() -> Ladder:
    return Ladder(
        OperatingPoint(
            name=name, budget_permille=budget, policy="prefix", relative_quality=quality, relative_quality_low=low
        )
        for name, budget, quality, low in POINTS
    )


def manifest() -> Manifest:
    digest = "sha256:" + "0" * 64
    shape = {"moeLayers": [0], "experts": 4, "topK": 2, "neurons": 8, "hidden": 8, "subExperts": 4}
    return Manifest.model_validate(
        {
            "tools": {},
            "source": {"name": MODEL, "architecture": "Scripted", "licence": "MIT", "digest": digest},
            "shape": shape | {"neuronsPerSubExpert": 2, "normTopkProb": True},
            "files": [],
            "calibration": {"texts": [], "sequenceLength": 1, "seeds": []},
            "partition": {},
            "gate": {},
            "operatingPoints": [point.to_wire() for point in ladder().points],
        }
    )


def byte_tokenizer() -> Tokenizer:
    """One token a byte, so that every character beyond ASCII spans several tokens; id 256 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_byte = {chr(b): b for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    spare = iter(b for b in range(256) if b not in by_byte.values())
    vocabulary = {symbol: by_byte.get(symbol, -1) for symbol in alphabet}
    for symbol in sorted((s for s, b in vocabulary.items() if b < 0), key=ord):
        vocabulary[symbol] = next(spare)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return tokenizer


class ScriptedEngine:
    """Every running request gets one token a step: the next byte of its answer, for ever if the answer repeats."""

    def __init__(
        self,
        answer: Callable[[Request], bytes] = lambda request: b"abcdefgh",
        *,
        max_sequences: int = 64,
        max_context_tokens: int = 512,
        step_s: float = 0.001,
    ) -> None:
        self.manifest = manifest()
        self.ladder = ladder()
        self.costs = StepCosts(self.ladder)
        self.tokenizer = byte_tokenizer()
        self.max_context_tokens = max_context_tokens
        self.vocabulary_size = VOCABULARY
        self.plan = Plan(0, (0,) * 16)
        self.steps: list[StepReport] = []
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.fail_steps = 0
        self.overloaded: Overloaded | None = None
        self.gate = threading.Event()
        self.gate.set()
        self._answer = answer
        self._max_sequences = max_sequences
        self._step_s = step_s
        self._lock = threading.Lock()
        self._pending: Plan | None = None
        self._waiting: deque[Request] = deque()
        self._running: dict[str, tuple[Request, int]] = {}
        self._doomed: set[str] = set()

    def validate(self, request: Request) -> None:
        if not request.prompt:
            raise Rejected("the prompt is empty", "prompt")
        if any(not 0 <= token_id < VOCABULARY for token_id in request.prompt):
            raise Rejected(f"token ids must be 0 to {VOCABULARY - 1}", "prompt")
        if len(request.prompt) + request.sampling.max_tokens > self.max_context_tokens:
            raise Rejected(f"prompt and answer must fit {self.max_context_tokens} tokens", "max_tokens")

    def submit(self, request: Request) -> None:
        self.validate(request)
        if self.overloaded:
            raise self.overloaded
        with self._lock:
            self.requests.append(request)
            self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        with self._lock:
            self.cancelled.append(request_id)
            self._doomed.add(request_id)

    def set_plan(self, plan: Plan) -> None:
        self._pending = plan

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def budgets(self) -> list[HeldBudget]:
        """As if b500 and b750 had thresholds, and only the former had served tokens."""
        return [HeldBudget(0, 0.5, 0.515, 0.09, at_limit=False), HeldBudget(1, 0.75, None, 0.0, at_limit=False)]

    def load(self) -> EngineLoad:
        return EngineLoad(len(self._running), len(self._waiting), 128, 2 * len(self._running), 0, 3, 50, 32)

    def step(self) -> StepReport:
        if self._pending:
            self.plan, self._pending = self._pending, None
        if self.fail_steps:
            self.fail_steps -= 1
            raise RuntimeError("scripted failure")
        if self.has_work:
            assert self.gate.wait(timeout=30), "the test never opened the gate"
            time.sleep(self._step_s)
        with self._lock:
            events, prefill = self._drop_cancelled(), Counter[int]()
            while self._waiting and len(self._running) < self._max_sequences:
                request = self._waiting.popleft()
                self._running[request.request_id] = (request, 0)
                prefill[self.plan.class_point[request.service_class]] += len(request.prompt)
            decoding = Counter(self.plan.class_point[request.service_class] for request, _ in self._running.values())
            for request, made in list(self._running.values()):
                events += self._advance(request, made)
        report = StepReport(tuple(events), self.plan, decoding, 8 * decoding.total(), prefill)
        self.steps.append(report)
        return report

    def _drop_cancelled(self) -> list[Event]:
        doomed, self._doomed = self._doomed, set()
        gone = [name for name in doomed if self._running.pop(name, None)]
        gone += [r.request_id for r in self._waiting if r.request_id in doomed]
        self._waiting = deque(r for r in self._waiting if r.request_id not in doomed)
        return [Finished(name, FinishReason.CANCELLED) for name in gone]

    def _advance(self, request: Request, made: int) -> list[Event]:
        answer = self._answer(request)
        token_id = self.tokenizer_id(answer, made)
        point = self.plan.class_point[request.service_class]
        asked = request.sampling.top_logprobs
        likely = None if asked is None else LogProbabilities(-0.5, ((token_id, -0.5), (ord("z"), -1.5))[:asked])
        events: list[Event] = [Token(request.request_id, token_id, self.plan.version, point, likely)]
        if token_id in request.sampling.stop_token_ids:
            reason = FinishReason.STOP
        elif made + 1 >= request.sampling.max_tokens:
            reason = FinishReason.LENGTH
        else:
            self._running[request.request_id] = (request, made + 1)
            return events
        del self._running[request.request_id]
        return [*events, Finished(request.request_id, reason)]

    def tokenizer_id(self, answer: bytes, position: int) -> int:
        """The answer's byte at a position; after its end the end token, again and again."""
        return answer[position] if position < len(answer) else END
