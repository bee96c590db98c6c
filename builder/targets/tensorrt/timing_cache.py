"""TensorRT's timing cache on disk, for the modules that time layers on the GPU at hand.

One file for each module, version and compute capability; TensorRT itself refuses what does not fit. No fault of the
disk fails a build.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from ....plugins.tensorrt import api as trt
from ....plugins.tensorrt import flavour
from ..timing_cache import cache_folder


@dataclass
class KeptCache:
    """The cache in `path`."""

    path: Path

    @classmethod
    def of(cls, capability: int) -> KeptCache:
        return cls(cache_folder() / "tensorrt" / "{}-{}-sm{}.cache".format(*flavour.about(), capability))

    def give_to(self, config: trt.IBuilderConfig) -> None:
        """What earlier builds timed."""
        try:
            known = self.path.read_bytes()
        except OSError:
            known = b""
        config.set_timing_cache(config.create_timing_cache(known), False)

    def take_from(self, config: trt.IBuilderConfig) -> None:
        """Keeps what this build added."""
        cache = config.get_timing_cache()
        if cache is None:
            return
        partial = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(bytes(memoryview(cache.serialize())))  # type: ignore[arg-type]
            os.replace(partial, self.path)
        except OSError as error:
            warnings.warn(f"TensorRT's timings are not kept: {error}", stacklevel=2)
