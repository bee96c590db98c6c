"""A C++ compiler that remembers: the same sources with the same flags are compiled once a session, by whichever worker
comes first.

Every build for the cpu target compiles all kernels anew, 15 s of processor time, and tests build dozens of engines, in
processes of their own too; they find this one as $CXX. What is not a compilation of one source goes straight through.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path


def install(folder: Path) -> None:
    """Makes it $CXX of this process and of those it starts, with its memory in `folder`; nothing without a compiler."""
    names = (os.environ.get("CXX") or "c++", "c++", "g++", "clang++")
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None or Path(compiler).parent == folder:
        return
    folder.mkdir(exist_ok=True)
    script = folder / "c++"
    own = script.with_name(f"c++.{os.getpid()}")  # another worker may be starting the script
    own.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{__file__}" "{folder}" "{compiler}" "$@"\n')
    own.chmod(0o755)
    own.rename(script)
    os.environ["CXX"] = str(script)


def main(folder: Path, compiler: str, arguments: list[str]) -> int:
    """Runs the compiler, or copies what it made of the same source before; returns its exit code."""
    if arguments.count("-c") != 1 or arguments[-2] != "-o":
        return subprocess.call([compiler, *arguments])
    source = Path(arguments[arguments.index("-c") + 1])
    digest = hashlib.sha256("\0".join([compiler, *arguments[:-1]]).encode())
    headers = source.parents[1].rglob("*.h")
    for path in (source, *sorted(headers)):
        digest.update(path.read_bytes())
    kept, out = folder / f"{digest.hexdigest()}.o", arguments[-1]
    with open(kept.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other worker waits for this one's
        if not kept.exists():
            code = subprocess.call([compiler, *arguments])
            if code:
                return code
            shutil.copy(out, kept.with_suffix(".part"))
            kept.with_suffix(".part").rename(kept)
            return 0
    shutil.copy(kept, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
