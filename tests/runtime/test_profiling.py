"""`ingot bench --profile`: floors against numbers worked out by hand, traces of known intervals, and whole profiles."""

import json
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hand_made import DEMO, cast_llama
from hypothesis import given
from hypothesis import strategies as st
from ingot import __main__ as cli
from ingot.engines.errors import EngineError, RequestError
from ingot.plugins.tactic import Site, Tensor
from ingot.runtime.capacity import ServeConfig
from ingot.runtime.profiling.cpu import measure
from ingot.runtime.profiling.cuda import read_step, read_trace, site_of
from ingot.runtime.profiling.floor import Ceilings, Cost, Load, cost, label
from ingot.runtime.profiling.run import profile
from ingot.runtime.profiling.table import Traced, Unit, summarise
from ingot.runtime.profiling.trace import Event, TraceError, align, exclusive, split
from ingot.runtime.profiling.workload import Watched, Workload

CONFIG = DEMO / "pycoder-draft-2m" / "config.json"
DECODE = Load((1,) * 3, (10, 20, 30), 3, 40)


def site(op, inputs, outputs, **attributes):
    return Site(op, attributes, tuple(inputs), tuple(outputs))


def cold(shape, dtype="bfloat16"):
    return Tensor(shape, dtype, cold=True)


# -- floors ------------------------------------------------------------------------------------------------------------


def test_the_slower_of_reading_and_computing_is_the_floor():
    ceilings = Ceilings(bytes_per_s=1e9, flops_per_s=1e12)
    assert ceilings.microseconds(Cost(5000, 1e6)) == pytest.approx(5)
    assert ceilings.microseconds(Cost(5000, 9e6)) == pytest.approx(9)


def test_a_linear_of_a_padded_bucket():
    """bf16, 3 tokens in a bucket of 8, [100, 64]: x 3*64*2, weight 100*64*2, bias 100*2, y 3*100*2 bytes."""
    inputs = [Tensor((8, 64), "bfloat16"), cold((100, 64)), cold((100,))]
    linear = site("Linear", inputs, [Tensor((8, 100), "bfloat16")])
    assert cost(linear, "body", DECODE) == Cost(384 + 12800 + 200 + 600, 2 * 3 * 100 * 64)
    assert label(linear) == "Linear 100x64"
    head = cost(linear, "head", Load((40,), (40,), rows=1, num_packed=0))
    assert head == Cost(128 + 12800 + 200 + 200, 2 * 1 * 100 * 64), "the head works on rows of logits"


def test_weights_of_four_bits_and_operands_of_eight():
    scales, y = cold((100, 2), "float32"), [Tensor((8, 100), "bfloat16")]
    int4 = site("QuantisedLinear", [Tensor((8, 64), "bfloat16"), cold((100, 64), "int4"), scales], y)
    assert cost(int4, "body", DECODE) == Cost(384 + 3200 + 800 + 600, 2 * 3 * 100 * 64)
    fp8 = site("QuantisedLinear", [Tensor((8, 64), "float8_e4m3fn"), cold((100, 64), "float8_e4m3fn"), scales], y)
    assert cost(fp8, "body", DECODE) == Cost(192 + 6400 + 800 + 600, 3 * 100 * 64), "two of them where one of bf16 is"


def test_a_product_of_onnx_is_depth_by_width():
    product = site("MatMul", [Tensor((3, 64), "float32"), cold((64, 10), "float32")], [Tensor((3, 10), "float32")])
    assert label(product) == "MatMul 10x64"
    assert cost(product, "body", DECODE) == Cost(4 * (3 * 64 + 64 * 10 + 3 * 10), 2 * 3 * 64 * 10)


def test_an_op_without_a_weight_reads_and_writes_its_activations():
    norm = site("RMSNorm", [Tensor((8, 64), "bfloat16"), cold((64,)), None], [Tensor((8, 64), "bfloat16")])
    assert cost(norm, "body", DECODE) == Cost(2 * (3 * 64 + 64 + 3 * 64)) and label(norm) == "RMSNorm"
    table = cold((50000, 64))
    gather = site("Gather", [table, Tensor((8,), "int32")], [Tensor((8, 64), "bfloat16")])
    assert cost(gather, "body", DECODE) == Cost(2 * 3 * 64 * 2), "of the table only the rows that are picked"
    assert cost(site("Unpack", [], []), "stage", DECODE) == Cost(2 * 4 * 40)


def attention(window=0):
    """4 heads over 2 of keys and values, 16 wide, values 8: a key and its value are 2 * (16 + 8) * 2 = 96 bytes."""
    steps = [Tensor((8,), "int32"), Tensor((5,), "int32"), Tensor((4,), "int32"), Tensor((4, 9), "int32")]
    pools = [cold((1, 16, 2, 16)), cold((1, 16, 2, 8))]
    return site("PagedAttention", [Tensor((8, 112), "bfloat16"), None, None, *steps, *pools],
                [Tensor((8, 32), "bfloat16")], num_heads=4, num_kv_heads=2, head_dim=16, v_head_dim=8,
                window=window)  # fmt: skip


@pytest.mark.parametrize(
    "queries, keys, window, read, pairs",
    [
        ((1, 1, 1), (10, 20, 30), 0, 60, 60),
        ((1, 1, 1), (10, 20, 30), 12, 10 + 12 + 12, 34),
        ((4,), (4,), 0, 4, 1 + 2 + 3 + 4),
        ((4,), (9,), 0, 9, 6 + 7 + 8 + 9),
        ((4,), (9,), 3, 6, 4 * 3),  # the four windows of 3 end at keys 6 to 9: keys 4 to 9
        ((1, 3), (5, 3), 2, 2 + 3, 2 + (1 + 2 + 2)),
    ],
)
def test_attention_over_known_contexts(queries, keys, window, read, pairs):
    load, tokens = Load(queries, keys, len(queries), 0), sum(queries)
    assert load.attended(window) == (read, pairs)
    moved = 2 * tokens * (112 + 32) + 96 * (tokens + read)  # q|k|v and y; keys and values written, those read
    assert cost(attention(window), "body", load) == Cost(moved, 2 * 4 * (16 + 8) * pairs)


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 30)), min_size=1, max_size=4), st.integers(0, 15))
def test_attended_counts_what_a_mask_would(drawn, window):
    queries, keys = [q for q, _ in drawn], [q + before for q, before in drawn]
    read, pairs = 0, 0
    for num, total in zip(queries, keys, strict=True):
        place = torch.arange(total - num, total)[:, None]
        seen = torch.arange(total)[None] <= place
        if window:
            seen &= torch.arange(total)[None] > place - window
        read, pairs = read + int(seen.any(0).sum()), pairs + int(seen.sum())
    assert Load(tuple(queries), tuple(keys), 1, 0).attended(window) == (read, pairs)


def test_experts_are_read_as_far_as_tokens_can_choose_them():
    """fp16, 3 tokens of 2 choices among 8 experts of 3 * 10 * 4 weights: 6 experts at most."""
    stacks = [cold((8, 20, 4), "float16"), cold((8, 4, 10), "float16"), None, None]
    inputs = [Tensor((16, 4), "float16"), Tensor((16, 2), "int32"), Tensor((16, 2), "float32"), *stacks]
    experts = site("Experts", inputs, [Tensor((16, 4), "float16")])
    moved = 3 * 4 * 2 + 3 * 2 * 4 + 3 * 2 * 4 + 3 * 4 * 2
    assert cost(experts, "body", DECODE) == Cost(moved + 6 * 120 * 2, 2 * 6 * 120)
    prompt = Load((16,), (16,), 1, 0)
    moved = 16 * 4 * 2 + 16 * 2 * 4 + 16 * 2 * 4 + 16 * 4 * 2
    assert cost(experts, "body", prompt) == Cost(moved + 8 * 120 * 2, 2 * 32 * 120), "no expert is read twice"


def test_what_a_machine_does_at_best_is_measured():
    found = measure(torch.float32)
    assert 1e8 < found.bytes_per_s < 1e13 and 1e8 < found.flops_per_s < 1e15


# -- traces ------------------------------------------------------------------------------------------------------------

INTERVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), min_size=1, max_size=12).map(sorted)


@given(INTERVALS)
def test_exclusive_times_add_up_to_the_union(intervals):
    events = [Event("k", start, length) for start, length in intervals]
    covered = {t for start, length in intervals for t in range(start, start + length)}
    found = exclusive(events)
    assert sum(found) == len(covered)
    assert all(0 <= us <= event.duration for us, event in zip(found, events, strict=True))


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=4), max_size=5), st.lists(st.sampled_from("abc"), max_size=3))
def test_a_trace_is_split_where_steps_begin(steps, before):
    names = [*before, *(name for step in steps for name in ["first", *step])]
    events = [Event(name, at, 1) for at, name in enumerate(names)]
    found = split(events[::-1], "first")
    assert [[event.name for event in step] for step in found] == [["first", *step] for step in steps]


def test_kernels_of_libraries_belong_to_their_products():
    symbols = ["norm", None, "rope", None, None, "sample"]
    names = ["norm", "gemm_128", "splitKreduce", "rope", "gemm_64", "gemm_128", "splitKreduce", "sample"]
    assert align(names, symbols) == [0, 1, 1, 2, 3, 4, 4, 5]
    cleared = ["norm", "Memset (Device)", "gemm_128", "rope", "Memset (Device)", *names[4:]]
    assert align(cleared, symbols) == [0, 1, 1, 2, 3, 3, 4, 4, 5]
    for wrong, words in (
        (["norm", "rope", *names[4:]], "has rope where launch 2 of 6 is a product"),
        (names[:-1], "has the end where launch 6 of 6 is sample"),
        ([*names, "again"], "goes on with again after the last of its 6"),
        (["rope", *names[1:]], "has rope where launch 1 of 6 is norm"),
        ([*names[:4], "gemm_64", "sample"], "is a product of cuBLASLt"),
    ):
        with pytest.raises(TraceError, match=words):
            align(wrong, symbols)


def test_a_step_of_a_trace(tmp_path):
    """norm 0..10, a product 8..20 and its reduction 20..23, sample 30..34: idle from 23 to 30."""
    rows = [("sample", 130, 4), ("norm", 100, 10), ("gemm", 108, 12), ("reduce", 120, 3)]
    entries = [{"name": name, "ts": ts, "dur": dur, "cat": "kernel"} for name, ts, dur in rows]
    entries += [{"name": "copy", "ts": 90, "dur": 5, "cat": "gpu_memcpy"}, {"name": "process", "ph": "M"}]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": entries}))
    (events,) = split(read_trace(tmp_path / "trace.json"), "norm")
    units = [Unit(site("RMSNorm", [], []), "body"), Unit(site("Linear", [], []), "body"),
             Unit(site("Sample", [], []), "sample")]  # fmt: skip
    step = read_step(events, ["norm", None, "sample"], [0, 1, 2], units)
    assert (list(step.times), step.start, step.end, step.summed) == ([10, 13, 4], 100, 134, 29)


def test_the_site_of_a_plan_comes_back_from_its_file():
    entry = {"op": "Linear", "attributes": {}, "inputs": [[[8, 64], "bfloat16", False], [[10, 64], "bfloat16", True],
             None], "outputs": [[[8, 10], "bfloat16", False]], "max_query": 1, "max_context": None}  # fmt: skip
    inputs = (Tensor((8, 64), "bfloat16"), cold((10, 64)), None)
    found = site_of(entry)
    assert found == Site("Linear", {}, inputs, (Tensor((8, 10), "bfloat16"),), max_query=1)
    assert [t and t.cold for t in found.inputs] == [False, True, None]


def test_a_table_of_known_steps():
    """Four decode steps 100 us apart; a norm of 10 us twice, an idle rest, floors of 1 byte a microsecond."""
    norm = Unit(site("RMSNorm", [Tensor((2, 4), "float32")], [Tensor((2, 4), "float32")]), "body", 2)
    load = Workload(sequences=2, tokens=2, context=9, num_steps=4)
    steps = [Watched(Load((1, 1), (n, n), 2, 0), began=n / 1e4, wait=2e-5) for n in range(8)]
    traced = [Traced([norm, norm], [10.0, 30.0], 100.0 * n, 100.0 * n + 50, summed=44.0) for n in range(8)]
    found = summarise(load, steps, steps, traced, Ceilings(1e6, 1e6), bucket=4)
    (row,) = found.rows
    assert (row.op, row.launches, row.us, row.floor_us) == ("RMSNorm", 4, 40, 2 * 64) and row.ratio == 40 / 128
    assert (found.busy_us, found.wall_us, found.summed_us, found.floor_us) == (40, 100, 44, 128)
    assert found.idle == pytest.approx(0.6) and found.num_steps == 4
    assert found.untraced_us == pytest.approx(100) and found.host_us == pytest.approx(80)
    assert found.title == "decode, 2 sequences of 5 keys (padded to 4)"
    gaps = summarise(load, steps, steps, [*traced[:4], None, *traced[5:]], Ceilings(1e6, 1e6), 2)
    assert gaps.wall_us == pytest.approx(100), "a step that was not recorded is left out"
    slow = replace(traced[5], start=560.0)  # the profiler wrote for 60 us
    assert summarise(load, steps, steps, [*traced[:5], slow, *traced[6:]], Ceilings(1e6, 1e6), 2).wall_us < 101
    with pytest.raises(EngineError, match="none of the 8 steps was traced"):
        summarise(load, steps, steps, [None] * 8, Ceilings(1e6, 1e6), 2)


# -- whole profiles, on the CPU ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return cast_llama(DEMO / "pycoder-draft-2m", tmp_path_factory.mktemp("engines") / "draft")


@pytest.fixture
def bench(engine, capsys, monkeypatch, tmp_path):
    """`ingot bench` on the draft engine, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)  # pytest's own handlers stay

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.run(cli.app, "ingot", ["bench", str(engine), *map(str, arguments)])
        output = capsys.readouterr()
        return end.value.code or 0, output.out, output.err

    return run


def refused(result, *words):
    code, out, err = result
    assert code == 2 and out == "", err
    (sentence,) = [line for line in err.splitlines() if line.strip()]
    assert sentence.startswith("error: ") and sentence.endswith(".") and "Traceback" not in err
    assert all(word in sentence for word in words), sentence


def test_a_profile_of_decode_and_prefill(bench, engine, tmp_path):
    code, out, err = bench("--profile", "--batches", "1,3", "--context", 24, "--prefill", 17, "--json")
    assert code == 0 and "drawn into profile.png" in err, err
    report = json.loads(out)
    assert report.keys() == {"engine", "device", "bytes_per_s", "flops_per_s", "profiles"}
    assert report["engine"] == str(engine) and report["device"] and report["bytes_per_s"] > 0 < report["flops_per_s"]
    loads = [(p["phase"], p["sequences"], p["tokens"], p["bucket"]) for p in report["profiles"]]
    assert loads == [("decode", 1, 1, 1), ("decode", 3, 3, 3), ("prefill", 1, 17, 17)]
    config = json.loads(CONFIG.read_text())
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    for found in report["profiles"]:
        rows = {row["op"]: row for row in found["rows"]}
        assert [row["us"] for row in found["rows"]] == sorted((row["us"] for row in found["rows"]), reverse=True)
        launches = Counter({name: row["launches"] for name, row in rows.items()})
        assert launches["PagedAttention"] == launches[f"Linear {width}x{width}"] == layers
        assert launches["RMSNorm"] == 2 * layers + 2 and launches[f"Linear {config['vocab_size']}x{width}"] == 1
        assert launches["Sample"] == 1
        for row in rows.values():
            assert row["us"] > 0 and row["share"] == pytest.approx(row["us"] / found["wall_us"])
            assert row["ratio"] == pytest.approx(row["us"] / row["floor_us"])
        assert found["busy_us"] == pytest.approx(sum(row["us"] for row in rows.values()))
        assert found["floor_us"] == pytest.approx(sum(row["floor_us"] for row in rows.values()))
        assert 0 < found["busy_us"] <= found["wall_us"] and found["idle"] == 1 - found["busy_us"] / found["wall_us"]
        assert 0 < found["host_us"] <= found["untraced_us"]
        head = rows[f"Linear {config['vocab_size']}x{width}"]  # [sequences, width] and the whole table, fp32
        values = config["vocab_size"] * width + found["sequences"] * (width + config["vocab_size"])
        flops = 2 * found["sequences"] * config["vocab_size"] * width
        least = max(4 * values / report["bytes_per_s"], flops / report["flops_per_s"])
        assert head["floor_us"] == pytest.approx(1e6 * least)
    one, three, prompt = report["profiles"]
    # of the step in the middle of those that were not disturbed: any of 30
    assert abs(one["context"] - 24) <= 15 and abs(three["context"] - 24) <= 15 and prompt["context"] == 17
    assert 15 <= one["num_steps"] <= 30 and 4 <= prompt["num_steps"] <= 8
    assert not_blank(tmp_path / "profile.png")


def not_blank(path):
    """A picture in which bars (blue) and floors (orange) are seen."""
    image = pytest.importorskip("matplotlib.image").imread(path)[..., :3]  # [H, W, 3], 0 to 1
    red, blue = image[..., 0], image[..., 2]
    return image.shape[0] > 200 < image.shape[1] and (blue - red > 0.4).mean() > 1e-3 < (red - blue > 0.4).mean()


def test_a_table_in_the_terminal(bench, tmp_path):
    pytest.importorskip("matplotlib")
    options = ("--profile", "-c", 2, "--context", 20, "--prefill", 0, "--plot", tmp_path / "steps.png")
    code, out, err = bench(*options)
    assert code == 0 and "steps.png" in err and not_blank(tmp_path / "steps.png")
    assert "GB/s" in out and "(both measured now)" in out and "prefill" not in out
    assert "decode, 2 sequences of" in out and "us of the host. Mean of " in out
    header = next(line for line in out.splitlines() if "op of a step" in line)
    assert header.split()[4:] == ["launches", "us", "share", "floor", "us", "x", "floor"]
    rows = [row for row in map(str.split, out.splitlines()) if len(row) > 5 and row[-3].endswith("%")]
    assert len(rows) > 8 and rows[-1][0] == "all"
    assert int(rows[-1][1]) == sum(int(row[-5]) for row in rows[:-1])


def test_a_profile_without_matplotlib(bench, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = bench("--profile", "--batches", 1, "--context", 10, "--prefill", "0", "--json")
    assert code == 0 and json.loads(out)["profiles"]
    assert err.splitlines() == ["The profile is not drawn: it needs matplotlib; install it with "
                                "`pip install 'ingot[bench]'` in ingot's environment."]  # fmt: skip
    assert not list(tmp_path.glob("*.png"))


def test_flags_that_do_not_go_together(bench, tmp_path):
    (tmp_path / "prompts.txt").write_text("x\n")
    for option in (["--rate", 3], ["--file", "prompts.txt"], ["-n", 4]):
        refused(bench("--profile", *option), "--profile makes its own load", "--rate, --file and --num-requests")
    for option in (["--batches", 1], ["--prefill", 8]):
        refused(bench(*option), "--batches and --prefill belong to --profile")
    for value in ("0", "1,,x", "-3", "2.5"):
        refused(bench("--profile", "--batches", value), "--batches", value, "numbers above 0")
    refused(bench("--profile", "--plot", tmp_path / "none" / "x.png"), "the folder of", "does not exist")
    refused(bench("--profile", "--speculate", "ngram"), "--profile is of steps without drafts", "--speculate")
    drafts = ("--speculate", "ngram", "--levels", 1, "--rounds", 1)
    refused(bench(*drafts, "--input-len", 99999), "--input-len is 99999, but a request may have", "ask for fewer")
    refused(bench(*drafts, "--output-len", 0), "'0' is not a length")
    assert bench(*drafts, "--max-num-seqs", 0)[::2] == (
        3,
        "error: max_num_seqs is 0; it must be an integer of at least 1.\n",
    )
    refused(bench(*drafts, "--plot", tmp_path / "x.foo"), "--plot is", "expected a file that ends in .png")
    refused(bench(*drafts, "--plot", "/proc/x.png"), "--plot is /proc/x.png, which cannot be written (")
    for plot in (tmp_path, tmp_path / "x.foo"):
        refused(bench("--profile", "--plot", plot), "--plot is", "expected a file that ends in .png")


def test_loads_that_the_engine_does_not_hold(bench):
    sizes = ("--max-num-seqs", 4, "--max-num-batched-tokens", 64)
    refused(bench("--profile", *sizes, "--batches", 5), "5 sequences", "at most 4 and 64")
    refused(bench("--profile", *sizes, "--batches", 1, "--prefill", 65), "65 tokens", "2 to 64")
    refused(bench("--profile", *sizes, "--batches", 1, "--prefill", 1), "a prompt of 2 to 64")
    refused(bench("--profile", *sizes, "--batches", 1, "--prefill", 0, "--context", 100000), "context")


def test_contexts_that_the_pool_does_not_hold(engine):
    config = ServeConfig(num_kv_pages=9, page_size=16)
    with pytest.raises(RequestError, match="2 sequences of .* but the KV pool holds 128 tokens; ask for fewer or"):
        profile(engine, config, batches=[2], context=100, prompts=[])


def test_without_options_it_is_what_the_engine_holds(engine):
    titles = []
    config = ServeConfig(max_num_seqs=3, max_num_batched_tokens=24, prefix_cache=False)
    report = profile(engine, config, context=16, num_steps=3, on_done=titles.append)
    found = [(p.phase, p.sequences, p.tokens, p.bucket) for p in report.profiles]
    assert found == [("decode", 1, 1, 1), ("decode", 3, 3, 3), ("prefill", 1, 24, 24)]
    assert titles == [p.title for p in report.profiles]


def test_a_cuda_engine_needs_a_torch_that_sees_a_gpu(engine, monkeypatch):
    from ingot.engines.manifest import Manifest

    manifest = Manifest.open(engine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda = SimpleNamespace(target="cuda", model=manifest.model)
    monkeypatch.setattr(Manifest, "open", lambda *_, **__: cuda)
    with pytest.raises(EngineError, match="this torch sees no GPU; install a torch that was built for CUDA"):
        profile(engine, ServeConfig())
