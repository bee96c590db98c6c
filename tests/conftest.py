"""Shared fixtures: engines of the embedded demo checkpoints, built once a run; tests marked `gpu` need one."""

import os
import random
import signal
from pathlib import Path

# OpenMP threads beyond the processors spin while they wait for each other: workers of pytest and the servers that
# tests start share them. Read when torch is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import pytest  # noqa: E402
import torch  # noqa: E402
from cached_compiler import install  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from made_once import made_once  # noqa: E402

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "engines" / "demo"

# a shell starts what it runs in the background without Ctrl-C, and tests send that to processes which inherit it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is imported

# shared machines: a deadline per example would fail on load, not on mistakes
settings.register_profile("ingot", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ingot")


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="of the random inputs of each test: a test that fails shows its own")


@pytest.fixture(autouse=True)
def fresh_inputs(request):
    """Random inputs that are new each time, and the same again with `--seed`."""
    given = request.config.getoption("seed")
    seed = random.SystemRandom().getrandbits(32) if given is None else given
    print("seed", seed)  # shown when a test fails
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` chooses
def pytest_collection_modifyitems(items):
    if not no_gpu():  # where there is one, all tests of kernels run on it
        for item in items:
            if item.path.stem.endswith("_gpu"):
                item.add_marker(pytest.mark.gpu)
    for mark, lacking in (("gpu", no_gpu), ("tensorrt", no_tensorrt)):
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and (reason := lacking()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


# after which no call of a process to the GPU succeeds (CUDA driver API: errors that leave it in an inconsistent state)
FAULTS = ("illegal memory access", "misaligned address", "illegal instruction", "launch failure", "device-side assert")
faulty: list[str] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and not no_gpu() and any(fault in str(report.longrepr) for fault in FAULTS):
        faulty.append(item.nodeid)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logfinish(nodeid):
    """A worker of pytest's whose test broke its context ends with it; with --dist load a new one takes what is left."""
    if faulty and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)


def no_gpu() -> str:
    """Why tests marked `gpu` cannot run here; nothing: they can."""
    return "" if torch.cuda.is_available() else "needs an NVIDIA GPU"


def no_tensorrt() -> str:
    """The same of those marked `tensorrt`, which run engines."""
    if reason := no_gpu():
        return reason
    from ingot.engines.errors import EngineError
    from ingot.plugins.tensorrt import api, flavour

    try:
        api.module()
    except EngineError as error:
        return str(error)
    major, minor = torch.cuda.get_device_capability()
    known = flavour.capabilities()
    return f"{flavour.about()[0]} does not run on {major}.{minor}" if known and 10 * major + minor not in known else ""


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder of this run that all workers have: their temporary folders have one parent."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_compilation_of_the_kernels(shared):
    install(shared / "compiled")


@pytest.fixture(scope="session", autouse=True)
def one_export_of_a_config():
    """What an export gives depends on class, config and dtype alone: each is traced, for seconds, once a worker."""
    from ingot.builder import export as module

    trace, kept = module.trace, {}

    def once(step, kind, outputs, *rest, **options):
        if not isinstance(step, module._Step):  # a head's
            return trace(step, kind, outputs, *rest, **options)
        model = step.model
        key = type(model), model.config.to_json_string(use_diff=False), model.dtype, tuple(outputs)
        if key not in kept:
            kept[key] = trace(step, kind, outputs, *rest, **options)
        return kept[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "trace", once)
        yield


def _build(name: str, dtype: str, shared: Path) -> Path:
    from ingot import BuildConfig, build_engine

    def make(out: Path) -> None:
        build_engine(BuildConfig(model=str(DEMO / name), out=str(out), dtype=dtype))

    return made_once(shared / f"{name}-{dtype}", make)


@pytest.fixture(scope="session")
def demo_engine_fp32(shared) -> Path:
    """pycoder-14m in float32. Read only, as all engines of the session are."""
    return _build("pycoder-14m", "float32", shared)


@pytest.fixture(scope="session")
def demo_engine(shared) -> Path:
    """pycoder-14m in bfloat16, as the checkpoint is stored."""
    return _build("pycoder-14m", "bfloat16", shared)
