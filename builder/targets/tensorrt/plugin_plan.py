"""How plugins are launched: tactics and cubins of every op that TensorRT has no form for, by the shapes of a step.

The kernels, their tactics and their order are the cuda target's; what is planned is less: the nodes that stay ingot's
own, and what lies around the graph (spreading the packed step, sampling). A plugin sees nothing of a step but the
shapes of its inputs, so those must tell which bucket it is: `distinct` sees to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ....engines.dtypes import DTYPES
from ....engines.plan import Bucket, Cubin, Launch, Plan
from ....engines.tensorrt import PluginKernels, PluginNode, shape_key
from ....plugins import OPS
from ....plugins.opschema import complete_attributes
from ....plugins.tactic import Device, Gemm, Operand, Tensor
from ...passes.graph import INGOT, attributes
from ..buckets import Sizes
from ..cubin import Cubin as Compiled
from ..planner import SAMPLING, STAGING, Planner, Work, key_of
from ..table import default_table
from ..tactics import Candidates, Choice, candidates, likeliest

STEP = 16  # tokens
ALIGNMENT = 256  # bytes
POOL_RANK = 4  # dimensions of a KV pool, and of nothing else


@dataclass
class PluginPlanner(Planner):
    """A planner of what is not TensorRT's. Buckets for short contexts have a page table of their own width."""

    def page_columns(self, sizes: Sizes) -> int:
        return min(self.max_pages, -(-sizes.max_context // self.page_size) or self.max_pages)


@dataclass(frozen=True)
class PluginPlan:
    """plan: staging and sampling of each bucket, and all cubins; its logits are the arena. kernels: of plugins, by
    name. nodes: what each node of domain ingot becomes. page_columns: of each bucket's page table."""

    plan: Plan
    kernels: dict[str, PluginKernels]
    nodes: dict[ir.Node, PluginNode]
    page_columns: tuple[int, ...]


def distinct(sizes: Sequence[Sizes]) -> list[Sizes]:
    """The same buckets, but none for any step with as many tokens as sequences: that is what one for decoding has."""
    return [
        replace(each, tokens=each.tokens + STEP) if each.max_query != 1 and each.tokens == each.sequences else each
        for each in sizes
    ]


def plan_plugins(
    graph: ir.Graph, sizes: Sequence[Sizes], device: Device, page_size: int, max_model_len: int, folder: Path
) -> PluginPlan:
    """Chooses and compiles what runs the nodes of domain ingot; cubins go to `folder`.

    Raises BuildError: nothing can run one of them.
    """
    choices: dict[Hashable, Choice] = {}
    planner = PluginPlanner(
        graph, device, page_size, -(-max_model_len // page_size), max(each.sequences for each in sizes),
        lambda site: choices[key_of(site)].tactic, runs=lambda node: node.domain == INGOT,
    )  # fmt: skip
    choices |= likeliest(_own(candidates(planner, sizes)), device, default_table(device.capability))

    nodes = list(graph)
    sites: dict[ir.Node, list[tuple[str, Work]]] = {}  # (key of the shapes, site) of each node in every bucket
    buckets = []
    for bucket in sizes:
        parts: dict[str, tuple[Launch, ...]] = {}
        arena = 0
        for work in planner.sites(bucket):
            if work.node in (STAGING, SAMPLING):
                parts[work.part] = _launches(planner, work, choices)
                if work.node == SAMPLING:
                    workspace = choices[key_of(work.site)].tactic.workspace
                    arena = max(arena, _logits_bytes(work.site.inputs[0]) + workspace)
            else:
                sites.setdefault(nodes[work.node], []).append((_shapes_of(work), _renamed(work)))
        buckets.append(
            Bucket(bucket.tokens, bucket.sequences, bucket.rows, bucket.max_query, bucket.max_context, arena, 0, parts)
        )  # fmt: skip
    kernels, plugin_nodes = _kernels(planner, sites, choices)
    compiled = {kernel: cubin for choice in choices.values() for kernel, cubin in choice.cubins.items()}
    plan = Plan(
        device.capability, planner.vocab_size, page_size, planner.max_pages, planner.logits_dtype, planner.nodes,
        tuple(_write(compiled[kernel], folder) for kernel in planner.kernels), tuple(buckets),
        tuple(choices[key].describe() for key in planner.planned), planner.zeros,
    )  # fmt: skip
    return PluginPlan(plan, kernels, plugin_nodes, tuple(planner.page_columns(each) for each in sizes))


def _own(found: Mapping[Hashable, Candidates]) -> dict[Hashable, Candidates]:
    """Without products of cuBLASLt, which a plugin cannot launch."""
    return {
        key: replace(each, tactics=[
            tactic for tactic in each.tactics if not any(isinstance(x.kernel, Gemm) for x in tactic.launches)
        ])
        for key, each in found.items()
    }  # fmt: skip


def _kernels(
    planner: PluginPlanner, sites: Mapping[ir.Node, list[tuple[str, Work]]], choices: Mapping[Hashable, Choice]
) -> tuple[dict[str, PluginKernels], dict[ir.Node, PluginNode]]:
    """Launches of nodes by name; layers that are alike share one."""
    names: dict[Hashable, str] = {}
    kernels: dict[str, PluginKernels] = {}
    found: dict[ir.Node, PluginNode] = {}
    for node, works in sites.items():
        alike = tuple(key_of(work.site) for _, work in works)
        if alike not in names:
            names[alike] = name = f"{node.op_type}.{len(names)}"
            launches: dict[str, tuple[Launch, ...]] = {}
            by_shapes: dict[str, Hashable] = {}
            for shapes, work in works:
                key = by_shapes.setdefault(shapes, key_of(work.site))
                assert key == key_of(work.site), f"{name}: two buckets have the shapes {shapes}"
                if shapes not in launches:
                    launches[shapes] = _launches(planner, work, choices)
            workspace = max(choices[key].tactic.workspace for key in alike)
            kernels[name] = PluginKernels(node.op_type, workspace, launches)
        found[node] = _plugin_node(node, names[alike])
    return kernels, found


def _plugin_node(node: ir.Node, kernels: str) -> PluginNode:
    schema = OPS[node.op_type].schema
    there = tuple(i for i, value in enumerate(node.inputs) if value is not None)
    pools = tuple(place for place, i in enumerate(there) if schema.inputs[i].name in ("k_pages", "v_pages"))
    given = complete_attributes(node, schema, attributes(node))
    types = tuple(int(value.dtype) for value in node.inputs if value is not None and value.dtype is not None)
    return PluginNode(node.op_type, given, there, types, pools, len(node.outputs), kernels)


def _launches(planner: PluginPlanner, work: Work, choices: Mapping[Hashable, Choice]) -> tuple[Launch, ...]:
    """The launches of a site; the arena of sampling is the logits, that of a plugin its workspace."""
    key = key_of(work.site)
    tactic = choices[key].tactic
    workspace = _logits_bytes(work.site.inputs[0]) if work.node == SAMPLING else 0
    number = planner.planned.setdefault(key, len(planner.planned))
    planner.zeros = max(planner.zeros, tactic.zeros)
    launches = []
    for launch in tactic.launches:
        cubin = planner.kernels.setdefault(launch.kernel, len(planner.kernels))
        arguments = tuple(
            planner.argument(work, a, {planner.logits: 0}, workspace) if isinstance(a, Operand) else a
            for a in launch.arguments
        )
        launches.append(Launch(cubin, work.node, number, launch.grid, arguments))
    return tuple(launches)


def _shapes_of(work: Work) -> str:
    """What a plugin sees of the bucket."""
    return shape_key(each.shape for each in work.site.inputs if each is not None and len(each.shape) != POOL_RANK)


def _renamed(work: Work) -> Work:
    """Its operands by their places, for every layer has its own."""
    inputs = tuple(None if value is None else f"in.{i}" for i, value in enumerate(work.inputs))
    return replace(work, inputs=inputs, outputs=tuple(f"out.{i}" for i in range(len(work.outputs))))


def _logits_bytes(logits: Tensor | None) -> int:
    """Where the workspace of sampling begins, behind the logits."""
    assert logits is not None
    return -(-prod(logits.shape) * DTYPES[logits.dtype].itemsize // ALIGNMENT) * ALIGNMENT


def _write(binary: Any, folder: Path) -> Cubin:
    """The cubin in a file of its own."""
    assert isinstance(binary, Compiled)
    file = f"cubins/{hashlib.sha256(binary.data).hexdigest()[:24]}.cubin"
    (folder / "cubins").mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(binary.data)
    return Cubin(file, binary.name, binary.shared, binary.num_warps, binary.pdl)
