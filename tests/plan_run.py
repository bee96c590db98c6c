"""Runs a plan without its cubins: launches go through Triton (interpreted without a GPU), over an arena of bytes."""

import math

import torch
from ingot.engines import step
from ingot.engines.dtypes import DTYPES
from ingot.engines.plan import ZEROS, Argument
from ingot.plugins import jit


class PlanRun:
    """A bucket of `plan` over weights and graph inputs by name; `kernels` are the plan's, in order."""

    def __init__(self, plan, kernels, bucket, inputs):
        self.plan, self.kernels, self.bucket = plan, list(kernels), bucket
        self.inputs = inputs | {ZEROS: torch.zeros(max(plan.zeros, 16), dtype=torch.uint8)}
        self.arena = torch.full((bucket.arena + 16,), 0xFF, dtype=torch.uint8)  # NaN in any float

    def __call__(self, parts=("body", "head")):
        for part in parts:
            for launch in self.bucket.parts[part]:
                kernel = self.kernels[launch.cubin]
                types = [kind for _, kind in kernel.signature]
                arguments = [self._value(a, kind) for a, kind in zip(launch.arguments, types, strict=True)]
                jit.launch_kernel(kernel, launch.grid, arguments)

    def logits(self, vocab):
        dtype = DTYPES[self.plan.logits].torch
        size = self.bucket.rows * vocab * dtype.itemsize
        return self.arena[self.bucket.logits :][:size].view(dtype).view(self.bucket.rows, vocab)

    def _value(self, argument, kind):
        if not isinstance(argument, Argument):
            return argument
        element = jit.ELEMENTS[kind]
        if argument.kind != "arena" and argument.name != ZEROS:
            return self.inputs[argument.name]
        rest = (self.arena if argument.kind == "arena" else self.inputs[ZEROS])[argument.offset :]
        return rest[: rest.numel() // element.itemsize * element.itemsize].view(element)


def padded(tensors, bucket, width):
    """Step tensors padded to the bucket as the runtime pads them: slot 0, no tokens, no keys."""
    num_tokens = len(tensors["tokens"])
    sizes = {"tokens": bucket.tokens, "positions": bucket.tokens, "slots": bucket.tokens,
             "query_start": bucket.sequences + 1, "kv_len": bucket.sequences, "logit_rows": bucket.rows}  # fmt: skip
    out = {}
    for name, size in sizes.items():
        given = tensors[name]
        out[name] = torch.full((size,), num_tokens if name == "query_start" else 0, dtype=torch.int32)
        out[name][: len(given)] = given
    pages = tensors["pages"]
    out["pages"] = torch.full((bucket.sequences, width), 2**30, dtype=torch.int32)
    out["pages"][: pages.shape[0], : pages.shape[1]] = pages
    assert all(math.isfinite(t.float().sum()) for t in out.values())
    return out


def step_inputs(spans, prompts, pages, page_size):
    """A step over `spans` of (sequence, start, end); the last token of each wants logits."""
    positions = torch.cat([torch.arange(start, end) for _, start, end in spans])
    owner = torch.cat([torch.full((end - start,), s) for s, start, end in spans])
    starts = torch.tensor([0, *(end - start for _, start, end in spans)]).cumsum(0)
    return {
        step.TOKENS: torch.cat([prompts[s][start:end] for s, start, end in spans]),
        step.POSITIONS: positions,
        step.SLOTS: pages[owner, positions // page_size] * page_size + positions % page_size,
        step.QUERY_START: starts,
        step.KV_LEN: torch.tensor([end for _, _, end in spans]),
        step.PAGES: pages,
        step.LOGIT_ROWS: starts[1:] - 1,
    }
