"""compute-sanitizer over tests of the kernels, drawn at random: is memory outside a buffer touched, do threads race?

    python benchmarks/gpu_sanitizer.py [FILE ..] [--tests 10] [--tools memcheck racecheck] [--jobs 14] [--seconds 500]

As many tests of each FILE (tests/plugins/test_*_gpu.py), `--each` of them to a process, `--jobs` processes at a time,
each test under every tool. torch gives each buffer its own allocation meanwhile, so that what lies behind one is
nobody's. A table of what passed and what was found; exit status 1 if anything was, or did not end in time. What a tool
said is kept in --logs.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb", "short"]
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


@dataclass(frozen=True)
class Run:
    """Tests of one file under one tool, and what came of them; one that skips itself has passed."""

    file: Path
    tool: str
    tests: list[str]
    passed: int = 0
    found: int = 0
    ended: bool = True


def tests_of(file: Path, num: int) -> list[str]:
    """Ids of `num` tests of a file, or of all if it has fewer."""
    done = subprocess.run([*PYTEST, "--collect-only", file], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    return random.sample(names, min(num, len(names)))


def sanitize(run: Run, until: float, logs: Path) -> Run:
    """Runs the tests; `found` counts what the tool's summary says, -1 if there is none."""
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tool = ["compute-sanitizer", "--tool", run.tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    try:
        done = subprocess.run([*tool, *PYTEST, *run.tests], cwd=ROOT, env=env, capture_output=True, text=True,
                              timeout=max(1, until - time.monotonic()))  # fmt: skip
    except subprocess.TimeoutExpired:
        return Run(run.file, run.tool, run.tests, ended=False)
    said = done.stdout + done.stderr
    (logs / f"{run.file.stem}-{run.tool}-{time.monotonic_ns()}.log").write_text(said)
    summaries = [int(number) for number in SUMMARY.findall(said)]
    passed = sum(int(number) for number in re.findall(r"(\d+) (?:passed|skipped)", said))
    found = max(sum(summaries), int(done.returncode == 9)) if summaries else -1
    return Run(run.file, run.tool, run.tests, passed, found)


def batches(files: Iterable[Path], tools: list[str], num: int, each: int) -> list[Run]:
    """Every file's tests, `each` to a run, under each tool."""
    drawn = {file: tests_of(file, num) for file in files}
    return [Run(file, tool, tests[i : i + each])
            for file, tests in drawn.items() for tool in tools for i in range(0, len(tests), each)]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=sorted(ROOT.glob("tests/plugins/test_*_gpu.py")))
    parser.add_argument("--tests", type=int, default=10)
    parser.add_argument("--tools", nargs="+", default=["memcheck", "racecheck"])
    parser.add_argument("--each", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 16))
    parser.add_argument("--logs", type=Path, default=Path("sanitizer-logs"))
    args = parser.parse_args()
    if not shutil.which("compute-sanitizer"):
        parser.error("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    random.seed(args.seed)
    args.logs.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + args.seconds
    runs = batches([file.resolve() for file in args.files], args.tools, args.tests, args.each)
    print(f"seed {args.seed}: {len(runs)} runs of {args.each} tests at most\n\n| file | tool | tests | passed | found |"
          "\n|---|---|---|---|---|", flush=True)  # fmt: skip
    with ThreadPoolExecutor(args.jobs) as threads:
        done = list(threads.map(lambda run: sanitize(run, until, args.logs), runs))
    wrong = 0
    for file, tool in dict.fromkeys((run.file, run.tool) for run in done):
        here = [run for run in done if (run.file, run.tool) == (file, tool)]
        asked, passed = sum(len(run.tests) for run in here), sum(run.passed for run in here)
        found = "cut off" if not all(run.ended for run in here) else (
            "no summary" if any(run.found < 0 for run in here) else str(sum(run.found for run in here)))  # fmt: skip
        wrong += found != "0" or passed != asked
        print(f"| {file.stem} | {tool} | {asked} | {passed} | {found} |", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
