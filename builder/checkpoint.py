"""A Hugging Face checkpoint on disk: config, and tensors that are read when asked for.

Only the safetensors headers are read when it is opened; they say where every tensor lies, and are checked against the
size of the file, so that a damaged or half downloaded shard is refused before the build starts.
Invariant: opening costs memory for names, never for weights.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

from ..engines.dtypes import DTYPES, DType, from_safetensors
from ..engines.errors import BuildError
from . import quantised_checkpoints
from .quantised_checkpoints import QuantisedWeights, StoredModule

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWNLOADED = ("*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "merges.txt", "vocab.*")
COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size",
          "vocab_size", "max_position_embeddings")  # fmt: skip
OF_HEADS = {"fc.weight", "model.fc.weight"}  # what EAGLE heads have and no model has
_MAX_HEADER = 100 << 20  # bytes; the limit of the safetensors format


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `length` bytes from `offset` of `file`, row-major, little-endian."""

    name: str
    file: Path
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class Checkpoint:
    """A model directory: its config, and name -> place of every tensor.

    One that is quantised already has the config and the names of the model that it was before: `stored` and `tensor`
    have a `weight` in float32 for each module that `quantised` has in few bits.
    """

    path: Path
    config: PretrainedConfig
    stored: Mapping[str, StoredTensor]
    quantised: QuantisedWeights | None = None

    @classmethod
    def open(cls, model: str) -> "Checkpoint":
        """Opens a directory, or downloads a hub id ("org/name"; only safetensors, json and tokenizer files).

        Raises BuildError if it is neither, is not in safetensors, is damaged, is quantised in a way that is unknown, or
        is an EAGLE head.
        """
        path = Path(os.path.expanduser(model))  # pathlib raises where a user or a name cannot be
        if not os.path.exists(path):
            path = _download(model)
        if path.suffix == ".gguf":
            raise BuildError(f"{model} is a GGUF file, which ingot does not read; give the checkpoint in safetensors")
        if not path.is_dir():
            raise BuildError(
                f"{model} is a file, expected a model directory; give the directory that holds config.json"
            )
        if not (path / "config.json").is_file():
            raise BuildError(f"{model} is not a checkpoint: it has no config.json; give a Hugging Face model directory")
        config = config_of(path)
        description = quantised_checkpoints.describe(path, config)
        stored = {tensor.name: tensor for file in shards(path) for tensor in read_header(file)}
        if not OF_HEADS.isdisjoint(stored):
            raise BuildError(f"{model} is a head, which drafts for a model; build it with --draft-for TARGET")
        checkpoint = cls(path, config, stored)
        checkpoint._check_index()
        if description is None:
            return checkpoint
        quantised = quantised_checkpoints.open_quantised(path, description, config, stored, checkpoint.tensor)
        return replace(checkpoint, stored=_as_unquantised(stored, quantised), quantised=quantised)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored, over a memory map of its file that lives as long as the tensor, so that what was read
        is not resident any longer. Raises BuildError if there is no such tensor."""
        module = self.stored_module(name)
        if module is not None:
            return module.weight()
        if name not in self.stored:
            raise BuildError(f"{self.path} has no tensor '{name}'; download the checkpoint again")
        with safe_open(self.stored[name].file, framework="pt") as file:
            return file.get_tensor(name)

    def stored_module(self, name: str) -> StoredModule | None:
        """What a name of `stored` is in the checkpoint, if that is a weight in few bits."""
        module, _, suffix = name.rpartition(".")
        return self.quantised.modules.get(module) if self.quantised and suffix == "weight" else None

    def _check_index(self) -> None:
        index = self.path / INDEX
        if (self.path / SINGLE).is_file() or not index.is_file():
            return
        for name, shard in _weight_map(index).items():
            if name not in self.stored or self.stored[name].file.name != shard:
                raise BuildError(f"{self.path / shard} lacks the tensor '{name}'; download that file again")


def _as_unquantised(stored: Mapping[str, StoredTensor], quantised: QuantisedWeights) -> dict[str, StoredTensor]:
    """One weight in float32 for the tensors of each quantised module; `offset` and `length` are of the numbers."""
    found = {name: tensor for name, tensor in stored.items() if name.rpartition(".")[0] not in quantised.modules}
    for name, tensor in stored.items():
        module, _, suffix = name.rpartition(".")
        if module in quantised.modules and suffix == "bias":
            found[name] = tensor
        elif module in quantised.modules and suffix in ("weight", "weight_packed", "qweight"):
            weight = f"{module}.weight"
            found[weight] = replace(tensor, name=weight, dtype=DTYPES["float32"], shape=quantised.modules[module].shape)
    return found


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, after checking header and file size (safetensors format, version 1).

    Raises BuildError if the file is damaged or truncated, or holds a data type that ingot does not know.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little") if size >= 8 else -1
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise _damaged(file, f"its header should be {length} bytes long, the file is {size}" if size >= 8 else "")
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = [_stored(file, name, entry, 8 + length) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, f"its header cannot be read: {error}") from None
    end = 8 + length
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.length)):  # the format knows no holes and no overlap
        if tensor.offset != end:
            raise _damaged(file, f"'{tensor.name}' begins at byte {tensor.offset}, expected {end}")
        end += tensor.length
    if end != size:
        raise _damaged(file, f"its tensors end at byte {end}, the file has {size}")
    try:
        with safe_open(file, framework="pt"):  # which will read it: what else it does not take, as other metadata
            return tensors
    except SafetensorError as error:
        raise _damaged(file, str(error)) from None


def _stored(file: Path, name: str, entry: dict, data: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    try:
        dtype = from_safetensors(entry["dtype"])
    except KeyError:
        raise BuildError(f"{file} stores '{name}' as {entry['dtype']}, which ingot does not read") from None
    shape = tuple(entry["shape"])
    if min((begin, *shape)) < 0 or end - begin != dtype.itemsize * math.prod(shape):
        raise ValueError(f"'{name}' of {dtype.name} {list(shape)} cannot fill {end - begin} bytes")
    return StoredTensor(name, file, dtype, shape, data + begin, end - begin)


def _damaged(file: Path, reason: str) -> BuildError:
    detail = f" ({reason})" if reason else ""
    return BuildError(f"{file} is not a whole safetensors file{detail}; download it again")


def shards(path: Path) -> list[Path]:
    """The safetensors files of a model directory. Raises BuildError if one is missing, or there are none."""
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if (path / INDEX).is_file():
        files = [path / shard for shard in sorted(set(_weight_map(path / INDEX).values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise BuildError(f"{path} lacks {', '.join(missing)}, named by {INDEX}; download the missing files")
        return files
    if any(path.glob("*.gguf")):
        raise BuildError(f"{path} holds GGUF files only, which ingot does not read; give the checkpoint in safetensors")
    if any(path.glob("*.bin")):
        raise BuildError(
            f"{path} holds pickled .bin weights only, expected safetensors; convert it with: "
            f'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
            f"M.from_pretrained('{path}', dtype='auto').save_pretrained('{path}-safetensors'); "
            f"T.from_pretrained('{path}').save_pretrained('{path}-safetensors')\""
        )
    raise BuildError(f"{path} has neither {SINGLE} nor {INDEX}; give a checkpoint with safetensors weights")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise BuildError(f"{index} has no weight_map; download it again")
    return weight_map


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise BuildError(f"{file} is not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise BuildError(f"{file} holds no JSON object; download it again")
    return content


def config_of(path: Path) -> PretrainedConfig:
    """What `config.json` of the directory says. Raises BuildError if it cannot be used."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)  # and do not ask for it
    except Exception as error:  # transformers raises many kinds: unknown type, bad json, validation of fields
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BuildError(f"{path / 'config.json'} cannot be used: {reason[:300]}") from error
    for name in COUNTS:
        if isinstance(found := getattr(config.get_text_config(), name, None), int) and found < 1:
            raise BuildError(f"{path / 'config.json'} cannot be used: {name} is {found}, expected at least 1")
    return config


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import validate_repo_id

    missing = f"{model} is not a directory"
    try:
        validate_repo_id(model)
    except ValueError:
        raise BuildError(f"{missing}; give a model directory or a hub id such as org/name") from None
    if model.count("/") != 1:
        raise BuildError(f"{missing}; give a model directory or a hub id such as org/name")
    try:
        return Path(snapshot_download(model, allow_patterns=list(DOWNLOADED), ignore_patterns=["original/*"]))
    except Exception as error:  # no such repository, gated, offline, time-out: all kinds of classes
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise BuildError(
            f"{missing} and could not be downloaded from the hub ({type(error).__name__}: {reason[:200]}); "
            "check the path, the name and the network"
        ) from error
