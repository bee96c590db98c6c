"""What a plugin runs: the launches of its node on a stream that TensorRT gives, with pointers that TensorRT gives.

Everything is loaded and allocated before (`prepare`): a launch allocates nothing and waits for nothing, so it can be
captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...engines.errors import EngineError
from ...engines.plan import ZEROS, Argument, Cubin, Plan
from ...engines.tensorrt import PluginNode, Plugins, shape_key
from ..gpu import Address, Gpu, Launchable


class Launcher:
    """The kernels of an engine's plugins on `gpu`. folder: the target's, with the cubins."""

    def __init__(self, gpu: Gpu, folder: Path, plan: Plan, plugins: Plugins):
        self._plugins, self._functions = plugins, _load(gpu, folder, plan, plugins)
        self._zeros = gpu.allocate(plan.zeros, "the counters of plugins")
        stream = gpu.stream()
        gpu.fill(self._zeros, max(1, plan.zeros), 0, stream)
        gpu.synchronise(stream)

    def launch(
        self, node: PluginNode, shapes: Sequence[Sequence[int]], inputs: Sequence[int], outputs: Sequence[int],
        workspace: int, stream: int,
    ) -> None:  # fmt: skip
        """Enqueues the node. shapes and inputs: of the inputs that are there, in order; all pointers are addresses.

        Raises EngineError: the shapes are of no bucket that the engine was built with.
        """
        kernels = self._plugins.kernels[node.kernels]
        key = shape_key(shape for i, shape in enumerate(shapes) if i not in node.pools)
        launches = kernels.launches.get(key)
        if launches is None:
            raise EngineError(
                f"{node.op} was asked to run on the shapes {key}, expected one of {', '.join(kernels.launches)}; build "
                "the engine again for steps of that size."
            )
        addresses = {f"in.{place}": address for place, address in zip(node.inputs, inputs, strict=True)}
        addresses |= {f"out.{i}": address for i, address in enumerate(outputs)}
        addresses[ZEROS] = self._zeros
        for i, launch in enumerate(launches):
            arguments = [_resolve(a, addresses, workspace) if isinstance(a, Argument) else a for a in launch.arguments]
            # the first waits for whatever TensorRT has enqueued before it
            self._functions[launch.cubin].launch(launch.grid, stream, arguments, apart=i == 0)


def _load(gpu: Gpu, folder: Path, plan: Plan, plugins: Plugins) -> dict[int, Launchable]:
    """Every kernel that a plugin launches: loading cannot be captured."""
    parts = (part for kernels in plugins.kernels.values() for part in kernels.launches.values())
    functions: dict[int, Launchable] = {}
    for number in sorted({launch.cubin for part in parts for launch in part}):
        binary = plan.cubins[number]
        assert isinstance(binary, Cubin), "plugins have no products of cuBLASLt"
        functions[number] = gpu.load((folder / binary.file).read_bytes(), binary.symbol, binary.num_warps,
                                     binary.shared, binary.pdl)  # fmt: skip
    return functions


def _resolve(argument: Argument, addresses: Mapping[str, int], workspace: int) -> Address:
    start = workspace if argument.kind == "arena" else addresses[argument.name]
    return Address(start + argument.offset)
