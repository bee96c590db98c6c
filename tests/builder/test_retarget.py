"""`ingot build --retarget DIR`: what an engine was built with stays, unless something else is given."""

import pytest
from hand_made import DEMO
from ingot import __main__ as cli
from ingot import build_engine
from ingot.builder import BuildConfig, retarget
from ingot.builder.targets import check_options
from ingot.engines.errors import BuildError
from ingot.engines.manifest import Manifest
from ingot.engines.plan import FOLDER, Plan

pytest.importorskip("triton")

SIZES = dict(max_num_seqs=3, max_num_batched_tokens=20, max_draft_tokens=2, page_size=8)


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A cuda engine for 8.0 with sizes of its own, but for its kernels, which are not compiled."""
    from ingot.builder.targets import tactics
    from ingot.builder.targets.cubin import Cubin

    binary = Cubin(b"", "kernel", 0, 4, True)
    monkeypatch.setattr(tactics, "compile_all", lambda sources, capability: dict.fromkeys(sources, binary))
    monkeypatch.setattr(retarget, "_gpu_at_hand", lambda: False)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)  # pytest's own handlers stay
    folder = tmp_path / "an engine"
    build_engine(BuildConfig(str(DEMO / "pycoder-draft-2m"), str(folder), "cuda", gpu_arch=80, tune=False, **SIZES))
    return folder


def anew(engine, *options):
    """`ingot build --retarget` with options; (exit code, the plan)."""
    with pytest.raises(SystemExit) as end:
        cli.run(cli.app, "ingot", ["build", "--retarget", str(engine), "--no-tune", *options])
    return end.value.code or 0, Plan.open(engine / FOLDER) if (engine / FOLDER).exists() else None


def shape(plan):
    """What a plan is but for the kinds of GPU."""
    buckets = [(b.tokens, b.sequences, b.rows, b.max_query, b.max_context) for b in plan.buckets]
    return buckets, plan.page_size, plan.max_num_seqs, plan.max_num_batched_tokens, plan.max_draft_tokens


def test_nothing_given_changes_nothing(engine, capsys):
    before = Plan.open(engine / FOLDER)
    code, plan = anew(engine)
    assert code == 0 and shape(plan) == shape(before) and plan.capability == 80
    notes = capsys.readouterr().err.splitlines()
    assert notes == [
        f"as {engine} was built: target cuda, max_num_seqs 3, max_num_batched_tokens 20, page_size 8, "
        "max_draft_tokens 2, gpu_arch 80."
    ]


def test_what_is_given_goes_before(engine, monkeypatch, capsys):
    code, plan = anew(engine, "--max-num-seqs", "5", "--max-draft-tokens", "0", "--gpu-arch", "90")
    assert code == 0 and (plan.max_num_seqs, plan.max_draft_tokens, plan.capability) == (5, 0, 90)
    assert (plan.max_num_batched_tokens, plan.page_size) == (20, 8)
    assert Manifest.read(engine).build.options == {
        "target": "cuda", "max_num_seqs": 5, "max_num_batched_tokens": 20, "page_size": 8, "gpu_arch": 90, "tune": False
    }  # fmt: skip
    # a default that is spelt out is given, too; a GPU at hand goes before that of the engine
    monkeypatch.setattr(retarget, "_gpu_at_hand", lambda: True)
    config = retarget.as_built(BuildConfig("", str(engine)), {"max_num_seqs"})
    assert (config.target, config.max_num_seqs, config.max_num_batched_tokens) == ("cuda", 256, 20)
    assert config.gpu_arch is None
    capsys.readouterr()
    assert anew(engine, "--max-num-batched-tokens", "4")[0] == 2
    assert "--max-num-batched-tokens is 4, expected at least --max-num-seqs, which is 5" in capsys.readouterr().err


def test_another_target_takes_what_it_knows(engine, monkeypatch, tmp_path, capsys):
    config = retarget.as_built(BuildConfig("", str(engine), "tensorrt"), {"target"})
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.page_size) == (3, 20, 8)
    assert config.max_draft_tokens == 0 and config.gpu_arch == 80
    monkeypatch.setenv("PATH", str(tmp_path))  # without a compiler, which takes seconds
    monkeypatch.delenv("CXX", raising=False)

    def no_links(*_):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(retarget.os, "link", no_links)  # as on a file system that has none
    assert anew(engine, "--target", "cpu")[0] == 0
    assert Manifest.open(engine).target == "cpu" and "was built" not in capsys.readouterr().err
    config = retarget.as_built(BuildConfig("", str(engine), "cuda"), {"target"})
    assert config.max_num_seqs == 256, "a cpu engine has no sizes"


@pytest.mark.parametrize(
    "target, option, message",
    [
        ("cpu", {"gpu_arch": 90}, "--gpu-arch is for --target cuda or tensorrt, and this engine is for cpu; leave it"),
        ("cpu", {"max_draft_tokens": 3}, "--max-draft-tokens is for --target cuda, and this engine is for cpu"),
        ("cpu", {"max_num_seqs": 8}, "--max-num-seqs is .*, or give it to `ingot serve`"),
        ("cpu", {"tensorrt_plugins": ""}, "--tensorrt-plugins is for --target tensorrt"),
        ("tensorrt", {"max_draft_tokens": 3}, "--max-draft-tokens is for --target cuda, and this engine is for tensor"),
        ("cuda", {"max_num_batched_tokens": 255}, "is 255, expected at least --max-num-seqs, which is 256"),
    ],
)
def test_options_that_the_target_cannot_follow(tmp_path, target, option, message):
    for build in (build_engine, lambda config: retarget.retarget(tmp_path, config)):
        with pytest.raises(BuildError, match=message):
            build(BuildConfig(str(tmp_path), str(tmp_path / "engine"), target, **option))
    check_options(BuildConfig("", "", target))
