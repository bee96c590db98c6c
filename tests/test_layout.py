"""The shape of the repository: import arrows, file sizes, names, packages, and the README's commands."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import ingot
import pytest

ROOT = Path(ingot.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# what each folder may import besides itself; the root holds only the names a user imports and the command line
ARROWS = {
    "engines": set(),
    "plugins": {"engines"},
    "calibration": {"engines", "plugins"},
    "builder": {"engines", "plugins", "calibration"},
    "runtime": {"engines", "plugins"},
}
SOURCES = sorted(p for folder in ARROWS for p in (ROOT / folder).rglob("*.py"))
OTHERS = [p for folder in ("tests", "benchmarks") for p in (ROOT / folder).rglob("*.py")]


def imported(path: Path) -> set[str]:
    """First folders below the package root that a file imports, relatively or as `ingot.x`, anywhere in it."""
    here, found = path.relative_to(ROOT).parent.parts, set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["ingot", *here[: len(here) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("ingot.")}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    folder = path.relative_to(ROOT).parts[0]
    assert imported(path) <= ARROWS[folder] | {folder}


def test_files_are_short_and_named_from_the_field():
    vague = {"utils", "util", "helpers", "helper", "common", "manager", "base", "misc"}
    for path in [*SOURCES, *OTHERS, *ROOT.glob("*.py")]:
        assert path.stem not in vague, path
        num_lines = len(path.read_text().splitlines())
        assert num_lines <= 400, f"{path} has {num_lines} lines"


def test_every_package_is_listed():
    found = {".".join(["ingot", *p.parent.relative_to(ROOT).parts]) for p in SOURCES if p.name == "__init__.py"}
    assert found | {"ingot"} == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_root_is_the_package_ingot_and_no_other():
    """pytest must not import the repository's __init__.py a second time under the name of the folder."""
    twice = [n for n, m in sys.modules.items() if getattr(m, "__file__", None) == str(ROOT / "__init__.py")]
    assert twice == ["ingot"]
    assert not any(name.startswith(f"{ROOT.name}.") for name in sys.modules if ROOT.name != "ingot")


def test_version_is_one():
    assert PROJECT["project"]["version"] == ingot.__version__


def test_ci_runs_the_command_of_the_readme():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert len(commands) == 1 and f"\n{commands[0]}\n" in (ROOT / "README.md").read_text()


def test_messages_name_extras_that_exist_in_one_wording():
    named = {path: re.findall(r"pip_install\('(\w+)'\)", path.read_text()) for path in SOURCES}
    assert {"serve", "cuda"} <= set(sum(named.values(), [])) <= set(PROJECT["project"]["optional-dependencies"])
    assert [path.name for path in SOURCES if re.search("install '?ingot\\[", path.read_text())] == ["extras.py"]


def test_links_of_the_documents_exist():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
