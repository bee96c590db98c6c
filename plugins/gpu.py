"""An NVIDIA GPU through the driver (cuda-python): memory, cubins, launches, graphs. No torch, no compiler.

Builder and runtime share it: one times tactics, the other replays plans. Every failure is one sentence: EngineError
for what this machine cannot do, GpuFault for what the driver reports of work that was under way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from ..engines.errors import EngineError
from ..engines.extras import pip_install
from .tactic import Device

Grid = tuple[int, int, int]
Address = ctypes.c_void_p  # a pointer among the arguments of a launch
_SCALARS: dict[type, Any] = {int: ctypes.c_int32, float: ctypes.c_float}
OLDEST_DRIVER = 12030  # CUDA 12.3: from it on graphs hold launches that depend on each other programmatically
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
INVALID_VALUE, LAUNCH_OUT_OF_RESOURCES, NOT_SUPPORTED = 1, 701, 801
# INVALID_IMAGE, NO_BINARY_FOR_GPU, INVALID_PTX, UNSUPPORTED_PTX_VERSION, INVALID_SOURCE, SYMBOL_NOT_FOUND
NOT_LOADABLE = (200, 209, 218, 222, 300, 500)


class Launchable(Protocol):
    """What a launch of a plan runs: a kernel or a product."""

    def launch(
        self, grid: Grid, stream: int, arguments: Sequence[int | float | Address], *, apart: bool = False
    ) -> None: ...


class GpuFault(RuntimeError):
    """The driver reported an error; after a fault in a kernel nothing runs in this process any more.

    status: CUDA's number of it. mend: what the user can do.
    """

    mend = "start the process again"

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status

    @property
    def refused(self) -> bool:
        """A launch that this GPU does not take; nothing has run, and others may follow."""
        return self.status in (INVALID_VALUE, LAUNCH_OUT_OF_RESOURCES, NOT_SUPPORTED)


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise EngineError(
            f"the cuda target runs through cuda-python ({error}); install it with {pip_install('cuda')}."
        ) from None
    return driver


@contextmanager
def opening() -> Iterator[None]:
    """What the driver refuses while something is set up is the machine's matter, no bug and no fault: EngineError."""
    try:
        yield
    except GpuFault as error:
        raise EngineError(f"the GPU cannot be used: {error}; see `nvidia-smi`.") from error
    except RuntimeError as error:
        if "not found" not in str(error):  # which is how the bindings say that the driver lacks a function
            raise
        raise EngineError(
            f"cuda-python is newer than the NVIDIA driver ({error}); update the driver, or install the cuda-python of "
            "the driver's CUDA version."
        ) from error


class Gpu:
    """Device number `index`, its primary context current in the calling thread.

    Raises EngineError: no cuda-python, no driver or one too old, no such GPU, one older than compute capability 8.0.
    """

    def __init__(self, index: int = 0):
        self._cuda = _driver()
        self._owned: dict[
            tuple[str, int], Any
        ] = {}  # (what destroys it, number) -> handle, of all that `release` frees
        self.name = f"GPU number {index}"
        try:
            status = int(self._cuda.cuInit(0)[0])
        except Exception as error:  # the driver library itself cannot be loaded
            raise EngineError(f"no NVIDIA driver was found ({error}); the cuda target needs one.") from None
        if status:
            raise EngineError(f"the NVIDIA driver does not start ({self._text(status)}); the cuda target needs it.")
        with opening():
            self._open(index)

    def _open(self, index: int) -> None:
        version = self._check(self._cuda.cuDriverGetVersion())
        if version < OLDEST_DRIVER:
            raise EngineError(
                f"the NVIDIA driver is of CUDA {_dotted(version)}, but the cuda target needs {_dotted(OLDEST_DRIVER)} "
                "or newer; update the driver."
            )
        self._version = version
        count = self._check(self._cuda.cuDeviceGetCount())
        if index >= count:
            raise EngineError(f"GPU number {index} was asked for, but there are {count}; see CUDA_VISIBLE_DEVICES.")
        self._device = self._check(self._cuda.cuDeviceGet(index))
        self._context = self._check(self._cuda.cuDevicePrimaryCtxRetain(self._device))
        self.use()
        major, minor = self._attribute("COMPUTE_CAPABILITY_MAJOR"), self._attribute("COMPUTE_CAPABILITY_MINOR")
        self.name = self._check(self._cuda.cuDeviceGetName(128, self._device)).split(b"\0")[0].decode()
        self.device = Device(10 * major + minor, self._attribute("MULTIPROCESSOR_COUNT"))
        if major < 8:
            raise EngineError(
                f"{self.name} has compute capability {major}.{minor}; the cuda target needs 8.0 or newer."
            )

    def release(self) -> None:
        """Frees all memory, streams, graphs and kernels that were made here; a second call does nothing.

        Never raises: after a fault the context is dead, and all of it with it. The context itself stays for the
        process, since libraries hold on to it.
        """
        self._cuda.cuCtxSetCurrent(self._context)
        while self._owned:
            (destroy, _), handle = self._owned.popitem()
            getattr(self._cuda, destroy)(handle)

    def _own(self, destroy: str, handle: Any) -> Any:
        self._owned[destroy, int(handle)] = handle
        return handle

    def _destroy(self, destroy: str, handle: Any) -> None:
        self._owned.pop((destroy, int(handle)), None)
        self._check(getattr(self._cuda, destroy)(handle))

    def use(self) -> None:
        """Makes the context current: once in every thread that calls anything here."""
        self._check(self._cuda.cuCtxSetCurrent(self._context))

    @cached_property
    def l2_bytes(self) -> int:
        return self._attribute("L2_CACHE_SIZE")

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""
        return self._check(self._cuda.cuMemGetInfo())

    def allocate(self, num_bytes: int, what: str) -> int:
        """Address of device memory. EngineError with the numbers if there is not enough; `what` it is for."""
        status, address = self._cuda.cuMemAlloc(max(1, num_bytes))
        if int(status) == OUT_OF_MEMORY:
            free, total = self.memory()
            raise EngineError(
                f"{what} need {num_bytes / 2**30:.2f} GiB, but {self.name} has {free / 2**30:.2f} GiB free of "
                f"{total / 2**30:.2f}; free some of its memory or ask for less."
            )
        self._check((status,))
        return int(self._own("cuMemFree", address))

    def free(self, address: int) -> None:
        self._destroy("cuMemFree", address)

    def pinned(self, num_bytes: int) -> np.ndarray:
        """[num_bytes] uint8 of host memory that the GPU copies from and to directly; kept until `unpin`."""
        status, address = self._cuda.cuMemHostAlloc(max(1, num_bytes), 0)
        if int(status) == OUT_OF_MEMORY:
            raise EngineError(
                f"the host has no {num_bytes / 2**20:.1f} MiB of memory left that {self.name} could copy from; free "
                "some, or raise the limit of locked memory (`ulimit -l`)."
            )
        self._check((status,))
        address = int(self._own("cuMemFreeHost", address))
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))

    def unpin(self, array: np.ndarray) -> None:
        """Gives pinned memory back; the array must not be used any more."""
        self._destroy("cuMemFreeHost", array.ctypes.data)

    def stream(self) -> int:
        stream = self._check(self._cuda.cuStreamCreate(1))  # non-blocking: apart from the default stream
        return int(self._own("cuStreamDestroy", stream))

    def synchronise(self, stream: int) -> None:
        self._check(self._cuda.cuStreamSynchronize(stream))

    def upload(self, address: int, source: np.ndarray, stream: int) -> None:
        """Enqueues a copy to the device; `source` is pinned, contiguous and stays as it is until the copy is done."""
        self._check(self._cuda.cuMemcpyHtoDAsync(address, source.ctypes.data, source.nbytes, stream))

    def download(self, target: np.ndarray, address: int, stream: int) -> None:
        """Enqueues a copy into pinned, contiguous memory."""
        self._check(self._cuda.cuMemcpyDtoHAsync(target.ctypes.data, address, target.nbytes, stream))

    def fill(self, address: int, num_bytes: int, byte: int, stream: int) -> None:
        self._check(self._cuda.cuMemsetD8Async(address, byte, num_bytes, stream))

    def event(self, timed: bool = False) -> int:
        return int(self._own("cuEventDestroy", self._check(self._cuda.cuEventCreate(0 if timed else 2))))

    def record(self, event: int, stream: int) -> None:
        self._check(self._cuda.cuEventRecord(event, stream))

    def wait(self, event: int) -> None:
        """Blocks until the event has passed."""
        self._check(self._cuda.cuEventSynchronize(event))

    def milliseconds(self, start: int, end: int) -> float:
        return self._check(self._cuda.cuEventElapsedTime(start, end))

    def load(self, cubin: bytes, symbol: str, num_warps: int, shared: int, pdl: bool) -> Function:
        """A kernel of a cubin, ready to be launched. EngineError if this GPU or its driver cannot run it."""
        status, library = self._cuda.cuLibraryLoadData(cubin, None, None, 0, None, None, 0)
        if int(status) in NOT_LOADABLE:
            raise EngineError(
                f"{self.name} with its driver (CUDA {_dotted(self._version)}) cannot load the kernel {symbol} "
                f"({self._text(int(status))}); update the driver, or compile the engine here with "
                "`ingot build --retarget DIR --target cuda`."
            )
        self._check((status,))
        self._own("cuLibraryUnload", library)
        kernel = self._check(self._cuda.cuLibraryGetKernel(library, symbol.encode()))
        function = self._check(self._cuda.cuKernelGetFunction(kernel))
        if shared > 48 << 10:
            name = self._cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._check(self._cuda.cuFuncSetAttribute(function, name, shared))
        return Function(self._cuda, self._check, function, num_warps, shared, pdl)

    def capture(self, run: Callable[[], None], stream: int) -> Any:
        """What `run` enqueues on `stream`, as a graph that `replay` can launch."""
        self._check(self._cuda.cuStreamBeginCapture(stream, self._cuda.CUstreamCaptureMode(1)))  # this thread's calls
        try:
            run()
        except BaseException:
            self._cuda.cuStreamEndCapture(stream)  # what it reports is only that the capture failed
            raise
        graph = self._check(self._cuda.cuStreamEndCapture(stream))
        instance = self._check(self._cuda.cuGraphInstantiate(graph, 0))
        self._check(self._cuda.cuGraphDestroy(graph))
        return self._own("cuGraphExecDestroy", instance)

    def replay(self, graph: Any, stream: int) -> None:
        self._check(self._cuda.cuGraphLaunch(graph, stream))

    def discard(self, graph: Any) -> None:
        self._destroy("cuGraphExecDestroy", graph)

    @contextmanager
    def scratch(self, num_bytes: int, what: str) -> Any:
        """Device memory for the time of a `with` block."""
        address = self.allocate(num_bytes, what)
        try:
            yield address
        finally:
            self.free(address)

    def _attribute(self, name: str) -> int:
        attribute = getattr(self._cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return self._check(self._cuda.cuDeviceGetAttribute(attribute, self._device))

    def _text(self, status: int) -> str:
        found = self._cuda.cuGetErrorString(self._cuda.CUresult(status))[1]
        return found.decode() if isinstance(found, bytes) else f"error {status}"

    def _check(self, result: tuple) -> Any:
        status, *values = result
        if status == OUT_OF_MEMORY:
            raise EngineError(f"{self.name} has no memory left for what the driver needs; free some, or ask for less.")
        if status != 0:
            raise GpuFault(f"the GPU reported: {self._text(int(status))} (CUDA error {int(status)})", int(status))
        return values[0] if len(values) == 1 else tuple(values)


def _dotted(version: int) -> str:
    """12040 -> 12.4"""
    return f"{version // 1000}.{version % 1000 // 10}"


class Function:
    """A kernel that is loaded. num_warps: of a block; shared: bytes of dynamic shared memory.

    One with `pdl` may start while what was enqueued before it still runs: it waits by itself.
    """

    def __init__(self, driver: Any, check: Callable[[tuple], Any], handle: Any, num_warps: int, shared: int, pdl: bool):
        self._driver, self._check, self._handle = driver, check, handle
        self._apart, self._joined = (self._configure(num_warps, shared, early) for early in (False, pdl))

    def _configure(self, num_warps: int, shared: int, early: bool) -> Any:
        config = self._driver.CUlaunchConfig()
        config.blockDimX, config.blockDimY, config.blockDimZ = 32 * num_warps, 1, 1
        config.sharedMemBytes = shared
        if early:
            attribute = self._driver.CUlaunchAttribute()
            attribute.id = self._driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        return config

    def launch(
        self, grid: Grid, stream: int, arguments: Sequence[int | float | Address], *, apart: bool = False
    ) -> None:
        """Enqueues a Triton kernel: integers are passed in 32 bits, and two null pointers behind everything.

        apart: it starts when all before it is done, whatever the kernel could do earlier.
        """
        both = (*arguments, Address(), Address())
        values: list[Any] = [a if isinstance(a, Address) else _SCALARS[type(a)](a) for a in both]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        config = self._apart if apart else self._joined
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.hStream = stream
        self._check(self._driver.cuLaunchKernelEx(config, self._handle, ctypes.addressof(pointers), 0))
