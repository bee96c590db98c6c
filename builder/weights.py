"""For each initialiser of an exported graph, where its data come from: the load plan.

Each is an `ir.LazyTensor` that reads, casts or puts together (experts stored one by one) what is stored, anew whenever
it is asked. An `ir.ExternalTensor` would keep its file mapped, and pages once read stay resident: all weights in the
end, where now it is four (tests/builder/test_weights.py). Renaming and fusing follow transformers' own conversion
mapping, so that a plan loads what `from_pretrained` would. Invariant: making a plan reads no weight (but those that are
tied and stored twice, to see that they are the same), and reading one keeps nothing.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.pytorch_utils import Conv1D

from ..calibration.formats import all_finite
from ..engines.dtypes import DTYPES
from ..engines.errors import BuildError
from ..plugins.dtypes import TORCH_DTYPES
from .checkpoint import Checkpoint
from .empty_model import empty_model
from .passes.packed_weights import KIND, STORED

FLOATS = "float32", "bfloat16", "float16", "float64"
LoadPlan = dict[str, ir.LazyTensor]
Read = Callable[[str], torch.Tensor]


@dataclass
class _Fusion:
    """Stored tensors that one converter of transformers turns into one or several parameters."""

    converter: WeightConverter
    sources: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # source pattern -> stored names

    def convert(
        self, target: str, model: PreTrainedModel, read: Callable[[str], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Every parameter that comes out, by name; `read(stored name)` gives the sources."""
        converter: Any = deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(target, name, pattern, partial(read, name))
        result = converter.convert(target, model=model, config=model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in result.items()}


def bind_weights(graph: ir.Model, checkpoint: Checkpoint) -> None:
    """Gives the initialisers of an exported graph their lazy data; what is floating point is cast to the graph's dtype.

    Raises BuildError if a weight is missing or has another shape than the config says, or if weights that the config
    ties are stored with different numbers.
    """
    weights = [value for value in graph.graph.initializers.values() if value.const_value is None]
    dtype = next(TORCH_DTYPES[int(value.dtype)] for value in weights if value.dtype)
    attach(graph, load_plan(checkpoint, empty_model(checkpoint.config, dtype), dtype))


def load_plan(checkpoint: Checkpoint, model: PreTrainedModel, dtype: torch.dtype) -> LoadPlan:
    """Name of each parameter (and stored buffer) of `model` -> its lazy tensor, floating-point ones in `dtype`.

    `model` has no weights of its own (`empty_model`). Tied parameters share one tensor, whichever of them is stored.
    Raises BuildError as `bind_weights`.
    """
    wanted = model.state_dict()
    plan: LoadPlan = {}
    fusions: dict[str, _Fusion] = {}
    names: dict[str, str] = {}
    for name, target, converter, pattern in _targets(checkpoint, model, wanted):
        if converter is None:
            _check_layout(checkpoint, model, name, target)
            plan[target] = _stored(checkpoint, name, target, wanted[target], dtype)
            names[target] = name
        else:
            fusions.setdefault(target, _Fusion(converter)).sources[pattern].append(name)
    for first, fusion in fusions.items():
        for target, shape in _outputs(checkpoint, model, first, fusion).items():
            if target in wanted:
                _check_shape(checkpoint, target, shape, wanted[target].shape)
                plan[target] = lazy(target, shape, dtype, partial(_fused, checkpoint, model, first, fusion, target))
    for target, source in model.all_tied_weights_keys.items():
        if target in names and source in names:
            _check_tied(checkpoint, names[target], names[source])
    _share_tied(plan, model)
    missing = sorted(wanted.keys() - plan.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BuildError(f"{checkpoint.path} lacks the weight '{missing[0]}'{more}; download the checkpoint again")
    return plan


def unread(checkpoint: Checkpoint) -> list[str]:
    """Stored tensors that the model of its config has no place for, but for those of which transformers knows that."""
    if checkpoint.quantised:
        return []  # scales are its own matter
    model = empty_model(checkpoint.config, torch.float32)
    read = {name for name, *_ in _targets(checkpoint, model, model.state_dict())}
    known = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    others = (name for name in checkpoint.stored if name not in read)
    return sorted(name for name in others if not any(re.search(pattern, name) for pattern in known))


def attach(graph: ir.Model, plan: Mapping[str, ir.TensorProtocol | torch.Tensor]) -> None:
    """Gives the graph's initialisers their data. Raises BuildError if one has neither a plan nor data."""
    for name, value in graph.graph.initializers.items():
        if name in plan:
            data = plan[name]
            value.const_value = ir.tensor(data, name=name) if isinstance(data, torch.Tensor) else data
        elif value.const_value is None:
            raise BuildError(f"the exported graph reads the weight '{name}', which the checkpoint does not hold")


def _targets(
    checkpoint: Checkpoint, model: PreTrainedModel, wanted: dict[str, torch.Tensor]
) -> Iterator[tuple[str, str, WeightConverter | None, str]]:
    """(stored name, parameter, converter or None, source pattern) of every stored tensor the model uses.

    In the natural order of names, because experts are stacked in the order in which they come.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    for name in sorted(checkpoint.stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if target in wanted:
            yield name, target, by_pattern[pattern] if pattern else None, pattern or ""
        elif name in wanted:
            yield name, name, None, ""


def _stored(checkpoint: Checkpoint, name: str, target: str, like: torch.Tensor, dtype: torch.dtype) -> ir.LazyTensor:
    stored = checkpoint.stored[name]
    _check_shape(checkpoint, target, stored.shape, like.shape)
    if like.is_floating_point() and stored.dtype.name not in FLOATS:
        raise BuildError(
            f"{checkpoint.path} stores '{name}' as {stored.dtype.name}, in few bits without the scales that its "
            "quantization_config explains; use config and weights of the same checkpoint"
        )
    wanted = dtype if stored.dtype.torch.is_floating_point else stored.dtype.torch
    tensor = lazy(target, stored.shape, wanted, partial(checkpoint.tensor, name))
    if (module := checkpoint.stored_module(name)) is not None:
        tensor.meta.update({STORED: module, KIND: module.kind})
    return tensor


def _check_layout(checkpoint: Checkpoint, model: PreTrainedModel, name: str, target: str) -> None:
    """Quantisers store [N, K] whatever the model has, so a square [K, N] would pass unseen."""
    if checkpoint.stored_module(name) and isinstance(model.get_submodule(target.rpartition(".")[0]), Conv1D):
        raise BuildError(
            f"{checkpoint.path} stores '{name}' in few bits, but {model.config.model_type} has it transposed (Conv1D), "
            "which ingot does not read; give the unquantised checkpoint"
        )


def _outputs(checkpoint: Checkpoint, model: PreTrainedModel, first: str, fusion: _Fusion) -> dict[str, tuple[int, ...]]:
    """Names and shapes that come out of a fusion, found by running it on the meta device."""

    def read(name: str) -> torch.Tensor:
        stored = checkpoint.stored[name]
        return torch.empty(stored.shape, dtype=stored.dtype.torch, device="meta")

    try:
        return {name: tuple(t.shape) for name, t in fusion.convert(first, model, read).items()}
    except Exception as error:  # transformers' operations fail in their own ways when a part is missing
        raise BuildError(
            f"{checkpoint.path} lacks a part of '{first}' ({error}); download the checkpoint again"
        ) from error


def _fused(checkpoint: Checkpoint, model: PreTrainedModel, first: str, fusion: _Fusion, target: str) -> torch.Tensor:
    return fusion.convert(first, model, checkpoint.tensor)[target]


def lazy(name: str, shape: tuple[int, ...], dtype: torch.dtype, load: Callable[[], torch.Tensor]) -> ir.LazyTensor:
    """A tensor that is loaded, and cast to `dtype` if it is of another, each time it is read; nothing is kept.

    BuildError when it is read and has a NaN or an infinity, or more than `dtype` can hold.
    """

    def evaluate() -> ir.TensorProtocol:
        stored = load()
        weight = stored.to(dtype)
        if dtype.is_floating_point and not all_finite(weight):
            raise _not_finite(name, stored, dtype)
        return ir.tensor(weight, name=name)

    onnx = next(d.onnx for d in DTYPES.values() if d.torch == dtype)
    return ir.LazyTensor(evaluate, dtype=onnx, shape=ir.Shape(shape), name=name, cache=False)


def _not_finite(name: str, stored: torch.Tensor, dtype: torch.dtype) -> BuildError:
    if all_finite(stored):
        low, high = (float(x) for x in torch.aminmax(stored))
        return BuildError(
            f"the weight '{name}' has numbers from {low:.4g} to {high:.4g}, and {str(dtype).removeprefix('torch.')} "
            f"holds none above {torch.finfo(dtype).max:.4g}; pass --dtype bfloat16 or float32"
        )
    num_nan, num_infinite = int(stored.isnan().sum()), int(stored.isinf().sum())
    return BuildError(
        f"the checkpoint's weight '{name}' has {num_nan} NaN and {num_infinite} infinite numbers of {stored.numel()}, "
        "expected finite ones; download the checkpoint again, or take one from before its training went wrong"
    )


def _share_tied(plan: LoadPlan, model: PreTrainedModel) -> None:
    for target, source in model.all_tied_weights_keys.items():
        if target in plan:
            plan.setdefault(source, plan[target])
        elif source in plan:
            plan[target] = plan[source]


def _check_tied(checkpoint: Checkpoint, *names: str) -> None:
    """transformers unties what differs, others take one of the two: whoever made the checkpoint has to say."""
    if any(checkpoint.stored_module(name) for name in names):
        return  # one in few bits is not the other, and yet meant to be
    one, other = map(checkpoint.tensor, names)
    for name, tensor in zip(names, (one, other), strict=True):
        if not all_finite(tensor):  # a NaN is not equal to itself
            raise _not_finite(name, tensor, tensor.dtype)
    if not torch.equal(one, other.to(one.dtype)):
        raise BuildError(
            f"{checkpoint.path} holds '{names[0]}' and '{names[1]}' with different numbers, but its config.json ties "
            "them to each other; set tie_word_embeddings to false in it, or take the one that is not meant out"
        )


def _check_shape(checkpoint: Checkpoint, name: str, found: tuple[int, ...], expected: torch.Size) -> None:
    if tuple(found) != tuple(expected):
        raise BuildError(
            f"{checkpoint.path} holds '{name}' of shape {list(found)}, its config.json says {list(expected)}; "
            "use config and weights of the same model"
        )
