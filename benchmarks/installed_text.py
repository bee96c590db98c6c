"""Text to train a head on: the Python files that are installed on this machine, but none that the measuring text has.

    python benchmarks/installed_text.py OUT.jsonl [--megabytes 80] [--but TEXT]

JSON Lines of documents, each begun by `<|endoftext|>`, in a random order. TEXT: what will be measured with. A file is
left out if a tenth of its long lines are in TEXT, in whatever version. The files are other people's: keep them here.
"""

import argparse
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LONG, LONGEST = 32, 200_000  # characters of a line that says something, and of a file
SHARED = 0.1


def long_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if len(line.strip()) >= LONG]


def files() -> Iterator[Path]:
    folders = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
    folders |= {each for folder in folders for each in folder.parent.glob("python3*/dist-packages")}
    found = {path for folder in folders if folder.is_dir() for path in folder.rglob("*.py")}
    every = sorted(found)
    random.Random(0).shuffle(every)
    yield from every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--megabytes", type=float, default=80)
    parser.add_argument("--but", type=Path)
    args = parser.parse_args()
    known = set(long_lines(args.but.read_text(encoding="utf-8"))) if args.but else set()
    room, num, left_out, seen = args.megabytes * 1e6, 0, 0, set()
    with args.out.open("w", encoding="utf-8") as out:
        for path in files():
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if not 200 <= len(text) <= LONGEST or hash(text) in seen:
                continue
            seen.add(hash(text))
            lines = long_lines(text)
            if sum(line in known for line in lines) > SHARED * len(lines):
                left_out += 1
                continue
            out.write(json.dumps({"text": f"<|endoftext|>\n{text.strip()}\n"}) + "\n")
            num, room = num + 1, room - len(text)
            if room <= 0:
                break
    print(f"{args.out}: {num} files, {args.megabytes - room / 1e6:.0f} MB; {left_out} left out, being in {args.but}")


if __name__ == "__main__":
    main()
