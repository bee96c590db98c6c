"""A request: what is asked (`SamplingParams`), what is tracked (`Request`) and what returns (`RequestOutput`).

Names and meanings follow vLLM, so that its users need no new vocabulary; values it would drop or clamp are refused.
Invariant: a `SamplingParams` that exists is valid, so nothing below the constructor checks a value again.
"""

from __future__ import annotations

import difflib
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, cast

from ..engines.errors import RequestError, shown
from .grammar import Matcher, StructuredOutputs

__all__ = [
    "CompletionOutput", "FinishReason", "Logprob", "Request", "RequestError", "RequestMetrics", "RequestOutput",
    "SamplingParams", "State", "fan_out",
]  # fmt: skip

FinishReason = Literal["stop", "length", "abort", "error"]
MAX_LOGPROBS = 20  # vLLM's and OpenAI's ceiling
_SEEDS = 1 << 63

# field -> (lowest, highest), both allowed
_INTEGERS: dict[str, tuple[float, float]] = {
    "n": (1, 128), "top_k": (-1, 2**31 - 1), "seed": (-_SEEDS, _SEEDS - 1), "max_tokens": (1, 2**31 - 1),
    "min_tokens": (0, 2**31 - 1), "logprobs": (0, MAX_LOGPROBS), "prompt_logprobs": (0, MAX_LOGPROBS),
}  # fmt: skip
# temperature: far from where it is infinite in float32, where logits of minus infinity over it are no numbers
_NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 1e30), "top_p": (math.ulp(0.0), 1.0), "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0), "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0),
}  # fmt: skip
RANGES = {**_INTEGERS, **_NUMBERS}  # of all that have one
_SWITCHES = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "prefix_cache", "speculate")
_OPTIONAL = ("seed", "max_tokens", "logprobs", "prompt_logprobs")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled, with vLLM's names and defaults (`vllm.SamplingParams`).

    `temperature=0` is greedy; `top_k` 0 or -1 is off; `max_tokens=None` runs to the context's end. `logprobs=k` returns
    the k most likely tokens and the chosen one. `prefix_cache=False` neither reads nor fills the prefix cache.
    `structured_outputs`: what the answer must be (`grammar.py`), also as a mapping; complete, the answer ends.
    `speculate=False`: no drafts for this request, whose answer is the same with them.
    Raises RequestError naming the field, the value and what is allowed.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prefix_cache: bool = True
    speculate: bool = True
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None

    @classmethod
    def of(cls, **options: Any) -> SamplingParams:
        """The same from names a user typed: an unknown one is a RequestError with the closest known name."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
                raise RequestError(f"{name} is not a sampling parameter; {hint}")
        return cls(**options)

    def __post_init__(self) -> None:
        put = object.__setattr__  # frozen: values are normalised once, here
        for name, bounds in _INTEGERS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                put(self, name, _integer(name, value, *bounds))
        for name, bounds in _NUMBERS.items():
            put(self, name, _number(name, getattr(self, name), *bounds))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {shown(getattr(self, name))}; it must be true or false.")
        put(self, "top_k", max(self.top_k, 0))
        put(self, "stop", _strings(self.stop))
        put(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        put(self, "logit_bias", _bias(self.logit_bias))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}; it must not exceed max_tokens, {self.max_tokens}.")
        if self.structured_outputs is not None:
            put(self, "structured_outputs", _structured(self.structured_outputs))
            for name in (
                "min_tokens",
                "ignore_eos",
            ):  # where the grammar allows nothing but the end, they allow nothing
                if getattr(self, name):
                    raise RequestError(
                        f"{name} cannot be kept together with structured_outputs; leave one of them out."
                    )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return cast("tuple[str, ...]", self.stop)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises RequestError where `logit_bias` or `stop_token_ids` names a token the model does not have."""
        for name, ids in (("logit_bias", self.logit_bias or ()), ("stop_token_ids", self.stop_token_ids or ())):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise RequestError(
                        f"{name} names token {shown(token)}; the model's tokens are 0 to {vocab_size - 1}."
                    )


class Logprob(NamedTuple):
    """One token's natural log-probability, from the raw logits; `rank` 1 is the most likely token."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class RequestMetrics:
    """Times of one request on `time.monotonic()`, in seconds; None until it happens."""

    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One of a request's `n` answers. `stop_reason` is the stop string or stop token that ended it, else None."""

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: Sequence[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestOutput:
    """What `generate` returns for one prompt; `prompt_logprobs[0]` is None, as nothing precedes the first token."""

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: Sequence[CompletionOutput]
    finished: bool
    prompt_logprobs: Sequence[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None


class State(Enum):
    WAITING = "waiting"  # in the queue, no row and no pages
    RUNNING = "running"
    PREEMPTED = "preempted"  # thrown out with a step in flight: waits again once that is committed
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """One sequence being generated. Written by the scheduler only; everyone else reads.

    `tokens` are those the host knows: the prompt, then the output; `num_in_flight` more are sampled by steps not yet
    committed. `computed` tokens have their KV written by steps already scheduled; it catches up with `length`.
    `stop_ids` end the request, but not among the first `min_tokens` outputs, where the sampler masks them.
    """

    id: str
    tokens: list[int]
    params: SamplingParams
    priority: int = 0  # lower first, then arrival
    salt: bytes = b""  # requests share cached pages only with requests of the same salt
    seed: int = -1  # params.seed; drawn at random where that is None
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(time.monotonic()))
    matcher: Matcher | None = None  # of its structured outputs; has seen all tokens of the output that are known

    num_prompt: int = field(init=False)
    state: State = field(init=False, default=State.WAITING)
    order: tuple[int, int] = field(init=False, default=(0, 0))  # (priority, arrival)
    limit: int = field(init=False, default=0)  # tokens, prompt included, at which it ends with "length"
    limit_reason: str | None = field(init=False, default=None)  # "kv_pool" where the pool set the limit
    stop_ids: frozenset[int] = field(init=False, default=frozenset())
    row: int = field(init=False, default=-1)
    pages: list[int] = field(init=False, default_factory=list)  # only ever appended to; replaced when given back
    computed: int = field(init=False, default=0)
    num_in_flight: int = field(init=False, default=0)
    steps_in_flight: int = field(init=False, default=0)
    num_cached: int | None = field(init=False, default=None)  # prompt tokens found in the cache; None: never admitted
    num_scored: int = field(init=False, default=0)  # prompt positions whose logits were asked for (prompt_logprobs)
    num_shared: int = field(init=False, default=0)  # leading pages that are in the prefix cache
    drafts: Sequence[int] = field(init=False, default=())  # of the tokens that follow, where the executor drafts
    digests: list[bytes] = field(init=False, default_factory=list)  # of the leading full pages, as far as needed
    num_preemptions: int = field(init=False, default=0)
    finish_reason: FinishReason | None = field(init=False, default=None)
    stop_reason: int | str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.tokens = list(self.tokens)
        self.num_prompt = len(self.tokens)
        if self.seed < 0:
            self.seed = (secrets.randbits(63) if self.params.seed is None else self.params.seed) % _SEEDS

    @property
    def length(self) -> int:
        """Tokens known or in flight."""
        return len(self.tokens) + self.num_in_flight

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt


def fan_out(
    request_id: str,
    prompt: Sequence[int],
    params: SamplingParams,
    priority: int = 0,
    salt: bytes = b"",
    matcher: Callable[[], Matcher | None] = lambda: None,
) -> list[Request]:
    """The `params.n` requests of one prompt. They share its pages through the prefix cache; answer i has seed + i.

    matcher: makes one for each answer.
    """
    base = secrets.randbits(63) if params.seed is None else params.seed
    single = params if params.n == 1 else replace(params, n=1)
    arrival = time.monotonic()
    requests = []
    for i in range(params.n):
        name = request_id if params.n == 1 else f"{request_id}#{i}"
        metrics = RequestMetrics(arrival)
        requests.append(Request(name, list(prompt), single, priority, salt, (base + i) % _SEEDS, metrics, matcher()))
    return requests


def _integer(name: str, value: Any, low: float, high: float) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:  # type: ignore[operator]
        raise RequestError(f"{name} is {shown(value)}; it must be an integer {_span(low, high)}.")
    return int(value)


def _number(name: str, value: Any, low: float, high: float) -> float:
    """The bounds are finite, and nothing that is not a number is between them."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not low <= value <= high:
        found = "NaN, which is not a number" if real and value != value else shown(value)
        raise RequestError(f"{name} is {found}; it must be a finite number {_span(low, high)}.")
    return float(value)


def _span(low: float, high: float) -> str:
    bottom = "above 0" if low == math.ulp(0.0) else f"of at least {low:g}"
    return bottom if high == math.inf else f"{bottom} and at most {high:.10g}"


def _structured(value: Any) -> StructuredOutputs:
    if isinstance(value, StructuredOutputs):
        return value
    known = [f.name for f in fields(StructuredOutputs)]
    if not isinstance(value, Mapping) or not set(value) <= set(known):
        raise RequestError(
            f"structured_outputs is {shown(value)}; it must be a mapping with one of {', '.join(known)}."
        )
    return StructuredOutputs(**value)


def _strings(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else None
    if strings is None or not all(isinstance(s, str) and s for s in strings):
        raise RequestError(f"stop is {shown(value)}; it must be a non-empty string or a list of such.")
    return strings


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if value is not None and (isinstance(value, str | bytes) or not isinstance(value, Sequence)):
        raise RequestError(f"{name} is {shown(value)}; it must be a list of token ids.")
    return tuple(_integer(f"{name}[{i}]", token, 0, math.inf) for i, token in enumerate(value or ()))


def _bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias is {shown(value)}; it must be a mapping of token ids to numbers.")
    bias: dict[int, float] = {}
    for key, amount in value.items():
        written = isinstance(key, str) and key.isdecimal() and len(key) <= 10  # JSON has only string keys
        token, found = int(key) if written else key, shown(key)
        if isinstance(token, bool) or not isinstance(token, Integral) or int(token) < 0:
            raise RequestError(f"logit_bias has the key {found}; its keys must be token ids, integers of at least 0.")
        if int(token) in bias:
            raise RequestError(f"logit_bias has token {shown(token)} twice; leave one of them out.")
        bias[int(token)] = _number(f"logit_bias[{found}]", amount, -100.0, 100.0)
    return bias
