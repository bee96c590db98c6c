"""compressed-tensors: what llm-compressor writes, each module in the scheme of the first config group that means it.

`int-quantized`, `float-quantized` and `naive-quantized` store `weight` [N, K] in 8 bits; `pack-quantized` stores
`weight_packed` [N, K * bits / 32], signed numbers plus half their range, with `weight_shape`. Both have `weight_scale`
and, where asymmetric, `weight_zero_point` (packed along N in the latter); `weight_g_idx` [K] gives each column its
group; a static activation has an `input_scale`.
Source: github.com/vllm-project/compressed-tensors (compressors, quantization/quant_args.py).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ...calibration.formats import Format
from ...engines.errors import BuildError
from .fp8 import weight_of
from .integers import centred, num_words, unpack
from .stored import Parts, Read, StoredModule, column_order

PACKED = "pack-quantized"
FORMATS = "int-quantized", "float-quantized", "naive-quantized", PACKED
DTYPES = {("int", 4): "int4", ("int", 8): "int8", ("float", 8): "fp8_e4m3"}


def read(config: Mapping[str, Any], modules: Mapping[str, Parts]) -> dict[str, StoredModule]:
    """The quantised modules by name. Raises BuildError: an option that is not served, a tensor that does not fit."""
    sparsity = config.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        structure = sparsity.get("sparsity_structure", "unknown")
        raise BuildError(
            f"the checkpoint is compressed by {structure} sparsity ({sparsity['format']}), which ingot does not read; "
            "give a dense one"
        )
    if config.get("transform_config"):
        raise BuildError(
            "the checkpoint rotates its activations (transform_config), which ingot does not do; give one without"
        )
    if attention := next((name for name, parts in modules.items() if "q_scale" in parts.tensors), None):
        raise BuildError(
            f"the checkpoint quantises the queries of '{attention}', expected keys and values only; give one without"
        )
    signs = {"weight_packed", "weight_scale"}
    quantised = {name: parts for name, parts in modules.items() if signs & parts.tensors.keys()}
    groups = list((config.get("config_groups") or {}).values())
    return {name: _module(_scheme(groups, parts), config, parts) for name, parts in quantised.items()}


def kv_dtype(config: Mapping[str, Any]) -> str | None:
    """Numbers of the KV cache; None: as they are. Raises BuildError for those that are not served."""
    scheme = config.get("kv_cache_scheme")
    if not scheme:
        return None
    dtype = DTYPES.get((scheme.get("type", "int"), scheme.get("num_bits", 8)))
    if dtype in (None, "int4") or not scheme.get("symmetric", True) or scheme.get("dynamic"):
        raise BuildError(
            f"the checkpoint has the KV cache scheme {_words(scheme)}, expected 8 bits, symmetric, with stored scales; "
            "give one in that form, or take kv_cache_scheme out of its config.json"
        )
    return dtype


def _scheme(groups: list[Mapping[str, Any]], parts: Parts) -> Mapping[str, Any]:
    """The config group of a module: one that names it, else by a pattern, else one for all Linears."""

    def of(means: Any) -> Iterator[Mapping[str, Any]]:
        return (group for group in groups if any(means(target) for target in group.get("targets", ())))

    for means in (
        lambda target: target == parts.name,
        lambda target: target.startswith("re:") and re.match(target[3:], parts.name) is not None,
        lambda target: target == "Linear",
    ):
        if found := next(of(means), None):
            return found
    raise BuildError(
        f"{parts.path} stores '{parts.name}' quantised, but no config group of its quantization_config is for it; use "
        "config and weights of the same checkpoint"
    )


def _module(scheme: Mapping[str, Any], config: Mapping[str, Any], parts: Parts) -> StoredModule:
    form = scheme.get("format") or config.get("format")
    if form not in FORMATS:
        raise BuildError(
            f"{parts.path} stores '{parts.name}' in the compressed-tensors format {form}, expected one of "
            f"{', '.join(FORMATS)}; give a checkpoint in those, or the unquantised one"
        )
    if scheme.get("output_activations"):
        raise BuildError(
            f"{parts.path} quantises what '{parts.name}' computes (output_activations), expected weights and inputs "
            "only; give a checkpoint without"
        )
    weights = _weights(scheme.get("weights") or {}, parts)
    activation = _activation(scheme.get("input_activations"), parts)
    static = activation is not None and activation.rows == 0
    known = ["weight_scale", "weight_zero_point", "weight_g_idx"] + ["input_scale", "input_zero_point"] * static
    if form == PACKED:
        parts.only("weight_packed", "weight_shape", *known)
        shape, values, zero = _packed(parts, weights)
    else:
        parts.only("weight", *known)
        shape, values, zero = _plain(parts, weights)
    _check_groups(parts, weights, shape)
    order = column_order(parts, "weight_g_idx", shape[1], weights.group or shape[1])
    return StoredModule(
        parts.name, shape, weights, values if order is None else lambda: values()[:, order],
        parts.scale("weight_scale", weights.scale_shape(*shape)), zero, activation,
        parts.number("input_scale") if static else None, order,
    )  # fmt: skip


def _plain(parts: Parts, form: Format) -> tuple[tuple[int, int], Read, Read | None]:
    shape = parts.shape("weight")
    values = parts.need("weight", shape, ["int8"]) if form.integer else weight_of(parts, shape)
    zero = None if form.symmetric else parts.need("weight_zero_point", form.scale_shape(*shape), ["int8"])
    return shape, values, zero


def _packed(parts: Parts, form: Format) -> tuple[tuple[int, int], Read, Read | None]:
    rows, columns = (int(n) for n in parts.need("weight_shape", (2,), ["int64", "int32"])())
    bits = 4 if form.dtype == "int4" else 8
    words = parts.need("weight_packed", (rows, num_words(columns, bits)), ["int32"])

    def values() -> Tensor:
        return centred(unpack(words(), bits)[:, :columns], bits)

    if form.symmetric:
        return (rows, columns), values, None
    _check_groups(parts, form, (rows, columns))
    groups = form.scale_shape(rows, columns)[1]
    zero_words = parts.need("weight_zero_point", (num_words(rows, bits), groups), ["int32"])
    return (rows, columns), values, lambda: centred(unpack(zero_words().T, bits)[:, :rows], bits).T.contiguous()


def _check_groups(parts: Parts, form: Format, shape: tuple[int, int]) -> None:
    if form.integer and form.group and shape[1] % form.group:
        raise BuildError(
            f"{parts.path} stores '{parts.name}' in groups of {form.group}, which do not divide its {shape[1]} "
            "columns; give a checkpoint with a group size that does"
        )


def _weights(scheme: Mapping[str, Any], parts: Parts) -> Format:
    dtype = DTYPES.get((scheme.get("type", "int"), scheme.get("num_bits", 8)))
    group, symmetric = scheme.get("group_size") or 0, scheme.get("symmetric", True)
    strategy = scheme.get("strategy") or ("tensor" if not group else "channel" if group < 0 else "group")
    block = scheme.get("block_structure") or (0, 0)
    shapes = {"tensor": (0, 0), "channel": (1, 0), "group": (1, group), "block": block}
    if dtype is None or strategy not in shapes or scheme.get("dynamic") or (dtype == "fp8_e4m3" and not symmetric):
        raise _refused(scheme, "weights", "4- or 8-bit integers or FP8, by tensor, channel, group or block", parts)
    rows, group = shapes[strategy]
    return Format(dtype, group=group, rows=rows, symmetric=symmetric)


def _activation(scheme: Mapping[str, Any] | None, parts: Parts) -> Format | None:
    if not scheme:
        return None
    dtype = DTYPES.get((scheme.get("type", "int"), scheme.get("num_bits", 8)))
    strategy, dynamic = scheme.get("strategy") or "tensor", scheme.get("dynamic", False)
    known = {("tensor", False): (0, 0), ("token", True): (1, 0), ("group", True): (1, scheme.get("group_size") or 0)}
    if dtype in (None, "int4") or not scheme.get("symmetric", True) or (strategy, dynamic) not in known:
        expected = "8 bits, symmetric, static by tensor, or dynamic by token or group"
        raise _refused(scheme, "activations", expected, parts)
    rows, group = known[strategy, dynamic]
    return Format(dtype, group=group, rows=rows)


def _refused(scheme: Mapping[str, Any], what: str, expected: str, parts: Parts) -> BuildError:
    return BuildError(
        f"{parts.path} has {what} of '{parts.name}' in {_words(scheme)}, expected {expected}; give a checkpoint in "
        "those, or the unquantised one"
    )


def _words(scheme: Mapping[str, Any]) -> str:
    """`4 bits float tensor_group asymmetric dynamic`."""
    words = f"{scheme.get('num_bits', 8)}-bit {scheme.get('type', 'int')} by {scheme.get('strategy') or 'tensor'}"
    return (
        words
        + ("" if scheme.get("symmetric", True) else ", asymmetric")
        + (f", dynamic {scheme['dynamic']}" if scheme.get("dynamic") else "")
    )
