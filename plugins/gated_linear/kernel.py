"""GatedLinear on the GPU: in one launch by Linear's kernels, which end in the activation, or in two.

The one launch reads as much and writes a quarter; the two may use what only Linear has, cuBLASLt above all.
"""

from dataclasses import replace

from ..gated_activation.activate import ACTIVATIONS
from ..gated_activation.kernel import tactics as activations
from ..linear.kernel import own
from ..linear.kernel import tactics as products
from ..tactic import Launch, Operand, Site, Tactic, Tensor

OWN_PRODUCTS = 2  # of Linear's own kernels that are also tried in two launches


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
    return fused + [_both(each, second, between) for each in products(product) if each.name not in mine]


def _both(first: Tactic, second: Tactic, between: Tensor) -> Tactic:
    """The product into the workspace, its own workspace behind that, then the activation."""
    rows, width = between.shape
    size = -(-rows * width * (4 if between.dtype == "float32" else 2) // 256) * 256

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
    return Tactic(f"{first.name}, then {second.name}", tuple(launches), size + first.workspace)
