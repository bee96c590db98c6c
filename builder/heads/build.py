"""A head's checkpoint -> an engine of its own, with the same passes and targets as any model.

What makes it a head is in the manifest (`HeadInfo`) and in two more inputs, `features` and `drafted`, of which one is
zero in each row. Its text side is the target's, so that an engine of another tokenizer is told from the right one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import onnx_ir as ir
import torch
from torch import Tensor
from transformers import LlamaConfig

from ...engines import step
from ...engines.errors import BuildError, EngineError
from ...engines.manifest import HeadInfo, Manifest, ModelInfo
from ...engines.weights import save_graph
from ...engines.writer import engine_directory
from .. import gate, hooks
from ..checkpoint import Checkpoint
from ..empty_model import pin_rope
from ..export import trace
from ..hidden_states import MEDUSA, check_target
from ..passes import optimise
from ..record import activation_dtype, build_record, kv_layers
from ..shrink import shrink
from ..targets import Audience, Target
from ..text_files import copy_text_files
from ..weights import attach, lazy
from . import unrolled
from .checkpoint import HeadCheckpoint, load
from .module import Head, MedusaHeads

if TYPE_CHECKING:
    from .. import BuildConfig, Phases

OnPass = Callable[[str, int], None]
Module = Head | MedusaHeads


def target_checkpoint(name: str) -> Checkpoint:
    """The checkpoint of a target, given as such or by its engine. Raises BuildError: it is neither, or has gone."""
    folder = Path(name).expanduser()
    if not (folder / "engine.json").is_file():
        return Checkpoint.open(name)
    try:
        source = Manifest.read(folder).model.source
    except EngineError as error:
        raise BuildError(str(error)) from error
    try:
        return Checkpoint.open(source)
    except BuildError as error:
        raise BuildError(f"{folder} was built from {source}, which cannot be opened any more ({error})") from error


def make_head(
    config: LlamaConfig, kind: str, features: int, draft_vocab_size: int, bias: bool, attention: str, dtype: torch.dtype
) -> Head:
    """A head without weights, and with RoPE tables, in eval mode."""
    with torch.device("meta"):
        head = Head(config, kind, features, draft_vocab_size, bias, attention).to(dtype).eval()
    head.rotary_emb = type(head.rotary_emb)(config)
    pin_rope(head)
    return head


def build_head(
    config: BuildConfig, phase: Phases, target: Target, audience: Audience, on_pass: OnPass | None = None
) -> Manifest:
    """`build_engine` for a head. Raises BuildError as that, and where head and target do not go together."""
    check_target(config.target, "a head (--draft-for)")
    with phase("read the checkpoint"):
        head = HeadBuild(config)
    with target.begin(config, audience) as compile:
        with phase("check the architecture"):
            error = head.check()
        with phase("export"):
            graph = head.export()
            num_exported = graph.graph.num_nodes()
        with phase("optimise"):
            graph = head.finish(optimise(graph, on_pass))
        with engine_directory(config.out, config.force) as folder:
            with phase("write the weights"):
                save_graph(graph, folder, audience.progress)
                copy_text_files(head.target.path, folder)
                shutil.copyfile(head.checkpoint.path / "config.json", folder / "config.json")
            model = head.model_info(graph)
            with phase(f"compile for {config.target}"):
                target_info = compile(graph, model, folder, head.info())
            record = build_record(phase, error, num_exported, graph, config.options())
            manifest = Manifest(model, kv_layers(graph), config.target, target_info, record, head=head.info())
            return manifest.save(folder)


class HeadBuild:
    """What `build_engine` asks of a head."""

    def __init__(self, config: BuildConfig):
        """Raises BuildError: no such head, no such target, or they do not go together."""
        of_models = "quant", "kv_cache", "scales", "calibration_data", "accept_accuracy", "hidden_states"
        if given := config.given(of_models):
            raise BuildError(f"{given[0]} is for models, and with --draft-for a head is built; leave it out")
        self.checkpoint = HeadCheckpoint.open(config.model)
        self.target = target_checkpoint(config.draft_for)
        self.dtype = activation_dtype(config.dtype, self.target.config)
        self.reads = self.checkpoint.layers_read(self.target)
        head, target = self.checkpoint.config, self.target.config.get_text_config()
        trained_for = getattr(head, "target_hidden_size", None) or head.hidden_size
        if trained_for != target.hidden_size:
            raise BuildError(
                f"{config.model} is a head for hidden states of {trained_for} columns, but those of {self.target.path} "
                f"have {target.hidden_size}; give the target that it was trained for as --draft-for"
            )
        if head.vocab_size != target.vocab_size:
            raise BuildError(
                f"{config.model} is a head for a vocabulary of {head.vocab_size} tokens, but that of {self.target.path}"
                f" has {target.vocab_size}; give the target that it was trained for as --draft-for"
            )
        self.ids = self.checkpoint.target_ids()
        if not bool(((0 <= self.ids) & (self.ids < target.vocab_size)).all()):
            raise BuildError(f"{config.model} maps draft tokens to none of the target's (d2t); download it again")
        self.features = len(self.reads) * target.hidden_size
        self.source = f"{config.model} --draft-for {config.draft_for}"

    def export(self) -> ir.Model:
        """The graph before any pass, with its weights."""
        dtype = getattr(torch, self.dtype)
        head = self._head(self.checkpoint.config, self.features, len(self.ids), hooks.ATTENTION, dtype)
        tensors = load(head, self.checkpoint, self.target)
        graph = _export(head, self.checkpoint.kind, dtype)
        attach(graph, {n: lazy(n, tuple(t.shape), dtype, partial(Tensor.contiguous, t)) for n, t in tensors.items()})
        return graph

    def finish(self, graph: ir.Model) -> ir.Model:
        """Gives the graph, whose logits are of draft tokens, the target's token of each."""
        ids = ir.tensor(self.ids.to(torch.int32), name=step.TOKEN_IDS)
        value = ir.Value(
            name=step.TOKEN_IDS, type=ir.TensorType(ids.dtype), shape=ir.Shape([len(self.ids)]), const_value=ids
        )
        graph.graph.register_initializer(value)
        return graph

    def model_info(self, graph: ir.Model) -> ModelInfo:
        head, target = self.checkpoint.config, self.target.config.get_text_config()
        weights = [value.const_value for value in graph.graph.initializers.values()]
        return ModelInfo(
            source=self.source, architecture=(head.architectures or ["LlamaForCausalLM"])[0],
            model_type=self.checkpoint.kind,
            num_parameters=sum(weight.size for weight in weights if weight is not None),
            dtype=self.dtype, vocab_size=len(self.ids), num_layers=head.num_hidden_layers,
            hidden_size=head.hidden_size, max_model_len=target.max_position_embeddings,
        )  # fmt: skip

    def info(self) -> HeadInfo:
        target = self.target.config.get_text_config()
        guesses = self.checkpoint.medusa[0] if self.checkpoint.kind == MEDUSA else 1
        return HeadInfo(self.checkpoint.kind, self.reads, target.hidden_size, target.vocab_size, guesses)

    def _head(self, config: LlamaConfig, features: int, vocab_size: int, attention: str, dtype: torch.dtype) -> Module:
        given = self.checkpoint
        if given.kind == MEDUSA:
            with torch.device("meta"):
                return MedusaHeads(
                    *given.medusa, config.hidden_size, vocab_size, "blocks.0.layers.0.bias" in given.tensors
                ).to(dtype)
        return make_head(config, given.kind, features, vocab_size, "fc.bias" in given.tensors, attention, dtype)

    def check(self) -> float:
        """A small random head of the kind, packed, against itself a sequence at a time with attention written out.

        Raises BuildError: it computes something else.
        """
        unrolled.install()
        small = cast(LlamaConfig, shrink(self.checkpoint.config))
        kind, features = self.checkpoint.kind, len(self.reads) * small.hidden_size
        make = partial(self._head, small, features, small.vocab_size, dtype=torch.float32)
        alone = make(attention=unrolled.ATTENTION)
        generator = torch.Generator().manual_seed(0)
        weights = {
            name: torch.randn(p.shape, generator=generator) * (min(p.shape) ** -0.5 if p.dim() > 1 else 0.2)
            for name, p in alone.named_parameters()
        }
        alone.load_state_dict(weights, assign=True)
        graph = _export(make(attention=hooks.ATTENTION), kind, torch.float32)
        attach(graph, weights)
        prompts = [torch.randint(small.vocab_size, (n,), generator=generator) for n in (19, 34, 1, 27)]
        values = {
            name: [torch.randn(len(prompt), width, generator=generator) for prompt in prompts]
            for name, width in alone.columns.items()
        }
        found = gate.packed(optimise(graph), prompts, values)
        worst = 0.0
        for i, (tokens, *given) in enumerate(zip(prompts, *values.values(), strict=True)):
            unrolled.begin(alone)
            with torch.inference_mode():
                expected = alone(tokens, torch.arange(len(tokens)), torch.arange(len(tokens)), *given)
            for name, each in zip(alone.outputs, expected, strict=True):
                worst = max(worst, gate.compare(kind, [found[name][i]], [each]))
        return worst


def _export(head: Module, kind: str, dtype: torch.dtype) -> ir.Model:
    hooks.install()
    return trace(head, kind, head.outputs, tuple(head.columns.values()), dtype)
