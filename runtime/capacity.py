"""How many KV pages an engine gets: from what the user asks, what the machine has, and what could ever be used.

The default takes a stated share of the memory that is free when the engine opens; too little is refused with numbers.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path

from ..engines.errors import EngineError, shown
from ..engines.manifest import Manifest
from ..engines.step import MOST_NODES

MEMORY_SHARE = 0.2  # of the memory available
MEMORY_CEILING = 4 << 30  # bytes; more has to be asked for
WITH_ENGINE = {"draft": "a draft engine", "eagle": "a head's engine", "medusa": "the engine of Medusa heads"}
DRAFTERS = ("ngram", "suffix", *WITH_ENGINE)
# of integers; memory is taken for so many sequences and tokens, whether they come or not
MOST = {"max_num_seqs": 1 << 16, "max_num_batched_tokens": 1 << 24, "kv_cache_memory": 2**63 - 1}


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How an engine is served. Raises EngineError for a value that cannot work.

    max_num_seqs: requests that run at a time. max_num_batched_tokens: tokens per step; longer prompts go in chunks.
    max_model_len: prompt and output of a request, by default the model's. page_size: tokens per KV page.
    num_kv_pages: pages, one of them set aside; or kv_cache_memory: bytes for them; by default, on a CPU, 20% of the
    memory available, at most 4 GiB and what `max_num_seqs` requests of full length need; on a GPU what is left of
    `gpu_memory_utilization` of its memory. What is None is settled by the engine's target.
    speculate: what drafts tokens that the engine then verifies, several in a step: ngram (what followed the last
    `prompt_lookup_max` to `prompt_lookup_min` tokens when they occurred before in the request), suffix (the same over
    all answers, by counts), draft (a smaller engine, `draft_engine`), eagle or medusa (the engine of heads that
    read hidden states of this one, `draft_engine`); None: nothing. Answers do not change.
    num_draft_tokens: drafted at a time for a request at most; adapt_drafts: fewer, or none, where they do not pay.
    num_draft_nodes: of a tree of drafts, where several may stand for the same token, up to num_draft_tokens after one
    another; 0: chains only. Engines that draft make trees where that pays better.
    """

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    page_size: int | None = None
    num_kv_pages: int | None = None
    kv_cache_memory: int | None = None
    prefix_cache: bool = True
    gpu_memory_utilization: float = 0.9
    load_format: str = "auto"  # or dummy: random weights, for benchmarks
    speculate: str | None = None
    draft_engine: str | os.PathLike | None = None
    num_draft_tokens: int = 4
    num_draft_nodes: int = 0
    adapt_drafts: bool = True
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 4

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "page_size", "num_kv_pages",
                     "kv_cache_memory"):  # fmt: skip
            value, most = getattr(self, name), MOST.get(name, 2**31 - 1)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise EngineError(f"{name} is {shown(value)}; it must be an integer of at least 1.")
            if value is not None and value > most:
                raise EngineError(f"{name} is {shown(value)}; it must be an integer of at most {most}.")
        if not isinstance(self.gpu_memory_utilization, Real) or not 0 < self.gpu_memory_utilization <= 1:
            raise EngineError(
                f"gpu_memory_utilization is {shown(self.gpu_memory_utilization)}; it must be above 0, at most 1."
            )
        if self.load_format not in ("auto", "dummy"):
            raise EngineError(f"load_format is {shown(self.load_format)}; it must be auto or dummy.")
        if self.num_kv_pages is not None and self.kv_cache_memory is not None:
            raise EngineError("num_kv_pages and kv_cache_memory both size the KV pool; give one of them.")
        self._check_speculation()

    def _check_speculation(self) -> None:
        if self.speculate not in (None, *DRAFTERS):
            raise EngineError(f"speculate is {shown(self.speculate)}; it must be one of {', '.join(DRAFTERS)}.")
        if self.speculate in WITH_ENGINE and self.draft_engine is None:
            raise EngineError(
                f"speculate is {self.speculate}, which needs {WITH_ENGINE[self.speculate]}; give its folder as"
                " draft_engine."
            )
        if self.draft_engine is not None:
            if self.speculate not in WITH_ENGINE:
                raise EngineError(
                    f"draft_engine is for speculate={', '.join(WITH_ENGINE)}, which is {shown(self.speculate)}; leave"
                    " one out."
                )
            object.__setattr__(self, "draft_engine", os.path.abspath(self.draft_engine))  # options travel as JSON
        for name, most in (("num_draft_tokens", 16), ("prompt_lookup_min", 16), ("prompt_lookup_max", 16)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise EngineError(f"{name} is {shown(value)}; it must be an integer from 1 to {most}.")
        self._check_tree()
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise EngineError(
                f"prompt_lookup_min is {self.prompt_lookup_min}; it must not exceed prompt_lookup_max,"
                f" {self.prompt_lookup_max}."
            )
        if self.max_model_len is not None and self.speculate and self.num_draft_tokens >= self.max_model_len:
            raise EngineError(
                f"num_draft_tokens is {self.num_draft_tokens}, but a request may have {self.max_model_len} tokens only"
                " (max_model_len); draft fewer."
            )

    def _check_tree(self) -> None:
        nodes = self.num_draft_nodes
        if isinstance(nodes, bool) or not isinstance(nodes, int) or not 0 <= nodes <= MOST_NODES:
            raise EngineError(f"num_draft_nodes is {shown(nodes)}; it must be an integer from 0 to {MOST_NODES}.")
        if nodes and self.speculate not in WITH_ENGINE:
            raise EngineError(
                f"num_draft_nodes is for speculate={', '.join(WITH_ENGINE)}, which is {shown(self.speculate)}; leave it"
                " out."
            )
        if nodes and nodes <= self.num_draft_tokens:
            raise EngineError(
                f"num_draft_nodes is {nodes}, but a chain has {self.num_draft_tokens} (num_draft_tokens) already; give"
                " more, or 0 for no trees."
            )

    def with_defaults(self, max_num_seqs: int, max_num_batched_tokens: int, page_size: int) -> ServeConfig:
        """The same with these values where nothing was asked for."""
        return replace(
            self,
            max_num_seqs=self.max_num_seqs or max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens or max_num_batched_tokens,
            page_size=self.page_size or page_size,
        )


def model_len(manifest: Manifest, config: ServeConfig) -> int:
    """Tokens that one request may have. Raises EngineError if more is asked than the model has positions."""
    most = manifest.model.max_model_len
    if config.max_model_len is not None and config.max_model_len > most:
        raise EngineError(f"max_model_len is {config.max_model_len}; {manifest.model.source} has {most} positions.")
    return config.max_model_len or most


def num_kv_pages(manifest: Manifest, config: ServeConfig) -> int:
    """Pages of the pool, the one set aside included. Raises EngineError if they do not fit or are too few."""
    assert config.page_size is not None and config.max_num_seqs is not None
    page_bytes = manifest.kv_bytes_per_token * config.page_size
    available = available_memory()
    length = model_len(manifest, config)
    full = -(-length // config.page_size)  # pages of one request of full length
    if config.num_kv_pages is not None:
        num = config.num_kv_pages
        if available is not None and num * page_bytes > available:
            raise EngineError(
                f"num_kv_pages={num} needs {_size(num * page_bytes)}, but {_size(available)} of memory is available; "
                f"ask for at most {available // page_bytes} pages."
            )
    elif config.kv_cache_memory is not None:
        num = config.kv_cache_memory // page_bytes
        if available is not None and config.kv_cache_memory > available:
            raise EngineError(
                f"kv_cache_memory is {_size(config.kv_cache_memory)}, but {_size(available)} of memory is available."
            )
    else:
        memory = MEMORY_CEILING if available is None else min(MEMORY_CEILING, int(MEMORY_SHARE * available))
        num = min(memory // page_bytes, config.max_num_seqs * full + 1)
    needed = full + 1 if config.max_model_len is not None else 2
    if num < needed:
        what = f"one request of max_model_len={length}" if needed > 2 else "one page"
        raise EngineError(
            f"The KV pool would have {num} pages of {_size(page_bytes)}, one of them set aside, but {what} needs "
            f"{needed} pages; give more kv_cache_memory or num_kv_pages, or a smaller max_model_len."
        )
    return num


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, within the control group's limit; None where unknown."""
    found = []
    try:
        text = Path("/proc/meminfo").read_text()
        found.append(1024 * int(re.search(r"MemAvailable:\s+(\d+)", text)[1]))  # type: ignore[index]
    except (OSError, TypeError):
        if "SC_PHYS_PAGES" in os.sysconf_names:  # macOS: half of what there is
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        found.append(limit - int((group / "memory.current").read_text()) + int(cached[1] if cached else 0))
    except (OSError, ValueError):  # no control group, or one without a limit
        pass
    return max(0, min(found)) if found else None


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"
