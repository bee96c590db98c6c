"""Which kernels of this folder a site may run on, and in blocks of what size: what the builder times.

Lists are short, since each entry is compiled and timed; they hold what was fastest for some product of a Llama-3.1-8B
layer on one H100 (`benchmarks/gpu_quantised.py`).
"""

from math import gcd

import triton

from ..tactic import Site, Tensor
from .row import MOST_ROWS

Shape = tuple[int, int, int, int, int]  # BM, BN, BK, warps, stages
X, WEIGHT, SCALE, ZERO, X_SCALE, BIAS = range(6)  # inputs

WGMMA = 90  # compute capability whose tensor cores read shared memory
SHARED = 227 << 10  # bytes that the programs on a multiprocessor of capability 9.0 share
FLOATS = "float32", "bfloat16", "float16"

# (BN, BK, warps) of the row kernel: a thread takes eight numbers of each row at a time
ROW = {
    "int4": ((4, 4096, 4), (8, 4096, 8), (4, 2048, 4), (8, 2048, 4)),
    "": ((2, 4096, 8), (4, 2048, 8), (4, 1024, 4), (2, 2048, 8)),
}
# (BN, warps, stages) of tiles whose warps have slices of depth of their own, up to MOST_IN_SLICES rows
SLICES = ((32, 4, 3), (16, 8, 3), (64, 4, 3), (32, 8, 3))
SLICE, SHORTEST_SLICE = 128, 32  # columns
MOST_IN_SLICES = 16
# (BN, BK, warps, stages) of tiles that hold all rows, up to FEW_ROWS; `pairs`: int4 and x in 16 bits
FEW_ROWS = 64
FEW = {
    "pairs": ((128, 128, 4, 4),),
    "pairs from 17": ((128, 128, 8, 4), (64, 128, 2, 4), (128, 128, 4, 4)),
    "pairs from 33": ((128, 128, 8, 4), (64, 128, 4, 4)),
    "int4": ((64, 128, 4, 5), (128, 128, 4, 4), (32, 128, 4, 6), (128, 128, 8, 4), (64, 64, 4, 6)),
    "": ((64, 256, 4, 4), (64, 128, 4, 5), (128, 128, 4, 5), (32, 256, 4, 4), (128, 128, 8, 4)),
}
SOME_ROWS = 512
SOME = ((128, 128, 128, 8, 3), (64, 128, 128, 4, 4), (128, 64, 128, 4, 4), (128, 256, 128, 8, 3), (256, 128, 64, 8, 4))
MANY = ((128, 256, 128, 8, 3), (128, 128, 128, 8, 3), (256, 128, 128, 8, 3), (128, 128, 64, 8, 4), (64, 128, 128, 4, 3))
# of weights that are scaled in registers, by the most rows: what was fastest on an H100. For fewer rows the tiles above
# were; of 192 rows, which were not measured, the larger tile wastes a quarter and reads the weights once
SCALED = {
    128: ((128, 128, 64, 8, 4), (128, 256, 64, 8, 4)),
    512: ((256, 128, 64, 8, 4), (128, 128, 64, 8, 4)),
}
MANY_SCALED = SCALED[512][:1]
FEWEST_SCALED = 65  # rows
MOST_PARTS, CACHED = 8, 32 << 20  # bytes of their sums, which ought to stay in the L2 cache
SMALL_TILES = ((32, 32, 64, 4, 2),)  # fp32: no tensor cores at full precision


def group_columns(site: Site) -> int:
    """The number of columns that all groups of a site are multiples of; 0: no groups."""
    return gcd(site.attributes["group"], site.attributes["x_group"])


def in_pairs(site: Site) -> bool:
    """Whether two columns lie in a byte of the weight and in a word of x."""
    x, weight = site.inputs[X], site.inputs[WEIGHT]
    assert x is not None and weight is not None
    return weight.dtype == "int4" and x.dtype in ("bfloat16", "float16") and weight.shape[1] % 8 == 0


def row_shapes(site: Site) -> list[tuple[int, int, int]]:
    """BN, BK and warps of the row kernel; [] where it does not serve."""
    x, weight = site.inputs[X], site.inputs[WEIGHT]
    assert x is not None and weight is not None
    serves = x.shape[0] <= MOST_ROWS and weight.shape[1] % 8 == 0 and not group_columns(site) % 8
    return list(ROW.get(weight.dtype, ROW[""])) if serves else []


def slice_shapes(site: Site) -> list[Shape]:
    """Tiles whose warps have slices of BK columns of their own; [] where that kernel does not serve."""
    x, slice = site.inputs[X], gcd(SLICE, group_columns(site))
    assert x is not None
    if not in_pairs(site) or x.shape[0] > MOST_IN_SLICES or slice < SHORTEST_SLICE:
        return []
    bm = max(8, triton.next_power_of_2(x.shape[0]))
    # a program keeps more of x than of the weight where it has no more of its rows
    return [(bm, bn, slice, warps, stages) for bn, warps, stages in SLICES if bn > bm]


def scaled_shapes(site: Site) -> list[tuple[Shape, int]]:
    """Tiles whose weights are scaled in registers, and parts of the depth; [] where that kernel does not serve: it is
    for tensor cores that read the rows from shared memory, and for groups of a multiple of 32 columns."""
    x, weight = site.inputs[X], site.inputs[WEIGHT]
    assert x is not None and weight is not None
    rows, depth, columns = x.shape[0], weight.shape[1], group_columns(site)
    if site.device.capability != WGMMA or not in_pairs(site) or depth % 32 or columns % 32 or rows < FEWEST_SCALED:
        return []
    tiles = next((tiles for most, tiles in SCALED.items() if rows <= most), MANY_SCALED)
    fitting: list[Shape] = [(bm, bn, gcd(bk, columns), warps, stages) for bm, bn, bk, warps, stages in tiles]
    return [(shape, parts) for shape in fitting for parts in _shares(site, shape)]


def tile_shapes(site: Site) -> list[tuple[Shape, int]]:
    """Tiles for the rows of a site, and into how many parts the depth is split; [] where they do not serve."""
    x, weight = site.inputs[X], site.inputs[WEIGHT]
    assert x is not None and weight is not None
    rows, power = x.shape[0], triton.next_power_of_2(x.shape[0])
    if not _multiplies(site):
        return []
    if x.dtype == "float32":
        fitting: list[Shape] = list(SMALL_TILES)
    elif rows <= FEW_ROWS:
        kind = weight.dtype
        if in_pairs(site):
            kind = "pairs" if rows <= 16 else "pairs from 17" if rows <= 32 else "pairs from 33"
        fitting = [(max(8 if kind == "pairs" else 16, power), *shape) for shape in FEW.get(kind, FEW[""])]
    else:
        fitting = [s for s in SOME if s[0] <= max(64, power)] if rows <= SOME_ROWS else list(MANY)
    if x.dtype in FLOATS and weight.dtype != "int4":  # x fills the memory
        fitting = [(bm, bn, bk if bm < 128 else min(bk, 64), w, s) for bm, bn, bk, w, s in fitting]
    least = 64 if weight.dtype == "int4" and x.dtype not in FLOATS else 32  # of an instruction, in halves for int4
    columns = group_columns(site)
    if columns:  # two accumulators: of the slice, and of all
        fitting = [shape for shape in fitting if shape[0] * shape[1] <= 2048 * shape[3]] or fitting[-1:]
    if rows > SOME_ROWS and scaled_shapes(site):
        fitting = fitting[:1]  # none was ever the fastest; the first is what --no-tune takes
    cut = [(bm, bn, gcd(bk, columns), warps, stages) for bm, bn, bk, warps, stages in fitting]
    split = rows <= SOME_ROWS and x.dtype != "float32"
    return [(shape, parts) for shape in cut if shape[2] >= least for parts in (_parts(site, shape) if split else [1])]


def _multiplies(site: Site) -> bool:
    """Whether tiles of these types can be multiplied as they are."""
    x, weight = site.inputs[X], site.inputs[WEIGHT]
    assert x is not None and weight is not None
    if weight.dtype == "int4" and weight.shape[1] % 8:
        return False
    if x.dtype in FLOATS:
        return True
    if x.dtype == "float8_e4m3fn":
        return weight.dtype == x.dtype and site.device.capability >= 89
    return weight.dtype == "int4" or (weight.dtype == "int8" and site.inputs[ZERO] is None)


def _parts(site: Site, shape: Shape) -> list[int]:
    """Shares of the depth to try: one, and as many as fill the GPU with one or with all programs that fit; of small
    programs as many as make some of each multiprocessor's."""
    x, weight = site.inputs[X], site.inputs[WEIGHT]
    assert x is not None and weight is not None
    bm, bn, bk, warps, stages = shape
    blocks = triton.cdiv(x.shape[0], bm) * triton.cdiv(weight.shape[0], bn)
    if warps < 4:
        most = min(16, weight.shape[1] // (2 * bk))
        wanted = {parts for parts in (1, 2, 4, 8, 16) if 2 <= blocks * parts / site.device.num_sms <= 6} or {1}
    else:
        stage = Tensor((bm, bk), x.dtype).num_bytes + Tensor((bn, bk), weight.dtype).num_bytes
        fit = max(1, min(SHARED // (stage * stages), 32 // warps))
        most = min(8, weight.shape[1] // (4 * bk))
        wanted = {1, site.device.num_sms // blocks, min(fit, 3) * site.device.num_sms // blocks}
    return sorted({max(1, min(most, parts)) for parts in wanted}, reverse=True)


def _shares(site: Site, shape: Shape) -> list[int]:
    """The best number of parts, and one that differs from it by half or more if it is about as good, by an estimate in
    times of a tile: of the multiprocessor that has most to do, and of sums that go to the L2 cache and come back, each
    a twentieth of a tile that is 4096 columns deep."""
    x, weight = site.inputs[X], site.inputs[WEIGHT]
    assert x is not None and weight is not None
    (bm, bn, bk, *_), rows, (width, depth) = shape, x.shape[0], weight.shape
    blocks, times = triton.cdiv(rows, bm) * triton.cdiv(width, bn), {}
    most = max(1, min(MOST_PARTS, depth // (4 * bk), CACHED // (4 * rows * width)))
    for parts in range(1, most + 1):
        waves = triton.cdiv(blocks * parts, site.device.num_sms)
        times[parts] = waves / parts + (0.05 * 4096 / depth * (waves + parts) if parts > 1 else 0)
    best = min(times, key=lambda parts: times[parts])
    others = [parts for parts in times if not 2 * best < 3 * parts < 4.5 * best and times[parts] < 1.15 * times[best]]
    return [best, *sorted(others, key=lambda parts: times[parts])[:1]]
