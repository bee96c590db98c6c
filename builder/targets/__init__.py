"""The targets an optimised graph can be compiled for: one module each, with `compile(graph, folder) -> target_info`.

`folder` already holds the graph and its weights; a target adds a folder of its own name, with what only it can run.
"""

from types import ModuleType

from ...engines.errors import BuildError
from . import cpu


def target_of(name: str) -> ModuleType:
    """The module of a target; BuildError for a name that is not one."""
    match name:
        case "cpu":
            return cpu
        case _:
            raise BuildError(f"there is no target {name!r}, expected 'cpu'; pass `--target cpu`.")
