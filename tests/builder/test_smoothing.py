"""Smoothing changes no result: columns times s, and 1 / s in the norm, the rows or the Mul that makes what is read."""

import pytest
import torch
from ingot.builder.gate import packed
from ingot.builder.passes.graph import nodes
from ingot.builder.passes.verify import verify
from ingot.builder.quantise import choose, sites, smooth
from ingot.calibration.recipe import parse
from ingot.calibration.scales import Scales
from ingot.engines.step import LOGITS
from ingot.plugins.dtypes import to_torch
from random_graph import random_graph

SMOOTH = (
    "{perplexity: 1, rules: [{match: '*experts*', method: keep}, {match: '*', method: awq, format: {dtype: int8}}]}"
)


def some_scales(graph, recipe):
    """Factors from 1/4 to 4 for every site, as it can have them."""
    generator, scales = torch.Generator().manual_seed(0), Scales()
    for site in sites(choose(graph, recipe)):
        s = site.fit((torch.rand(site.x.shape[-1], generator=generator) * 4 - 2).exp2())
        scales.smoothing.update(dict.fromkeys(site.names, s))
    return scales


# Mul in front: a plain MLP; a norm that others read too, by rows (last layer of cohere2) or as experts do
@pytest.mark.parametrize(
    "family, num_mul", [("qwen2", 0), ("gemma3", 0), ("cohere2", 2), ("starcoder2", 2), ("qwen3_moe", 2)]
)
def test_the_graph_computes_what_it_did(family, num_mul):
    recipe, graph = parse(SMOOTH, "smooth", ""), random_graph(family)
    prompts = [torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(n)) for n in (19, 34, 1, 27)]
    smoothed = graph.clone()
    scales = some_scales(graph, recipe)
    smooth(smoothed, recipe, scales)
    verify(smoothed, "smooth")
    assert len(nodes(smoothed, "Mul")) - len(nodes(graph, "Mul")) == num_mul
    for before, after in zip(packed(graph, prompts)[LOGITS], packed(smoothed, prompts)[LOGITS], strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    for name, s in scales.smoothing.items():
        assert s.min() < 0.6 and s.max() > 1.6
        old, new = (to_torch(g.graph.initializers[name].const_value) for g in (graph, smoothed))
        assert not torch.allclose(old, new, rtol=0.1)
