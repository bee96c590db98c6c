"""A GPU that is not there: torch computes on the CPU, but keeps apart what would lie on the device and on the host.

Within `pretended_gpu()` there is a device "cuda", and what torch refuses on a machine that has one is refused: an op on
tensors of both devices, unless the host's has no dimensions or is an index; numpy of a tensor on the device. Copies
between them are copies. To torch a tensor on the device is one on "meta:1", which every build of torch knows and nobody
uses; it holds its numbers in a tensor of the host. What is seen are ATen's ops, so all ways to spell one are the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, OURS = torch.device("cuda:0"), torch.device("meta:1")
COPIES = {"aten::copy_", "aten::_to_copy"}  # between any devices
SCALARS = {"aten::fill_", "aten::masked_fill", "aten::masked_fill_"}  # beside all that is computed number by number
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}  # by indices of the host


class OnGpu(torch.Tensor):
    """A tensor on the device; `host` has its numbers, and views share them."""

    device, is_cuda, is_meta, is_cpu = CUDA, True, False, False  # type: ignore[assignment]
    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> OnGpu:
        place = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, host.shape, **place, device=OURS)
        tensor.host = host
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.host})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} of a tensor on the pretended GPU, outside of it")


class Gpu(TorchDispatchMode):
    """alive, peak: bytes on the device now, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._storages: dict[int, int] = {}  # address -> tensors that share it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnGpu)]
        devices = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)]
        if (devices or 0 < len(ours) < len(tensors)) and func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        if ours and torch.Tag.inplace_view in func.tags and func._schema.name != "aten::detach_":
            raise NotImplementedError(f"{func} on the pretended GPU")
        if 0 < len(ours) < len(tensors):
            _check(func, args, kwargs, tensors)
        there = kwargs.get("device")
        goes = bool(ours) if there is None else there == OURS
        if func._schema.name == "aten::copy_":
            goes = isinstance(args[0], OnGpu)
        if there == OURS:
            kwargs["device"] = "cpu"
        known = {id(x.host): x for x in ours}  # what was given and comes back is the same tensor
        found = func(*tree_map(_host, args), **tree_map(_host, kwargs))
        return tree_map(lambda x: self._put(x, known) if goes and isinstance(x, torch.Tensor) else x, found)

    def _put(self, host: torch.Tensor, known: Mapping[int, OnGpu]) -> OnGpu:
        if id(host) in known:
            return known[id(host)]
        storage = host.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self._storages:
            self.alive += size
            self.peak = max(self.peak, self.alive)
        self._storages[address] = self._storages.get(address, 0) + 1
        tensor = OnGpu(host)
        weakref.finalize(tensor, self._drop, address, size)
        return tensor

    def _drop(self, address: int, size: int) -> None:
        self._storages[address] -= 1
        if not self._storages[address]:
            del self._storages[address]
            self.alive -= size


class _Calls(TorchFunctionMode):
    """What Python asks of a device "cuda", before torch looks for a driver."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0].to(OURS)
        if args and isinstance(args[0], OnGpu):
            if func is torch.Tensor.tolist or (func is torch.Tensor.numpy and kwargs.get("force")):
                return func(args[0].cpu(), **kwargs)
            if func in (torch.Tensor.numpy, torch.Tensor.__array__):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if func is torch.device:
            return func(*args, **kwargs)
        return func(*map(_named, args), **{key: _named(value) for key, value in kwargs.items()})


def _named(x: Any) -> Any:
    return OURS if isinstance(x, str | torch.device) and str(x) in ("cuda", "cuda:0") else x


def _host(x: Any) -> Any:
    return x.host if isinstance(x, OnGpu) else x


def _check(func: Any, args: tuple, kwargs: dict, tensors: list[torch.Tensor]) -> None:
    """Raises torch's error for an op on tensors of both devices that a GPU does not allow."""
    name = func._schema.name
    if name in COPIES:
        return
    if name in INDEXING and isinstance(args[0], OnGpu):
        indices = [x for x in args[1] if x is not None]
        tensors = [x for x in tensors if not any(x is index for index in indices)]
    others = [x for x in tensors if not isinstance(x, OnGpu)]
    free = torch.Tag.pointwise in func.tags or name in INDEXING | SCALARS
    written = [x for x in others if func._schema.is_mutable and (x is args[0] or x is kwargs.get("out"))]
    if written or any(x.dim() or not free for x in others):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
            f"{others[0].device}! ({name})"
        )


@contextmanager
def pretended_gpu() -> Iterator[Gpu]:
    """The device, for the code within; what it left there is of no use afterwards."""
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(.., device) is made on the host, and copied
    try:
        with patch("torch.cuda.is_available", lambda: True), Gpu() as gpu, _Calls():
            yield gpu
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
