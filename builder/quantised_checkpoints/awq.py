"""AutoAWQ's GEMM packing: unsigned 4-bit numbers packed along N, eight in a word in the order of its kernel.

`qweight` [K, N / 8], `qzeros` [G, N / 8], `scales` [G, N]. Number j of a word's eight lies in the nibble `NIBBLES[j]`.
What AWQ multiplied the columns by is folded into the layer before, so nothing of it is left to do.
Source: github.com/casper-hansen/AutoAWQ (awq/utils/packing_utils.py).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...calibration.formats import Format
from ...engines.errors import BuildError
from .integers import WORD, centred, unpack
from .stored import Parts, StoredModule

NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]
BITS = 4


def read(config: Mapping[str, Any], modules: Mapping[str, Parts]) -> dict[str, StoredModule]:
    """The quantised modules by name. Raises BuildError: an option that is not served, a tensor that does not fit."""
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    bits, zero_point = config.get("bits", config.get("w_bit", BITS)), config.get("zero_point", True)
    for option, found, expected in (("version", version, "gemm"), ("bits", bits, BITS),
                                    ("zero_point", zero_point, True)):  # fmt: skip
        if found != expected:
            raise BuildError(
                f"the checkpoint is AWQ with {option} {found}, expected {expected}; give one that AutoAWQ wrote so"
            )
    group = config.get("group_size", config.get("q_group_size", 128))
    return {name: _module(group, parts) for name, parts in modules.items() if "qweight" in parts.tensors}


def _module(group: int, parts: Parts) -> StoredModule:
    parts.only("qweight", "qzeros", "scales")
    columns, num_words = parts.shape("qweight")
    num_rows = num_words * (WORD // BITS)
    if group > 0 and columns % group:
        raise BuildError(
            f"{parts.path} stores '{parts.name}' in groups of {group}, which do not divide its {columns} columns; give "
            "a checkpoint with a group size that does"
        )
    groups = columns // group if group > 0 else 1
    words = parts.need("qweight", (columns, num_words), ["int32"])
    zero_words = parts.need("qzeros", (groups, num_words), ["int32"])
    scales = parts.scale("scales", (groups, num_rows))
    return StoredModule(
        parts.name, (num_rows, columns), Format("int4", group=group if groups > 1 else 0, symmetric=False),
        lambda: _rows(words()), lambda: scales().T.contiguous(), lambda: _rows(zero_words()),
    )  # fmt: skip


def _rows(words: Tensor) -> Tensor:
    """[R, N / 8] int32 -> [N, R] int8, -8 .. 7."""
    octets = unpack(words, BITS).unflatten(1, (-1, len(NIBBLES)))  # [R, N / 8, 8]
    return centred(octets[:, :, NIBBLES].flatten(1), BITS).T.contiguous()
