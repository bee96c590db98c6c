"""The targets an optimised graph can be compiled for: one module each, with a context manager `begin`.

    with target_of("cpu").begin(config) as compile:  # refuses what cannot be compiled here; starts what needs no graph
        ...
        target_info = compile(graph, model, folder)

`folder` already holds the graph and its weights; a target adds a folder of its own name, with what only it can run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import onnx_ir as ir

from ...engines.errors import BuildError
from ...engines.manifest import HeadInfo, ModelInfo

if TYPE_CHECKING:
    from .. import BuildConfig


# options of a build that some targets have no use for, and those that have
FOR_TARGETS = {
    "max_num_seqs": ("cuda", "tensorrt"),
    "max_num_batched_tokens": ("cuda", "tensorrt"),
    "page_size": ("cuda", "tensorrt"),
    "max_draft_tokens": ("cuda",),
    "gpu_arch": ("cuda", "tensorrt"),
    "tensorrt_plugins": ("tensorrt",),
}


def check_options(config: BuildConfig) -> None:
    """Raises BuildError: an option that the target cannot follow, or sizes that no step could have."""
    for name, targets in FOR_TARGETS.items():
        if config.target not in targets and (given := config.given([name])):
            serve = ", or give it to `ingot serve`" if config.target == "cpu" and name.startswith("max_num_") else ""
            raise BuildError(
                f"{given[0]} is for --target {' or '.join(targets)}, and this engine is for {config.target}; "
                f"leave it out{serve}."
            )
    if config.target != "cpu" and config.max_num_batched_tokens < config.max_num_seqs:
        raise BuildError(
            f"--max-num-batched-tokens is {config.max_num_batched_tokens}, expected at least --max-num-seqs, which is "
            f"{config.max_num_seqs}: every sequence of a step has a token; raise the one or lower the other."
        )


@dataclass(frozen=True)
class Audience:
    """Who hears how compiling goes on: `progress(done, all)` in steps of any size, `note(sentence)`."""

    progress: Callable[[int, int], None] = lambda done, total: None
    note: Callable[[str], None] = lambda sentence: None


NOBODY = Audience()


def audience_of(
    progress: Callable[[int, int], None] | None = None, note: Callable[[str], None] | None = None
) -> Audience:
    """Of those that listen."""
    return Audience(progress or NOBODY.progress, note or NOBODY.note)


class Compile(Protocol):
    """Writes what the target runs of a graph into the engine's folder; returns what the manifest says about it.

    head: of the engine of a head.
    """

    def __call__(
        self, graph: ir.Model, model: ModelInfo, folder: Path, head: HeadInfo | None = None
    ) -> dict[str, Any]: ...


class Target(Protocol):
    """A module of this folder."""

    def begin(self, config: BuildConfig, audience: Audience = NOBODY) -> AbstractContextManager[Compile]: ...


def target_of(name: str) -> Target:
    """The module of a target; BuildError for a name that is not one."""
    match name:
        case "cpu":
            from . import cpu

            return cpu
        case "cuda":
            from . import cuda

            return cuda
        case "tensorrt":
            from . import tensorrt

            return tensorrt
        case _:
            raise BuildError(
                f"there is no target {name!r}, expected 'cpu', 'cuda' or 'tensorrt'; pass one as `--target`."
            )
