"""Experts on the GPU: the pairs are sorted by expert, two grouped matrix products, a weighted sum over the choices.

Four launches, five where there are many pairs. How many rows an expert has is known on the device only, so the number
of blocks is bounded from above: `num_blocks`.
"""

from math import prod

import triton

from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic, Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "swiglu_oai")
X, INDEX, ROUTE, GATE_UP, DOWN, GATE_UP_BIAS, DOWN_BIAS = range(7)  # inputs
MANY_PAIRS = 2048  # from here on they are counted in a launch of their own

# (BM, BN, BK, warps, stages); BN: rows of the weight, half of them gates in the first product
FEW = ((16, 64, 128, 4, 4), (16, 128, 64, 4, 5), (16, 32, 256, 4, 4), (16, 128, 128, 8, 3))
SOME = ((32, 128, 64, 4, 4), (64, 128, 64, 4, 4), (16, 64, 128, 4, 4), (64, 64, 128, 4, 3))
MANY = ((128, 128, 64, 8, 3), (64, 128, 64, 4, 4), (128, 256, 64, 8, 3), (64, 256, 64, 8, 3))
SMALL_TILES = ((16, 32, 32, 4, 2), (32, 32, 32, 4, 2))  # fp32: no tensor cores at full precision


def num_blocks(pairs: int, experts: int, rows: int) -> int:
    """Most blocks of `rows` that `pairs` fill, whichever experts they chose: all but one row of each may be padding."""
    hit = min(pairs, experts)
    return min(pairs, (pairs + (rows - 1) * hit) // rows)


def tactics(site: Site) -> list[Tactic]:
    """A tactic per tile, by the mean number of rows of an expert; [] for an activation or sizes it does not know."""
    x, index, _, gate_up, down = site.inputs[:5]
    assert x is not None and index is not None and gate_up is not None and down is not None
    largest = max(prod(gate_up.shape[1:]), prod(down.shape[1:]))  # offsets within an expert have 32 bits
    if site.attributes["activation"] not in ACTIVATIONS or largest >= 1 << 31 or not prod(index.shape):
        return []
    if x.dtype == "float32":
        tiles: tuple[tuple[int, int, int, int, int], ...] = SMALL_TILES
    else:
        mean = prod(index.shape) / gate_up.shape[0]
        tiles = FEW if mean <= 8 else SOME if mean <= 48 else MANY
    return [_tactic(site, *tile) for tile in tiles]


def _tactic(site: Site, bm: int, bn: int, bk: int, warps: int, stages: int) -> Tactic:
    x, index, route, gate_up, down = site.inputs[:5]
    assert x is not None and index is not None and route is not None and gate_up is not None and down is not None
    attributes = site.attributes
    gate_up_bias, down_bias = (site.inputs[i] if i < len(site.inputs) else None for i in (GATE_UP_BIAS, DOWN_BIAS))
    (tokens, width), choices, experts = x.shape, index.shape[1], gate_up.shape[0]
    inner = down.shape[1] if attributes["transposed"] else down.shape[2]
    pairs = tokens * choices
    blocks = num_blocks(pairs, experts, bm)
    # workspace, in bytes from its start
    counts, order = 0, _aligned(4 * experts)
    owner = order + _aligned(4 * blocks * bm)
    hidden = owner + _aligned(4 * blocks)
    parts = hidden + _aligned(pairs * inner * (4 if x.dtype == "float32" else 2))
    starts = {"counts": counts, "order": order, "owner": owner, "hidden": hidden, "parts": parts}
    places = {name: Operand("workspace", at) for name, at in starts.items()}
    launches = _sort(index, places, pairs, blocks, experts, bm)

    def product(
        source: Operand, at: int, bias_at: int, bias: Tensor | None, target: Operand, n: int, k: int, activation: str
    ) -> Launch:
        columns = bn // 2 if activation else bn
        out = n // 2 if activation else n
        constants = {
            "N": n, "K": k, "BM": bm, "BN": bn, "BK": bk, "GROUP": 8,
            "CHOICES": choices if activation else 1, "TRANSPOSED": bool(attributes["transposed"]),
            "BIAS": bias is not None, "EVEN": out % columns == 0 and k % bk == 0, "ACTIVATION": activation,
            "INTERLEAVED": bool(attributes["interleaved"]),
            "ALPHA": float(attributes["alpha"]), "LIMIT": float(attributes["limit"]),
        }  # fmt: skip
        pointer = POINTERS[x.dtype]
        signature = (("x", pointer), ("weight", pointer), ("bias", pointer), ("order", "*i32"), ("owner", "*i32"),
                     ("y", pointer if activation else "*fp32"), ("blocks", "i32"))  # fmt: skip
        aligned = ("x", "weight", "order", "owner", "y")
        kernel = Kernel("experts.grouped:grouped_kernel", signature, tuple(constants.items()), warps, stages, aligned)
        arguments = (source, Operand("input", at), Operand("input", bias_at if bias else at), places["order"],
                     places["owner"], target, blocks)  # fmt: skip
        return Launch(kernel, (triton.cdiv(out, columns) * blocks, 1, 1), arguments)

    launches += [
        product(Operand("input", X), GATE_UP, GATE_UP_BIAS, gate_up_bias, places["hidden"], 2 * inner, width,
                attributes["activation"]),
        product(places["hidden"], DOWN, DOWN_BIAS, down_bias, places["parts"], width, inner, ""),
        _weighted_sum(x, index, route, experts, places["parts"]),
    ]  # fmt: skip
    name = f"{bm}x{bn}x{bk} warps{warps} stages{stages}"
    return Tactic(name, tuple(launches), parts + _aligned(4 * pairs * width))


def _sort(index: Tensor, places: dict[str, Operand], pairs: int, blocks: int, experts: int, bm: int) -> list[Launch]:
    """Fills `order` and `owner` (see sort.py)."""
    chunk = min(1024, max(128, triton.next_power_of_2(pairs)))
    pointer, counted = POINTERS[index.dtype], pairs > MANY_PAIRS
    kernel = Kernel(
        "experts.sort:sort_kernel",
        (("index", pointer), ("counts", "*i32"), ("order", "*i32"), ("owner", "*i32"), ("pairs", "i32"),
         ("blocks", "i32")),
        (("E", experts), ("BINS", triton.next_power_of_2(experts + 1)), ("BM", bm), ("CHUNK", chunk),
         ("COUNTED", counted)),
        divisible=("counts", "order", "owner"),
    )  # fmt: skip
    counts, source = places["counts"], Operand("input", INDEX)
    sort = Launch(kernel, (experts, 1, 1), (source, counts, places["order"], places["owner"], pairs, blocks))
    if not counted:
        return [sort]
    count = Kernel("experts.sort:count_kernel", (("index", pointer), ("counts", "*i32"), ("pairs", "i32")),
                   (("E", experts), ("CHUNK", chunk)), divisible=("counts",))  # fmt: skip
    return [Launch(count, (experts, 1, 1), (source, counts, pairs)), sort]


def _weighted_sum(x: Tensor, index: Tensor, route: Tensor, experts: int, parts: Operand) -> Launch:
    (tokens, width), choices = x.shape, index.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    kernel = Kernel(
        "experts.grouped:weighted_sum_kernel",
        (("parts", "*fp32"), ("index", POINTERS[index.dtype]), ("route", POINTERS[route.dtype]),
         ("y", POINTERS[x.dtype])),
        (("E", experts), ("CHOICES", choices), ("WIDTH", width), ("BLOCK", block)),
        divisible=("parts", "y"),
    )  # fmt: skip
    arguments = (parts, Operand("input", INDEX), Operand("input", ROUTE), Operand("output", 0))
    return Launch(kernel, (tokens, triton.cdiv(width, block), 1), arguments)


def _aligned(size: int) -> int:
    return -(-size // 256) * 256
