"""The standard ONNX ops that move data or talk about shapes, in torch: part of `onnx_ops.ONNX_OPS`.

Shapes, axes and bounds are usually constants: they become Python lists when the node is bound (`numbers`), and only
truly dynamic ones are read from a tensor in every call. Results are views wherever torch can give one.
"""

import math
from collections.abc import Callable

import torch

from .binder import Attributes, Binder, Constants, Run
from .dtypes import to_torch


def numbers(constant: torch.Tensor | None) -> Callable[[torch.Tensor], list[int]]:
    """How to read a list of integers: the constant's, if there is one, else that of the tensor of the call."""
    if constant is None:
        return lambda tensor: tensor.flatten().tolist()
    fixed = constant.flatten().tolist()
    return lambda tensor: fixed


def bind_reshape(attributes: Attributes, constants: Constants) -> Run:
    """0 keeps the dimension (unless `allowzero`), -1 is inferred."""
    read, keep_zero = numbers(constants[1]), attributes.get("allowzero", 0)

    def reshape(x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
        sizes = read(shape)
        if 0 in sizes and not keep_zero:
            sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
        if -1 in sizes and x.numel() == 0:  # torch cannot infer a size from no elements; the others decide it
            kept = math.prod(size for size in sizes if size > 0)
            sizes = [x.numel() // kept if size == -1 else size for size in sizes]
        return x.reshape(sizes)

    return reshape


def bind_transpose(attributes: Attributes, constants: Constants) -> Run:
    order = attributes.get("perm")
    if order is None:
        return lambda x: x.permute(*reversed(range(x.dim())))
    order = list(order)
    return lambda x: x.permute(order)


def bind_flatten(attributes: Attributes, constants: Constants) -> Run:
    axis = attributes.get("axis", 1)

    def flatten(x: torch.Tensor) -> torch.Tensor:
        split = axis if axis >= 0 else axis + x.dim()
        return x.reshape(math.prod(x.shape[:split]), math.prod(x.shape[split:]))

    return flatten


def bind_squeeze(attributes: Attributes, constants: Constants) -> Run:
    if len(constants) < 2:
        return lambda x, axes=None: x.squeeze()
    read = numbers(constants[1])
    return lambda x, axes: x.squeeze(tuple(read(axes)))


def bind_unsqueeze(attributes: Attributes, constants: Constants) -> Run:
    read = numbers(constants[1])

    def unsqueeze(x: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
        places = read(axes)
        rank = x.dim() + len(places)
        for axis in sorted(axis % rank for axis in places):
            x = x.unsqueeze(axis)
        return x

    return unsqueeze


def bind_expand(attributes: Attributes, constants: Constants) -> Run:
    """Broadcasts both ways: a 1 in the target keeps the size of x."""
    read = numbers(constants[1])
    return lambda x, shape: x.expand(torch.broadcast_shapes(x.shape, read(shape)))


def bind_concat(attributes: Attributes, constants: Constants) -> Run:
    axis = attributes["axis"]
    return lambda *parts: torch.cat(parts, axis)


def bind_split(attributes: Attributes, constants: Constants) -> Run:
    """Into the given sizes, or into `num_outputs` equal parts of which the last may be smaller."""
    axis, count = attributes.get("axis", 0), attributes.get("num_outputs")
    if count is not None:
        return lambda x, sizes=None: torch.split(x, -(-x.shape[axis] // count), axis)
    read = numbers(constants[1])
    return lambda x, sizes: torch.split(x, read(sizes), axis)


def bind_split_to_sequence(attributes: Attributes, constants: Constants) -> Run | None:
    """A list of tensors (what torch.export makes of `chunk`); a scalar split is the size of every part but the last."""
    axis = attributes.get("axis", 0)
    if len(constants) < 2 or constants[1] is None:
        return None
    sizes = constants[1].tolist()
    return lambda x, split: list(torch.split(x, sizes, axis))


def sequence_at(parts: list[torch.Tensor], position: torch.Tensor) -> torch.Tensor:
    return parts[int(position)]


def bind_slice(attributes: Attributes, constants: Constants) -> Run:
    """Python slices, whose clamping is ONNX's; a negative step becomes a flip of the reversed range."""
    padded = (*constants, None, None)
    begin, end, read_axes, read_steps = (numbers(constant) for constant in padded[1:5])

    def run(
        x: torch.Tensor,
        starts: torch.Tensor,
        ends: torch.Tensor,
        axes: torch.Tensor | None = None,
        steps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        first, stop = begin(starts), end(ends)
        dims = list(range(len(first))) if axes is None else read_axes(axes)
        strides = [1] * len(first) if steps is None else read_steps(steps)
        for axis, low, high, step in zip(dims, first, stop, strides, strict=True):
            x = _slice_one(x, axis, low, high, step)
        return x

    return run


def _slice_one(x: torch.Tensor, axis: int, low: int, high: int, step: int) -> torch.Tensor:
    size = x.shape[axis]
    if step < 0:
        kept = range(size)[max(low, -size - 1) : None if high < -size else high : step]
        return x.index_select(axis, torch.tensor(list(kept), dtype=torch.long))
    kept = range(size)[low:high:step]
    if not kept:
        return x.narrow(axis, 0, 0)
    y = x.narrow(axis, kept[0], kept[-1] + 1 - kept[0])
    return y if step == 1 else y[(slice(None),) * (axis % x.dim()) + (slice(None, None, step),)]


def bind_gather(attributes: Attributes, constants: Constants) -> Run:
    """Rows of an axis by index; negative indices count from the end."""
    axis = attributes.get("axis", 0)

    def gather(data: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        size = data.shape[axis]
        flat = torch.where(index < 0, index + size, index).reshape(-1)
        rows = data.index_select(axis, flat)
        if index.dim() == 1:
            return rows
        dim = axis % data.dim()
        return rows.reshape(*data.shape[:dim], *index.shape, *data.shape[dim + 1 :])

    return gather


def bind_gather_elements(attributes: Attributes, constants: Constants) -> Run:
    axis = attributes.get("axis", 0)
    return lambda data, index: torch.gather(data, axis, _wrapped(index, data.shape[axis]))


def _gather_nd(data: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return data[tuple(index.long().unbind(-1))]


def bind_gather_nd(attributes: Attributes, constants: Constants) -> Run | None:
    return None if attributes.get("batch_dims") else _gather_nd


def bind_scatter_elements(attributes: Attributes, constants: Constants) -> Run | None:
    axis, reduction = attributes.get("axis", 0), attributes.get("reduction", "none")
    reduce = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}.get(reduction)

    def scatter(data: torch.Tensor, index: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        index = _wrapped(index, data.shape[axis])
        if reduce is None:
            return data.scatter(axis, index, updates)
        return data.scatter_reduce(axis, index, updates, reduce)

    return scatter if reduce or reduction == "none" else None


def bind_scatter_nd(attributes: Attributes, constants: Constants) -> Run | None:
    reduction = attributes.get("reduction", "none")

    def scatter(data: torch.Tensor, index: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        places = tuple(index.long().unbind(-1))
        return data.index_put(places, updates, accumulate=reduction == "add")

    return scatter if reduction in ("none", "add") else None


def _wrapped(index: torch.Tensor, size: int) -> torch.Tensor:
    index = index.long()
    return torch.where(index < 0, index + size, index)


def bind_shape(attributes: Attributes, constants: Constants) -> Run:
    start, end = attributes.get("start", 0), attributes.get("end")
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.long)


def arange(start: torch.Tensor, limit: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def bind_constant(attributes: Attributes, constants: Constants) -> Run | None:
    for name, value in attributes.items():
        if name == "value":
            tensor = to_torch(value)
        elif name in ("value_float", "value_floats"):
            tensor = torch.tensor(value, dtype=torch.float32)
        elif name in ("value_int", "value_ints"):
            tensor = torch.tensor(value, dtype=torch.long)
        else:
            return None
        return lambda: tensor
    return None


def bind_constant_of_shape(attributes: Attributes, constants: Constants) -> Run:
    read = numbers(constants[0])
    value = to_torch(attributes["value"]).reshape(()) if "value" in attributes else torch.tensor(0.0)
    return lambda shape: value.expand(read(shape)).clone()


def bind_one_hot(attributes: Attributes, constants: Constants) -> Run:
    """Indices outside [-depth, depth) give an all-off row."""
    axis = attributes.get("axis", -1)

    def one_hot(index: torch.Tensor, depth: torch.Tensor, off_on: torch.Tensor) -> torch.Tensor:
        size = int(depth)
        wrapped = _wrapped(index, size).unsqueeze(axis)
        line = torch.arange(size).view([size] + [1] * ((wrapped.dim() - 1 - axis) % wrapped.dim()))
        return torch.where(wrapped == line, off_on[1], off_on[0])

    return one_hot


def bind_tile(attributes: Attributes, constants: Constants) -> Run:
    read = numbers(constants[1])
    return lambda x, repeats: x.repeat(read(repeats))


def bind_trilu(attributes: Attributes, constants: Constants) -> Run:
    keep = torch.triu if attributes.get("upper", 1) else torch.tril
    return lambda x, k=None: keep(x, 0 if k is None else int(k))


def bind_identity(attributes: Attributes, constants: Constants) -> Run:
    return lambda x: x


MOVEMENT_OPS: dict[str, Binder] = {
    "Concat": bind_concat,
    "Constant": bind_constant,
    "ConstantOfShape": bind_constant_of_shape,
    "Expand": bind_expand,
    "Flatten": bind_flatten,
    "Gather": bind_gather,
    "GatherElements": bind_gather_elements,
    "GatherND": bind_gather_nd,
    "Identity": bind_identity,
    "OneHot": bind_one_hot,
    "Range": lambda attributes, constants: arange,
    "Reshape": bind_reshape,
    "ScatterElements": bind_scatter_elements,
    "ScatterND": bind_scatter_nd,
    "SequenceAt": lambda attributes, constants: sequence_at,
    "Shape": bind_shape,
    "Size": lambda attributes, constants: lambda x: torch.tensor(x.numel()),
    "Slice": bind_slice,
    "Split": bind_split,
    "SplitToSequence": bind_split_to_sequence,
    "Squeeze": bind_squeeze,
    "Tile": bind_tile,
    "Transpose": bind_transpose,
    "Trilu": bind_trilu,
    "Unsqueeze": bind_unsqueeze,
}
