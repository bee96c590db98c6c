"""Every tactic of PagedAttention against its reference: on the GPU where there is one, interpreted otherwise.

Pools, page tables and outputs are poison wherever no sequence may look; padded sequences and tokens are added behind.
"""

import math
import random

import pytest
import torch

pytest.importorskip("triton")

from ingot.plugins import OPS, tactics_of
from ingot.plugins.paged_attention.kernel import tactics
from ingot.plugins.tactic import Device, Site, Tensor
from random_tree import bits_of, random_parents
from triton_run import DEVICE, described, run_tactic, some_of

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter

GPU = DEVICE == "cuda"
# the interpreter multiplies bf16 matrices wrongly, so it is left to the GPU
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
TOLERANCE = {torch.float32: 3e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
EXACT = dict(rtol=0, atol=0)
OPTIONS = {
    "plain": {},
    "window": {"window": 21},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "all": {"window": 9, "softcap": 2.0, "sinks": True},
}
WIDE_OPTIONS = {"plain": {}, "window": {"window": 300}, "all": {"window": 1000, "softcap": 20.0, "sinks": True}}


class Case:
    """Random sequences of `past` written and `new` query tokens, and `spare` padded sequences and tokens."""

    def __init__(self, past, new, heads, kv_heads, dim, v_dim, page, dtype, *, packed, spare=0, options, nodes=None):
        seed = random.getrandbits(32)
        rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
        options = dict(options)
        lengths = [p + n if n else 0 for p, n in zip(past, new, strict=True)]
        counts = [-(-length // page) for length in lengths]
        num_pages = sum(counts) + 4
        free = rng.sample(range(1, num_pages), num_pages - 1)
        owned = torch.zeros(num_pages, page, dtype=torch.bool)
        pages = torch.zeros(len(past) + spare, max(counts) + 2, dtype=torch.int32)
        slots = []
        for s, length in enumerate(lengths):
            table = torch.tensor([free.pop() for _ in range(counts[s])], dtype=torch.int32)
            pages[s, : counts[s]] = table
            place = [int(table[i // page]) * page + i % page for i in range(length)]
            owned.view(-1)[place[: past[s]]] = True
            slots += place[past[s] :]
        self.real, total = sum(new), sum(new) + spare

        def random_(*shape):  # below 4, where the next number of 16 bits is further away than the tolerance
            return torch.randn(*shape, generator=g).clamp(-3.9, 3.9).to(dtype)

        def pool(width):
            return torch.where(owned[..., None, None], random_(num_pages, page, kv_heads, width), math.nan).to(dtype)

        q, k, v = random_(total, heads * dim), random_(total, kv_heads * dim), random_(total, kv_heads * v_dim)
        q, k, v = (torch.cat((q, k, v), 1), None, None) if packed else (q, k, v)
        starts = [0, *torch.tensor(new).cumsum(0).tolist()]
        sinks = random_(heads) if options.pop("sinks", False) else None
        i32 = torch.int32
        ancestors = None
        if nodes:  # of a tree at the end of each sequence
            ancestors = [-1] * total
            for begin, n, num in zip(starts, new, nodes, strict=False):
                tree, few = random_parents(rng, num), min(n, num)
                ancestors[begin + n - few : begin + n] = [bits_of(tree, num - few + j, num) for j in range(few)]
            ancestors = torch.tensor(ancestors, dtype=i32)
        self.inputs = [
            q, k, v, torch.tensor(slots + [0] * spare, dtype=i32),
            torch.tensor(starts + [self.real] * spare, dtype=i32),
            torch.tensor(lengths + [0] * spare, dtype=i32), pages, pool(dim), pool(v_dim), sinks,
            None, None, ancestors,
        ]  # fmt: skip
        self.attributes = {
            "layer": 0, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "v_head_dim": v_dim,
            "scale": dim**-0.5, "window": 0, "softcap": 0.0, **options,
        }  # fmt: skip
        self.op, self.dtype = "PagedAttention", dtype
        self.key_bounds = EXACT
        self.max_query = 1 if max(new) == 1 and total == len(new) + spare else None

    def rotated(self, rotary, table, **rotation):
        """The same, packed, with the rotation of queries and keys in the op: `rotary` columns by a table of a type."""
        assert self.inputs[1] is None
        angles = torch.rand(len(self.inputs[0]), rotary // 2) * 7
        self.inputs[1:3] = [torch.cat((angles.cos(), angles.sin()), 1).to(table)]
        self.op, self.attributes = "RotaryPagedAttention", self.attributes | rotation
        if table == torch.float32 and self.inputs[-2] is not None:  # what rounds differently is a number further
            self.key_bounds = dict(rtol=0.13, atol=1)
        elif table == torch.float32:  # a GPU makes one operation of a product and a sum in fp32, which is rounded once
            self.key_bounds = dict(rtol=torch.finfo(self.dtype).eps, atol=1e-6)
        return self

    def quantised(self, pages, k_heads, v_heads):
        """The same with pages of 8 bits, scales of so many heads. What nobody may read is NaN, or 99 in int8."""
        for i, heads in ((0, k_heads), (1, v_heads)):
            numbers = (self.inputs[7 + i].float() * 40).nan_to_num(99.0 if pages is torch.int8 else math.nan)
            self.inputs[7 + i] = (numbers.round() if pages is torch.int8 else numbers).to(pages)
            self.inputs[10 + i] = 0.012 + 0.013 * torch.rand(heads)  # some of what is written saturates in int8
        return self

    def check(self, device=None, take=slice(None)):
        """Each tactic writes the same pools and the same attention as the reference; returns the tactics."""
        copies = [None if x is None else x.clone() for x in self.inputs]
        expected = OPS[self.op].reference(*copies, **self.attributes)
        output = described(expected)
        site = Site(self.op, self.attributes, tuple(map(described, self.inputs)), (output,),
                    device or Device(), self.max_query)  # fmt: skip
        found = tactics_of(self.op)(site)
        assert found and len({tactic.name for tactic in found}) == len(found)
        for tactic in found[take] if isinstance(take, slice) else some_of(found, take):
            inputs = [None if x is None else x.to(DEVICE, copy=True) for x in self.inputs]
            (y,) = run_tactic(tactic, inputs, [output])
            error = (y.cpu()[: self.real].float() - expected[: self.real].float()).abs().max()
            assert error < TOLERANCE[self.dtype], f"{tactic.name}: {error}"  # false for NaN
            for ours, theirs, bounds in zip(inputs[-6:-4], copies[-6:-4], (self.key_bounds, EXACT), strict=True):
                # slot 0 holds any padded token
                ours, theirs = ours.cpu().float().flatten(0, 1)[1:], theirs.float().flatten(0, 1)[1:]
                same = torch.allclose(ours.nan_to_num(123.0), theirs.nan_to_num(123.0), **bounds)
                assert same, f"{tactic.name}: pool"
        return found


# a table of the activation's type or fp32; all of a head, or part of it at an offset; halves or neighbours
ROTATIONS = [
    (20, None, dict(interleaved=0, rotary_offset=0)),
    (12, torch.float32, dict(interleaved=1, rotary_offset=8)),
]
EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]
HEADS = [(20, 12), (64, 80), *([(128, 128), (256, 64)] if GPU else [])]  # from 64 on with copies for prompts
DECODE, MIXED = ([150, 3, 37], [1, 1, 1]), ([0, 29, 41], [9, 1, 21])  # past and new tokens
FEW_SMS = Device(90, 8)  # a GPU so small that a small test splits as a large one would


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_decode(dtype, options):
    case = Case([150, 3, 37], [1, 1, 1], 6, 2, 20, 12, 8, dtype, packed=True, spare=1, options=options)
    assert case.max_query == 1
    found = case.check(FEW_SMS)
    assert all(len(tactic.launches) == 1 for tactic in found)
    assert {bool(tactic.workspace) for tactic in found} == {True, False}, "with splits and without"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_chunks_and_decode_rows(dtype, options):
    case = Case([0, 29, 41, 0], [9, 1, 21, 0], 6, 2, 20, 12, 8, dtype, packed=False, spare=2, options=options)
    assert case.max_query is None
    found = case.check(FEW_SMS, slice(None))
    assert any(len(tactic.launches) == 3 for tactic in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary,table,rotation", ROTATIONS)
@pytest.mark.parametrize("past,new", [DECODE, MIXED], ids=["decode", "mixed"])
def test_rotation_on_the_way(dtype, rotary, table, rotation, past, new):
    case = Case(past, new, 6, 2, 20, 12, 8, dtype, packed=True, spare=2, options={"window": 30})
    found = case.rotated(rotary, table or dtype, **rotation).check(FEW_SMS)
    least = min(len(tactic.launches) for tactic in found)
    assert least == (1 if case.max_query == 1 else 2), "no launch for the rotation alone"


@pytest.mark.parametrize("pages", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("past,new", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("dim,v_dim", HEADS)
def test_pages_of_8_bits(pages, dtype, past, new, dim, v_dim):
    kinds = [(90, "plain", True, (1, 2)), (80, "all", False, (2, 1))]  # 80 has no fp8: its pages are bytes
    for capability, options, packed, heads in kinds:
        case = Case(past, new, 6, 2, dim, v_dim, 8, dtype, packed=packed, spare=2, options=OPTIONS[options])
        case.quantised(pages, *heads).check(Device(90 if GPU else capability, 8), 4 if GPU else 1)


@pytest.mark.parametrize("pages", EIGHT_BITS)
@pytest.mark.parametrize("rotary,table,rotation", ROTATIONS)
@pytest.mark.parametrize("past,new", [DECODE, MIXED], ids=["decode", "mixed"])
def test_rotation_into_pages_of_8_bits(pages, rotary, table, rotation, past, new):
    case = Case(past, new, 6, 2, 20, 12, 8, torch.float16, packed=True, spare=2, options={"window": 30})
    case.quantised(pages, 2, 2).rotated(rotary, table or torch.float16, **rotation).check(FEW_SMS, 5 if GPU else 1)


@pytest.mark.parametrize("pages", EIGHT_BITS)
def test_prompts_that_begin_in_the_step_are_attended_apart(pages):
    case = Case([0, 29, 41, 0], [9, 1, 21, 1], 6, 2, 64, 80, 8, torch.float16, packed=True, spare=2, options={})
    found = case.quantised(pages, 2, 2).check(FEW_SMS, slice(-4 if GPU else -1, None))
    assert "new prompts" in found[-1].name and len(found[-1].launches) == 4


@pytest.mark.parametrize("pages", EIGHT_BITS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_whole_heads_rotated_into_pages_of_8_bits(pages, options):
    """`short.py`: contexts of several blocks, of one, of nothing but the newest key."""
    for dtype, table in [(torch.float16, torch.float16), *([(torch.bfloat16, torch.float32)] * GPU)]:
        case = Case([300, 0, 37, 129], [1] * 4, 6, 2, 32, 32, 8, dtype, packed=True, spare=2, options=options)
        case = case.quantised(pages, 2, 1).rotated(32, table, interleaved=0, rotary_offset=0)
        found = case.check(Device(90 if GPU or options else 80, 8), slice(-5 if GPU else -1, None))
        assert found[-1].name.startswith("short")


@pytest.mark.parametrize("pages", EIGHT_BITS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, at infinities and NaN
def test_numbers_are_stored_as_the_reference_stores_them(pages):
    """Some patterns of the upper 16 bits of fp32: numbers of all sizes, halves between two stored ones, NaN."""
    x = (torch.randint(1 << 16, (4, 1024), dtype=torch.int32) << 16).view(torch.float32)
    step = [torch.arange(4), torch.arange(5), torch.ones(4), torch.arange(4)[:, None]]
    pools = [torch.zeros(4, 1, 4, 256, dtype=pages) for _ in "kv"]
    scales = [torch.tensor([1.0, 0.3, 2.0, 0.001]), torch.tensor([0.7])]
    inputs = [x, x, x, *(entry.int() for entry in step), *pools, None, *scales]
    attributes = {"layer": 0, "num_heads": 4, "num_kv_heads": 4, "head_dim": 256, "v_head_dim": 256, "scale": 0.0,
                  "window": 0, "softcap": 0.0}  # fmt: skip
    output = described(x)
    for max_query in (1, None):
        site = Site("PagedAttention", attributes, tuple(map(described, inputs)), (output,), Device(), max_query)
        ours = [None if t is None else t.to(DEVICE, copy=True) for t in inputs]
        theirs = [None if t is None else t.clone() for t in inputs]
        run_tactic(tactics(site)[-1], ours, [output])
        OPS["PagedAttention"].reference(*theirs, **attributes)
        known = ~x.flatten().isnan()  # int8 has no NaN, and a GPU's NaN no sign
        for a, b in zip(ours[7:9], theirs[7:9], strict=True):
            a, b = a.cpu().flatten(), b.flatten()
            assert torch.equal(a.view(torch.int8)[known], b.view(torch.int8)[known])
            assert not pages.is_floating_point or a.float()[~known].isnan().all()


@pytest.mark.parametrize("heads,kv_heads,dim,v_dim", [(5, 5, 16, 16), (7, 1, 8, 24), (20, 1, 17, 5)])
def test_head_shapes(heads, kv_heads, dim, v_dim):
    for packed, new in ((True, [1, 1]), (False, [1, 6])):
        case = Case([40, 11], new, heads, kv_heads, dim, v_dim, 16, torch.float16, packed=packed, options={})
        case.check(FEW_SMS, slice(0, 2))


@pytest.mark.parametrize("window", [1, 16, 17, 32])
def test_window_boundaries(window):
    for past, new in (([32, 33, 15, 0], [1, 1, 1, 1]), ([0, 31, 20], [35, 1, 4])):
        case = Case(past, new, 2, 1, 16, 16, 8, torch.float32, packed=True, options={"window": window})
        case.check(FEW_SMS, slice(0, 1))


def test_shares_that_are_exactly_full():
    """Lengths at and around multiples of a block and of all blocks of the splits."""
    case = Case([15, 16, 63, 64, 127, 128], [1] * 6, 2, 1, 16, 16, 16, torch.float32, packed=True, options={})
    case.check(Device(90, 24), slice(0, 3))


@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_verification(dtype, options):
    """Up to five queries of each sequence, two or three heads to a key head, some sequences with fewer, or none."""
    for past, new, most, packed in (([150, 3, 0, 37], [5, 1, 3, 0], 5, True), ([64, 127, 40], [2, 2, 1], 2, False)):
        case = Case(past, new, 6, 2, 20, 12, 8, dtype, packed=packed, spare=2, options=OPTIONS[options])
        case.max_query = most
        found = case.check(FEW_SMS, slice(None) if GPU else slice(0, None, 2))
        assert {len(tactic.launches) for tactic in found} == {2}, "the keys of a step are written, then attended"
        assert {bool(tactic.workspace) for tactic in found} == {True, False}, "with splits and without"


TREES = ([60, 5, 0, 40, 33], [9, 3, 12, 1, 4], [8, 3, 11, 20, 31])  # past and new tokens, nodes of a tree at the end


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ["plain", "all"])
def test_trees_of_drafts(dtype, options):
    """Steps of verification, of single nodes, and beside a prompt; trees that earlier steps began."""
    past, new, nodes = TREES
    for more, most in ((new, 12), ([1] * 5, 1), ([9, 40, 12, 1, 4], None)):
        case = Case(past, more, 6, 2, 20, 12, 8, dtype, packed=most == 12, spare=2, options=OPTIONS[options],
                    nodes=nodes)  # fmt: skip
        case.max_query = most
        assert all(len(tactic.launches) == 2 for tactic in case.check(FEW_SMS, slice(None) if GPU else 1))


@pytest.mark.parametrize("pages", [None, *EIGHT_BITS])
@pytest.mark.parametrize("most", [1, 12, None])
def test_trees_with_rotation_and_pages_of_8_bits(pages, most):
    rotary, table, rotation = ROTATIONS[0]
    past, new, nodes = TREES
    case = Case(past, [1] * 5 if most == 1 else new, 6, 2, 20, 12, 8, torch.float16, packed=True, spare=1,
                options={"window": 30}, nodes=nodes)  # fmt: skip
    case = (case.quantised(pages, 2, 2) if pages else case).rotated(rotary, torch.float16, **rotation)
    case.max_query = most
    case.check(FEW_SMS, slice(None) if GPU else 1)


@pytest.mark.parametrize("pages", EIGHT_BITS)
def test_verification_with_rotation_into_pages_of_8_bits(pages):
    rotary, table, rotation = ROTATIONS[0]
    case = Case([70, 20], [4, 3], 6, 2, 20, 12, 8, torch.float16, packed=True, spare=1, options={"window": 30})
    case = case.quantised(pages, 2, 2).rotated(rotary, torch.float16, **rotation)
    case.max_query = 4
    case.check(FEW_SMS, slice(None) if GPU else slice(0, 1))


@pytest.mark.parametrize("programs", [1, 2, 3, 5, 11])
def test_shares_of_many_sequences(programs):
    """Long and short sequences, padded ones and prompts between them, cut anywhere."""
    past = [200, 0, 3, 77, 0, 15, 16, 330, 5, 31]
    for new in [1, 1, 1, 1, 0, 1, 1, 1, 2, 1], [2, 1, 3, 4, 0, 2, 1, 3, 2, 1]:
        case = Case(past, new, 2, 1, 16, 16, 16, torch.float32, packed=True, spare=1, options={})
        case.max_query = 4 if 4 in new else None
        case.check(Device(90, programs), slice(0, 1) if case.max_query else slice(-1, None))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", WIDE_OPTIONS.values(), ids=WIDE_OPTIONS)
@pytest.mark.parametrize(
    "heads,kv_heads,dim,v_dim,page",
    [(32, 8, 128, 128, 16), (12, 12, 64, 64, 8), (8, 4, 256, 256, 16), (10, 2, 96, 96, 32), (16, 1, 80, 64, 64)],
)
def test_random_steps(dtype, options, heads, kv_heads, dim, v_dim, page):
    rng = random.Random(torch.initial_seed())
    drafts = [rng.randrange(1, 9) for _ in range(5)]
    for new in ([1] * 5, [1, rng.randrange(2, 600), 1, 0, rng.randrange(2, 200)], drafts):
        past = [rng.choice((0, 1, rng.randrange(400), rng.randrange(5000))) for _ in new]
        case = Case(past, new, heads, kv_heads, dim, v_dim, page, dtype, packed=rng.random() < 0.5, spare=2,
                    options=options)  # fmt: skip
        case.max_query = 8 if new is drafts else case.max_query
        case.check(Device(90, 132), slice(None) if heads == 32 and not options else 5)


@pytest.mark.gpu
@pytest.mark.parametrize("pages", EIGHT_BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", WIDE_OPTIONS.values(), ids=WIDE_OPTIONS)
@pytest.mark.parametrize("heads,kv_heads,dim,v_dim,page", [(32, 8, 128, 128, 16), (8, 4, 256, 256, 16)])
def test_random_steps_over_pages_of_8_bits(pages, dtype, options, heads, kv_heads, dim, v_dim, page):
    rng = random.Random(torch.initial_seed())
    for new in ([1] * 5, [1, rng.randrange(2, 600), 1, 0, rng.randrange(2, 200)]):
        past = [rng.choice((0, 1, rng.randrange(400), rng.randrange(5000))) for _ in new]
        case = Case(past, new, heads, kv_heads, dim, v_dim, page, dtype, packed=rng.random() < 0.5, spare=2,
                    options=options)  # fmt: skip
        case.quantised(pages, rng.choice((1, kv_heads)), kv_heads).check(Device(90, 132), 5)


@pytest.mark.gpu
def test_the_same_input_gives_the_same_bits():
    """Whatever order the programs of a split sequence arrive in."""
    case = Case([9000, 300], [1, 1], 32, 8, 128, 128, 16, torch.bfloat16, packed=True, options={})
    inputs = [None if x is None else x.to(DEVICE) for x in case.inputs]
    output = Tensor((2, 32 * 128), "bfloat16")
    site = Site("PagedAttention", case.attributes, tuple(map(described, case.inputs)), (output,), Device(), 1)
    for tactic in tactics(site):
        (first,) = run_tactic(tactic, inputs, [output])
        for _ in range(20):
            assert torch.equal(run_tactic(tactic, inputs, [output])[0], first), tactic.name
