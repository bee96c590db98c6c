"""Tactics of a site on the same operands: roundings are let pass, and a kernel that computes something else is not.

Kernels run in Triton's interpreter, over the memory of a driver that has no GPU.
"""

import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from fake_driver import FakeDriver
from ingot import BuildConfig
from ingot.builder.targets import cuda, tactics
from ingot.builder.targets.agreement import alike, strangers
from ingot.builder.targets.cubin import Cubin
from ingot.builder.targets.planner import key_of
from ingot.builder.targets.steps import steps
from ingot.builder.targets.tactics import Candidates, timed
from ingot.builder.targets.timing import Timer
from ingot.builder.targets.timing_cache import TimingCache
from ingot.plugins import gpu as gpus
from ingot.plugins import jit, tactics_of
from ingot.plugins.gpu import Address, Gpu
from ingot.plugins.tactic import Device, Operand, Site, Tensor
from onnx import TensorProto

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU"),
]


def tensor(*shape, dtype="float16", cold=False):
    return Tensor(shape, dtype, cold)


def weight(*shape, dtype="float16"):
    return Tensor(shape, dtype, True)


LINEAR = Site("Linear", {}, (tensor(3, 128), weight(64, 128), None), (tensor(3, 64),))
NORM = {"epsilon": 1e-5, "weight_offset": 0.0, "fp32_multiply": 0, "dtype": TensorProto.INT8, "group": 0}
QUANTISED_NORM = Site("QuantisedRMSNorm", NORM, (tensor(20, 128), weight(128), tensor(20, 128)),
                      (tensor(20, 128, dtype="int8"), tensor(20, 1, dtype="float32"), tensor(20, 128)))  # fmt: skip
PRODUCT = {"dtype": TensorProto.FLOAT16, "group": 32, "x_group": 0}
FOUR_BITS = Site("QuantisedLinear", PRODUCT, (tensor(3, 128), weight(32, 128, dtype="int4"),
                 weight(32, 4, dtype="float32"), weight(32, 4, dtype="int4"), None, None),
                 (tensor(3, 32),))  # fmt: skip
ATTENTION = {"layer": 0, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "v_head_dim": 16, "scale": 0.25,
             "window": 0, "softcap": 0.0}  # fmt: skip


def attention(tokens, sequences, max_query, pages="float16", tree=False):
    """Of contexts up to 64 tokens; rows of the bucket may be padding."""
    pool, scale = weight(1, 16, 2, 16, dtype=pages), None if pages == "float16" else weight(2, dtype="float32")
    shapes = (tokens,), (sequences + 1,), (sequences,), (sequences, 4)
    numbers = [tensor(*shape, dtype="int32") for shape in shapes]
    inputs = (tensor(tokens, 128), None, None, *numbers, pool, pool, None, scale, scale, numbers[0] if tree else None)
    return Site("PagedAttention", ATTENTION, inputs, (tensor(tokens, 64),), Device(), max_query, 64)


class Interpreted:
    """A loaded kernel that Triton interprets, on addresses of the driver's memory."""

    def __init__(self, driver, kernel):
        self._driver, self._kernel = driver, kernel

    def launch(self, grid, stream, arguments, *, apart=False):
        kinds = [kind for _, kind in self._kernel.signature]
        both = zip(arguments, kinds, strict=True)
        values = [self._at(a.value, kind) if isinstance(a, Address) else a for a, kind in both]
        jit.launch_kernel(self._kernel, grid, values)

    def _at(self, address, kind):
        base, element = max(at for at in self._driver.memory if at <= address), jit.ELEMENTS[kind]
        rest = self._driver.memory[base][address - base :]
        return torch.from_numpy(rest[: len(rest) // element.itemsize * element.itemsize]).view(element)


@pytest.fixture
def driver(monkeypatch):
    driver = FakeDriver()
    monkeypatch.setattr(gpus, "_driver", lambda: driver)
    monkeypatch.setattr(Gpu, "load", lambda gpu, data, *_: Interpreted(driver, pickle.loads(data)))
    return driver


def binaries(sources):
    return {source: Cubin(pickle.dumps(source), source.function, 0, source.num_warps, False) for source in sources}


def run_of(tactic):
    return tactic, binaries(launch.kernel for launch in tactic.launches)


def astray(tactic, name="wrong"):
    """The same with an operand that lies elsewhere, as where the compiler loses a register."""
    weight = Operand("input", 1)
    launches = [replace(each, arguments=tuple(replace(weight, offset=64) if a == weight else a for a in each.arguments))
                for each in tactic.launches]  # fmt: skip
    assert launches != list(tactic.launches)
    return replace(tactic, name=name, launches=tuple(launches))


@pytest.mark.parametrize(
    "site",
    [LINEAR, QUANTISED_NORM, FOUR_BITS, attention(3, 3, 1), attention(9, 4, 4, tree=True), attention(12, 4, 0, "int8")],
    ids=lambda site: f"{site.op} {site.inputs[0].shape[0]}",
)
def test_tactics_agree(driver, site):
    found, step = tactics_of(site.op)(site)[:4], steps(site)[-1]
    with Timer(Gpu()) as timer:
        outputs = timer.outputs(site, [run_of(tactic) for tactic in found], step)
        assert len(found) > 1 and strangers(outputs) == set()
        for each in outputs[0]:
            assert len(each) == (sum(step.queries) if step else site.outputs[0].shape[0])
            numbers = each.astype(np.float32)
            assert np.isfinite(numbers).all() and len(np.unique(numbers)) > 2
        again = timer.outputs(site, [run_of(found[0])], step)
        assert all(map(np.array_equal, outputs[0], again[0])), "of the same numbers each time"
        region = driver.memory[timer._region]
        assert np.array_equal(region, timer._noise[: len(region)]), "and what tactics are timed on is there again"
    assert not driver.memory


def test_one_that_reads_astray_or_writes_nothing_is_found(driver):
    right = tactics_of("Linear")(LINEAR)[:3]
    idle = replace(right[0], launches=())
    with Timer(Gpu()) as timer:
        runs = [run_of(tactic) for tactic in (right[0], astray(right[1]), *right[1:], idle)]
        assert strangers(timer.outputs(LINEAR, runs, None)) == {1, 4}
        assert strangers(timer.outputs(LINEAR, [runs[4], runs[0]], None)) == {0}
        assert strangers(timer.outputs(LINEAR, runs[:2], None)) is None


def test_the_fastest_is_left_out_of_engine_and_cache_where_it_is_wrong(driver, tmp_path, monkeypatch):
    gpu = Gpu()
    right, site = tactics_of("Linear")(LINEAR)[:3], replace(LINEAR, device=gpu.device)
    us = {"wrong": 1.0} | {tactic.name: 2.0 + i for i, tactic in enumerate(right)}
    monkeypatch.setattr(tactics, "compile_all", lambda sources, capability: binaries(sources))
    monkeypatch.setattr(Timer, "microseconds", lambda timer, site, tactic, cubins: us[tactic.name])
    cache = TimingCache(tmp_path, {})

    def choose(found, cache=cache):
        each = Candidates(site, "node", found)
        return timed({key_of(site): each}, gpu, cache)[key_of(site)], each.names

    choice, names = choose([*right, astray(right[0])])
    assert choice.tactic == right[0] and [us for _, us in choice.ranking] == [2.0, 3.0, 4.0]
    assert cache.read(site, names) == [2.0, 3.0, 4.0, None]
    note = "left out 'wrong', which computed something else than most others did on this GPU; please report it"
    assert choice.note == choice.describe()["note"] == note
    again, _ = choose([*right, astray(right[0])])
    assert again.tactic == right[0] and cache.num_hits == 1
    assert "note" not in choose(right)[0].describe()

    choice, names = choose([astray(right[0]), right[0]], None)
    assert choice.tactic.name == "wrong", "nobody knows which of two it is"
    assert choice.note == f"no majority of 'wrong', '{right[0].name}' computes the same on this GPU; please report it"
    alone, _ = choose([astray(right[0])], None)
    assert not alone.note


def test_who_builds_is_told(monkeypatch, tmp_path):
    site = {"op": "Linear", "outputs": [[(3, 64), "float16", False]]}
    plan = SimpleNamespace(tactics=(site, site | {"note": "left out 'wrong'"}), max_num_seqs=1, page_size=16,
                           max_num_batched_tokens=16, max_draft_tokens=0, buckets=(), cubins=())  # fmt: skip
    monkeypatch.setattr(cuda, "make_plan", lambda *_: plan)
    told = []
    with cuda.begin(BuildConfig("", "", tune=False, gpu_arch=90), SimpleNamespace(note=told.append)) as compile:
        compile(SimpleNamespace(graph=None), SimpleNamespace(max_model_len=64), tmp_path)
    assert told == ["Linear -> (3, 64): left out 'wrong'"]


# -- what is alike -----------------------------------------------------------------------------------------------------


def rows(dtype="float16", seed=0):
    """Of sizes from 0.01 to 100."""
    sizes = np.logspace(-2, 2, 8)[:, None]
    return (sizes * np.random.default_rng(seed).standard_normal((8, 64))).astype(dtype)


def test_roundings_are_alike():
    from ml_dtypes import bfloat16, float8_e4m3fn

    exact = rows("float64")
    assert alike(exact.astype(bfloat16), (exact * (1 + 2**-8)).astype(bfloat16))
    assert alike(exact.astype(float8_e4m3fn), (exact * (1 + 2**-8)).astype(float8_e4m3fn))
    whole = np.rint(20 * exact / np.abs(exact).max(1, keepdims=True)).astype(np.int8)
    assert alike(whole, whole + np.random.default_rng(1).integers(-1, 2, whole.shape, np.int8))
    big = np.array([[7e4, 6.5e4, 6e4]])
    with np.errstate(over="ignore"):
        assert alike(big.astype(np.float16), (big * (1 + 2**-8)).astype(np.float16)), "at the end of the type"
    assert alike(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("row", range(8))
def test_one_number_that_is_wrong_is_seen_in_rows_of_any_size(row):
    one = rows()
    for value in (one[row, 5] + np.abs(one[row]).mean(), np.inf):
        other = one.copy()
        other[row, 5] = value
        assert not alike(one, other) and not alike(other, one)
    assert not alike(one, rows(seed=1)) and not alike(one, np.zeros_like(one))
    places = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert alike(places, places.copy()) and not alike(places, places + 1)


def test_the_majority_is_right():
    a, b, c = [rows(seed=0)], [rows(seed=1)], [rows(seed=2)]
    none = [np.full_like(a[0], np.nan)]
    some = [a[0].copy()]
    some[0][3, 3] = np.nan
    for found, expected in (
        ([a, a, a], set()),
        ([b, a, a], {0}),
        ([b, a, b, a, a], {0, 2}),
        ([a, b], None),
        ([a, b, c], None),
        ([a, a, b, b], None),
        ([none, none, a], {0, 1}),
        ([some, none, a, a, b], {0, 1, 4}),
        ([none, none], set()),
        ([some, some, some], set()),
    ):
        assert strangers(found) == expected
    two = [a[0], b[0]]
    assert strangers([two, two, [a[0], c[0]]]) == {2}, "in any of its outputs"
