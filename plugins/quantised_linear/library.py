"""QuantisedLinear in FP8 by cuBLASLt, where many rows share a weight."""

from ..tactic import Site, Tactic


def fp8_products(site: Site) -> list[Tactic]:
    return []
