"""The tensorrt target: the graph through TensorRT's parser, with the ops that it does not know as plugins.

Full `tensorrt` builds for the GPU at hand; TensorRT for RTX for any architecture that it knows, and then no GPU is
needed. What TensorRT has a form of its own for is lowered to that (`lowering.py`), so that it fuses around it; the rest
are plugins that launch the cuda target's kernels (`plugin_plan.py`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ....engines.errors import BuildError, EngineError
from ....engines.manifest import HeadInfo, ModelInfo
from ....engines.tensorrt import ENGINE_FILE, FOLDER, LAYERS_FILE, Plugins
from ....engines.weights import load_graph
from ....plugins.gpu import Gpu
from ....plugins.tactic import Device
from ....plugins.tensorrt import api, flavour
from ....plugins.tensorrt.adapter import plugins_of
from ....plugins.tensorrt.log import Log
from .. import NOBODY, Audience, Compile, cubin
from ..buckets import bucket_sizes
from ..cuda import SMS
from ..fusion import fuse, rotary_attentions
from .fp8 import asks_for_fp8, check_fp8, has_fp8
from .layers import layers_of
from .lowering import LOWERINGS, lower
from .onnx_graph import MappedWeights, plugin_proto
from .plan_file import GIB, build, expected_bytes, last_log
from .plugin_plan import distinct, plan_plugins
from .profiles import ranges, share

if TYPE_CHECKING:
    from ... import BuildConfig


@contextmanager
def begin(config: BuildConfig, audience: Audience = NOBODY) -> Iterator[Compile]:
    """Looks for TensorRT first, so that a build that cannot be made ends before the export."""
    device = _device(config)
    plugins = _plugins(config.tensorrt_plugins)
    if asks_for_fp8(config):
        check_fp8(device.capability)  # before an hour of calibration

    def compile(graph: ir.Model, model: ModelInfo, folder: Path, head: HeadInfo | None = None) -> dict[str, Any]:
        """Write plan, plugins and cubins into `folder/tensorrt`; returns what the manifest says about them."""
        return _compile(config, model, folder, device, plugins, audience)

    yield compile


def _compile(
    config: BuildConfig, model: ModelInfo, folder: Path, device: Device, plugins: frozenset[str], audience: Audience
) -> dict[str, Any]:
    out = folder / FOLDER
    out.mkdir()
    saved = load_graph(folder)  # whose weights are places in the file
    weights = MappedWeights(saved, folder)
    need, capability = expected_bytes(weights.num_bytes), device.capability
    mapped = f"{weights.num_bytes / GIB:.1f} GiB of weights"
    audience.note(f"TensorRT will take up to {need / GIB:.1f} GiB of memory, and map {mapped}.")
    fusions = (rotary_attentions,) if "Rope" in plugins else ()
    lowered = ir.Model(fuse(saved.graph, fusions), ir_version=saved.ir_version)
    lower(lowered, plugins)
    if has_fp8(lowered):
        check_fp8(device.capability)

    sizes = distinct(bucket_sizes(
        config.max_num_seqs, min(config.max_num_batched_tokens, model.max_model_len * config.max_num_seqs),
        model.max_model_len,
    ))  # fmt: skip
    planned = plan_plugins(lowered.graph, sizes, device, config.page_size, model.max_model_len, out)
    buckets = planned.plan.buckets
    profiles = share(buckets)
    shapes = [
        ranges(lowered.graph, [buckets[i] for i in group], [planned.page_columns[i] for i in group], config.page_size)
        for group in profiles
    ]
    log = Log()
    ops = sorted({node.op for node in planned.nodes.values()})
    try:
        with plugins_of(ops, {name: each.workspace for name, each in planned.kernels.items()}, None):
            build(lowered, plugin_proto(lowered, planned.nodes), weights, shapes, capability, out / ENGINE_FILE, log,
                  audience.progress)  # fmt: skip
    finally:
        log.save(last_log())

    planned.plan.save(out)
    module, version = flavour.about()
    Plugins(module, version, capability, profiles, planned.page_columns, planned.kernels).save(out)
    layers = layers_of(text for _, text in log.lines)
    (out / LAYERS_FILE).write_text(json.dumps(layers, indent=0) + "\n", encoding="utf-8")
    plan = planned.plan
    return {
        "module": module, "version": version, "capability": capability,
        "plan_bytes": (out / ENGINE_FILE).stat().st_size, "profiles": len(profiles), "buckets": len(buckets),
        "layers": sum(layer["profile"] == 0 for layer in layers),
        "plugins": dict(Counter(node.op for node in planned.nodes.values())), "max_num_seqs": plan.max_num_seqs,
        "max_num_batched_tokens": plan.max_num_batched_tokens, "page_size": plan.page_size, "cubins": len(plan.cubins),
        "tensorrt_plugins": config.tensorrt_plugins,
    }  # fmt: skip


def _device(config: BuildConfig) -> Device:
    """What to build for. Raises BuildError: no TensorRT, an architecture that it does not build for, no GPU where it
    needs one."""
    try:
        api.module()
    except EngineError as error:
        raise BuildError(str(error)) from None
    name, version = flavour.about()
    known = sorted(set(flavour.capabilities()) & set(cubin.CAPABILITIES))
    gpu, why = _gpu()
    if not flavour.chooses_capability():
        if gpu is None:
            raise BuildError(
                f"{name} {version} builds for the GPU at hand alone, and {why}; build where the engine is to run, or "
                "install TensorRT for RTX, which needs no GPU."
            )
        have = gpu.device.capability
        if config.gpu_arch not in (None, have):
            raise BuildError(
                f"{name} {version} builds for the GPU at hand, a {gpu.name} of {have}, and not for {config.gpu_arch}; "
                "leave --gpu-arch out, or build where such a GPU is."
            )
        return gpu.device
    capability = config.gpu_arch or (gpu.device.capability if gpu else None)
    if capability is None:
        raise BuildError(f"there is no GPU to build for ({why}); pass one of {_list(known)} as --gpu-arch.")
    if capability not in known:
        raise BuildError(
            f"{name} {version} builds for {_list(known)}, not for {capability}; pass one of them as --gpu-arch, or for "
            "another GPU install full TensorRT (`pip install tensorrt`)."
        )
    return Device(capability, SMS[capability])


def _gpu() -> tuple[Gpu | None, str]:
    try:
        return Gpu(), ""
    except EngineError as error:
        return None, str(error).rstrip(".")


def _plugins(asked: str) -> frozenset[str]:
    """Ops that stay plugins, from a list with commas. Raises BuildError: one that is never anything else."""
    ops = frozenset(filter(None, asked.replace(" ", "").split(",")))
    if unknown := sorted(ops - LOWERINGS.keys()):
        raise BuildError(f"--tensorrt-plugins names {', '.join(unknown)}, expected some of {', '.join(LOWERINGS)}.")
    return ops


def _list(capabilities: list[int]) -> str:
    return ", ".join(map(str, capabilities))
