"""No model is silently wrong: what an export must look like, and what it must compute.

`check_structure` counts the attention nodes and refuses ops that would mix the tokens of different sequences.
`self_check` shrinks the config, keeps all that is peculiar to it, gives it random weights, and compares the exported
graph over packed sequences, in two steps through the paged cache, with transformers' eager attention one sequence by
one. Invariant: a model that was not compared is refused, too.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

import onnx_ir as ir
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..engines import step
from ..engines.errors import BuildError, EngineError
from ..plugins.dtypes import TORCH_DTYPES
from ..plugins.interpreter import Program
from .empty_model import first_line, pin_rope
from .export import export
from .shrink import shrink
from .weights import attach

TOLERANCE = 1e-3  # relative, fp32; right models reach about 1e-5, a wrong window or position 1e-1
# these look along the token axis and know nothing of sequences, or hide a subgraph from this check
FORBIDDEN = {"Attention", "Conv", "ConvTranspose", "CumSum", "GRU", "If", "LSTM", "Loop", "RNN", "Scan", "SequenceMap"}

_LENGTHS = (19, 34, 1, 27)
_FIRST = (19, 13, 0, 26)  # tokens of each sequence in the first step: all, a chunk, none, all but one
_PAGE_SIZE = 4


def check_structure(model: ir.Model, config: PretrainedConfig) -> None:
    """Raises BuildError unless each layer has its attention node and nothing else relates tokens to each other."""
    kind, layers = config.model_type, config.num_hidden_layers
    found = sum(node.op_type == "PagedAttention" for node in model.graph)
    if found != layers:
        raise BuildError(
            f"{kind} exports with {found} attention calls for {layers} layers, expected one each; "
            "its attention does not go through transformers' attention interface, so it cannot be built"
        )
    for node in model.graph:
        if node.op_type in FORBIDDEN:
            raise BuildError(
                f"{kind} exports with the op {node.op_type}, which would mix the tokens of different requests"
            )
        if node.op_type in ("Softmax", "LogSoftmax") and _over_tokens(node):
            raise BuildError(f"{kind} exports with a {node.op_type} over tokens, attention that ingot did not replace")


def self_check(
    config: PretrainedConfig, optimise: Callable[[ir.Model], ir.Model] | None = None, hidden_states: Sequence[int] = ()
) -> float:
    """Largest difference of the logits, relative to the largest one, on a small random model of the config's class.

    With `optimise` the rewritten graph is checked. hidden_states: the engine gives some, so the small model's are
    compared as well. Raises BuildError above `TOLERANCE`, or if the model cannot be exported or run.
    """
    small = shrink(config)
    model = _random_model(small)
    states = tuple(range(small.num_hidden_layers + 1)) if hidden_states else ()  # the small model has fewer layers
    graph = export(small, torch.float32, states)
    check_structure(graph, small)
    attach(graph, model.state_dict())
    if optimise is not None:
        graph = optimise(graph)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, small.vocab_size, (n,), generator=generator) for n in _LENGTHS]
    expected = [_eager(model, prompt, states) for prompt in prompts]
    try:
        found = packed(graph, prompts)
    except EngineError as error:
        raise BuildError(f"{config.model_type} cannot be run: {error}") from error
    return max(compare(config.model_type, found[name], [each[name] for each in expected]) for name in expected[0])


def compare(kind: str, found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest difference [n, width] by sequence, relative to the largest number. BuildError above `TOLERANCE`."""
    largest = max(float(logits.abs().max()) for logits in expected)
    if not largest > 0:
        raise BuildError(f"{kind} gives no logits on random weights, so that it could not be checked")
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        error = (ours - theirs).abs().amax(-1) / largest  # [n]
        if not bool((error <= TOLERANCE).all()):  # NaN too
            position = int((~(error <= TOLERANCE)).nonzero()[0])
            raise BuildError(
                f"{kind} computes other logits packed than transformers does alone: {float(error.max()):.1e} relative "
                f"in a sequence of {len(theirs)} tokens, from position {position} on, at most {TOLERANCE:.0e} is "
                "accepted; this architecture cannot be built"
            )
        worst = max(worst, float(error.max()))
    return worst


def _random_model(config: PretrainedConfig) -> PreTrainedModel:
    """An fp32 model with eager attention whose every parameter matters to the logits.

    Matrices keep the size of their input; norms, biases and sinks are moved away from the ones and zeros with which
    they are initialised, since a wrong table or a lost bias would go unnoticed otherwise.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = AutoModelForCausalLM.from_config(
                deepcopy(config), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
            ).eval()
        except Exception as error:  # a class whose sizes cannot be shrunk together
            raise BuildError(f"a small {config.model_type} cannot be made to check it: {first_line(error)}") from error
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:
                parameter.data += 0.2 * noise
            else:
                parameter.data = noise * min(parameter.shape[-2:]) ** -0.5
    pin_rope(model)
    return model


@torch.inference_mode()
def _eager(model: PreTrainedModel, prompt: torch.Tensor, states: Sequence[int]) -> dict[str, torch.Tensor]:
    output = model(input_ids=prompt[None], use_cache=False, output_hidden_states=bool(states))
    hidden = {step.hidden_states(i): output.hidden_states[i][0] for i in states}
    return {step.LOGITS: output.logits[0], **hidden}  # [n, vocab], [n, hidden_size]


def packed(
    graph: ir.Model, prompts: Sequence[torch.Tensor], values: Mapping[str, Sequence[torch.Tensor]] | None = None
) -> dict[str, list[torch.Tensor]]:
    """Each output for every token of every prompt, from two packed steps over one paged cache, the pages far apart.

    values: further inputs [n, width] by prompt.
    """
    program = Program(graph, {})
    widths = [-(-len(prompt) // _PAGE_SIZE) for prompt in prompts]
    num_pages = sum(widths) + 1
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(1))
    page_lists = order[: sum(widths)].split(widths)
    pages = torch.zeros(len(prompts), max(widths), dtype=torch.int32)
    for row, owned in zip(pages, page_lists, strict=True):
        row[: len(owned)] = owned
    pools = {
        # what is not written is poison
        value.name: torch.full((num_pages, _PAGE_SIZE, *_numbers(value)), torch.nan).to(TORCH_DTYPES[int(value.dtype)])
        for value in graph.graph.inputs
        if value.name and value.dtype and value.name not in (*step.STEP_INPUTS, *(values or ()))
    }
    found: dict[str, list[list[torch.Tensor]]] = {}
    starts = [0] * len(prompts)
    for ends in (_FIRST, _LENGTHS):
        spans = [(s, starts[s], ends[s]) for s in range(len(prompts)) if ends[s] > starts[s]]
        given = {name: torch.cat([x[s][a:b] for s, a, b in spans]) for name, x in (values or {}).items()}
        for name, output in program({**_step_inputs(spans, prompts, pages), **given, **pools}).items():
            by_prompt = found.setdefault(name, [[] for _ in prompts])
            for (s, _, _), rows in zip(spans, output.split([b - a for _, a, b in spans]), strict=True):
                by_prompt[s].append(rows)
        starts = list(ends)
    return {name: [torch.cat(rows) for rows in by_prompt] for name, by_prompt in found.items()}


def _step_inputs(
    spans: Sequence[tuple[int, int, int]], prompts: Sequence[torch.Tensor], pages: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The step tensors for tokens [start, end) of some sequences: spans of (sequence, start, end)."""
    positions = torch.cat([torch.arange(start, end) for _, start, end in spans])
    owner = torch.cat([torch.full((end - start,), s) for s, start, end in spans])
    counts = torch.tensor([0, *(end - start for _, start, end in spans)])
    inputs = {
        step.TOKENS: torch.cat([prompts[s][start:end] for s, start, end in spans]),
        step.POSITIONS: positions,
        step.SLOTS: pages[owner, positions // _PAGE_SIZE] * _PAGE_SIZE + positions % _PAGE_SIZE,
        step.QUERY_START: counts.cumsum(0),
        step.KV_LEN: torch.tensor([end for _, _, end in spans]),
        step.PAGES: pages[[s for s, _, _ in spans]],
        step.LOGIT_ROWS: torch.arange(len(positions)),
    }
    return {name: tensor.to(torch.int32) for name, tensor in inputs.items()}


def _numbers(value: ir.Value) -> list[int]:
    assert value.shape is not None
    return [dim for dim in value.shape[2:] if isinstance(dim, int)]  # kv_heads, head_dim


def _over_tokens(node: ir.Node) -> bool:
    source = node.inputs[0]
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    return source is None or source.shape is None or not isinstance(source.shape[axis], int)
