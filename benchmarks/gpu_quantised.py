"""The products of a Llama-3.1-8B layer on a GPU with weights (and activations) in few bits, against what limits them.

    python benchmarks/gpu_quantised.py [--formats bf16,fp8,..] [--shapes qkv,o,gate_up,down,head] [--rows 1,4,16,..]
                                       [--seconds 420] [--json FILE]

Each tactic is checked against the reference in fp32 on random numbers, then timed in a CUDA graph over copies of the
weight that no cache holds. Floor: the longer of reading (at the speed of torch's sum, same run) and multiplying (at
that of the largest bf16 or FP8 product that cuBLAS does here, same run). The table has microseconds, floor over time,
and the tactic. A format is left where the seconds are used up.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from gpu_timing import read_speed, replay_ms
from ingot.builder.targets.cubin import Binary, Cubin, Source, compile_all
from ingot.builder.targets.timing import Timer
from ingot.engines.errors import BuildError
from ingot.plugins import OPS, cublas, tactics_of
from ingot.plugins.gpu import Address, Gpu, Launchable
from ingot.plugins.tactic import Device, Operand, Site, Tactic, Tensor

SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
BF16, INT8, FP8 = 16, torch.int8, torch.float8_e4m3fn  # the first: ONNX's number of the type
# format -> type of the weight, columns of a scale (0: a row), type of activations, columns of their scale
FORMATS = {
    "bf16": ("bfloat16", 0, "", 0), "fp8": ("float8_e4m3fn", 0, "float8_e4m3fn", 0),
    "fp8-block": ("float8_e4m3fn", 128, "float8_e4m3fn", 128), "int8": ("int8", 0, "int8", 0),
    "int4-g128": ("int4", 128, "", 0), "w8a16-fp8": ("float8_e4m3fn", 0, "", 0), "w8a16": ("int8", 0, "", 0),
}  # fmt: skip
TOLERANCE = 2e-2  # of the norm of the difference over that of the reference: bf16 operands, dequantised ones too


def numbers(shape: tuple[int, ...], kind: str) -> torch.Tensor:
    """Random numbers of a type; int4 packed as engines have it."""
    match kind:
        case "int4":
            return torch.randint(0, 256, (shape[0], shape[1] // 2), device="cuda", dtype=torch.uint8)
        case "int8":
            return torch.randint(-127, 128, shape, device="cuda", dtype=INT8)
        case _:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(getattr(torch, kind))


def inputs_of(rows: int, shape: tuple[int, int], form: str) -> list[torch.Tensor | None]:
    """x, weight, and where the format has them scale, zero, x_scale, bias."""
    kind, group, activation, x_group = FORMATS[form]
    width, depth = shape
    x = numbers((rows, depth), activation or "bfloat16")
    weight = numbers(shape, kind)
    if form == "bf16":
        return [x, weight, None]
    scale = torch.rand(width, depth // group, device="cuda") if group else torch.rand(width, device="cuda")
    x_scale = torch.rand(rows, depth // x_group if x_group else 1, device="cuda") if activation else None
    return [x, weight, (scale + 0.5) / 100, None, x_scale, None]


def described(rows: int, shape: tuple[int, int], form: str) -> list[Tensor | None]:
    """What `inputs_of` makes, without making it."""
    kind, group, activation, x_group = FORMATS[form]
    x, weight = Tensor((rows, shape[1]), activation or "bfloat16"), Tensor(shape, kind, cold=True)
    if form == "bf16":
        return [x, weight, None]
    scale = Tensor((shape[0], shape[1] // group) if group else (shape[0],), "float32", cold=True)
    x_scale = Tensor((rows, shape[1] // x_group if x_group else 1), "float32") if activation else None
    return [x, weight, scale, None, x_scale, None]


def site_of(rows: int, shape: tuple[int, int], form: str, gpu: Device) -> Site:
    _, group, _, x_group = FORMATS[form]
    inputs, y = tuple(described(rows, shape, form)), (Tensor((rows, shape[0]), "bfloat16"),)
    if form == "bf16":
        return Site("Linear", {}, inputs, y, gpu)
    return Site("QuantisedLinear", {"dtype": BF16, "group": group, "x_group": x_group}, inputs, y, gpu)


def expected(inputs: Sequence[torch.Tensor | None], form: str, columns: slice) -> torch.Tensor:
    """The reference's first columns of y, in fp32."""
    x, weight, *rest = inputs
    assert x is not None and weight is not None
    if form == "bf16":
        return x.float() @ weight[columns].float().T
    _, group, _, x_group = FORMATS[form]
    scale, _, x_scale, _ = rest
    assert scale is not None
    if weight.dtype == torch.uint8:
        both = torch.stack((weight[columns] & 15, weight[columns] >> 4), -1).flatten(1)
        stored = (both ^ 8).to(INT8) - 8
    else:
        stored = weight[columns]
    return OPS["QuantisedLinear"].reference(
        x, stored, scale[columns], None, x_scale, None, dtype=1, group=group, x_group=x_group
    )  # fmt: skip


class Bench:
    """Kernels compiled in many processes, as a build has them, launched on torch's tensors and timed by its Timer."""

    def __init__(self) -> None:
        self.gpu = Gpu()
        self.stream = self.gpu.stream()
        self.timer = Timer(self.gpu)
        self.device = replace(self.gpu.device, cublas=not cublas.why_missing())
        self.binaries: dict[Source, Binary | BuildError] = {}
        self._functions: dict[Source, Launchable] = {}

    def tactics(self, site: Site) -> list[Tactic]:
        """Those whose kernels compile, and whose algorithms cuBLASLt has."""
        every = tactics_of(site.op)(site)
        todo = dict.fromkeys(launch.kernel for tactic in every for launch in tactic.launches)
        self.compile([source for source in todo if source not in self.binaries])
        return [t for t in every if not any(isinstance(self.binaries[e.kernel], BuildError) for e in t.launches)]

    def compile(self, sources: Sequence[Source]) -> None:
        self.binaries |= compile_all(sources, self.device.capability)

    def cubins(self, tactic: Tactic) -> dict[Source, Binary]:
        found = {launch.kernel: self.binaries[launch.kernel] for launch in tactic.launches}
        return {source: binary for source, binary in found.items() if not isinstance(binary, BuildError)}

    def run(self, tactic: Tactic, inputs: Sequence[torch.Tensor | None], *outputs: torch.Tensor) -> None:
        """Launches it and waits. workspace and counters: poison and zeros."""
        workspace = torch.full((tactic.workspace + 256,), 0xFF, device="cuda", dtype=torch.uint8)
        zeros = torch.zeros(tactic.zeros + 16, device="cuda", dtype=torch.uint8)
        torch.cuda.synchronize()
        starts = {"output": list(outputs), "input": list(inputs), "workspace": [workspace], "zeros": [zeros]}
        for launch in tactic.launches:
            arguments: list[int | float | Address] = []
            for a in launch.arguments:
                if not isinstance(a, Operand):
                    arguments.append(a)
                    continue
                room = a.kind in ("workspace", "zeros")
                start = starts[a.kind][0 if room else a.index]
                assert start is not None
                arguments.append(Address(start.data_ptr() + (a.index if room else a.offset)))
            if launch.kernel not in self._functions:
                binary = self.binaries[launch.kernel]
                assert not isinstance(binary, BuildError)
                self._functions[launch.kernel] = (
                    self.gpu.load(binary.data, binary.name, binary.num_warps, binary.shared, binary.pdl)
                    if isinstance(binary, Cubin) else cublas.load_product(binary)
                )  # fmt: skip
            self._functions[launch.kernel].launch(launch.grid, self.stream, arguments)
        self.gpu.synchronise(self.stream)

    def measure(self, rows: int, shape: tuple[int, int], form: str) -> tuple[list[tuple[float, str]], int]:
        """(microseconds and name of each tactic, the fastest first; bytes that must be read and written).

        Raises AssertionError: one of them is wrong.
        """
        inputs = inputs_of(rows, shape, form)
        site = site_of(rows, shape, form, self.device)
        y, columns = torch.empty(rows, shape[0], device="cuda", dtype=torch.bfloat16), slice(0, min(shape[0], 2048))
        theirs, times = expected(inputs, form, columns), []
        for tactic in self.tactics(site):
            y.fill_(torch.nan)
            self.run(tactic, inputs, y)
            error = float((y[:, columns].float() - theirs).norm() / theirs.norm())
            assert error < TOLERANCE and not y.isnan().any(), (form, rows, shape, tactic.name, error)
            times.append((self.timer.microseconds(site, tactic, self.cubins(tactic)), tactic.name))
        return sorted(times), sum(t.nbytes for t in (*inputs, y) if t is not None)


def multiply_speed(kind: torch.dtype, size: int = 8192) -> float:
    """Operations a second of torch's largest product of a type."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16).to(kind) for _ in range(2))
    one = torch.ones((), device="cuda")
    if kind == FP8:
        run = partial(torch._scaled_mm, a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    else:
        run = partial(torch.matmul, a, b.t())
    return 2 * size**3 / replay_ms(run) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="bf16,fp8,fp8-block,int8,int4-g128")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rows", default="1,4,16,64,128,256,1024,4096")
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--json")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    torch.manual_seed(int(time.time()))
    torch.cuda.synchronize()  # makes the context that both sides use
    bench = Bench()
    reads = read_speed()
    speeds = {"": multiply_speed(torch.bfloat16), "float8_e4m3fn": multiply_speed(FP8)}
    speeds["int8"] = speeds["float8_e4m3fn"]  # of the same instructions a second
    print(f"{torch.cuda.get_device_name()}: reads {reads / 1e12:.2f} TB/s, multiplies "
          + ", ".join(f"{name or 'bf16'} {speed / 1e12:.0f} T/s" for name, speed in speeds.items()))  # fmt: skip
    found: list[dict] = []
    asked = [(int(rows), name, form) for rows in args.rows.split(",") for name in args.shapes.split(",")
             for form in args.formats.split(",") if name != "head" or int(rows) <= 256]  # fmt: skip
    # a head has at most a row of logits for each sequence
    sites = [site_of(rows, SHAPES[name], form, bench.device) for rows, name, form in asked]  # fmt: skip
    bench.compile(list(dict.fromkeys(
        launch.kernel for site in sites for tactic in tactics_of(site.op)(site) for launch in tactic.launches
    )))  # fmt: skip
    print(f"{len(bench.binaries)} kernels and products are compiled", flush=True)
    for rows, name, form in asked:
        if time.monotonic() > end:
            print("the seconds are used up")
            break
        width, depth = SHAPES[name]
        times, num_bytes = bench.measure(rows, SHAPES[name], form)
        floor = 1e6 * max(num_bytes / reads, 2 * rows * width * depth / speeds[FORMATS[form][2]])
        found.append({"rows": rows, "shape": name, "format": form, "floor_us": floor, "times": times})
        best, second = times[0], times[min(1, len(times) - 1)]
        print(f"{rows:5} {name:8} {form:10} {best[0]:8.1f} us  {floor / best[0]:5.0%} of the floor  {best[1]}"
              f"  (next {second[0]:.1f} {second[1]})", flush=True)  # fmt: skip
        torch.cuda.empty_cache()
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)
    layer = ("qkv", "o", "gate_up", "down")
    print("\nproducts of 32 layers, ms (floor over time), by rows")
    for form in args.formats.split(","):
        cells = []
        for rows in map(int, args.rows.split(",")):
            mine = [f for f in found if f["format"] == form and f["rows"] == rows and f["shape"] in layer]
            total, floor = 32e-3 * sum(f["times"][0][0] for f in mine), 32e-3 * sum(f["floor_us"] for f in mine)
            cells.append(f"{rows}: {total:.2f} ({floor / total:.0%})" if len(mine) == len(layer) else f"{rows}: -")
        print(f"{form:10} " + "  ".join(cells))


if __name__ == "__main__":
    main()
