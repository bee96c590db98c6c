"""Memory of calibrating and building a large shape, killed half-way (SIGKILL) and started again: the host's, a GPU's.

    python benchmarks/calibration_memory.py [--layers 32] [--quant int4-rtn] [--tokens 512] [--device cuda]

The checkpoint is benchmarks/dummy_checkpoint.py's llama-8b with some layers (16 GB of disk with all 32, removed in the
end) and the tokenizer of a demo model. Memory is for one layer, so the peak of a few layers is that of all; what grows
with layers lies on disk. Exit code 1 if the peak of either process (VmHWM), or what is used of a GPU that has no other
user (by nvidia-smi), is over the limit, or nothing was resumed.
Two cores: all 32 layers by int4-rtn 2.73 GiB, killed after 711 s, resumed and built in 1,092 s; two layers by int4-gptq
3.74 GiB, killed after 104 s, resumed and built in 94 s.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "engines" / "demo" / "pycoder-14m"
LIMIT_GIB = 12.0


GPU_MEMORY = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]


def watch(
    command: list[str], log: Path, stop_at: Path | None, seconds: float, gpu: bool
) -> tuple[int, float, float, float]:
    """Runs it, until a file appears: exit code, peak of the host and of the GPU in GiB, seconds."""
    start, peak, on_gpu = time.monotonic(), 0.0, 0.0
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = max([peak, *(int(line.split()[1]) / 2**20 for line in status.splitlines() if "VmHWM" in line)])
            except OSError:
                pass  # it has just ended
            if gpu:
                used = subprocess.run(GPU_MEMORY, check=True, capture_output=True, text=True).stdout
                on_gpu = max(on_gpu, int(used.split()[0]) / 1024)
            if (stop_at and stop_at.exists()) or time.monotonic() - start > seconds:
                process.kill()
                process.wait()
                break
            time.sleep(0.1)
    return process.returncode, peak, on_gpu, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--quant", default="int4-rtn")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--seconds", type=float, default=3600.0, help="limit of each of the two runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="calibration-memory-", dir=args.folder) as name:
        folder = Path(name)
        model, out, log = folder / "model", folder / "engine", folder / "log.txt"
        make = [sys.executable, str(ROOT / "benchmarks" / "dummy_checkpoint.py"), str(model)]
        subprocess.run([*make, "--layers", str(args.layers)], check=True)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / file, model)
        text = folder / "text.txt"
        text.write_text("\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "runtime").glob("*.py"))))
        command = [
            sys.executable, "-m", "ingot", "build", str(model), "-o", str(out), "--quant", args.quant,
            "--calibration-data", str(text), "--calibration-tokens", str(args.tokens), "--accept-accuracy",
            "--calibration-width", str(args.width), "--calibration-device", args.device, "-v",
        ]  # fmt: skip
        kept = folder / "engine.calibration"
        gpu, half = args.device == "cuda", kept / f"found-{2 * args.layers:05d}.safetensors"
        code, killed, on_gpu, seconds = watch(command, log, half, args.seconds, gpu)
        left = sorted(path.name for path in kept.glob("*")) if kept.is_dir() else []
        print(f"killed after {seconds:.0f} s (exit {code}), peak {killed:.2f} GiB, left {len(left)} files", flush=True)
        code, peak, again, seconds = watch(command, log, None, args.seconds, gpu)
        peak, on_gpu = max(killed, peak), max(on_gpu, again)
        said = log.read_text()
        resumed = "going on with" in said
        print(f"again: exit {code} after {seconds:.0f} s, resumed: {resumed}", flush=True)
        if code:
            print(said[-2000:])
            return 1
        manifest = json.loads((out / "engine.json").read_text())
        size = (out / "weights.safetensors").stat().st_size
        print(f"{args.layers} layers, {args.quant}: {size / 1e9:.2f} GB of weights, "
              f"calibrated in {max(manifest['build']['phases'].values()):.0f} s of it")  # fmt: skip
        print(f"peak {peak:.2f} GiB, of the GPU {on_gpu:.2f}, at most {LIMIT_GIB:g}; left behind: {kept.exists()}")
        return int(max(peak, on_gpu) > LIMIT_GIB or not resumed or kept.exists())


if __name__ == "__main__":
    sys.exit(main())
