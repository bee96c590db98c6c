"""`engine.json`: what an engine is, how it was made, and the size and hash of every file in it.

It is written last, so a directory with an `engine.json` is complete; opening verifies every file before anything runs.
The manifest carries a hash of itself, so that no edited figure (an eos id, a window) changes tokens silently.
Every refusal is one sentence that ends with the command which makes a good engine.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from .again import from_checkpoint, from_engine
from .dtypes import DTYPES, DType
from .errors import EngineError
from .tree_hash import tree_hashes

FORMAT_VERSION = 1
FILE_NAME = "engine.json"


@dataclass(frozen=True)
class ModelInfo:
    """The model as it was cast. `dtype` is the activation dtype; `source` is what the user passed to build-engine."""

    source: str
    architecture: str  # LlamaForCausalLM
    model_type: str  # llama
    num_parameters: int
    dtype: str
    vocab_size: int  # rows of the logits
    num_layers: int
    hidden_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None


@dataclass(frozen=True)
class KVLayer:
    """The KV pool of one attention layer: pages are `[page_size, kv_heads, head_dim]` and `[.., v_head_dim]`."""

    kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int = 0  # 0: all keys
    dtype: str = ""  # of the pages; empty, as in engines of older versions: the activations'


@dataclass(frozen=True)
class HeadInfo:
    """Of an engine that drafts from a target's hidden states. `reads`: which (`step.hidden_states`), in this order.

    guesses: that a run makes for each row at once.
    """

    kind: str  # eagle, eagle3, medusa
    reads: tuple[int, ...]
    target_hidden_size: int
    target_vocab_size: int
    guesses: int = 1


@dataclass(frozen=True)
class BuildRecord:
    """How the engine came to be."""

    time: str  # ISO 8601, UTC
    seconds: float
    phases: dict[str, float] = field(default_factory=dict)  # phase name -> seconds
    num_nodes: dict[str, int] = field(default_factory=dict)  # exported, optimised
    self_check_error: float | None = None  # largest relative error, packed against eager
    versions: dict[str, str] = field(default_factory=dict)  # torch, transformers, onnx
    options: dict[str, Any] = field(default_factory=dict)  # fields of the BuildConfig that were not its defaults


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    hash: str  # tree_hash.py


@dataclass(frozen=True)
class Manifest:
    """The engine directory, described. `files` is filled by `save`; paths in it are relative and use `/`."""

    model: ModelInfo
    kv_layers: tuple[KVLayer, ...]
    target: str
    target_info: dict[str, Any]  # cpu: compiler, flags, or why there are no native kernels
    build: BuildRecord
    quantisation: dict[str, Any] | None = None  # recipe and accuracy, or the checkpoint's scheme
    hidden_states: tuple[int, ...] = ()  # those that the graph gives (`step.hidden_states`)
    head: HeadInfo | None = None
    files: dict[str, FileRecord] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    ingot_version: str = field(default_factory=lambda: version("ingot"))

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V that one token occupies over all layers."""
        return sum(
            self.kv_dtype(layer).itemsize * layer.kv_heads * (layer.head_dim + layer.v_head_dim)
            for layer in self.kv_layers
        )

    def kv_dtype(self, layer: KVLayer) -> DType:
        """Element type of a layer's pages."""
        return DTYPES[layer.dtype or self.model.dtype]

    @property
    def num_bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())

    def save(self, folder: Path, progress: Callable[[int, int], None] | None = None) -> Manifest:
        """Flush and hash every file of `folder`, then write `engine.json`; returns the manifest with `files` filled."""
        folder = Path(folder)
        paths = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        paths.pop(FILE_NAME, None)
        for path in paths.values():
            sync(path)
        hashes = tree_hashes(paths, progress)
        files = {name: {"bytes": path.stat().st_size, "hash": hashes[name]} for name, path in paths.items()}
        fields = asdict(self) | {"files": files}
        text = json.dumps(fields | {"hash": _own_hash(fields)}, indent=1)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")
        sync(folder / FILE_NAME)
        return _parse(json.loads(text))

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        *,
        targets: Collection[str] | None = None,
        verify: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> Manifest:
        """Read and verify the engine in `folder`.

        `targets`: the targets the caller can run, None for any. `verify=False` checks sizes but not hashes.
        Raises EngineError: no engine there, another format version or target, a missing, truncated or damaged file.
        """
        manifest = cls.read(folder, targets)
        manifest.verify(folder, hashes=verify, progress=progress)
        return manifest

    @classmethod
    def read(cls, folder: str | os.PathLike, targets: Collection[str] | None = None) -> Manifest:
        """What `engine.json` says; the other files are not looked at. Raises EngineError as `open` does."""
        folder = Path(folder)
        fields = _read(folder)
        mend = f"build it again with {from_checkpoint(folder, fields)}"
        found = fields.get("format_version")
        if found != FORMAT_VERSION:
            raise EngineError(
                f"{folder} has engine format version {found}, made by ingot {fields.get('ingot_version') or '?'}, "
                f"but this ingot reads version {FORMAT_VERSION}; {mend}."
            )
        if fields.get("hash") != _own_hash(fields):
            raise EngineError(f"{folder / FILE_NAME} was changed after the build (its hash does not match); {mend}.")
        manifest = _parse(fields)
        if targets is not None and manifest.target not in targets:
            raise EngineError(
                f"{folder} was built for the target {manifest.target!r}, but here only {_list(targets)} can run; "
                f"compile it for one with {from_engine(folder, target=sorted(targets)[0])}."
            )
        return manifest

    def verify(
        self,
        folder: str | os.PathLike,
        *,
        without: Collection[str] = (),
        hashes: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Checks size and hash of every file, or the size alone. `without`: files that the caller does not need, or
        checks as it reads them. Raises EngineError: a missing, truncated or damaged file."""
        folder = Path(folder)
        files = [name for name in self.files if name not in without]
        for name in files:
            self.check_size(folder, name)
        if not hashes:
            return
        try:
            found = tree_hashes({name: folder / name for name in files}, progress)
        except OSError as error:
            raise EngineError(
                f"{error.filename} cannot be read ({error.strerror}); build it {self.again(folder)}."
            ) from None
        for name in files:
            self.check_hash(folder, name, found[name])

    def check_size(self, folder: Path, name: str) -> None:
        """Raises EngineError unless the file is there and as long as it was built."""
        path, pure = folder / name, PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise EngineError(
                f"{folder / FILE_NAME} names the file {name!r} outside of the engine; build it {self.again(folder)}."
            )
        if not path.is_file():
            raise EngineError(f"{folder} is incomplete: the file {name} is missing; build it {self.again(folder)}.")
        size, expected = path.stat().st_size, self.files[name].bytes
        if size != expected:
            what = "truncated" if size < expected else "longer than it was built"
            raise EngineError(f"{path} is {what} ({size} bytes, expected {expected}); build it {self.again(folder)}.")

    def check_hash(self, folder: Path, name: str, found: str) -> None:
        """Raises EngineError unless `found` is the hash of the file that was built."""
        if found != self.files[name].hash:
            mend = f"build it {self.again(folder)}"
            raise EngineError(f"{folder / name} is damaged (its hash is not the one that was built); {mend}.")

    def again(self, folder: Path, **changed: Any) -> str:
        """The build of this engine again, but for options that are `changed`, as a sentence says it (again.py)."""
        return f"again with {from_checkpoint(folder, asdict(self), **changed)}"


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(folder: Path) -> dict[str, Any]:
    make = f"make one with `build-engine MODEL -o {folder}`"
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise EngineError(f"{folder} {found}, expected an engine directory; {make}.")
    if not (folder / FILE_NAME).is_file():
        if (folder / "config.json").is_file():
            raise EngineError(f"{folder} is a checkpoint, not an engine; cast it with `build-engine {folder} -o DIR`.")
        raise EngineError(f"{folder} is not an engine (it has no {FILE_NAME}); {make}.")
    try:
        fields = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        if not isinstance(fields, dict) or not isinstance(fields.get("model", {}), dict):
            raise ValueError
    except (ValueError, RecursionError, OSError):
        raise EngineError(f"{folder / FILE_NAME} is damaged (not a readable manifest); {make} --force.") from None
    return fields


def _own_hash(fields: dict[str, Any]) -> str:
    content = {key: value for key, value in fields.items() if key != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parse(fields: dict[str, Any]) -> Manifest:
    """The manifest of verified JSON fields (their hash matched, so their shape is what `save` wrote)."""
    head = fields.get("head")
    model = fields["model"] | {"eos_token_ids": tuple(fields["model"]["eos_token_ids"])}
    return Manifest(
        model=ModelInfo(**model),
        kv_layers=tuple(KVLayer(**layer) for layer in fields["kv_layers"]),
        target=fields["target"],
        target_info=fields["target_info"],
        build=BuildRecord(**fields["build"]),
        quantisation=fields.get("quantisation"),
        hidden_states=tuple(fields.get("hidden_states", ())),
        head=None if head is None else HeadInfo(**head | {"reads": tuple(head["reads"])}),
        files={name: FileRecord(**record) for name, record in fields["files"].items()},
        format_version=fields["format_version"],
        ingot_version=fields["ingot_version"],
    )


def _list(names: Collection[str]) -> str:
    return " and ".join(repr(n) for n in sorted(names))
