"""What a machine refuses is one sentence, before and after a fault; nothing is left behind. The driver is a fake."""

import sys

import pytest
from fake_driver import FakeDriver
from ingot.engines.errors import EngineError
from ingot.plugins import gpu as gpus
from ingot.plugins.gpu import Gpu, GpuFault


@pytest.fixture
def driver(monkeypatch):
    driver = FakeDriver()
    monkeypatch.setattr(gpus, "_driver", lambda: driver)
    return driver


def test_no_cuda_python(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EngineError, match=r"cuda-python.*install it with `pip install 'ingot\[cuda\]'`"):
        Gpu()


def test_a_gpu(driver):
    gpu = Gpu()
    assert gpu.name == "NVIDIA Fake" and (gpu.device.capability, gpu.device.num_sms) == (90, 132)
    assert gpu.memory() == (256 << 20, 256 << 20)


@pytest.mark.parametrize(
    "call, status, words",
    [
        ("cuInit", RuntimeError("libcuda.so.1 cannot be opened"), "no NVIDIA driver was found .*libcuda"),
        ("cuInit", 100, "does not start .no CUDA-capable device is detected"),
        ("cuDevicePrimaryCtxRetain", 2, "no memory left"),
        ("cuDevicePrimaryCtxRetain", 46, "cannot be used: .*CUDA error 46.*nvidia-smi"),
        ("cuDeviceGetAttribute", RuntimeError('Function "cuX" not found'), "newer than the NVIDIA driver .*cuX"),
    ],
)
def test_a_machine_that_cannot(driver, call, status, words):
    driver.failing[call] = status
    with pytest.raises(EngineError, match=words):
        Gpu()


def test_too_old(driver):
    driver.version = 11080
    with pytest.raises(EngineError, match=r"driver is of CUDA 11\.8, but the cuda target needs 12\.3 or newer"):
        Gpu()
    driver.version, driver.attributes = 13000, driver.attributes | {"COMPUTE_CAPABILITY_MAJOR": 7}
    with pytest.raises(EngineError, match=r"capability 7\.0; the cuda target needs 8\.0"):
        Gpu()


def test_a_gpu_that_is_not_there(driver):
    with pytest.raises(EngineError, match="GPU number 3 was asked for, but there are 1; see CUDA_VISIBLE_DEVICES"):
        Gpu(3)


def test_a_bug_of_ours_stays_one(driver):
    driver.failing["cuDeviceGetAttribute"] = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        Gpu()


def test_out_of_memory_anywhere(driver):
    gpu = Gpu()
    driver.failing = dict.fromkeys(
        ("cuMemAlloc", "cuMemHostAlloc", "cuStreamCreate", "cuEventCreate", "cuLibraryLoadData", "cuGraphInstantiate",
         "cuGraphLaunch"), 2)  # fmt: skip
    with pytest.raises(EngineError, match=r"the weights need 3\.00 GiB, but NVIDIA Fake has 0\.25 GiB free of 0\.25"):
        gpu.allocate(3 << 30, "the weights")
    with pytest.raises(EngineError, match=r"the host has no 8\.0 MiB.*ulimit"):
        gpu.pinned(8 << 20)
    for run in (
        gpu.stream, gpu.event, lambda: gpu.load(b"", "kernel", 4, 0, False), lambda: gpu.capture(lambda: None, 1),
        lambda: gpu.replay(1, 1),
    ):  # fmt: skip
        with pytest.raises(EngineError, match="NVIDIA Fake has no memory left"):
            run()


@pytest.mark.parametrize("status", gpus.NOT_LOADABLE)
def test_a_cubin_for_another_gpu_or_a_newer_driver(driver, status):
    gpu, driver.failing = Gpu(), {"cuLibraryLoadData": status}
    with pytest.raises(EngineError, match=r"driver \(CUDA 13\.0\) cannot load the kernel rms_norm.*--retarget"):
        gpu.load(b"", "rms_norm", 4, 0, False)


def test_all_of_it_is_given_back(driver):
    gpu = Gpu()
    address, array, graph = gpu.allocate(100, "x"), gpu.pinned(100), gpu.capture(lambda: None, gpu.stream())
    gpu.allocate(100, "y"), gpu.pinned(10), gpu.event(), gpu.load(b"", "kernel", 4, 64 << 10, True)
    assert len(driver.left) == 8, "the captured graph itself is gone once it is instantiated"
    gpu.free(address), gpu.unpin(array), gpu.discard(graph)
    gpu.release()
    gpu.release()
    assert not driver.left and not driver.used


def test_a_dead_context(driver):
    gpu = Gpu()
    gpu.allocate(100, "x"), gpu.pinned(100), gpu.stream()
    driver.dead = 700
    with pytest.raises(GpuFault, match="an illegal memory access was encountered .CUDA error 700") as fault:
        gpu.synchronise(1)
    assert not fault.value.refused and "again" in fault.value.mend
    gpu.release()  # does not raise


def test_what_fails_while_captured_is_what_is_raised(driver):
    gpu = Gpu()
    driver.failing["cuStreamEndCapture"] = 901

    def run():
        raise GpuFault("too many blocks", 701)

    with pytest.raises(GpuFault, match="too many blocks") as fault:
        gpu.capture(run, 1)
    assert fault.value.refused
