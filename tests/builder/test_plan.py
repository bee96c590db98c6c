"""Plans: what they launch computes what the graph computes, places never overlap, and the file brings it all back."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from ingot.builder import gate
from ingot.builder.export import export
from ingot.builder.kv_cache import quantise_pools
from ingot.builder.passes import optimise
from ingot.builder.targets import timing
from ingot.builder.targets.arena import ALIGNMENT, Interval, place
from ingot.builder.targets.buckets import Sizes, bucket_sizes
from ingot.builder.targets.planner import Planner
from ingot.builder.weights import attach
from ingot.engines import step
from ingot.engines.plan import Plan
from ingot.plugins import tactics_of
from ingot.plugins.dtypes import TORCH_DTYPES, to_torch
from ingot.plugins.interpreter import Program
from ingot.plugins.tactic import Device, Site, Tensor
from plan_run import PlanRun, padded, step_inputs

PAGE_SIZE, WIDTH = 4, 16
PROMPTS = (19, 34, 1, 27)
SIZES = [Sizes(96, 6, 6, 0), Sizes(6, 6, 6, 1)]
# all kinds of ops: plain, norms of heads, softcap and window, LayerNorm and Gelu, experts, sinks
PLANNED = ["llama", "qwen3", "gemma2", "gpt2", "mixtral", "gpt_oss"]


def first_tactic(site):
    return tactics_of(site.op)(site)[0]


def planned(family, pages=""):
    config = FAMILIES[family]()
    if pages:
        config.num_hidden_layers = 1
    graph = export(config, torch.float32)
    attach(graph, gate._random_model(config).state_dict())
    optimise(graph)
    if pages:
        names = [value.name for value in graph.graph.inputs if "pages." in (value.name or "")]
        scales = {name: torch.rand(1) * 0.01 + 0.01 for name in names}
        quantise_pools(graph, pages, scales | {"k_offset.0": torch.randn(32)})
    planner = Planner(graph.graph, Device(90, 8), PAGE_SIZE, WIDTH, 6, first_tactic)
    buckets = tuple(planner.plan(sizes) for sizes in SIZES)
    plan = Plan(
        90, planner.vocab_size, PAGE_SIZE, WIDTH, planner.logits_dtype, planner.nodes, (), buckets, (), planner.zeros
    )
    return graph, planner, plan


@pytest.mark.parametrize("family, kv", [*((family, "") for family in PLANNED), ("llama", "fp8_e4m3")])
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter
def test_a_plan_computes_what_its_graph_does(family, kv, tmp_path):
    graph, planner, plan = planned(family, kv)
    plan.save(tmp_path)
    plan = Plan.open(tmp_path)
    program = Program(graph, {})
    weights = {name: to_torch(value.const_value) for name, value in graph.graph.initializers.items()}
    counts = [-(-(n + 1) // PAGE_SIZE) for n in PROMPTS]
    order = torch.randperm(sum(counts)) + 1
    pages = torch.zeros(len(PROMPTS), max(counts), dtype=torch.int32)
    for row, owned in zip(pages, order.split(counts), strict=True):
        row[: len(owned)] = owned

    def pools():
        return {
            value.name: torch.full((sum(counts) + 1, PAGE_SIZE, *gate._numbers(value)), torch.nan).to(
                TORCH_DTYPES[int(value.dtype)]
            )
            for value in graph.graph.inputs
            if value.name not in step.STEP_INPUTS
        }

    ours, theirs = pools(), pools()
    prompts = [torch.randint(3, 300, (n + 1,)) for n in PROMPTS]
    prefill = [(s, 0, n) for s, n in enumerate(PROMPTS)]
    decode = [(s, n, n + 1) for s, n in enumerate(PROMPTS)]
    for bucket, spans in zip(plan.buckets, (prefill, decode), strict=True):
        inputs = {
            name: tensor.to(torch.int32) for name, tensor in step_inputs(spans, prompts, pages, PAGE_SIZE).items()
        }
        expected = program({**inputs, **theirs})[step.LOGITS]
        run = PlanRun(plan, planner.kernels, bucket, {**weights, **padded(inputs, bucket, WIDTH), **ours})
        run()
        vocab = expected.shape[1]
        found = run.logits(vocab)[: len(expected)]
        # what is computed in another order may be stored as the number beside
        bound = (2e-2 if kv else 1e-4) * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=bound)
        run(["head"])  # a second time, as steps with many rows of logits do
        torch.testing.assert_close(run.logits(vocab)[: len(expected)], expected, rtol=1e-4, atol=bound)


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 12), st.integers(0, 12)), max_size=30))
def test_values_alive_at_the_same_time_never_overlap(drawn):
    intervals = [Interval(size, min(a, b), max(a, b)) for size, a, b in drawn]
    offsets, total = place(intervals)
    for i, one in enumerate(intervals):
        assert offsets[i] % ALIGNMENT == 0 and offsets[i] + one.num_bytes <= total
        for j, other in enumerate(intervals[:i]):
            together = one.first <= other.last and other.first <= one.last
            apart = offsets[i] + one.num_bytes <= offsets[j] or offsets[j] + other.num_bytes <= offsets[i]
            assert apart or not together or not (one.num_bytes and other.num_bytes)


def test_disjoint_lives_share_a_place():
    offsets, total = place([Interval(1000, 0, 1), Interval(1000, 2, 3), Interval(10, 1, 2)])
    assert offsets[0] == offsets[1] and total == 1024 + 256


@given(st.integers(1, 600), st.integers(16, 9000), st.integers(1, 9000))
def test_buckets_hold_every_step(max_num_seqs, max_num_batched_tokens, max_model_len):
    sizes = bucket_sizes(max_num_seqs, max_num_batched_tokens, max_model_len)
    decode = [s.tokens for s in sizes if s.max_query == 1 and not s.max_context]
    short = [s for s in sizes if s.max_context]
    assert [s.tokens for s in short] == (decode if max_model_len > 2048 else [])
    assert all(s.max_query == 1 and s.max_context == 1024 for s in short)
    mixed = [s.tokens for s in sizes if s.max_query == 0]
    assert decode == sorted(set(decode)) and decode[-1] == max_num_seqs
    assert mixed == sorted(set(mixed)) and mixed[-1] == max_num_batched_tokens
    assert all(2 * small >= large for small, large in zip(mixed, mixed[1:], strict=False))
    assert all(s.tokens == s.sequences == s.rows for s in sizes if s.max_query == 1)


@given(st.integers(1, 600), st.integers(1, 9000), st.integers(16, 9000), st.integers(1, 16))
def test_buckets_for_verification(max_num_seqs, max_num_batched_tokens, max_model_len, drafts):
    """Up to 512 tokens of sequences with 1 + drafts each, on steps that fit; other buckets stay as they are."""
    sizes = bucket_sizes(max_num_seqs, max_num_batched_tokens, max_model_len, drafts)
    verify = [s for s in sizes if s.max_query > 1]
    others = [s for s in sizes if s.max_query <= 1]
    without = bucket_sizes(max_num_seqs, max_num_batched_tokens, max_model_len)
    assert [replace(s, rows=0) for s in others] == [replace(s, rows=0) for s in without]
    assert all(s.rows > drafts for s in others if not s.max_query), "a request's samples fit into any step's rows"
    most = min(512, max_num_seqs * (1 + drafts), max_num_batched_tokens)
    if most > 1:
        assert max(s.tokens for s in verify if not s.max_context) == most
    for each in verify:
        assert each.max_query == 1 + drafts and each.rows == each.tokens and each.sequences <= max_num_seqs
        table, pool = Tensor((each.sequences, -(-max_model_len // 16)), "int32"), Tensor((1, 16, 1, 16), "float32")
        inputs = (Tensor((each.tokens, 48), "float32"), None, None, *[Tensor((1,), "int32")] * 3, table, pool, pool)
        site = Site("PagedAttention", {}, inputs, (), Device(), each.max_query, each.max_context or None)
        for timed in timing.steps(site):
            assert len(timed.queries) == len(timed.lengths) == each.sequences and sum(timed.queries) <= each.tokens
            assert 0 < max(timed.queries) <= each.max_query and max(timed.lengths) <= max_model_len + 15
            assert all(n <= length for n, length in zip(timed.queries, timed.lengths, strict=True))
