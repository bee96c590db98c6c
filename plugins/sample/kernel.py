"""Sampling on the GPU: which launches turn the logits of a bucket into tokens.

A row is spread over programs, each with a span of the vocabulary, so that a single row occupies the GPU as well. Greedy
or untruncated: a race per span, then the best of the spans. Truncated: the maximum first, then four to eight levels of
top_k and as many of top_p (`select.py`). Programs of rows that need no truncation leave at once. Logits are only read.
A row's token is the same in any tactic.

Site: op `Sample`; attributes `num_rows` (of the scheduler), `num_bias` B, `num_stop` S (slots per row), `num_logprobs`
L (0: none), `random` (False: all rows greedy), `truncate` (some row has top_k, top_p or min_p), `extras` (some row has
a mask, bias, min_tokens or penalties), `drafts` (0, or the most drafts of a request that are verified: its samples
follow one another, see `runtime/speculation/verify.py`). Inputs that these rule out are None. The tables have a row per
row of the scheduler:

     0 logits [R, V]    1 sample_rows [R] int32, negative: padding    2 sample_positions [R] int32
     3 temperature fp32, 0: greedy    4 top_k int32, 0: off    5 top_p fp32, 1: off    6 min_p fp32, 0: off
     7 seed int64    8 penalties [.., 3] fp32: repetition, presence, frequency
     9 counts [.., V] int32: bit 30, the token is in the prompt; the bits below, how often it was put out (updated)
    10 bias_ids [.., B] int32, -1: empty    11 bias_values [.., B] fp32    12 stop_ids [.., S] int32, -1: empty
    13 min_length int32: stop ids are masked at positions below
    14 masks [.., ceil(V / 32)] int32: a bit for each token, the lowest first, 0: it may not be    15 last_token int32
       (written)
    16 step_tokens [T] int32 and 17 logit_rows [R] int32, where drafts are verified: the tokens of the step, drafts
       among them, and the one that each sample follows. masks has `num_rows` rows for each number of drafts before it
    18 ancestors [T] int32, where drafts may be trees: the drafts before a sample are those that its token sees
       (`PagedAttention`), each has masks of its own, and the last_token of a request with drafts stays as it was

Outputs: 0 tokens [R] int32, -1 for padding; with L > 0 also 1 chosen_logprob [R] fp32, 2 chosen_rank [R] int32 (tokens
strictly more likely, plus one), 3 top_ids [R, L] int32, 4 top_logprobs [R, L] fp32, all of the raw logits; those of
padding are not written.
"""

from typing import Any

import triton

from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic
from .draw import race_kernel, take_kernel
from .logprobs import logprobs_kernel, score_kernel
from .select import STATE, TABLE, peak_kernel, select_kernel

INPUTS = (
    "logits", "sample_rows", "sample_positions", "temperatures", "top_k", "top_p", "min_p", "seeds", "penalties",
    "counts", "bias_ids", "bias_values", "stop_ids", "min_length", "masks", "last_token",
    "step_tokens", "logit_rows", "ancestors",
)  # fmt: skip
OUTPUTS = ("tokens", "chosen_logprob", "chosen_rank", "top_ids", "top_logprobs")
TILE = 512  # tokens of a step of a program
MOST_CANDIDATES = 4096  # of one row's best, merged by one program
# (programs per multiprocessor that spans are cut for, tokens of a step where sixteen sums of each stay in registers)
CONFIGS = ((4, 256), (8, 128), (2, 256))


def tactics(site: Site) -> list[Tactic]:
    """Spans of different lengths, likeliest first."""
    rows, vocab = _sizes(site)
    found = {}
    for programs, tile in CONFIGS:
        blocks = max(1, triton.cdiv(programs * site.device.num_sms, rows))
        span = min(max(triton.next_power_of_2(triton.cdiv(vocab, blocks)), 2 * TILE), 32 * TILE)
        tactic = _Sampling(site, span, tile).tactic()
        found[tactic.name] = tactic
    return list(found.values())


def _sizes(site: Site) -> tuple[int, int]:
    assert site.inputs[0] is not None
    rows, vocab = site.inputs[0].shape
    return rows, vocab


class _Sampling:
    """The launches of a site at one length of spans; `tile`: tokens of a step of the select kernel."""

    def __init__(self, site: Site, span: int, tile: int):
        self.tile = tile
        self.rows, self.vocab = _sizes(site)
        options = site.attributes
        self.random, self.truncate, self.extras = (bool(options[name]) for name in ("random", "truncate", "extras"))
        self.best = min(options["num_logprobs"], self.vocab)
        assert self.best == options["num_logprobs"], "more logprobs than tokens"
        assert self.random or not self.truncate, "only what is drawn can be truncated"
        assert site.inputs[0] is not None
        self.workspace = 0
        self.operands: dict[str, tuple[Operand, str]] = {}
        drafts = options.get("drafts", 0)
        given = (*site.inputs, *[None] * (len(INPUTS) - len(site.inputs)))
        for kind, names, tensors in (("input", INPUTS, given), ("output", OUTPUTS, site.outputs)):
            for index, (name, tensor) in enumerate(zip(names, tensors, strict=False)):
                # no kernel reads what is absent: any pointer will do
                self.operands[name] = (
                    (Operand("input", 1), "*i32") if tensor is None else (Operand(kind, index), POINTERS[tensor.dtype])
                )
        # levels of four bits until a logit is told from any other: extras may make any float of it
        self.levels = 8 if self.extras else {"bfloat16": 4, "float16": 5}.get(site.inputs[0].dtype, 8)
        self.blocks = triton.cdiv(self.vocab, span)
        slots = options["num_bias"] if self.extras else 0
        self.constants: dict[str, Any] = {
            "V": self.vocab, "SPAN": span, "N": TILE, "B": slots, "BIASES": triton.next_power_of_2(max(slots, 1)),
            "S": options["num_stop"] if self.extras else 0, "EXTRAS": self.extras, "BLOCKS": self.blocks,
            "PADDED": triton.next_power_of_2(self.blocks), "LEVELS": self.levels, "RANDOM": self.random,
            "TRUNCATE": self.truncate, "ROWS": options["num_rows"],
            "DRAFTS": triton.next_power_of_2(drafts) if drafts else 0,
        }  # fmt: skip
        if given[INPUTS.index("ancestors")] is None:
            self.constants["ancestors"] = None

    def tactic(self) -> Tactic:
        spans = (self.blocks, self.rows, 1)
        self._reserve("best_images", self.rows * self.blocks)
        self._reserve("best_tokens", self.rows * self.blocks)
        for name, dtype, size in (
            ("peaks", "*fp32", self.rows * self.blocks),
            ("tables", "*i32", self.rows * self.levels * TABLE.value),
            ("states", "*i32", self.rows * 2 * self.levels * STATE.value),
        ):
            self._reserve(name, size if self.truncate else 0, dtype)
        launches = []
        if self.truncate:
            size = self.levels * TABLE.value
            clear = triton.next_power_of_2(triton.cdiv(size, self.blocks))
            launches.append(self._launch("select", peak_kernel, spans, CLEAR=clear, SIZE=size))
            for mass in (False, True):
                for level in range(self.levels):
                    launches.append(self._launch("select", select_kernel, spans, level=level, MASS=mass, N=self.tile))
        launches.append(self._launch("draw", race_kernel, spans))
        launches.append(self._launch("draw", take_kernel, (self.rows, 1, 1)))
        if self.best:
            launches += self._logprobs()
        name = f"span{self.constants['SPAN']}" + (f" tile{self.tile}" if self.truncate else "")
        return Tactic(name, tuple(launches), self.workspace)

    def _logprobs(self) -> list[Launch]:
        """Spans of their own, of a length that depends on the vocabulary alone: sums of floats depend on it."""
        most = max(1, MOST_CANDIDATES // self.best)
        span = max(triton.next_power_of_2(triton.cdiv(self.vocab, most)), 2048)
        blocks = triton.cdiv(self.vocab, span)
        for name, dtype, size in (
            ("tops", "*fp32", blocks), ("totals", "*fp32", blocks), ("above", "*i32", blocks),
            ("images", "*i32", blocks * self.best), ("ids", "*i32", blocks * self.best),
        ):  # fmt: skip
            self._reserve(name, self.rows * size, dtype)
        sizes = dict(SPAN=span, N=span, BLOCKS=blocks, PADDED=triton.next_power_of_2(blocks), L=self.best,
                     CANDIDATES=triton.next_power_of_2(blocks * self.best))  # fmt: skip
        return [
            self._launch("logprobs", score_kernel, (blocks, self.rows, 1), 8, **sizes),
            self._launch("logprobs", logprobs_kernel, (self.rows, 1, 1), 8, **sizes),
        ]

    def _reserve(self, name: str, size: int, dtype: str = "*i32") -> None:
        """`size` words of the workspace, from a multiple of 16 bytes on."""
        self.operands[name] = (Operand("workspace", self.workspace), dtype)
        self.workspace += triton.cdiv(4 * size, 16) * 16

    def _launch(self, module: str, function: Any, grid: tuple[int, int, int], num_warps: int = 4, **values: Any):
        """A kernel given, by the names of its arguments, the operands, `values`, and the constants of the site."""
        names = [n for n in function.arg_names if n != "PDL"]  # which the compiler passes
        fixed = {n: value for n, value in (self.constants | values).items() if n.isupper() or value is None}
        plain = [n for n in names if n not in fixed]
        constants = tuple((n, fixed[n]) for n in names if n in fixed)
        signature = tuple((n, self.operands[n][1] if n in self.operands else "i32") for n in plain)
        arguments = tuple(self.operands[n][0] if n in self.operands else values[n] for n in plain)
        aligned = ("logits", "counts") if self.vocab % 16 == 0 else ()
        divisible = tuple(n for n in aligned if n in plain and self.operands[n][0].index != 1)
        kernel = Kernel(f"sample.{module}:{function.__name__}", signature, constants, num_warps, divisible=divisible)
        return Launch(kernel, grid, arguments)
