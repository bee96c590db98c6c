"""Times of tactics on disk, so that what one build timed the next does not time again.

An entry is one site; its name is a hash of everything that its times depend on: the site with its device, the GPU's
name, driver, Triton, cuBLASLt, and the sources of kernels, tactics and timer. So nothing is ever out of date, it is
only not found. Invariant: an entry that is damaged or of other candidates counts as none, and no fault of the disk
fails a build.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from ...plugins import cublas
from ...plugins.gpu import Gpu
from ...plugins.tactic import Site

HERE = Path(__file__).parent
PLUGINS = HERE.parents[1] / "plugins"
TIMING = "agreement", "cubin", "operands", "steps", "timing"  # modules on which times depend
DRIVER = Path("/proc/driver/nvidia/version")  # its first line names the driver's release

Times = Sequence[float | None]  # microseconds of each candidate, None: it cannot run here


class TimingCache:
    """Times by site in `folder`, valid under `conditions`; num_hits of num_sites that were asked for were in it."""

    def __init__(self, folder: Path, conditions: Mapping[str, Any]):
        self._folder, self._conditions = folder, dict(conditions)
        self._warned = False
        self.num_sites = self.num_hits = 0

    @classmethod
    def of(cls, gpu: Gpu) -> TimingCache | None:
        """The user's cache for timings on `gpu`; None where there is no place for one."""
        try:
            return cls(cache_folder() / "tactics", conditions(gpu))
        except (OSError, RuntimeError) as error:  # sources that cannot be read, a user without a home
            warnings.warn(f"timings are not cached: {error}", stacklevel=2)
            return None

    def read(self, site: Site, names: Sequence[str]) -> Times | None:
        """What the candidates of these names took, None if that is not known."""
        key = self._key(site)
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(f"the timing cache cannot be read: {error}")
            return None
        return _times(data, key, names)

    def write(self, site: Site, names: Sequence[str], times: Times) -> None:
        """Keep times; whoever reads meanwhile sees the old entry or the new one."""
        key = self._key(site)
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(dir=path.parent, suffix=".part")
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    json.dump({"key": key, "times": dict(zip(names, times, strict=True))}, file)
                os.replace(partial, path)
            except BaseException:
                os.unlink(partial)
                raise
        except OSError as error:
            self._warn(f"timings are not cached: {error}")

    def _key(self, site: Site) -> Any:
        # as JSON brings it back
        return json.loads(json.dumps({"conditions": self._conditions, "site": asdict(site)}, default=str))

    def _path(self, key: Any) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self._folder / digest[:2] / f"{digest[2:32]}.json"

    def _warn(self, message: str) -> None:
        if not self._warned:
            warnings.warn(message, stacklevel=3)
        self._warned = True


def cache_folder() -> Path:
    """`$INGOT_CACHE`, else `ingot` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("INGOT_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "ingot"


def conditions(gpu: Gpu) -> dict[str, Any]:
    """What all times of a build depend on besides the site."""
    import triton

    return {
        "gpu": gpu.name, "driver": _driver_release(), "triton": triton.__version__,
        "cublas": None if cublas.why_missing() else cublas.version(), "sources": sources_hash(),
    }  # fmt: skip


@cache
def sources_hash() -> str:
    """Of the files that define kernels, tactics and how they are timed and compared."""
    digest = hashlib.sha256()
    for path in [*sorted(PLUGINS.rglob("*.py")), *(HERE / f"{name}.py" for name in TIMING)]:
        data = path.read_bytes()
        digest.update(f"{path.relative_to(PLUGINS.parent).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _driver_release() -> str:
    try:
        return DRIVER.read_text(encoding="utf-8").partition("\n")[0]
    except OSError:  # not on Linux
        return ""


def _times(data: bytes, key: Any, names: Sequence[str]) -> Times | None:
    """The times in an entry, None if it is damaged or of other candidates."""
    try:
        entry = json.loads(data)
    except (ValueError, RecursionError):
        return None
    match entry:
        case {"key": stored, "times": dict(times)} if stored == key and list(times) == list(names):
            known = [us for us in times.values() if us is not None]
            sound = all(isinstance(us, float) and 0 < us < math.inf for us in known)
            return list(times.values()) if known and sound else None
    return None
