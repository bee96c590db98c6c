"""A CUDA driver that has no GPU: memory is the host's, copies are made at once, kernels do nothing.

What `cuda.bindings.driver` would answer can be changed call by call: `failing["cuMemAlloc"] = 2` is out of memory.
"""

import ctypes
from collections import Counter
from types import SimpleNamespace

import numpy as np

NAMES = {2: b"out of memory", 100: b"no CUDA-capable device is detected", 209: b"no kernel image is available",
         700: b"an illegal memory access was encountered"}  # fmt: skip
ATTRIBUTES = {"COMPUTE_CAPABILITY_MAJOR": 9, "COMPUTE_CAPABILITY_MINOR": 0, "MULTIPROCESSOR_COUNT": 132,
              "L2_CACHE_SIZE": 50 << 20}  # fmt: skip


class FakeDriver:
    """failing: status of a call by its name, or a function of how often it was called before, or an exception.

    dead: every call fails with this status from now on, as after a fault in a kernel. calls: how often each was called.
    """

    CUresult = CUstreamCaptureMode = int
    CUlaunchConfig = CUlaunchAttribute = lambda self: SimpleNamespace(value=SimpleNamespace())
    CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6)
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self, memory=256 << 20, version=13000, **attributes):
        self.CUdevice_attribute = SimpleNamespace(**{f"CU_DEVICE_ATTRIBUTE_{name}": name for name in ATTRIBUTES})
        self.total, self.version, self.attributes = memory, version, ATTRIBUTES | attributes
        self.failing, self.dead, self.calls = {}, 0, Counter()
        self.memory, self.pinned, self.handles = {}, {}, {}
        self.used, self.next = 0, 1000

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments):
            before = self.calls[name]
            self.calls[name] += 1
            status = self.failing.get(name, 0)
            status = status(before) if callable(status) else status
            if isinstance(status, Exception):
                raise status
            status = self.dead or status
            if status and name not in ("cuGetErrorString", "cuInit"):
                return (status, 0)
            values = getattr(self, f"_{name}", self._nothing)(*arguments)
            values = values if isinstance(values, tuple) else (values,) if values is not None else ()
            return (status, *values)

        return call

    @property
    def left(self):
        """What has been made and not been given back."""
        return [*self.memory, *self.pinned, *self.handles]

    def read(self, address, num_bytes):
        return ctypes.string_at(address, num_bytes)

    # -- calls ---------------------------------------------------------------------------------------------------------

    @staticmethod
    def _nothing(*_):
        return None

    def _cuGetErrorString(self, status):
        return NAMES.get(status, b"unknown error")

    def _cuDriverGetVersion(self):
        return self.version

    def _cuDeviceGetCount(self):
        return 1

    def _cuDeviceGet(self, index):
        return index

    def _cuDevicePrimaryCtxRetain(self, device):
        return 7

    def _cuDeviceGetAttribute(self, name, device):
        return self.attributes[name]

    def _cuDeviceGetName(self, size, device):
        return b"NVIDIA Fake\0\0"

    def _cuMemGetInfo(self):
        return self.total - self.used, self.total

    def _cuMemAlloc(self, num_bytes):
        memory = np.zeros(num_bytes, np.uint8)
        self.memory[memory.ctypes.data] = memory
        self.used += num_bytes
        return memory.ctypes.data

    def _cuMemFree(self, address):
        self.used -= self.memory.pop(address).nbytes

    def _cuMemHostAlloc(self, num_bytes, flags):
        memory = np.zeros(num_bytes, np.uint8)
        self.pinned[memory.ctypes.data] = memory
        return memory.ctypes.data

    def _cuMemFreeHost(self, address):
        del self.pinned[address]

    def _cuMemcpyHtoDAsync(self, target, source, num_bytes, stream):
        ctypes.memmove(target, source, num_bytes)

    _cuMemcpyDtoHAsync = _cuMemcpyHtoDAsync

    def _cuMemsetD8Async(self, address, byte, num_bytes, stream):
        ctypes.memset(address, byte, num_bytes)

    def _handle(self, *_):
        self.next += 1
        self.handles[self.next] = True
        return self.next

    def _forget(self, handle):
        del self.handles[handle]

    _cuStreamCreate = _cuEventCreate = _cuLibraryLoadData = _cuStreamEndCapture = _cuGraphInstantiate = _handle
    _cuStreamDestroy = _cuEventDestroy = _cuLibraryUnload = _cuGraphDestroy = _cuGraphExecDestroy = _forget

    def _cuLibraryGetKernel(self, library, symbol):
        return library

    def _cuKernelGetFunction(self, kernel):
        return kernel

    def _cuEventElapsedTime(self, start, end):
        return 1.0
