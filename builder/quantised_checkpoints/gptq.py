"""GPTQ, as AutoGPTQ and GPTQModel write it: unsigned 4- or 8-bit numbers packed along K, with zero points.

`qweight` [K * bits / 32, N], `scales` [G, N], `qzeros` [G, N * bits / 32], `g_idx` [K]: the group of each column.
Format `gptq` stores zero points less one (0 wraps around), `gptq_v2` stores them as they are. With act-order the groups
are scattered over the columns; sorted by group, they are contiguous, which is the order that `StoredModule` has.
Source: github.com/ModelCloud/GPTQModel, github.com/AutoGPTQ/AutoGPTQ (qlinear modules).
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...calibration.formats import Format
from ...engines.errors import BuildError
from .integers import BITS, WORD, centred, num_words, unpack
from .stored import Parts, StoredModule, column_order

FORMATS = {"gptq": 1, "gptq_v2": 0}  # name -> what the stored zero points lack


def read(config: Mapping[str, Any], modules: Mapping[str, Parts]) -> dict[str, StoredModule]:
    """The quantised modules by name. Raises BuildError: an option that is not served, a tensor that does not fit."""
    form = config.get("checkpoint_format") or config.get("format") or "gptq"
    if form not in FORMATS or config.get("is_marlin_format"):
        form = "marlin" if config.get("is_marlin_format") else form
        raise BuildError(
            f"the checkpoint is GPTQ in the format {form}, expected {' or '.join(FORMATS)}; give the checkpoint that "
            "was not repacked for a kernel"
        )
    return {
        name: _module(_options(config, name), FORMATS[form], parts)
        for name, parts in modules.items()
        if "qweight" in parts.tensors
    }


def _options(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The config with GPTQModel's `dynamic` for this module: pattern -> what is different."""
    for pattern, changed in (config.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
            return {**config, **changed}
    return config


def _module(config: Mapping[str, Any], offset: int, parts: Parts) -> StoredModule:
    bits, group = config.get("bits"), config.get("group_size", -1)
    if bits not in BITS:
        raise BuildError(
            f"{parts.path} stores '{parts.name}' in {bits} bits by GPTQ, expected 4 or 8; give a checkpoint with those"
        )
    parts.only("qweight", "qzeros", "scales", "g_idx")
    num_rows = parts.shape("qweight")[1]
    columns = parts.shape("qweight")[0] * WORD // bits
    groups = columns // group if group > 0 else 1
    if group > 0 and columns % group:
        raise BuildError(
            f"{parts.path} stores '{parts.name}' in groups of {group}, which do not divide its {columns} columns; give "
            "a checkpoint with a group size that does"
        )
    order = column_order(parts, "g_idx", columns, group if group > 0 else columns)
    words = parts.need("qweight", (num_words(columns, bits), num_rows), ["int32"])
    scales = parts.scale("scales", (groups, num_rows))
    stored_zeros = parts.need("qzeros", (groups, num_words(num_rows, bits)), ["int32"])
    symmetric = bool(config.get("sym", True))

    def values() -> Tensor:
        numbers = centred(unpack(words().T, bits), bits)  # [N, K]
        return numbers if order is None else numbers[:, order]

    def zeros() -> Tensor:
        numbers = unpack(stored_zeros(), bits)[:, :num_rows] + offset  # [G, N]; 255 + 1 is 0
        return centred(numbers & (2**bits - 1), bits).T.contiguous()

    def scale() -> Tensor:
        if symmetric and bool(zeros().any()):
            raise BuildError(
                f"{parts.path} says that '{parts.name}' is symmetric, but stores other zero points; set sym to false "
                "in its quantization_config"
            )
        return scales().T.contiguous()

    form = Format(f"int{bits}", group=group if groups > 1 else 0, symmetric=symmetric)
    return StoredModule(parts.name, (num_rows, columns), form, values, scale, None if symmetric else zeros, order=order)
