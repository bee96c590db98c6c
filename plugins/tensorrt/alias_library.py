"""An empty shared library that depends on another one: the loader takes the one for the other.

The parser of the TensorRT for RTX wheels calls `dlopen("libtensorrt_rtx.so")` when it makes a plugin. The wheel has
only `libtensorrt_rtx.so.1`, so the process would end there. A library with the SONAME that is asked for, loaded before,
is what `dlopen` then returns, and symbols are found in what it depends on. It is written here byte by byte (ELF-64,
System V ABI), since a machine that runs engines need not have a compiler.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import tempfile
from pathlib import Path

MACHINES = {"x86_64": 62, "aarch64": 183}
DT_NULL, DT_NEEDED, DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT, DT_SONAME = 0, 1, 4, 5, 6, 10, 11, 14
PT_LOAD, PT_DYNAMIC = 1, 2
ELF_HEADER, PROGRAM_HEADER, SYMBOL = 64, 56, 24  # bytes
PAGE = 0x10000  # the largest that either machine has


def load_alias(library: Path, alias: str) -> ctypes.CDLL:
    """Loads `library`, and lets `dlopen(alias)` find it in this process. Raises OSError: it cannot be loaded."""
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    with tempfile.TemporaryDirectory(prefix="ingot-") as folder:
        path = Path(folder) / alias
        path.write_bytes(alias_library(alias, library.name, MACHINES[platform.machine()]))
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def alias_library(name: str, needed: str, machine: int = MACHINES["x86_64"]) -> bytes:
    """An ELF library with SONAME `name` that needs `needed` and defines nothing."""
    strings = b"\0" + name.encode() + b"\0" + needed.encode() + b"\0"
    at_name, at_needed = 1, 2 + len(name)
    symbols = bytes(SYMBOL)  # the one that every table begins with
    hashes = struct.pack("<4I", 1, 1, 0, 0)
    at_symbols = ELF_HEADER + 2 * PROGRAM_HEADER
    at_hashes = at_symbols + len(symbols)
    at_strings = at_hashes + len(hashes)
    at_dynamic = -(-(at_strings + len(strings)) // 8) * 8
    entries = {
        DT_NEEDED: at_needed, DT_SONAME: at_name, DT_HASH: at_hashes, DT_STRTAB: at_strings, DT_SYMTAB: at_symbols,
        DT_STRSZ: len(strings), DT_SYMENT: SYMBOL, DT_NULL: 0,
    }  # fmt: skip
    dynamic = b"".join(struct.pack("<qQ", tag, value) for tag, value in entries.items())
    total = at_dynamic + len(dynamic)
    identity = b"\x7fELF" + bytes((2, 1, 1, 0)) + bytes(8)  # 64 bits, little-endian, version 1, System V
    header = identity + struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, ELF_HEADER, 0, 0, ELF_HEADER, PROGRAM_HEADER, 2,
                                    64, 0, 0)  # fmt: skip
    everything = struct.pack("<IIQQQQQQ", PT_LOAD, 6, 0, 0, 0, total, total, PAGE)
    table = struct.pack("<IIQQQQQQ", PT_DYNAMIC, 6, at_dynamic, at_dynamic, at_dynamic, len(dynamic), len(dynamic), 8)
    content = (header + everything + table + symbols + hashes + strings).ljust(at_dynamic, b"\0")
    return content + dynamic
