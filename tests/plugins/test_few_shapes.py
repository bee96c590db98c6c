"""Products of all numbers of rows: the right numbers, in few shapes, as counted by oneDNN itself."""

import ctypes

import pytest
import torch
from ingot.plugins import OPS
from ingot.plugins.few_shapes import in_few_shapes
from ingot.plugins.native_binders import _onednn_linear
from torch.backends import mkldnn

linear, experts = OPS["Linear"].reference, OPS["Experts"].reference
MOST = 16 + 8 * 5  # shapes of 1 to 512 rows


@pytest.fixture
def primitives(capfd):
    """Calls a function and counts what oneDNN made anew meanwhile."""

    def counted(call):
        capfd.readouterr()
        with mkldnn.verbose(mkldnn.VERBOSE_ON_CREATION):
            call()
        ctypes.CDLL(None).fflush(None)
        return capfd.readouterr().out.count(",create:cache_miss,")

    return counted


def test_rows_are_those_of_the_plain_product():
    shapes = set()
    x, weight = torch.randn(600, 24, dtype=torch.float64), torch.randn(24, 7, dtype=torch.float64)
    for rows in range(601):

        def product(x, rows=rows):
            shapes.add(len(x))
            assert rows <= len(x) <= rows * 9 / 8
            return x @ weight

        torch.testing.assert_close(in_few_shapes(product, x[:rows]), x[:rows] @ weight, rtol=1e-12, atol=1e-12)
    assert {1, 2, 15, 16, 64, 240, 256, 512} <= shapes and len(shapes - {0}) <= MOST + 2


@pytest.mark.skipif(not mkldnn.is_available(), reason="torch has no oneDNN")
@pytest.mark.parametrize("what", ["linear", "onednn", "experts"])
def test_onednn_meets_few_shapes(primitives, what):
    """Sizes that no other test has, since it remembers 1,024. Without `in_few_shapes` they were as many as rows."""
    width, depth, dtype = 43, 59, torch.float32 if what == "onednn" else torch.bfloat16
    weight, steps = torch.randn(width, depth).to(dtype), range(1, 513, 3)
    gate_up, down = torch.randn(1, 2 * width, depth).to(dtype), torch.randn(1, depth, width).to(dtype)
    unit = torch.ones(512, 1)

    @torch.inference_mode()
    def run():
        for rows in steps:
            x = torch.randn(rows, depth).to(dtype)
            if what == "experts":
                experts(x, unit[:rows].int() * 0, unit[:rows], gate_up, down, activation="silu")
            else:
                y = (linear if what == "linear" else _onednn_linear)(x, weight, None)
                torch.testing.assert_close(y.double(), x.double() @ weight.double().t(), rtol=1.6e-2, atol=0.1)

    found = primitives(run)
    print(f"{found} primitives for {len(steps)} numbers of rows")
    assert found <= MOST * (2 if what == "experts" else 1)
    if what == "onednn":
        assert found, "oneDNN says nothing any more: nothing was counted"
