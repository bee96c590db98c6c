"""Heads as they are published: a Llama's `config.json`, and weights in safetensors or a pickled `pytorch_model.bin`.

EAGLE-1 has `fc`, `layers.i` (no norm before the first attention) and perhaps the target's `embed_tokens`; the output
head is the target's. EAGLE-3 has `fc` over three hidden states, `midlayer`, `norm`, an `lm_head` over a vocabulary of
its own with `d2t` (what to add to a draft token to have the target's) and `t2d`, and perhaps `embed_tokens`.
Medusa has `I.J.linear` for block J of head I and, behind the blocks, `I.J.weight` over the vocabulary, or vLLM's
`blocks.I.layers.J` and `lm_heads.I`; its config says nothing that is needed.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig

from ...engines.errors import BuildError
from ..checkpoint import Checkpoint, config_of, read_header, shards
from ..hidden_states import EAGLE, EAGLE3, MEDUSA, read_by

PICKLED = ("pytorch_model.bin", "medusa_lm_head.pt")
MEDUSA_FILE = "medusa_lm_head.safetensors"
DRAFT_TO_TARGET, TARGET_TO_DRAFT = "d2t", "t2d"


@dataclass(frozen=True)
class HeadCheckpoint:
    """tensors: by their names in `Head`. reads: hidden states of the target, None: those that the kind reads."""

    path: Path
    config: LlamaConfig
    kind: str
    tensors: Mapping[str, Tensor]
    reads: tuple[int, ...] | None

    @classmethod
    def open(cls, path: str | Path) -> HeadCheckpoint:
        """Raises BuildError: not there, damaged, not a head, or one of a kind that is unknown."""
        path = Path(path).expanduser()
        if not (path / "config.json").is_file():
            raise BuildError(f"{path} has no config.json, expected the checkpoint of a head; give its directory")
        tensors = {name.removeprefix("model."): tensor for name, tensor in _tensors(path).items()}
        if heads := _medusa(tensors):
            rows, width = heads["lm_heads.0.weight"].shape
            sizes = LlamaConfig(architectures=["MedusaModel"], hidden_size=width, vocab_size=rows)
            return cls(path, sizes, MEDUSA, heads, None)
        config = config_of(path)
        if "fc.weight" not in tensors:
            raise BuildError(
                f"{path} has no tensor 'fc.weight', so it is no EAGLE head; give one, or leave out --draft-for to "
                "build a model"
            )
        if not isinstance(config, LlamaConfig):
            raise BuildError(f"{path} is a head of type {config.model_type}; expected llama, whatever the target is")
        deep = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
        kind = EAGLE3 if "midlayer.hidden_norm.weight" in deep else EAGLE
        return cls(path, config, kind, deep if kind == EAGLE3 else tensors, _reads(config))

    @property
    def medusa(self) -> tuple[int, int]:
        """Heads, and blocks of each."""
        places = [name.split(".")[1:4:2] for name in self.tensors if name.startswith("blocks.")]
        return 1 + max(int(head) for head, _ in places), 1 + max(int(layer) for _, layer in places)

    def target_ids(self) -> Tensor:
        """The target's token of each draft token [draft_vocab_size]."""
        if DRAFT_TO_TARGET in self.tensors:
            offsets = self.tensors[DRAFT_TO_TARGET].long()
            return torch.arange(len(offsets)) + offsets
        rows = self.tensors["lm_head.weight"].shape[0] if "lm_head.weight" in self.tensors else self.config.vocab_size
        return torch.arange(rows)

    def layers_read(self, target: Checkpoint) -> tuple[int, ...]:
        """The hidden states of a target that it reads. Raises BuildError: the target has no such layers."""
        num = target.config.get_text_config().num_hidden_layers
        found = self.reads or read_by(self.kind, num)
        if not all(0 <= layer <= num for layer in found):
            raise BuildError(f"{self.path} reads the hidden states {list(found)}, but {target.path} has {num} layers")
        return found


def _reads(config: LlamaConfig) -> tuple[int, ...] | None:
    """As vLLM and SGLang read it: layers by what enters them, and in `eagle_config` by what they give."""
    if given := getattr(config, "eagle_aux_hidden_state_layer_ids", None):
        return tuple(given)
    nested = getattr(config, "eagle_config", None) or {}
    if not nested.get("use_aux_hidden_state", True):
        raise BuildError("the head reads no three hidden states (use_aux_hidden_state is false), which is not known")
    given = nested.get("eagle_aux_hidden_state_layer_ids")
    return tuple(layer + 1 for layer in given) if given else None


def _tensors(path: Path) -> dict[str, Tensor]:
    given = next((path / name for name in (*PICKLED, MEDUSA_FILE) if (path / name).is_file()), None)
    if given is None or (given.name == PICKLED[0] and any(path.glob("*.safetensors"))):
        return {name: tensor for shard in shards(path) for name, tensor in _stored(shard).items()}
    if given.suffix == ".safetensors":
        return _stored(given)
    try:
        tensors = torch.load(given, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise BuildError(f"{given} cannot be read ({str(error).splitlines()[0][:200]}); download it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise BuildError(f"{given} holds no dictionary of tensors; download it again")
    return tensors


def _stored(file: Path) -> dict[str, Tensor]:
    read_header(file)  # refuses a damaged one
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}


def _medusa(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of Medusa heads by their names in `MedusaHeads`, none where they are no such heads."""
    found = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("medusa_heads.").removeprefix("medusa_head.")
        name = re.sub(r"^(\d+)\.(\d+)\.linear\.", r"blocks.\1.layers.\2.", name)
        found[re.sub(r"^(\d+)\.\d+\.weight$", r"lm_heads.\1.weight", name)] = tensor
    return found if "blocks.0.layers.0.weight" in found and "lm_heads.0.weight" in found else {}


def load(head: torch.nn.Module, checkpoint: HeadCheckpoint, target: Checkpoint) -> dict[str, Tensor]:
    """Name of each parameter of `head` -> its tensor; embedding and output head are the target's where it has none.

    Raises BuildError: a tensor is missing or has another shape than the config says.
    """
    found = {}
    for name, parameter in head.named_parameters():
        if name in checkpoint.tensors:
            tensor, where = checkpoint.tensors[name], checkpoint.path
        else:
            tensor, where = _of_target(name, checkpoint, target), target.path
        if tensor.shape != parameter.shape:
            raise BuildError(
                f"{where} holds '{name}' of shape {list(tensor.shape)}, but the head needs {list(parameter.shape)}; "
                "use config and weights of the same head, and the target that it was trained for"
            )
        found[name] = tensor
    return found


def _of_target(name: str, checkpoint: HeadCheckpoint, target: Checkpoint) -> Tensor:
    names = {"embed_tokens.weight": ("model.embed_tokens.weight",),
             "lm_head.weight": ("lm_head.weight", "model.embed_tokens.weight")}  # fmt: skip
    known = next((other for other in names.get(name, ()) if other in target.stored), None)
    if known is None or (name == "lm_head.weight" and checkpoint.kind == EAGLE3):
        raise BuildError(f"{checkpoint.path} lacks the tensor '{name}'; download the checkpoint again")
    return target.tensor(known)
