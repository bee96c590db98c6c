"""GatedQuantisedLinear on the GPU: QuantisedLinear's kernels, which may end in the activation, and what is left of
activation and quantisation in a launch behind them."""

from dataclasses import replace

from ...engines.dtypes import DTYPES
from ..gated_activation.activate import ACTIVATIONS
from ..gated_activation.kernel import tactics as activations
from ..gated_linear.kernel import both
from ..quantise_tokens.kernel import tactics as quantisations
from ..quantised_gated_activation.kernel import tactics as quantised_activations
from ..quantised_linear.kernel import own
from ..quantised_linear.kernel import tactics as products
from ..tactic import Site, Tactic, Tensor

OWN_PRODUCTS = 2  # of QuantisedLinear's own kernels that are also tried without the activation


def tactics(site: Site) -> list[Tactic]:
    """The product with the activation first; [] for an activation that it does not know."""
    x, weight = site.inputs[:2]
    assert x is not None and weight is not None
    attributes, activation = dict(site.attributes), site.attributes["activation"]
    if activation not in ACTIVATIONS:
        return []
    kind = next(d.name for d in DTYPES.values() if int(d.onnx) == attributes["dtype"])
    between = Tensor((x.shape[0], weight.shape[0]), kind)
    options = {name: attributes[name] for name in ("dtype", "group", "x_group")}
    product = replace(site, op="QuantisedLinear", attributes=options, outputs=(between,))
    y = Tensor((x.shape[0], weight.shape[0] // 2), kind)
    fused = own(replace(site, outputs=(y,)), activation)
    if attributes["y_dtype"]:
        how = {"dtype": attributes["y_dtype"], "group": attributes["y_group"]}
        (last, *_) = quantisations(Site("QuantiseTokens", how, (y,), site.outputs, site.device))
        fused = [both(each, replace(last, name="quantised"), y) for each in fused]
        rest = Site("QuantisedGatedActivation", how | {"activation": activation}, (between,), site.outputs, site.device)
        second = [replace(each, name="activated and quantised") for each in quantised_activations(rest)[:1]]
    else:
        second = activations(Site("GatedActivation", {"activation": activation}, (between,), site.outputs, site.device))
    mine = [tactic.name for tactic in own(product)][OWN_PRODUCTS:]
    return fused + [both(each, last, between) for last in second for each in products(product) if each.name not in mine]
