"""PagedAttention on the GPU: which launches run a node, and how wide they are.

In a bucket for decoding one launch writes the new keys and values and attends: either the keys of all sequences are
split over programs (`decode.py`), or each sequence has its own (`whole.py`, `short.py`). In any other bucket every K
and V of the step is written to its slot first; launches of a stream are ordered, so all later reads see them. Then
tiles of prompt tokens are attended (`chunk.py`), and rows of decoding either with them or, split, in a launch of their
own. Where drafts are verified all sequences have a few query tokens: split as in decoding, or a tile for each. The
number of splits is a guess at what fills the GPU and part of what the builder times. Where drafts may be a tree,
steps of decoding run as those of verification do: a single query may have keys before it that it does not see.
"""

from ..tactic import Site, Tactic
from .launches import Rotation, Shape, block, copies

# (BN, warps, stages) of decode; BN keys are in flight per stage
DECODE = ((64, 4, 3), (64, 4, 2), (128, 4, 3), (32, 4, 4), (128, 8, 3), (32, 4, 2))
# (BN, warps, stages) of decode without a split: a program for each sequence and key head
WHOLE = ((64, 4, 2), (128, 8, 2), (32, 4, 4), (128, 4, 2), (32, 4, 2))
# (BN, warps, stages) of the same where pages have 8 bits and heads are rotated in halves
SHORT = ((256, 8, 2), (128, 4, 2), (128, 8, 2), (64, 4, 2), (32, 4, 4))
# (rows, BN, warps, stages) of chunks
CHUNK = ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (256, 64, 16, 3), (128, 128, 8, 2), (64, 32, 4, 3),
         (16, 64, 4, 3), (64, 32, 4, 2))  # fmt: skip
# (BN, warps, stages) of verification, split and with a tile for each sequence
VERIFY = ((64, 4, 3), (64, 8, 2), (32, 4, 3))
VERIFY_WHOLE = ((64, 4, 2), (64, 8, 2), (32, 4, 3))
FRESH = 4  # of the chunks that are also tried with sequences apart that begin in the step, over pages of 8 bits
APART = 5  # of the chunks that are also tried with rows of decoding apart
SMALL_DECODE = ((32, 4, 2), (16, 4, 2))  # fp32, which has no tensor cores at full precision: registers are the limit
SMALL_CHUNK = ((32, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2))


def tactics(site: Site, rotation: Rotation | None = None) -> list[Tactic]:
    """Decode buckets: splits of different widths, and none; buckets for verification the same, over what is written
    first. Others: tiles, with and without decode rows apart.

    rotation: of a packed query; in buckets for decoding only.
    """
    shape = Shape.of(site, rotation)
    small = shape.itemsize == 4
    decodes = [d for d in (SMALL_DECODE if small else DECODE) if shape.fits(shape.decode_rows, *d)]
    if site.max_query == 1 and not shape.tree:
        found = []
        for d in decodes:
            for programs in shape.programs(d[0]):
                launch, workspace, zeros = shape.decode(*d, programs, own=True)
                name = "decode {} warps{} stages{} programs{}".format(*d, programs)
                found.append(Tactic(name, (launch,), workspace, zeros))
        wholes = [w for w in (SMALL_DECODE if small else WHOLE) if shape.fits(shape.decode_rows, *w)]
        found += [Tactic("whole {} warps{} stages{}".format(*w), (shape.whole(*w),)) for w in wholes]
        shorts = [w for w in SHORT if shape.fits_short(*w)]
        return found + [Tactic("short {} warps{} stages{}".format(*w), (shape.short(*w),)) for w in shorts]
    if site.max_query and (found := _verifications(shape, max(2, site.max_query) if shape.tree else site.max_query)):
        return found
    chunks = [c for c in (SMALL_CHUNK if small else CHUNK) if shape.fits(max(c[0], shape.bg), *c[1:])]
    named = [("chunk {}x{} warps{} stages{}".format(*c), c) for c in chunks]
    _, room = copies(site)
    found = [Tactic(name, (shape.write(), shape.chunk(*c, skip_decode=False)), room) for name, c in named]
    if shape.tree:
        return found
    d = decodes[0]
    launch, workspace, zeros = shape.decode(*d, shape.programs(d[0])[0], own=False, room=room)
    for name, c in named[:APART]:
        launches = (shape.write(), shape.chunk(*c, skip_decode=True), launch)
        found.append(Tactic(f"{name}, decode {d[0]}", launches, workspace, zeros))
    for name, c in named[:FRESH] if room else []:
        new = shape.chunk(*c, skip_decode=True, past="none")
        others = shape.chunk(*chunks[0], skip_decode=True, past="some")
        apart = (shape.write(), new, others, launch)
        found.append(Tactic(f"{name} of new prompts, decode {d[0]}", apart, workspace, zeros))
    return found


def _verifications(shape: Shape, queries: int) -> list[Tactic]:
    """Up to `queries` tokens of each sequence; [] where so many do not fit a program. Likeliest is no split where
    contexts are short and sequences enough to occupy half of the GPU."""
    small, rows = shape.itemsize == 4, block(queries * shape.bg)
    found, wholes = [], []
    for d in SMALL_DECODE if small else VERIFY:
        if not shape.fits(rows, *d):
            continue
        for programs in shape.programs(d[0])[:2]:
            launch, workspace, zeros = shape.decode(*d, programs, own=False, queries=queries)
            name = "verify {} warps{} stages{} programs{}".format(*d, programs)
            found.append(Tactic(name, (shape.write(), launch), workspace, zeros))
    for w in SMALL_DECODE if small else VERIFY_WHOLE:
        if shape.fits(rows, *w):
            launches = (shape.write(), shape.chunk(rows, *w, skip_decode=False))
            wholes.append(Tactic("verify whole {} warps{} stages{}".format(*w), launches))
    enough = 2 * shape.tokens // queries * shape.kv_heads >= shape.site.device.num_sms
    return wholes + found if shape.site.max_context and enough else found + wholes
