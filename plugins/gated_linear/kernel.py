"""GatedLinear on the GPU: in one launch by Linear's kernels, which end in the activation, or in two.

The one launch reads as much and writes a quarter; the two may use what only Linear has, cuBLASLt above all. Where there
are many rows they take turns over blocks of rows, so that what is between them stays in the L2 cache.
"""

from dataclasses import replace

from ..gated_activation.activate import ACTIVATIONS
from ..gated_activation.kernel import tactics as activations
from ..linear.kernel import own
from ..linear.kernel import tactics as products
from ..tactic import Launch, Operand, Site, Tactic, Tensor

OWN_PRODUCTS = 2  # of Linear's own kernels that are also tried in two launches
BLOCKS = (512, 1024)  # rows
BLOCK_ALGORITHMS = 2


def tactics(site: Site) -> list[Tactic]:
    """One launch first; [] for an activation that it does not know."""
    x, weight = site.inputs[:2]
    assert x is not None and weight is not None
    if site.attributes["activation"] not in ACTIVATIONS:
        return []
    between = Tensor((x.shape[0], weight.shape[0]), x.dtype)
    product = Site("Linear", {}, site.inputs, (between,), site.device, site.max_query)
    activation = Site("GatedActivation", site.attributes, (between,), site.outputs, site.device, site.max_query)
    (second,) = activations(activation)
    fused = own(site, site.attributes["activation"])
    mine = [tactic.name for tactic in own(product)][OWN_PRODUCTS:]
    apart = [both(each, second, between) for each in products(product) if each.name not in mine]
    return fused + apart + [tactic for rows in BLOCKS for tactic in _in_blocks(site, rows)]


def _in_blocks(site: Site, rows: int) -> list[Tactic]:
    """Two launches for each block of `rows` rows, by the likeliest algorithms of cuBLASLt."""
    x, y = site.inputs[0], site.outputs[0]
    assert x is not None
    if x.shape[0] <= rows or x.shape[0] % rows or not site.device.cublas:
        return []
    some_x, some_y = (replace(each, shape=(rows, each.shape[1])) for each in (x, y))
    block = replace(site, inputs=(some_x, *site.inputs[1:]), outputs=(some_y,))
    found = [tactic for tactic in tactics(block) if tactic.name.startswith("cublas")][:BLOCK_ALGORITHMS]
    times = x.shape[0] // rows
    return [_repeated(tactic, times, some_x.num_bytes, some_y.num_bytes, rows) for tactic in found]


def _repeated(tactic: Tactic, times: int, x_bytes: int, y_bytes: int, rows: int) -> Tactic:
    """The launches `times` over, each on the next block of x and y."""

    def moved(launch: Launch, i: int) -> Launch:
        step = {"input": x_bytes, "output": y_bytes}
        arguments = [
            replace(a, offset=i * step[a.kind]) if isinstance(a, Operand) and a.kind in step and a.index == 0 else a
            for a in launch.arguments
        ]
        return replace(launch, arguments=tuple(arguments))

    launches = tuple(moved(launch, i) for i in range(times) for launch in tactic.launches)
    return replace(tactic, name=f"{tactic.name}, by {rows} rows", launches=launches)


def both(first: Tactic, second: Tactic, between: Tensor) -> Tactic:
    """One op's tactic into the workspace, its own workspace behind that, then another op's of it, which needs none."""
    size = -(-between.num_bytes // 256) * 256

    def moved(launch: Launch, kind: str) -> Launch:
        """What the launch had as `kind` is at the start of the workspace."""
        arguments = [
            Operand("workspace", 0) if isinstance(a, Operand) and a.kind == kind and a.index == 0
            else Operand("workspace", size + a.index) if isinstance(a, Operand) and a.kind == "workspace"
            else a
            for a in launch.arguments
        ]  # fmt: skip
        return replace(launch, arguments=tuple(arguments))

    launches = [moved(each, "output") for each in first.launches] + [moved(each, "input") for each in second.launches]
    return Tactic(f"{first.name}, then {second.name}", tuple(launches), size + first.workspace, first.zeros)
