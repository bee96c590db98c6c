"""transformers decoder -> onnx_ir graph with the step's inputs, traced once with fake tensors.

`torch.export` sees the model through `hooks.py`, so attention and experts are single nodes and every family takes the
same way. Tokens of all sequences lie flat: the model is shown one row of T tokens with explicit positions, and only
`PagedAttention` knows where a sequence ends. Invariant: no weight is read here; initialisers are called as in the
transformers model, and their data stay in the checkpoint's files (`weights.py`).
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel

from ..engines import step
from ..engines.errors import BuildError
from .checkpoint import Checkpoint
from .empty_model import empty_model, first_line
from .weights import bind_weights

OPSET = 23
_WRAPPER = "model."  # what `_Step` puts before each parameter's name


def export(
    source: Checkpoint | PretrainedConfig, dtype: str | torch.dtype, hidden_states: Sequence[int] = ()
) -> ir.Model:
    """The graph of docs/contracts.md, before any pass. T and R are dynamic; activations are of `dtype`.

    hidden_states: those of transformers' that the graph gives as well.

    From a `Checkpoint` the initialisers are lazy tensors over its files; from a config they have no data.
    Raises BuildError if the model is not a decoder that can be exported, or the checkpoint lacks a weight.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    config = source.config if isinstance(source, Checkpoint) else source
    model = empty_model(config, dtype)
    outputs = (step.LOGITS, *map(step.hidden_states, hidden_states))
    graph = trace(_Step(model, hidden_states), config.model_type, outputs, tied=model.all_tied_weights_keys)
    if isinstance(source, Checkpoint):
        bind_weights(graph, source)
    return graph


class _Step(nn.Module):
    """The traced function: (tokens [T], positions [T], logit_rows [R]) -> logits [R, vocab], states [T, width]."""

    def __init__(self, model: PreTrainedModel, hidden_states: Sequence[int]):
        super().__init__()
        self.model = model
        self.hidden_states = tuple(hidden_states)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, logit_rows: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        output = self.model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, logits_to_keep=logit_rows,
            output_hidden_states=bool(self.hidden_states),
        )  # fmt: skip
        return output.logits[0], *(output.hidden_states[i][0] for i in self.hidden_states)


def trace(
    module: nn.Module,
    kind: str,
    outputs: Sequence[str],
    widths: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    tied: Mapping[str, str] | None = None,
) -> ir.Model:
    """The graph of a function of tokens [T], positions [T], logit_rows [R] and values [T, width] of `dtype`.

    outputs: their names, in order. tied: shared parameters that are to have the name of another. Its parameters lose
    their storage. Raises BuildError, which names the `kind` of model, if it cannot be exported.
    """
    _fake_parameters(module)
    example = (
        *(torch.zeros(n, dtype=torch.int32) for n in (8, 8, 3)),
        *(torch.zeros(8, width, dtype=dtype) for width in widths),
    )
    # named dimensions: with Dim.DYNAMIC torch would accept a model that mixes up T and R
    tokens, rows = torch.export.Dim("T"), torch.export.Dim("R")
    shapes = ({0: tokens}, {0: tokens}, {0: rows}, *({0: tokens} for _ in widths))
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
            onnx = torch.onnx.export(program, (), opset_version=OPSET, optimize=False, verbose=False)
    except BuildError as error:
        raise BuildError(f"{kind} cannot be exported: {error}") from error
    except Exception as error:  # whatever a model's own code raises under the tracer
        cause = error
        while isinstance(cause.__cause__, BuildError):
            cause = cause.__cause__
        raise BuildError(f"{kind} cannot be exported by torch: {first_line(cause)}") from error
    if onnx is None:
        raise BuildError(f"{kind} cannot be exported: torch gave no graph")
    graph = onnx.model
    _clean(graph, tied or {})
    for value, name in zip(graph.graph.outputs, outputs, strict=True):
        value.name = name
    _connect(graph)
    return graph


def _fake_parameters(model: nn.Module) -> None:
    """Gives the parameters a shape and a device, but no storage; shared ones stay shared."""
    fakes: dict[nn.Parameter, nn.Parameter] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if parameter not in fakes:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                    fakes[parameter] = nn.Parameter(fake, requires_grad=False)
                module._parameters[name] = fakes[parameter]


def _clean(model: ir.Model, tied: Mapping[str, str]) -> None:
    """transformers' parameter names, our dimension names, and none of the tracer's notes about its own source files.

    The tracer names a shared parameter by its last use (`lm_head.weight`); it gets the name of its owner in `tied`.
    """
    graph = model.graph
    for value in list(graph.initializers.values()):
        name = value.name or ""
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            value.const_value = None
        if name.startswith(_WRAPPER):
            graph.initializers.pop(name)
            own = name.removeprefix(_WRAPPER)
            value.name = tied.get(own, own)
            assert value.name not in graph.initializers, f"'{own}' is tied, but its own initialiser"
            graph.initializers[value.name] = value
    names = {
        str(value.shape[0]): dim
        for value in graph.inputs
        for dim in ["R" if value.name == step.LOGIT_ROWS else "T"]
        if value.shape is not None
    }
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        if value.shape is not None and any(str(dim) in names for dim in value.shape):
            value.shape = ir.Shape([names.get(str(dim), dim) for dim in value.shape])
        value.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in graph.initializers.values():
        value.metadata_props.clear()


def _connect(model: ir.Model) -> None:
    """Adds the step inputs and KV pools to the graph and to each attention node, numbered in graph order."""
    graph = model.graph
    given = {value.name: value for value in graph.inputs}
    shapes = {step.SLOTS: ["T"], step.QUERY_START: ["S+1"], step.KV_LEN: ["S"], step.PAGES: ["S", "P"]}
    for name, shape in shapes.items():
        given[name] = _input(name, ir.DataType.INT32, shape)
    inputs = [given[name] for name in (*step.STEP_INPUTS, step.FEATURES, step.DRAFTED) if name in given]
    attention = [node for node in graph if node.op_type == "PagedAttention"]
    for layer, node in enumerate(attention):
        query, key, value, *sinks = node.inputs
        assert query is not None
        dims = {n: node.attributes[n].as_int() for n in ("num_kv_heads", "head_dim", "v_head_dim")}
        pools = [
            _input(name, query.dtype, ["num_pages", "page_size", dims["num_kv_heads"], width])
            for name, width in (
                (step.k_pages(layer), dims["head_dim"]),
                (step.v_pages(layer), dims["v_head_dim"]),
            )
        ]
        steps = [given[name] for name in (step.SLOTS, step.QUERY_START, step.KV_LEN, step.PAGES)]
        inputs += pools
        _replace(node, [query, key, value, *steps, *pools, *(s for s in sinks if s is not None)])
        node.attributes["layer"] = ir.AttrInt64("layer", layer)
    graph.inputs[:] = inputs


def _replace(node: ir.Node, inputs: Sequence[ir.Value | None]) -> None:
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def _input(name: str, dtype: ir.DataType | None, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=None if dtype is None else ir.TensorType(dtype), shape=ir.Shape(shape))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracers' warnings, which are not addressed to whoever builds an engine."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
