"""The cuda target: a plan of launches per bucket, its kernels compiled to cubins for one compute capability.

With a GPU of that capability at hand the tactics of each site are timed on it; without one the likeliest is taken, by
what was measured on another machine, and the manifest says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ...calibration.recipe import Recipe
from ...engines.errors import BuildError, EngineError
from ...engines.manifest import HeadInfo, ModelInfo
from ...engines.plan import FOLDER, Cubin, Gemm, Plan
from ...engines.step import MOST_NODES
from ...plugins import cublas
from ...plugins.gpu import Gpu
from ...plugins.tactic import Device
from . import NOBODY, Audience, Compile, cubin
from .buckets import bucket_sizes
from .fusion import FUSIONS, VERIFYING, fuse
from .head_planner import HeadPlanner, check_guesses
from .planner import Planner, key_of
from .table import default_table
from .tactics import Choice, candidates, likeliest, timed
from .timing_cache import TimingCache

if TYPE_CHECKING:
    from .. import BuildConfig

LISTED = ("GatedQuantisedLinear", "QuantiseTokens", "QuantisedGatedActivation", "QuantisedLinear", "QuantisedRMSNorm")
SMS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 188}  # multiprocessors of the best-known GPU of each kind


HARDWARE_FP8 = 89  # compute capability from which GPUs multiply FP8


@contextmanager
def begin(config: BuildConfig, audience: Audience = NOBODY) -> Iterator[Compile]:
    """Looks for a GPU first, so that a build that cannot be made ends before the export."""
    if not 0 <= config.max_draft_tokens <= MOST_NODES:
        raise BuildError(
            f"max_draft_tokens is {config.max_draft_tokens}, expected 0 (no speculation) to {MOST_NODES}; ask for "
            "fewer."
        )
    gpu, device, how = _device(config)
    if config.quant:
        rules = Recipe.open(config.quant).rules
        check_fp8(any(r.activation and r.activation.dtype == "fp8_e4m3" for r in rules), device.capability)
    cache = TimingCache.of(gpu) if gpu else None

    def compile(graph: ir.Model, model: ModelInfo, folder: Path, head: HeadInfo | None = None) -> dict[str, Any]:
        """Write plan and cubins into `folder/cuda`; returns what the manifest says about them."""
        plan = make_plan(graph.graph, model.max_model_len, folder / FOLDER, device, config, gpu, cache, head)
        for entry in plan.tactics:
            if note := entry.get("note"):
                audience.note(f"{entry['op']} -> {entry['outputs'][0][0]}: {note}")
        ordered = "" if gpu else _not_in_table(plan, device)
        cached = f"; {cache.num_hits} of {cache.num_sites} sites from the timing cache" if cache else ""
        return {
            "capability": device.capability, "gpu": gpu.name if gpu else None, "tactics": how + ordered + cached,
            "max_num_seqs": plan.max_num_seqs, "max_num_batched_tokens": plan.max_num_batched_tokens,
            "max_draft_tokens": plan.max_draft_tokens, "page_size": plan.page_size, "buckets": len(plan.buckets),
            "cubins": len(plan.cubins),
        }  # fmt: skip

    yield compile


def make_plan(
    graph: ir.Graph, max_model_len: int, folder: Path, device: Device, config: BuildConfig, gpu: Gpu | None,
    cache: TimingCache | None = None, head: HeadInfo | None = None,
) -> Plan:  # fmt: skip
    """Compile `graph` into `folder` and return the plan saved there. Raises BuildError for what nothing can run."""
    choices: dict[Any, Choice] = {}
    if head:
        check_guesses(graph, head)
    fused = fuse(graph, VERIFYING if config.max_draft_tokens else FUSIONS)
    check_fp8(any(_multiplies_fp8(node) for node in fused), device.capability)
    kind = partial(HeadPlanner, head=head) if head else Planner
    planner = kind(
        fused, device, config.page_size, -(-max_model_len // config.page_size), config.max_num_seqs,
        lambda site: choices[key_of(site)].tactic, max_draft_tokens=config.max_draft_tokens,
    )  # fmt: skip
    sizes = bucket_sizes(
        config.max_num_seqs, min(config.max_num_batched_tokens, max_model_len * config.max_num_seqs), max_model_len,
        config.max_draft_tokens,
    )  # fmt: skip
    found = candidates(planner, sizes)
    choices |= timed(found, gpu, cache) if gpu else likeliest(found, device, default_table(device.capability))
    buckets = tuple(planner.plan(each) for each in sizes)

    compiled = {kernel: cubin for choice in choices.values() for kernel, cubin in choice.cubins.items()}
    (folder / "cubins").mkdir(parents=True)
    cubins: list[Cubin | Gemm] = []
    for kernel in planner.kernels:  # in the order of their numbers
        binary = compiled[kernel]
        if isinstance(binary, Gemm):
            cubins.append(binary)
            continue
        file = f"cubins/{hashlib.sha256(binary.data).hexdigest()[:24]}.cubin"
        (folder / file).write_bytes(binary.data)
        cubins.append(Cubin(file, binary.name, binary.shared, binary.num_warps, binary.pdl))
    plan = Plan(
        device.capability, planner.vocab_size, config.page_size, planner.max_pages, planner.logits_dtype,
        planner.nodes, tuple(cubins), buckets, tuple(choices[key].describe() for key in planner.planned),
        planner.zeros,
    )  # fmt: skip
    plan.save(folder)
    return plan


def check_fp8(multiplied: bool, capability: int) -> None:
    """Raises BuildError for products of FP8 activations where no GPU of the capability multiplies them."""
    if multiplied and capability < HARDWARE_FP8:
        raise BuildError(
            f"the recipe quantises activations to FP8, and GPUs multiply FP8 from compute capability "
            f"{HARDWARE_FP8 / 10} on, but this build is for {capability / 10}; take a recipe that leaves activations "
            "as they are (w8a16-fp8, int4-..) or quantises them to INT8."
        )


def _multiplies_fp8(node: ir.Node) -> bool:
    x = node.inputs[0] if node.inputs and "QuantisedLinear" in node.op_type else None
    return x is not None and x.dtype == ir.DataType.FLOAT8E4M3FN


def _not_in_table(plan: Plan, device: Device) -> str:
    """Names the ops with several tactics of which the default table says nothing."""
    known = {each.site.op for each in default_table(device.capability).measured}
    ops = sorted({entry["op"] for entry in plan.tactics if entry["op"] in LISTED} - known)
    return f"; {', '.join(ops)}: not in the table, the first that the op lists for its sizes" if ops else ""


def _device(config: BuildConfig) -> tuple[Gpu | None, Device, str]:
    """The GPU to time on (None: no timing), what to compile for, and how tactics are chosen, in words."""
    asked = config.gpu_arch
    if asked is not None and asked not in cubin.CAPABILITIES:
        known = ", ".join(map(str, cubin.CAPABILITIES))
        raise BuildError(f"the GPU architecture is {asked}, expected one of {known}; pass one as --gpu-arch.")
    try:
        gpu = Gpu()
        missing = cublas.why_missing()
        device = replace(gpu.device, cublas=not missing)
    except EngineError as error:
        capability = asked or 90
        return None, Device(capability, SMS[capability]), _untimed(str(error).rstrip("."), capability)
    if asked is not None and asked != gpu.device.capability:
        return None, Device(asked, SMS[asked]), _untimed(f"the GPU here is a {gpu.name}", asked)
    if not config.tune:
        return None, device, _untimed("--no-tune", device.capability)
    return gpu, device, f"timed on {gpu.name}" + (f", without cuBLASLt: {missing}" if missing else "")


def _untimed(why: str, capability: int) -> str:
    return f"not timed: {why}; {default_table(capability).describe()}"
