"""Every name of TensorRT that ingot uses is in the bindings of each version (`benchmarks/tensorrt_names.py` read them).

mypy holds the sources to `plugins/tensorrt/api.pyi`; this holds `api.pyi` to the bindings.
"""

import ast
import json
from pathlib import Path

import ingot
import pytest

ROOT = Path(ingot.__file__).parent
NAMES = json.loads((ROOT / "tests/plugins/tensorrt_names.json").read_text())
STUB = (ROOT / "plugins/tensorrt/api.pyi").read_text()
OWN = {"MODULES", "module"}  # of api.py itself
# declared under "not in every module" and looked for before they are used (flavour.py)
OPTIONAL = {
    "BuilderFlag.REQUIRE_USER_ALLOCATION", "ComputeCapability", "ComputeCapability.SM89", "ComputeCapability.SM120",
    "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability",
    "IExecutionContext.is_stream_capturable",
}  # fmt: skip


def declared():
    """`Class`, `Class.attribute` and names of the module, as the stub declares them."""
    for node in ast.parse(STUB).body:
        if isinstance(node, ast.ClassDef):
            yield node.name
            for item in node.body:
                name = getattr(item, "name", None) or getattr(getattr(item, "target", None), "id", None)
                if name and not name.startswith("__"):
                    yield f"{node.name}.{name}"
        elif isinstance(node, ast.FunctionDef | ast.AnnAssign):
            name = node.name if isinstance(node, ast.FunctionDef) else node.target.id
            if name not in OWN and not name.startswith("__"):
                yield name


@pytest.mark.parametrize("version", NAMES)
def test_the_bindings_have_what_is_used(version):
    names = {key: set(found.split()) for key, found in NAMES[version].items()}
    missing = set()
    for name in declared():
        owner, _, attribute = name.rpartition(".")
        if attribute not in names.get(owner, set()):
            missing.add(name)
    assert missing <= OPTIONAL, "or they are used behind hasattr and stand in OPTIONAL"
    if version.startswith("rtx"):
        assert not missing


def test_all_versions_of_the_issue_were_read():
    assert {version.split(".")[0] for version in NAMES} == {"10", "11", "rtx 1"}
    assert {"10.13", "10.16"} <= NAMES.keys()


def test_optional_names_are_looked_for_first():
    """No other file than flavour.py reads one of them."""
    for path in ROOT.glob("[bpr]*/**/*.py"):
        if "tensorrt" in path.parts and path.name != "flavour.py":
            for name in OPTIONAL:
                assert name.rpartition(".")[2] not in path.read_text().replace("set_capability", ""), (path, name)


def test_the_installed_module_has_them_too():
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    for name in declared():
        value = trt
        for part in name.split("."):
            value = getattr(value, part)
