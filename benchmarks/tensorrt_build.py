"""Time and memory of TensorRT's build of a large graph, on this machine, without a GPU.

    python benchmarks/tensorrt_build.py DIR [--layers 2] [--gpu-arch 89]

Writes a random checkpoint of Llama 3 8B's shape with that many layers into DIR, exports it once, and builds it for
TensorRT in a process of its own. Memory is sampled every 20 ms: what the process has itself (which the build needs),
and pages of the weights' file that it has mapped (which the system may take back).
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

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


def prepare(folder: Path, layers: int) -> None:
    """The graph and its weights, written once."""
    from dataclasses import asdict

    from ingot.builder.checkpoint import Checkpoint
    from ingot.builder.export import export
    from ingot.builder.passes import optimise
    from ingot.builder.record import model_info
    from ingot.engines.weights import save_graph

    checkpoint = folder.with_name(folder.name + "-checkpoint")
    subprocess.run([sys.executable, HERE / "dummy_checkpoint.py", checkpoint, "--layers", str(layers)], check=True)
    opened = Checkpoint.open(str(checkpoint))
    graph = optimise(export(opened, "bfloat16"))
    folder.mkdir(parents=True)
    save_graph(graph, folder)
    (folder / "model.json").write_text(json.dumps(asdict(model_info(str(checkpoint), opened, graph, "bfloat16"))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--gpu-arch", type=int, default=89)
    parser.add_argument("--build", action="store_true", help="only build what is in DIR, in this process")
    args = parser.parse_args()
    folder = args.folder / f"llama-8b-{args.layers}"
    if args.build:
        return build(folder, args.gpu_arch)
    if not folder.exists():
        prepare(folder, args.layers)
    subprocess.run(["rm", "-rf", folder / "tensorrt"], check=True)
    command = [sys.executable, __file__, args.folder, "--layers", str(args.layers), "--gpu-arch", str(args.gpu_arch)]
    done = subprocess.run([*command, "--build"], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{args.layers} layers of 4096/14336 for sm_{args.gpu_arch}: {found['note']}")
    print(f"parsed and built in {found['seconds']:.1f} s ({found['cpu_seconds']:.1f} s of processor time), "
          f"{found['anon_gib']:.1f} GiB of its own and {found['mapped_gib']:.1f} GiB of mapped weights at most, "
          f"a plan of {found['plan_bytes'] / 1e9:.2f} GB with {found['layers']} layers")  # fmt: skip


if __name__ == "__main__":
    main()
