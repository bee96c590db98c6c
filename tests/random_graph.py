"""Engine graphs of small random models, whose every weight matters to the logits."""

from functools import cache

import onnx_ir as ir
import torch
from families import FAMILIES
from ingot.builder.export import export
from ingot.builder.gate import _random_model
from ingot.builder.node_major import Windows
from ingot.builder.passes import optimise
from ingot.builder.weights import attach


def random_graph(family: str, dtype: torch.dtype = torch.float32, **options) -> ir.Model:
    """The optimised graph of a random model of a family in `families.FAMILIES`, `options` in its config."""
    return _graph(family, dtype, tuple(sorted(options.items()))).clone()


@cache
def _graph(family: str, dtype: torch.dtype, options: tuple) -> ir.Model:
    config = FAMILIES[family]()
    config.update(dict(options))
    model = _random_model(config).to(dtype)
    graph = export(config, dtype)
    attach(graph, model.state_dict())
    return optimise(graph)


def random_windows(num: int, width: int, vocab: int, seed: int = 0) -> Windows:
    """Random tokens, of which the first few are likelier, so that channels differ."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, vocab, (num, width), generator=generator, dtype=torch.int32)
    return Windows(torch.where(torch.rand(num, width, generator=generator) < 0.3, tokens % 7 + 3, tokens))
