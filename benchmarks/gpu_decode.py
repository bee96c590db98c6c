"""What a decode step of a Llama-3.1-8B shape with quantised weights launches, op by op, on a GPU.

    python benchmarks/gpu_decode.py [--formats fp8,int4-g128] [--rows 1,4,16,64] [--keys 225] [--prompts 1024,4096]
                                    [--most 14] [--seconds 100]

Each tactic of a product is checked against the reference, and all are timed as a build times them, in a CUDA graph with
cold weights; attention on sequences of about so many keys, and on prompts, a step each. The table has microseconds and
names of the best four; last come the sums of 32 layers, of the best of each op.
"""

import argparse
import time
from dataclasses import replace

import torch
from gpu_quantised import BF16, FORMATS, SHAPES, TOLERANCE, Bench, inputs_of, site_of
from gpu_timing import read_speed
from ingot.builder.targets.steps import SPREAD, Step
from ingot.plugins import OPS, tactics_of
from ingot.plugins.tactic import Device, Site, Tactic, Tensor

FP8 = 17  # ONNX's number of E4M3
LAYER = ("norm", "qkv", "attention", "quantise", "o", "norm", "gate_up", "down")
HEADS, KV_HEADS, DIM, PAGE, WIDTH = 32, 8, 128, 16, 8192


def products(rows: int, name: str, form: str, device: Device) -> Site:
    site = site_of(rows, SHAPES[name], form, device)
    if name != "gate_up":
        return site
    y = Tensor((rows, SHAPES[name][0] // 2), "bfloat16")
    rounded = bool(FORMATS[form][2])
    ends = {"activation": "silu", "y_dtype": FP8 if rounded else 0, "y_group": 0}
    outputs = (replace(y, dtype="float8_e4m3fn"), Tensor((rows, 1), "float32")) if rounded else (y,)
    return replace(site, op="GatedQuantisedLinear", attributes={**site.attributes, **ends}, outputs=outputs)


def others(rows: int, form: str, device: Device) -> dict[str, Site]:
    """Norm, attention and rounding."""
    x, weight = Tensor((rows, 4096), "bfloat16"), Tensor((4096,), "bfloat16", cold=True)
    small, scale, rounded = replace(x, dtype="float8_e4m3fn"), Tensor((rows, 1), "float32"), bool(FORMATS[form][2])
    norm = {"epsilon": 1e-5, "weight_offset": 0.0, "fp32_multiply": 0}
    found = {}
    if rounded:
        found["norm"] = Site("QuantisedRMSNorm", norm | {"dtype": FP8, "group": 0}, (x, weight, x), (small, scale, x),
                             device)  # fmt: skip
        found["quantise"] = Site("QuantiseTokens", {"dtype": FP8, "group": 0}, (x,), (small, scale), device)
    else:
        found["norm"] = Site("RMSNorm", norm, (x, weight, x), (x, x), device)
    found["attention"] = attention(rows, rows, form, device)
    return found


def attention(tokens: int, sequences: int, form: str, device: Device) -> Site:
    """Of a decode step if there are as many sequences, else of any step."""
    x, rounded = Tensor((tokens, HEADS * DIM), "bfloat16"), bool(FORMATS[form][2])
    i32, unit = "int32", Tensor((1,), "float32", cold=True)
    pool = Tensor((1, PAGE, KV_HEADS, DIM), "float8_e4m3fn" if rounded else "bfloat16", cold=True)
    step = (Tensor((tokens,), i32), Tensor((sequences + 1,), i32), Tensor((sequences,), i32),
            Tensor((sequences, WIDTH), i32))  # fmt: skip
    inputs = (Tensor((tokens, 6144), "bfloat16"), Tensor((tokens, DIM), "bfloat16"), *step, pool, pool, None,
              *((unit, unit) if rounded else (None, None)))  # fmt: skip
    attributes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "v_head_dim": DIM,
                  "scale": DIM**-0.5, "softcap": 0.0, "window": 0, "rotary_offset": 0, "interleaved": 0}  # fmt: skip
    decoding = (1, 1024) if tokens == sequences else (None, None)
    return Site("RotaryPagedAttention", attributes, inputs, (x,), device, *decoding)


def right(bench: Bench, tactic: Tactic, site: Site, inputs: list, theirs: torch.Tensor) -> bool:
    """Whether the tactic gives the reference's numbers, scales multiplied in."""
    outputs = [torch.full(y.shape, torch.nan, device="cuda").to(getattr(torch, y.dtype)) for y in site.outputs]
    bench.run(tactic, inputs, *outputs)
    y = outputs[0].float() * (outputs[1] if len(outputs) > 1 else 1.0)
    error = float((y - theirs).norm() / theirs.norm())
    if not error < TOLERANCE:  # NaN, too
        print(f"WRONG by {error:.3f}: {site.op} {[t and t.shape for t in site.inputs[:2]]} {tactic.name}", flush=True)
    return error < TOLERANCE


class Decode(Bench):
    """Also times any op of a step."""

    def times(self, site: Site, most: int, keys: int) -> list[tuple[float, str]]:
        """(microseconds, name) of each tactic that compiles, the fastest first."""
        found = []
        for tactic in self.tactics(site)[: most or None]:
            if site.op == "RotaryPagedAttention":
                rows = site.outputs[0].shape[0]
                step = Step((1,) * rows, tuple(keys + SPREAD // 2 - 29 * i % SPREAD for i in range(rows)))
                us = self.timer.on_step(site, tactic, self.cubins(tactic), step)
            else:
                us = self.timer.microseconds(site, tactic, self.cubins(tactic))
            found.append((us, tactic.name))
        return sorted(found)


def reference(site: Site, form: str, inputs: list) -> torch.Tensor:
    """Of a product, in fp32."""
    numbers = list(inputs)
    if inputs[1].dtype == torch.uint8:
        numbers[1] = ((torch.stack((inputs[1] & 15, inputs[1] >> 4), -1).flatten(1) ^ 8).to(torch.int8)) - 8
    found = OPS[site.op].reference(*numbers, **(dict(site.attributes) | {"dtype": BF16}))
    values, *scale = found if isinstance(found, tuple) else (found,)
    return values.float() * (scale[0] if scale else 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="fp8,int4-g128")
    parser.add_argument("--rows", default="1,4,16,64")
    parser.add_argument("--keys", type=int, default=225)
    parser.add_argument("--prompts", default="1024,4096")
    parser.add_argument("--most", type=int, default=0, help="tactics of an op, the first of its list; 0: all")
    parser.add_argument("--seconds", type=float, default=100)
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    torch.manual_seed(int(time.time()))
    torch.cuda.synchronize()
    bench = Decode()
    print(f"{torch.cuda.get_device_name()}: reads {read_speed() / 1e12:.2f} TB/s")
    cases = []
    for form in args.formats.split(","):
        for rows in map(int, args.rows.split(",")):
            sites = others(rows, form, bench.device)
            sites |= {name: products(rows, name, form, bench.device) for name in LAYER if name in SHAPES}
            cases.append((rows, form, sites))
    every = [
        t for _, _, sites in cases for site in sites.values() for t in tactics_of(site.op)(site)[: args.most or None]
    ]
    prompts = [attention(int(tokens), 256, args.formats.split(",")[0], bench.device)
               for tokens in filter(None, args.prompts.split(","))]  # fmt: skip
    every += [tactic for site in prompts for tactic in tactics_of(site.op)(site)]
    bench.compile(list(dict.fromkeys(launch.kernel for tactic in every for launch in tactic.launches)))
    print(f"{len(bench.binaries)} kernels are compiled, {end - time.monotonic():.0f} s are left", flush=True)
    sums, wrong = [], []
    for rows, form, sites in cases:
        best = {}
        for name, site in sites.items():
            if time.monotonic() > end:
                print("the seconds are used up")
                break
            if name in SHAPES:
                inputs = inputs_of(rows, SHAPES[name], form)
                theirs = reference(site, form, inputs)
                wrong += [
                    t for t in bench.tactics(site)[: args.most or None] if not right(bench, t, site, inputs, theirs)
                ]
                del inputs, theirs
                torch.cuda.empty_cache()
            times = bench.times(site, args.most, args.keys)
            best[name] = times[0][0]
            shown = "; ".join(f"{us:.2f} {what}" for us, what in times[:4])
            print(f"{rows:3} {form:9} {name:9} {shown}", flush=True)
        if best.keys() == set(LAYER) - ({"quantise"} - sites.keys()):
            total = 32e-3 * sum(best[name] for name in LAYER if name in best)
            sums.append(f"{rows} rows, {form}: {total:.3f} ms")
    for site in prompts:
        tokens, times = site.outputs[0].shape[0], []
        step = Step((tokens, *[0] * 255), (tokens, *[0] * 255))
        for tactic in bench.tactics(site):
            times.append((bench.timer.on_step(site, tactic, bench.cubins(tactic), step), tactic.name))
        print(f"a prompt of {tokens}: " + "; ".join(f"{us:.1f} {what}" for us, what in sorted(times)[:5]), flush=True)
    print("\n".join(["", "32 layers, the best of each op", *sums]))
    if wrong:
        raise SystemExit(f"{len(wrong)} tactics are wrong")


if __name__ == "__main__":
    main()
