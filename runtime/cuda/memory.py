"""What an engine takes of the GPU's memory beside its weights, and what a plan must hold to be served here."""

from __future__ import annotations

from ...engines.again import from_engine
from ...engines.dtypes import DTYPES
from ...engines.errors import EngineError
from ...engines.plan import MOVES, ZEROS, Plan
from ...engines.sampling import (
    BASES,
    CHANCES,
    LEVEL,
    MAX_BRANCHES,
    MAX_LEVELS,
    MAX_LOGPROBS,
    PACKED,
    PARENTS,
    PATHS,
    RESULTS,
    SAMPLE_POSITIONS,
    SAMPLE_ROWS,
    STATE_SLOTS,
)
from ...engines.step import ANCESTORS, LOGIT_ROWS, STEP_INPUTS, hidden_states, k_pages, v_pages
from ...plugins.gpu import Gpu
from ..batch import packed_size
from ..capacity import ServeConfig, model_len
from ..engine import Engine

GRAPH_RESERVE = 64 << 20  # bytes left for graphs and for what the driver loads with kernels


def step_buffers(gpu: Gpu, plan: Plan, stream: int, samples: int = 1) -> dict[str, int]:
    """Step tensors and results, for the largest bucket. samples: of each row of logits."""
    sequences, tokens = plan.max_num_seqs, plan.max_num_batched_tokens
    rows = max(bucket.rows for bucket in plan.buckets)
    sizes = dict.fromkeys(STEP_INPUTS, tokens)
    sizes |= {"query_start": sequences + 1, "kv_len": sequences, "pages": sequences * plan.max_pages}
    sizes |= {LOGIT_ROWS: rows, SAMPLE_ROWS: rows * samples, SAMPLE_POSITIONS: rows * samples}
    sizes |= {PACKED: packed_size(sequences, tokens, plan.max_pages)}
    sizes |= {name: rows * samples * (MAX_LOGPROBS if columns else 1) for name, (_, columns) in RESULTS.items()}
    sizes |= {ZEROS: -(-plan.zeros // 4), ANCESTORS: tokens, MOVES: 2 * sequences}
    buffers = {name: gpu.allocate(4 * size, "the tensors of a step") for name, size in sizes.items() if size}
    if ZEROS in buffers:
        gpu.fill(buffers[ZEROS], plan.zeros, 0, stream)
    gpu.fill(buffers[ANCESTORS], 4 * tokens, 0xFF, stream)  # chains, where nothing else is said
    return buffers


def tree_buffers(gpu: Gpu, plan: Plan) -> dict[str, int]:
    """What a drafter's steps hand on where they grow trees."""
    tokens, rows = plan.max_num_batched_tokens, plan.max_num_seqs
    nodes = MAX_LEVELS * rows * MAX_BRANCHES
    sizes = {LEVEL: 3, BASES: rows, PARENTS: tokens, STATE_SLOTS: tokens, CHANCES: nodes, PATHS: nodes}
    return {name: gpu.allocate(4 * size, "the tensors of a step") for name, size in sizes.items()}


def kv_pools(gpu: Gpu, engine: Engine, page_size: int, num_pages: int) -> dict[str, int]:
    """Room for the keys and values of `num_pages` pages."""
    manifest, pools = engine.manifest, {}
    for i, layer in enumerate(manifest.kv_layers):
        itemsize = manifest.kv_dtype(layer).itemsize
        for name, dim in ((k_pages(i), layer.head_dim), (v_pages(i), layer.v_head_dim)):
            pools[name] = gpu.allocate(num_pages * page_size * layer.kv_heads * dim * itemsize, "the KV pages")
    return pools


def state_pools(gpu: Gpu, draft: Engine, num_slots: int) -> dict[str, int]:
    """Room for the hidden states of the target that a drafting engine reads, a row for each slot."""
    return {name: gpu.allocate(num_slots * size, "the hidden states") for name, size in _states(draft).items()}


def _states(draft: Engine) -> dict[str, int]:
    """Bytes of each of them for a token; none, but for heads."""
    head, dtype = draft.manifest.head, DTYPES[draft.manifest.model.dtype]
    return {hidden_states(i): head.target_hidden_size * dtype.itemsize for i in head.reads} if head else {}


def check_plan(plan: Plan, engine: Engine, gpu: Gpu, config: ServeConfig) -> None:
    """Raises EngineError where the plan cannot serve this GPU or this configuration."""
    folder, have = engine.folder, gpu.device.capability

    def mend(**options: int) -> str:
        return f"compile it again for this GPU with {from_engine(folder, **options)}"

    if plan.capability // 10 != have // 10 or plan.capability > have:  # cubins run on later GPUs of their generation
        raise EngineError(
            f"{folder} was compiled for compute capability {plan.capability / 10}, but {gpu.name} has {have / 10}; "
            f"{mend()}."
        )
    for name, most in (("max_num_seqs", plan.max_num_seqs), ("max_num_batched_tokens", plan.max_num_batched_tokens)):
        asked = getattr(config, name)
        if asked is not None and asked > most:
            raise EngineError(
                f"{name} is {asked}, but {folder} was built for at most {most}; ask for less, or "
                f"{mend(**{name: asked})}."
            )
    most = max(config.num_draft_tokens, config.num_draft_nodes)
    if config.speculate and most > plan.max_draft_tokens:
        name = "num_draft_nodes" if config.num_draft_nodes else "num_draft_tokens"
        found = f"{name} is {most}, but {folder} was built to verify"
        again = mend(max_draft_tokens=most)
        if not plan.max_draft_tokens:
            raise EngineError(f"{found} none; {again}.")
        raise EngineError(f"{found} at most {plan.max_draft_tokens}; ask for fewer, or {again}.")
    if config.num_draft_nodes and not any(MOVES in bucket.parts for bucket in plan.buckets):
        raise EngineError(f"{folder} was built by a version that verified chains only; {mend(max_draft_tokens=most)}.")
    if config.page_size not in (None, plan.page_size):
        raise EngineError(
            f"page_size is {config.page_size}, but {folder} was built for pages of {plan.page_size}; leave it out."
        )


def pages_of_pool(
    engine: Engine, gpu: Gpu, config: ServeConfig, plan: Plan, later: int, draft: Engine | None = None
) -> int:
    """Pages of the pool; `later` bytes will be allocated while serving, besides what graphs and the driver take.

    draft: an engine that keeps its keys and values, and what it reads of the target, in as many pages of its own.

    Raises EngineError if a request of full length would not fit, with the numbers.
    """
    manifest, reserve = engine.manifest, GRAPH_RESERVE + later
    token_bytes = manifest.kv_bytes_per_token
    if draft:
        token_bytes += draft.manifest.kv_bytes_per_token + sum(_states(draft).values())
    page_bytes = token_bytes * plan.page_size
    free, total = gpu.memory()
    room = min(free, int(total * config.gpu_memory_utilization) - (total - free)) - reserve
    if config.num_kv_pages is not None:
        num = config.num_kv_pages
    elif config.kv_cache_memory is not None:
        num = config.kv_cache_memory // page_bytes
    else:
        num = max(0, room) // page_bytes
    full = -(-model_len(manifest, config) // plan.page_size)
    needed = full + 1 if config.max_model_len is not None else 2
    numbers = (
        f"{gpu.name} has {total / 2**30:.1f} GiB, {free / 2**30:.1f} free after the weights; at "
        f"gpu_memory_utilization={config.gpu_memory_utilization:g} {max(0, room) / 2**30:.2f} GiB are left for KV pages"
    )
    if num < needed:
        raise EngineError(
            f"The KV pool would have {num} pages of {page_bytes / 2**20:.2f} MiB, but {needed} are needed: {numbers}; "
            "ask for more, for a smaller max_model_len, or free some memory."
        )
    if num * page_bytes > free - reserve:
        raise EngineError(f"{num} KV pages need {num * page_bytes / 2**30:.2f} GiB: {numbers}; ask for fewer.")
    return num
