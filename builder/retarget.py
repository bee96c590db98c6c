"""An engine for another GPU or target, from the engine itself: plan and kernels are made again, the rest stays."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from ..engines.errors import BuildError
from ..engines.manifest import Manifest
from ..engines.weights import load_graph
from ..engines.writer import engine_directory
from . import BuildConfig
from .hidden_states import check_target
from .targets import NOBODY, Audience, target_of

OF_THE_CHECKPOINT = (
    "dtype", "quant", "kv_cache", "scales", "calibration_data", "calibration_tokens", "calibration_width",
    "calibration_device", "accept_accuracy", "hidden_states", "draft_for",
)  # fmt: skip


def check_options(config: BuildConfig) -> None:
    """Raises BuildError: options that only a build from the checkpoint can follow."""
    plain = BuildConfig(config.model, config.out)
    if given := [name for name in OF_THE_CHECKPOINT if getattr(config, name) != getattr(plain, name)]:
        raise BuildError(
            f"--{given[0].replace('_', '-')} was given with --retarget, which compiles {config.out} anew; "
            "leave it out, or build from the checkpoint."
        )


def retarget(folder: Path, config: BuildConfig, audience: Audience = NOBODY) -> Manifest:
    """Compile the graph of the engine in `folder` anew, for `config.target` and what is at hand; the checkpoint is not
    needed. Until it is done the old engine stays as it is; weights are linked, not copied.

    Raises EngineError: no engine there, or a damaged one; BuildError: the target cannot be compiled for.
    """
    start = time.perf_counter()
    manifest = Manifest.open(folder)
    if manifest.head or manifest.hidden_states:
        check_target(config.target, f"{folder}, which is {'a head' if manifest.head else 'a target of heads'},")
    with target_of(config.target).begin(config, audience) as compile, engine_directory(folder, force=True) as fresh:
        for name in manifest.files:
            if name.partition("/")[0] != manifest.target:
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(folder / name, fresh / name)
        info = compile(load_graph(fresh), manifest.model, fresh, manifest.head)
        seconds = round(time.perf_counter() - start, 3)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record = replace(manifest.build, time=now, seconds=seconds, phases={f"compile for {config.target}": seconds})
        return replace(manifest, target=config.target, target_info=info, build=record).save(fresh)
