"""Which engine may draft for which: what `ServeConfig.draft_engine` names, whatever the target runs on."""

from __future__ import annotations

from ...engines.errors import EngineError
from ..capacity import ServeConfig, model_len
from ..engine import Engine
from .draft_engine import check_pair


def check_drafter(target: Engine, engine: Engine, config: ServeConfig) -> None:
    """Raises EngineError where `engine` is not what `config.speculate` says, or cannot guess for `target`."""
    head, folder = engine.manifest.head, engine.folder
    right = "draft" if head is None else "medusa" if head.kind == "medusa" else "eagle"
    if config.speculate != right:
        found = "no head" if head is None else f"a head of kind {head.kind}"
        raise EngineError(f"speculate is {config.speculate}, but {folder} is {found}; use speculate={right} with it.")
    if head is None:
        return check_pair(target, engine, model_len(target.manifest, config))
    wanted = target.manifest
    if head.target_hidden_size != wanted.model.hidden_size:
        raise EngineError(
            f"{folder} is a head for hidden states of {head.target_hidden_size} columns, but those of {target.folder}"
            f" have {wanted.model.hidden_size}; give a head of this target."
        )
    check_pair(target, engine, model_len(wanted, config))
    if not set(head.reads) <= set(wanted.hidden_states):
        reads, given = (",".join(map(str, sorted(set(some)))) for some in (head.reads, wanted.hidden_states))
        raise EngineError(
            f"{folder} reads the hidden states {reads}, but {target.folder} gives {given or 'none'}; build the latter"
            f" {wanted.again(target.folder, hidden_states=reads)}."
        )
    if engine.manifest.model.dtype != wanted.model.dtype:
        raise EngineError(
            f"{folder} is a head in {engine.manifest.model.dtype}, {target.folder} an engine in {wanted.model.dtype};"
            " build both with the same --dtype."
        )
