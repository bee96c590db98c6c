"""Time and memory of TensorRT's builds, on this machine, without a GPU.

    python benchmarks/tensorrt_build.py DIR [--layers 2] [--gpu-arch 89] [--quant int4-rtn]
    python benchmarks/tensorrt_build.py DIR --matrix

`--matrix`: pycoder-14m and small random qwen3, gemma3 and mistral in bf16, FP8 (with FP8 pages) and INT4, for SM89 and
SM120: time and size of each, and what TensorRT says of its layers.

Without it: writes a random checkpoint of Llama 3 8B's shape with that many layers into DIR, exports it once, and builds
it for TensorRT in a process of its own. Memory is sampled every 20 ms: what the process has itself (which the build
needs), and pages of the weights' file that it has mapped (which the system may take back).
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GIB = 1 << 20  # kilobytes


def build(folder: Path, capability: int) -> None:
    """Compiles the graph in `folder`, and prints what it took as JSON."""
    from ingot.builder import BuildConfig
    from ingot.builder.targets import audience_of, tensorrt
    from ingot.builder.targets.tensorrt import plan_file
    from ingot.engines.manifest import ModelInfo

    peak = {"RssAnon": 0, "RssFile": 0}
    done, marks = threading.Event(), {}

    def watch() -> None:
        while not done.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                name = line.partition(":")[0]
                if name in peak:
                    peak[name] = max(peak[name], int(line.split()[1]))

    def timed(*args: object, **options: object) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        plan_file_build(*args, **options)  # type: ignore[arg-type]
        marks.update(seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)

    plan_file_build = plan_file.build
    tensorrt.build = timed  # type: ignore[assignment]
    notes: list[str] = []
    model = ModelInfo(**json.loads((folder / "model.json").read_text()))
    config = BuildConfig("", str(folder), "tensorrt", max_num_seqs=8, max_num_batched_tokens=64, gpu_arch=capability)
    thread = threading.Thread(target=watch)
    with tensorrt.begin(config, audience_of(note=notes.append)) as compile:
        thread.start()
        info = compile(None, model, folder)  # type: ignore[arg-type]
    done.set()
    thread.join()
    print(json.dumps({**marks, "anon_gib": peak["RssAnon"] / GIB, "mapped_gib": peak["RssFile"] / GIB, "note": notes[0],
                      "plan_bytes": info["plan_bytes"], "layers": info["layers"]}))  # fmt: skip


def prepare(folder: Path, layers: int, quant: str) -> None:
    """The graph and its weights, written once."""
    from dataclasses import asdict

    from ingot.builder.checkpoint import Checkpoint
    from ingot.builder.export import export
    from ingot.builder.passes import optimise
    from ingot.builder.quantise import quantise
    from ingot.builder.record import model_info
    from ingot.calibration.recipe import Recipe
    from ingot.calibration.scales import Scales
    from ingot.engines.weights import save_graph

    checkpoint = folder.with_name(folder.name + "-checkpoint")
    subprocess.run([sys.executable, HERE / "dummy_checkpoint.py", checkpoint, "--layers", str(layers)], check=True)
    opened = Checkpoint.open(str(checkpoint))
    graph = optimise(export(opened, "bfloat16"))
    if quant:
        quantise(graph, Recipe.open(quant), Scales())
    folder.mkdir(parents=True)
    save_graph(graph, folder)
    (folder / "model.json").write_text(json.dumps(asdict(model_info(str(checkpoint), opened, graph, "bfloat16"))))


def matrix(folder: Path) -> None:
    """The 24 builds of the tests (`tests/tensorrt_build.py`), kernels compiled, as a table."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import tensorrt_build as builds
    from ingot.builder.targets import tactics, tensorrt

    took = dict.fromkeys(("build", "compile_all"), (0.0, 0.0))
    for module, name in ((tensorrt, "build"), (tactics, "compile_all")):
        setattr(module, name, _timed(getattr(module, name), name, took))
    columns = ("model", "precision", "SM", "TensorRT s (processor)", "kernels s", "plan MB", "attention", "all plugins",
               "layers", "fused", "products of FP8 / INT4")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    total = time.perf_counter()
    for name in builds.MODELS:
        home = folder / name
        (home / "graph").mkdir(parents=True)
        model = builds.write_graph(builds.checkpoint_of(name, home / "checkpoint"), home / "graph")
        for precision in builds.PRECISIONS:
            for capability in builds.CAPABILITIES:
                out = home / f"{precision}-{capability}"
                builds.in_precision(name, precision, home / "graph", out)
                took.update(dict.fromkeys(took, (0.0, 0.0)))
                made = builds.compile_for(out, model, capability)
                first, (wall, cpu) = [x for x in made.layers if x["profile"] == 0], took["build"]
                kernels, plugins = took["compile_all"][0], sum(made.info["plugins"].values())
                fp8, int4 = (sum(x["profile"] == 0 for x in made.products[kind]) for kind in ("FP8", "Int4"))
                print(f"| {name} | {precision} | {capability} | {wall:.1f} ({cpu:.1f}) | {kernels:.1f} | "
                      f"{made.info['plan_bytes'] / 1e6:.1f} | {sum(x['profile'] == 0 for x in made.attention)} of "
                      f"{made.manifest.model.num_layers} | {plugins} | {len(first)} | "
                      f"{sum(x['profile'] == 0 for x in made.fused)} | {fp8} / {int4} |", flush=True)  # fmt: skip
    print(f"\nlayers of the first profile; all in {time.perf_counter() - total:.0f} s, exports included")


def _timed(function: Callable[..., Any], name: str, took: dict[str, tuple[float, float]]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = function(*args, **options)
        took[name] = time.perf_counter() - wall, time.process_time() - cpu
        return result

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--gpu-arch", type=int, default=89)
    parser.add_argument("--quant", default="", help="a recipe that rounds to the nearest")
    parser.add_argument("--matrix", action="store_true", help="24 small builds; DIR must be empty or not there")
    parser.add_argument("--build", action="store_true", help="only build what is in DIR, in this process")
    args = parser.parse_args()
    if args.matrix:
        return matrix(args.folder)
    folder = args.folder / f"llama-8b-{args.layers}{args.quant and '-'}{args.quant}"
    if args.build:
        return build(folder, args.gpu_arch)
    if not folder.exists():
        prepare(folder, args.layers, args.quant)
    subprocess.run(["rm", "-rf", folder / "tensorrt"], check=True)
    command = [sys.executable, __file__, args.folder, "--layers", str(args.layers), "--gpu-arch", str(args.gpu_arch),
               "--quant", args.quant]  # fmt: skip
    done = subprocess.run([*command, "--build"], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{args.layers} layers of 4096/14336 {args.quant} for sm_{args.gpu_arch}: {found['note']}")
    print(f"parsed and built in {found['seconds']:.1f} s ({found['cpu_seconds']:.1f} s of processor time), "
          f"{found['anon_gib']:.1f} GiB of its own and {found['mapped_gib']:.1f} GiB of mapped weights at most, "
          f"a plan of {found['plan_bytes'] / 1e9:.2f} GB with {found['layers']} layers")  # fmt: skip


if __name__ == "__main__":
    main()
