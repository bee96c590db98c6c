"""What requests ask of sampling, in tables on the GPU: a row is written when a request takes it, and then only read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...engines.errors import RequestError
from ...engines.sampling import (
    IN_PROMPT,
    KINDS,
    MASKS,
    MAX_BIAS,
    MAX_LOGPROBS,
    MAX_STOP,
    TABLES,
    VOCABULARY,
    Kind,
    width,
)
from ...plugins.gpu import Gpu
from ..placement import Placement, needs_history
from ..request import SamplingParams

FIELDS = tuple(Kind.__dataclass_fields__)
CHEAPEST = tuple(  # name of the cheapest kind that serves a set of needs, by their bits
    next(name for name, kind in KINDS.items() if kind.serves(Kind(*(bool(bits >> i & 1) for i in range(len(FIELDS))))))
    for bits in range(1 << len(FIELDS))
)


class SamplingTables:
    """The tables of `engines/sampling.py` on `gpu`, and the kind of sampling that each row needs.

    A table is allocated when a request first needs it; the mirrors on the host know what is in all rows of it by then.
    max_drafts: of a row that a step may verify, each with a mask of its own.
    """

    def __init__(self, gpu: Gpu, num_rows: int, vocab_size: int, stream: int, max_drafts: int = 0):
        self._gpu, self._num_rows, self._vocab_size, self._stream = gpu, num_rows, vocab_size, stream
        self._max_drafts = max_drafts
        self._masked = [0] * num_rows  # masks of a row that may forbid something
        self._needs = np.zeros(num_rows, np.int64)  # what each row asks of sampling, a bit for each field of `Kind`
        self._num_logprobs: list[int | None] = [None] * num_rows
        self.addresses: dict[str, int] = {}
        self._mirrors = {
            name: np.zeros((self._rows(name), max(1, width(name, vocab_size))), dtype)
            for name, (dtype, columns) in TABLES.items()
            if columns != VOCABULARY
        }
        self._mirrors["top_p"][:] = 1
        self._mirrors["penalties"][:, 0] = 1
        self._mirrors["bias_ids"][:] = self._mirrors["stop_ids"][:] = -1
        self._mirrors[MASKS][:] = -1  # every token may be

    def bytes_of(self, kind: Kind) -> int:
        """Bytes of the tables that `kind` needs and that are not there yet."""
        return sum(self._size(name) for name in kind.tables - self.addresses.keys())

    def reserve(self, kind: Kind) -> None:
        """Allocates the tables of `kind`, with what rows placed before have in them."""
        for name in kind.tables - self.addresses.keys():
            size = self._size(name)
            self.addresses[name] = self._gpu.allocate(size, f"the table {name} of sampling")
            if name in self._mirrors:
                self._gpu.upload(self.addresses[name], self._mirrors[name], self._stream)
            else:  # counts: of no row placed before
                self._gpu.fill(self.addresses[name], size, 0, self._stream)

    def kind_of(self, rows: np.ndarray) -> str:
        """Name of the cheapest kind that serves all of these rows."""
        return CHEAPEST[int(np.bitwise_or.reduce(self._needs[rows], initial=0))]

    def num_logprobs(self, row: int) -> int | None:
        """How many were asked for; None: none."""
        return self._num_logprobs[row]

    def place(self, placement: Placement) -> None:
        """A row gets a new request, or one that comes back after preemption."""
        row, params = placement.row, placement.params
        random = params.temperature > 0
        truncate = random and (0 < params.top_k < self._vocab_size or params.top_p < 1 or params.min_p > 0)
        masked = bool(params.min_tokens and placement.stop_ids)
        bound = params.structured_outputs is not None
        extras = needs_history(params) or bool(params.logit_bias) or masked or bound
        kind = Kind(random, truncate, extras, params.logprobs is not None)
        self._needs[row] = sum(getattr(kind, name) << bit for bit, name in enumerate(FIELDS))
        self._num_logprobs[row] = params.logprobs
        # a step takes the kind that serves all of its rows, so a row is written for any kind there has been
        self.reserve(next(each for each in KINDS.values() if each.serves(kind)))
        bias = params.logit_bias or {}
        values: Mapping[str, np.ndarray | list | float | int] = {
            "temperature": max(params.temperature, 1e-30) if random else 0.0,
            "top_k": params.top_k if random and params.top_k < self._vocab_size else 0,
            "top_p": params.top_p if random else 1.0,
            "min_p": params.min_p if random else 0.0,
            "seed": (placement.seed + 2**63) % 2**64 - 2**63,
            "penalties": [params.repetition_penalty, params.presence_penalty, params.frequency_penalty],
            "bias_ids": _padded(list(bias.keys()), MAX_BIAS),
            "bias_values": _padded(list(bias.values()), MAX_BIAS),
            "stop_ids": _padded(sorted(placement.stop_ids) if masked else [], MAX_STOP),
            "min_length": placement.num_prompt + params.min_tokens if masked else 0,
        }
        for name, value in values.items():
            self._mirrors[name][row] = value
            if name in self.addresses:
                self._write(name, row, self._mirrors[name][row])
        for depth in range(self._masked[row]):
            self._mask(row, depth, -1)
        self._masked[row] = 0
        if "counts" in self.addresses and needs_history(params):
            self._write("counts", row, self._count(placement))

    def mask(self, row: int, depth: int, bits: np.ndarray) -> None:
        """The tokens that this row may sample in the next step after `depth` drafts; bits [ceil(vocabulary / 32)]
        int32."""
        self._masked[row] = max(self._masked[row], 1 + depth)
        self._mask(row, depth, bits)

    def _mask(self, row: int, depth: int, bits: np.ndarray | int) -> None:
        place = depth * self._num_rows + row
        self._mirrors[MASKS][place] = bits
        if MASKS in self.addresses:
            self._write(MASKS, place, self._mirrors[MASKS][place])

    def _count(self, placement: Placement) -> np.ndarray:
        prompt, output = placement.tokens[: placement.num_prompt], placement.tokens[placement.num_prompt :]
        counts = np.bincount(np.array(output, np.int64), minlength=self._vocab_size).astype(np.int32)
        counts[np.array(prompt, np.int64)] |= IN_PROMPT
        return counts

    def _write(self, name: str, row: int, values: np.ndarray) -> None:
        self._gpu.upload(self.addresses[name] + row * values.nbytes, values, self._stream)

    def _size(self, name: str) -> int:
        columns = max(1, width(name, self._vocab_size))
        return self._rows(name) * columns * np.dtype(TABLES[name][0]).itemsize

    def _rows(self, name: str) -> int:
        return self._num_rows * (1 + self._max_drafts if name == MASKS else 1)


def check_params(params: SamplingParams, num_stop_ids: int) -> None:
    """Raises RequestError for what does not fit into a row of the tables.

    num_stop_ids: tokens that may end the request, the model's own included; they are masked for `min_tokens`.
    """
    for name, number, most in (
        ("logit_bias", len(params.logit_bias or ()), MAX_BIAS),
        ("stop_token_ids with min_tokens", num_stop_ids if params.min_tokens else 0, MAX_STOP),
        ("logprobs", params.logprobs or 0, MAX_LOGPROBS),
    ):
        if number > most:
            raise RequestError(f"{name} asks for {number} tokens; on a GPU a request may have at most {most} of them.")


def _padded(values: list, size: int) -> np.ndarray:
    return np.array([*values, *[-1] * (size - len(values))])
