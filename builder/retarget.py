"""An engine for another GPU or target, from the engine itself: plan and kernels are made again, the rest stays.

The sizes and options that it was built with stay, too, unless others are given.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from ..engines.errors import BuildError, EngineError
from ..engines.manifest import Manifest
from ..engines.weights import load_graph
from ..engines.writer import engine_directory
from ..plugins.gpu import Gpu
from . import OF_QUANTISED, BuildConfig
from .hidden_states import check_target
from .targets import FOR_TARGETS, NOBODY, Audience, target_of
from .targets import check_options as check_target_options

OF_THE_CHECKPOINT = ("dtype", "quant", "kv_cache", *OF_QUANTISED, "hidden_states", "draft_for")


def check_options(config: BuildConfig) -> None:
    """Raises BuildError: options that only a build from the checkpoint can follow."""
    if given := config.given(OF_THE_CHECKPOINT):
        raise BuildError(
            f"{given[0]} was given with --retarget, which compiles {config.out} anew; "
            "leave it out, or build from the checkpoint."
        )


def as_built(config: BuildConfig, given: Collection[str], on_note: Callable[[str], None] | None = None) -> BuildConfig:
    """The config with what the engine at `config.out` was built with: its target, and what its manifest says of options
    that the target knows. What is `given`, names of fields, stays; where there is no GPU at hand the engine's own kind
    of GPU is kept. `on_note` hears in one line what was taken.

    Raises EngineError: no engine there.
    """
    manifest = Manifest.read(Path(config.out))
    recorded = {"target": manifest.target} | manifest.target_info
    target = config.target if "target" in given else manifest.target
    known = [name for name, targets in FOR_TARGETS.items() if target in targets]
    own = {name: recorded[name] for name in ("target", *known) if name in recorded and name not in given}
    if "gpu_arch" in known and "gpu_arch" not in given and "capability" in recorded and not _gpu_at_hand():
        own["gpu_arch"] = recorded["capability"]
    if on_note and own:
        on_note(f"as {config.out} was built: {', '.join(f'{name} {value}' for name, value in own.items())}.")
    return replace(config, **own)


def retarget(folder: Path, config: BuildConfig, audience: Audience = NOBODY) -> Manifest:
    """Compile the graph of the engine in `folder` anew, for `config.target` and what is at hand; the checkpoint is not
    needed. Until it is done the old engine stays as it is; weights are linked, not copied.

    Raises EngineError: no engine there, or a damaged one; BuildError: the target cannot be compiled for.
    """
    start = time.perf_counter()
    check_target_options(config)
    manifest = Manifest.open(folder)
    if manifest.head or manifest.hidden_states:
        check_target(config.target, f"{folder}, which is {'a head' if manifest.head else 'a target of heads'},")
    with target_of(config.target).begin(config, audience) as compile, engine_directory(folder, force=True) as fresh:
        for name in manifest.files:
            if name.partition("/")[0] != manifest.target:
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                _link(folder / name, fresh / name)
        info = compile(load_graph(fresh), manifest.model, fresh, manifest.head)
        seconds = round(time.perf_counter() - start, 3)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        options = {name: value for name, value in manifest.build.options.items() if name in OF_THE_CHECKPOINT}
        record = replace(
            manifest.build, time=now, seconds=seconds, phases={f"compile for {config.target}": seconds},
            options=options | config.options(),
        )  # fmt: skip
        return replace(manifest, target=config.target, target_info=info, build=record).save(fresh)


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:  # not every file system has links
        shutil.copyfile(file, to)


def _gpu_at_hand() -> bool:
    try:
        Gpu()
    except EngineError:
        return False
    return True
