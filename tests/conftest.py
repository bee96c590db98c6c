"""Shared fixtures: engines of the embedded demo checkpoints, built once a session; tests marked `gpu` need one."""

import os
from pathlib import Path

# OpenMP threads beyond the processors spin while they wait for each other: workers of pytest and the servers that
# tests start share them. Read when torch is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "engines" / "demo"

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is imported

# shared machines: a deadline per example would fail on load, not on mistakes
settings.register_profile("ingot", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ingot")


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu") or item.get_closest_marker("tensorrt")]
    if marked:
        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def _build(name: str, dtype: str, folder: Path) -> Path:
    from ingot import BuildConfig, build_engine

    build_engine(BuildConfig(model=str(DEMO / name), out=str(folder), dtype=dtype))
    return folder


@pytest.fixture(scope="session")
def demo_engine_fp32(tmp_path_factory) -> Path:
    """pycoder-14m in float32."""
    return _build("pycoder-14m", "float32", tmp_path_factory.mktemp("engines") / "pycoder-fp32")


@pytest.fixture(scope="session")
def demo_engine(tmp_path_factory) -> Path:
    """pycoder-14m in bfloat16, as the checkpoint is stored."""
    return _build("pycoder-14m", "bfloat16", tmp_path_factory.mktemp("engines") / "pycoder")
