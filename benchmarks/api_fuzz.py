"""Does `ingot serve` keep to its own description? schemathesis over /openapi.json, with a seed.

    python benchmarks/api_fuzz.py ENGINE [--schemathesis COMMAND] [--examples 100] [--seed 1]

All its phases (examples, coverage, fuzzing, stateful) and all its checks but one: that a request which fits the schema
is accepted. A schema cannot say how many tokens a text has, which ids a model knows, or which model is served; such
requests must get a 400 or a 404 with a sentence. The context is short so that answers are. Exit code: schemathesis'.
"""

import argparse
import asyncio
import subprocess
import tempfile
from pathlib import Path

from serving import server


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument(
        "--schemathesis", default="schemathesis", help="the command, of version 4.32; a path must be absolute"
    )
    parser.add_argument("--examples", type=int, default=100, help="of each operation and phase")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # for what schemathesis leaves behind
        raise SystemExit(await run(args, folder))


async def run(args: argparse.Namespace, folder: str) -> int:
    """The exit code of schemathesis."""
    async with server(args.engine, "--max-model-len", "48", "--max-num-seqs", "16") as (port, process):
        command = [args.schemathesis, "run", f"http://127.0.0.1:{port}/openapi.json",
                   "--phases", "examples,coverage,fuzzing,stateful", "--exclude-checks", "positive_data_acceptance",
                   "--max-examples", str(args.examples), "--seed", str(args.seed), "--generation-database", "none",
                   "--continue-on-failure", "--request-timeout", "60", "--workers", "2"]  # fmt: skip
        ran = await asyncio.to_thread(subprocess.run, command, cwd=folder)
        assert process.poll() is None, "the server has ended"
        return ran.returncode


if __name__ == "__main__":
    asyncio.run(main())
