"""Names that the Python bindings of TensorRT have, per version: writes tests/plugins/tensorrt_names.json.

    python benchmarks/tensorrt_names.py  # needs pip, its index and a C compiler; downloads some 100 MB

Bindings of full TensorRT install from PyPI without the libraries (which come from NVIDIA's own index). They import once
libraries that do nothing stand in for those that they are linked to: enough to ask which names there are. A test
compares them with what `plugins/tensorrt/api.pyi` declares; only classes that are declared there are kept.
"""

from __future__ import annotations

import ast
import ctypes
import importlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
STUB = ROOT / "plugins/tensorrt/api.pyi"
OUT = ROOT / "tests/plugins/tensorrt_names.json"
VERSIONS = {
    "10.13": ("tensorrt-cu13-bindings==10.13.3.9", "tensorrt_bindings"),
    "10.16": ("tensorrt-cu13-bindings==10.16.1.11", "tensorrt_bindings"),
    "11.4": ("tensorrt-cu13-bindings==11.4.0.106", "tensorrt_bindings"),
    "rtx 1.7": ("tensorrt-rtx-cu13-bindings==1.7.1.116", "tensorrt_rtx_bindings"),
}


def names_of(wheel: Path, module: str, classes: list[str]) -> dict[str, list[str]]:
    """Public attributes of the classes that the bindings in `wheel` have; "" holds the names of the module itself."""
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        for binary in Path(folder, module).glob("*.so"):
            _stand_in(binary, Path(folder))
        sys.path.insert(0, folder)
        found = importlib.import_module(module)
        public = {"": [name for name in dir(found) if not name.startswith("_")]}
        for each in classes:
            if hasattr(found, each):
                public[each] = [name for name in dir(getattr(found, each)) if not name.startswith("_")]
    return public


def _stand_in(binary: Path, folder: Path) -> None:
    """Libraries for those of TensorRT that `binary` is linked to, with every symbol that it takes from them."""
    undefined = subprocess.run(["nm", "-D", "--undefined-only", binary], check=True, capture_output=True, text=True)
    symbols = re.findall(r" U (create\w+|get\w+|initLib\w+)$", undefined.stdout, re.MULTILINE)
    source = folder / "stand_in.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols))
    for name in sorted(set(re.findall(rb"lib(?:nv\w+|tensorrt\w*)\.so\.\d+", binary.read_bytes()))):
        library = folder / name.decode()
        subprocess.run(
            ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-w", "-o", library, source], check=True
        )
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def main() -> None:
    """One process for each version: two of them cannot be loaded together."""
    classes = [node.name for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ClassDef)]
    if len(sys.argv) > 1:
        wheel, module = sys.argv[1:]
        print(json.dumps(names_of(Path(wheel), module, classes)))
        return
    found = {}
    for version, (requirement, module) in VERSIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder]
            subprocess.run([*pip, requirement], check=True)
            (wheel,) = Path(folder).glob("*.whl")
            command = [sys.executable, __file__, str(wheel), module]
            found[version] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(version, sum(map(len, found[version].values())), "names")
    lines = {version: {key: " ".join(names) for key, names in each.items()} for version, each in found.items()}
    OUT.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
