"""How far the tactics of a site are apart on the GPU at hand, beside the bound from which a build leaves one out.

    python benchmarks/gpu_agreement.py [--seconds 240]

All tactics of some sites of an 8B model, bf16 and quantised: the worst distance of each op in parts of the bound (above
1 one would be left out), which tactics would be, and what the comparison adds to a build for a site.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest

import numpy as np
from ingot.builder.targets.agreement import COMPARED, distance, strangers
from ingot.builder.targets.steps import steps
from ingot.builder.targets.table import default_table
from ingot.builder.targets.tactics import Candidates, _compile, _cubins
from ingot.builder.targets.timing import Timer
from ingot.plugins import cublas, tactics_of
from ingot.plugins.gpu import Gpu
from ingot.plugins.tactic import Device, Site, Tensor
from onnx import TensorProto

INNER, WIDTH = 14336, 4096


def tensor(*shape: int, dtype: str = "bfloat16", cold: bool = False) -> Tensor:
    return Tensor(shape, dtype, cold)


def quantised(device: Device) -> Iterator[Site]:
    """Products, norms and attention over pages of 8 bits, for a few rows and for many."""
    kinds = {"int8": TensorProto.INT8, "float8_e4m3fn": TensorProto.FLOAT8E4M3FN}
    for rows in (4, 48, 2048):
        for dtype, group in (("int4", 128), ("int8", 0), ("float8_e4m3fn", 0)):
            product = {"dtype": TensorProto.BFLOAT16, "group": group, "x_group": 0}
            for x_dtype in ("bfloat16", dtype) if dtype in kinds else ("bfloat16",):
                for op, width, more in (("QuantisedLinear", WIDTH, {}), ("GatedQuantisedLinear", 2 * INNER,
                                        {"activation": "silu", "y_dtype": 0, "y_group": 0})):  # fmt: skip
                    scales = (width, WIDTH // group) if group else (width,)
                    inputs = (tensor(rows, WIDTH, dtype=x_dtype), tensor(width, WIDTH, dtype=dtype, cold=True),
                              tensor(*scales, dtype="float32", cold=True), None,
                              None if x_dtype == "bfloat16" else tensor(rows, 1, dtype="float32"), None)  # fmt: skip
                    yield Site(op, product | more, inputs, (tensor(rows, width // (2 if more else 1)),), device)
        for dtype, kind in kinds.items():
            norm = {"epsilon": 1e-5, "weight_offset": 0.0, "fp32_multiply": 0, "dtype": kind, "group": 0}
            x, values = tensor(rows, WIDTH), tensor(rows, WIDTH, dtype=dtype)
            yield Site("QuantisedRMSNorm", norm, (x, tensor(WIDTH, cold=True), x),
                       (values, tensor(rows, 1, dtype="float32"), x), device)  # fmt: skip
            heads = {"layer": 0, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "v_head_dim": 128,
                     "scale": 128**-0.5, "window": 0, "softcap": 0.0}  # fmt: skip
            pool, scale = tensor(1, 16, 8, 128, dtype=dtype, cold=True), tensor(8, dtype="float32", cold=True)
            numbers = [tensor(*n, dtype="int32") for n in ((rows,), (65,), (64,), (64, 512))]
            if rows == 48:  # decoding
                numbers = [tensor(*n, dtype="int32") for n in ((rows,), (rows + 1,), (rows,), (rows, 512))]
            yield Site("PagedAttention", heads, (tensor(rows, 6144), None, None, *numbers, pool, pool, None, scale,
                       scale, None), (tensor(rows, WIDTH),), device, 1 if rows == 48 else 0)  # fmt: skip


def measured(device: Device) -> Iterator[Site]:
    """Sites of the default table, whose weights and pools are cold again."""
    for each in default_table(device.capability).measured[::9]:
        inputs = enumerate(each.site.inputs)
        cold = tuple(t and replace(t, cold=i > 0 and "int" not in t.dtype) for i, t in inputs)
        yield replace(each.site, inputs=cold, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240, help="stop after this long")
    deadline = time.monotonic() + parser.parse_args().seconds
    gpu = Gpu()
    device = replace(gpu.device, cublas=not cublas.why_missing())
    sites = [s for pair in zip_longest(quantised(device), measured(device)) for s in pair if s and tactics_of(s.op)(s)]
    todo = [Candidates(site, site.op, tactics_of(site.op)(site)) for site in sites]
    worst: dict[str, float] = {}
    seconds, num = 0.0, 0
    with Timer(gpu) as timer:
        for each in todo:
            if time.monotonic() > deadline:
                break
            compiled = _compile(each.tactics, device.capability)
            runs = [(t, cubins) for t in each.tactics if (cubins := _cubins(t, compiled)) is not None]
            begin = time.monotonic()
            strangers(timer.outputs(each.site, runs[:COMPARED], steps(each.site)[-1]))
            seconds, num = seconds + time.monotonic() - begin, num + 1
            found = timer.outputs(each.site, runs, steps(each.site)[-1])
            apart = strangers(found)
            far = max(max(map(distance, found[0], other)) for other in found)
            worst[each.site.op] = max(far, worst.get(each.site.op, 0.0))
            if far > 1 or apart or apart is None or not all(np.isfinite(y.astype(np.float32)).all() for y in found[0]):
                names = "no majority" if apart is None else [runs[i][0].name for i in sorted(apart)]
                print(f"{each.site.op} {[t and (t.dtype, *t.shape) for t in each.site.inputs]}: {far:.3g} {names}")
    for op, far in sorted(worst.items()):
        print(f"{op:24}{far:10.4f} of the bound")
    each_ms = 1000 * seconds / max(num, 1)
    print(f"{num} of {len(todo)} sites on {gpu.name}; {each_ms:.0f} ms a site for {COMPARED} tactics")


if __name__ == "__main__":
    main()
