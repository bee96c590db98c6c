"""Checkpoints of heads: what is refused when they are built, what a target gives, how training goes on."""

import itertools
import json
import resource
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hand_made import DEMO, cast_llama, greedy, prompts_of
from heads import write_head, write_medusa
from ingot.builder import BuildConfig, build_engine
from ingot.builder.checkpoint import Checkpoint
from ingot.builder.heads import folder as its_folder
from ingot.builder.heads import train, written
from ingot.builder.heads.build import HeadBuild
from ingot.builder.heads.training import Trainer
from ingot.builder.hidden_states import states_of
from ingot.builder.retarget import retarget
from ingot.engines import writer
from ingot.engines.errors import BuildError
from ingot.engines.plan import FIRST, FOLDER, Plan
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

TARGET = DEMO / "pycoder-draft-2m"


def opened(folder, target=TARGET, **options):
    return HeadBuild(BuildConfig(str(folder), "/nowhere", draft_for=str(target), **options))


def test_what_a_head_reads(tmp_path):
    small = write_head(tmp_path / "a", TARGET, "eagle3", draft_vocab=500)
    found = opened(small)
    assert found.info().reads == (2, 1, 0) and len(found.ids) == 500 and found.checkpoint.kind == "eagle3"
    as_vllm = write_head(tmp_path / "b", TARGET, "eagle3", eagle_aux_hidden_state_layer_ids=[0, 1, 2])
    as_sglang = write_head(
        tmp_path / "c", TARGET, "eagle3", eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 0, 1]}
    )
    assert opened(as_vllm).reads == (0, 1, 2) and opened(as_sglang).reads == (1, 1, 2)
    write_medusa(tmp_path / "e", TARGET, num=3, blocks=2, style="vllm")
    medusa = opened(tmp_path / "e")
    assert medusa.info().kind == "medusa" and medusa.reads == (2,) and medusa.checkpoint.medusa == (3, 2)
    first = opened(write_head(tmp_path / "d", TARGET, "eagle", pickled=True))
    assert first.info().kind == "eagle" and first.reads == (2,) and len(first.ids) == 4096


def test_a_target_gives_what_is_asked_for():
    checkpoint = Checkpoint.open(str(DEMO / "pycoder-14m"))
    for asked, found in (("", ()), ("eagle", (8,)), ("eagle3", (2, 4, 5)), ("5,0, 5", (0, 5))):
        assert states_of(BuildConfig("m", "o", hidden_states=asked), checkpoint) == found
    for asked, target, message in (
        ("9", "cpu", "'9'; expected eagle, eagle3, medusa, or numbers from 0 to 8"),
        ("-1", "cpu", "'-1'; expected"),
        ("9" * 5000, "cpu", "'9{59}..; expected"),
        ("eagle", "tensorrt", "a target of heads .* cannot be built for the tensorrt target; build for cuda"),
    ):
        with pytest.raises(BuildError, match=message):
            states_of(BuildConfig("m", "o", target, hidden_states=asked), checkpoint)


def test_engines_stay_on_targets_that_draft(tmp_path):
    engine = cast_llama(TARGET, tmp_path / "engine", hidden_states=(2,))
    with pytest.raises(BuildError, match="engine, which is a target of heads, cannot be built for the tensorrt target"):
        retarget(engine, BuildConfig("", str(engine), "tensorrt"))


def test_a_head_is_compiled_for_a_gpu_and_again_from_its_engine(tmp_path, monkeypatch):
    """But for what compiling its kernels gives (tests/plugins/test_small_ops_gpu.py), which takes long."""
    pytest.importorskip("triton")
    from ingot.builder.targets import tactics
    from ingot.builder.targets.cubin import Cubin

    binary = Cubin(b"", "kernel", 0, 4, True)
    monkeypatch.setattr(tactics, "compile_all", lambda sources, capability: dict.fromkeys(sources, binary))
    write_medusa(tmp_path / "head", TARGET, num=2, blocks=1, style="vllm")
    sizes = dict(target="cuda", gpu_arch=90, tune=False, max_num_seqs=1, max_num_batched_tokens=16, max_draft_tokens=2)
    config = BuildConfig(str(tmp_path / "head"), str(tmp_path / "engine"), draft_for=str(TARGET), **sizes)
    for manifest in (build_engine(config), retarget(tmp_path / "engine", config)):
        assert manifest.head.guesses == 2 and manifest.target_info["max_draft_tokens"] == 2
        plan = Plan.open(tmp_path / "engine" / FOLDER)
        assert plan.vocab_size == 4096 and {FIRST in b.parts for b in plan.buckets if b.max_query > 1} == {True}
        assert all((tmp_path / "engine" / FOLDER / cubin.file).is_file() for cubin in plan.cubins)
    replace(manifest, head=replace(manifest.head, guesses=1)).save(tmp_path / "engine")
    with pytest.raises(
        BuildError, match="logits of 8192 columns, expected 1 times the 4096 tokens .*; an older version"
    ):
        retarget(tmp_path / "engine", config)


def edited(folder, change, **config):
    """The head's checkpoint with other tensors, or another config."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_heads_that_are_none_or_not_whole_are_refused(tmp_path):
    def head(name, kind="eagle3", change=lambda tensors: None, **config):
        return edited(write_head(tmp_path / name, TARGET, kind), change, **config)

    def beyond(tensors):
        tensors["d2t"] += 9

    damaged = head("damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-9])
    pickled = write_head(tmp_path / "pickled", TARGET, "eagle", pickled=True)
    (pickled / "pytorch_model.bin").write_bytes(b"no pickle")
    for folder, options, message in (
        (tmp_path / "nowhere", {}, "has no config.json, expected the checkpoint of a head"),
        (TARGET, {}, "has no tensor 'fc.weight', so it is no EAGLE head; give one, or leave out --draft-for"),
        (damaged, {}, "is not a whole safetensors file"),
        (pickled, {}, "pytorch_model.bin cannot be read"),
        (head("wide", hidden_size=384), {}, "hidden states of 384 columns, but those of .* have 192; give the target"),
        (head("vocabulary", vocab_size=99), {}, "for a vocabulary of 99 tokens, but that of .* has 4096; give"),
        (head("layers", eagle_aux_hidden_state_layer_ids=[1, 2, 3]), {}, r"hidden states \[1, 2, 3\], but .* 2 layers"),
        (head("beyond", change=beyond), {}, r"maps draft tokens to none of the target's \(d2t\)"),
        (head("type", model_type="qwen2"), {}, "is a head of type qwen2; expected llama"),
        (head("fine"), {"quant": "int8"}, "--quant is for models"),
        (tmp_path / "fine", {"calibration_data": "text"}, "--calibration-data is for models"),
        (tmp_path / "fine", {"target": "tensorrt"}, "a head .* cannot be built for the tensorrt target"),
    ):
        with pytest.raises(BuildError, match=message) as caught:
            build_engine(BuildConfig(str(folder), str(tmp_path / "out"), draft_for=str(TARGET), **options))
        assert "\n" not in str(caught.value)
    for options in ({}, {"draft_for": str(tmp_path / "fine")}):
        with pytest.raises(BuildError, match="is a head, which drafts for a model; build it with --draft-for TARGET"):
            build_engine(BuildConfig(str(tmp_path / "fine"), str(tmp_path / "out"), **options))
    for name, change, message in (
        ("missing", lambda tensors: tensors.pop("norm.weight"), "lacks the tensor 'norm.weight'"),
        ("head", lambda tensors: tensors.pop("lm_head.weight"), "lacks the tensor 'lm_head.weight'"),
        ("shape", lambda tensors: tensors.update({"norm.weight": torch.ones(7)}), r"'norm.weight' of shape \[7\], but"),
    ):
        with pytest.raises(BuildError, match=message):
            opened(head(name, change=change)).export()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.py"
    path.write_text("\n".join(path.read_text() for path in sorted((DEMO.parents[1] / "engines").glob("*.py"))))
    return path


def test_the_target_goes_on_with_a_window():
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    windows = torch.tensor(prompts_of(20, 20, 3))
    found = written.go_on(target, windows)
    assert [row[5:] for row in found.tolist()] == [greedy(target, row[:5], 15) for row in windows.tolist()]
    assert torch.equal(found[:, :5], windows[:, :5]) and written.kept(20) == 5


def test_training_ends_by_the_clock_too(text, tmp_path, monkeypatch):
    ticks, rates, checks = itertools.count(), [], []
    monkeypatch.setattr(train.time, "monotonic", lambda: next(ticks) / 2)  # asked for twice a step
    learn = Trainer.learn
    monkeypatch.setattr(Trainer, "learn", lambda self, *args: (rates.append(args[1]), learn(self, *args))[1])
    config = train.TrainConfig(
        str(TARGET), str(text), str(tmp_path / "head"), tokens=1 << 10, drafts=3, width=32, batch=4, epochs=9,
        reads="2,0", mlp_width=600, written=0.5, seconds=6.0,
    )  # fmt: skip
    found = train.train_head(config, on_check=lambda share, now: checks.append((share, now)))
    assert 4 <= len(rates) <= 6 and rates == sorted(rates) and rates[0] < 0.2 and 0.7 < rates[-1] < 1
    assert len(checks) >= 3 and len(found.by_step) == 3 and not (tmp_path / "head" / train.STATE).exists()
    built = opened(tmp_path / "head")
    assert built.reads == (2, 0) and built.checkpoint.config.intermediate_size == 600
    assert built.checkpoint.tensors["fc.weight"].shape == (192, 2 * 192)
    with pytest.raises(BuildError, match="the hidden states asked for are '3'; expected .* numbers from 0 to 2"):
        train.train_head(replace(config, reads="3", force=True))
    with pytest.raises(BuildError, match="windows of 16 tokens are too short for 12 drafts; raise --width"):
        train.train_head(replace(config, width=16, drafts=12, force=True))


@contextmanager
def files_of_at_most(num_bytes):
    """A disk that is full, for each file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_training_on_a_disk_that_is_full(text, tmp_path, monkeypatch):
    """It is told of before the first step; at the end nothing of the training is lost."""
    monkeypatch.setattr(train, "SECONDS", 1e9)  # what is saved is saved at the beginning and the end
    options = dict(tokens=1 << 9, drafts=1, width=32, batch=4, draft_vocab=64)
    config, steps = train.TrainConfig(str(TARGET), str(text), str(tmp_path / "head"), **options), []
    on_step = lambda done, total, loss: steps.append((done, total))  # noqa: E731
    with files_of_at_most(1 << 16), pytest.raises(BuildError, match=r"head cannot be written \(File too large\); free"):
        train.train_head(config, on_step=on_step)
    assert not steps and not list(tmp_path.glob("head*"))
    learnt = write = train.write

    def full(*arguments):
        nonlocal learnt
        learnt = arguments[0].state_dict()
        with files_of_at_most(1 << 16):
            write(*arguments)

    monkeypatch.setattr(train, "write", full)
    with pytest.raises(BuildError, match="cannot be written .* the same command goes on with the training"):
        train.train_head(config, on_step=on_step)
    assert steps[-1][0] == steps[-1][1] and (tmp_path / "head" / train.STATE).is_file()
    assert not list((tmp_path / "head").glob("model*"))
    num = len(steps)
    monkeypatch.setattr(train, "write", write)
    train.train_head(config, on_step=on_step)
    found = load_file(tmp_path / "head" / "model.safetensors")
    assert len(steps) == num and torch.equal(found["fc.weight"], learnt["fc.weight"].to(found["fc.weight"].dtype))
    assert {path.name for path in (tmp_path / "head").iterdir()} == {"config.json", "model.safetensors"}


def test_two_trainings_in_one_folder(text, tmp_path, monkeypatch):
    """The second is told so, whatever it was given; the first comes to its head."""
    options = dict(tokens=1 << 9, drafts=1, width=32, batch=4, draft_vocab=64)
    config, refused = train.TrainConfig(str(TARGET), str(text), str(tmp_path / "a" / "head"), **options), []

    def another(*_):
        for force in (False, True):
            with pytest.raises(BuildError, match="head is in use by another process; wait for it or give `-o` another"):
                train.train_head(replace(config, force=force, seed=1))
            refused.append(force)

    train.train_head(config, on_step=another)
    assert refused and {path.name for path in (tmp_path / "a" / "head").iterdir()} == {
        "config.json", "model.safetensors",
    }  # fmt: skip
    lock = writer.lock_folder  # as if the other one had ended right before
    monkeypatch.setattr(its_folder, "lock_folder", lambda path: (path / "config.json").touch() or lock(path))
    with pytest.raises(BuildError, match="b holds something else than a head"):
        train.train_head(replace(config, out=str(tmp_path / "b")))


def test_only_a_head_is_replaced(text, tmp_path):
    """A model, its engine or anything else is not, whatever was forced."""
    shutil.copytree(TARGET, tmp_path / "model")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.json").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, words in (("model", "holds something else than a head"), ("notes", "something else than a head"),
                        ("file", "is not a directory; give -o a new directory")):  # fmt: skip
        with pytest.raises(BuildError, match=words):
            train.train_head(train.TrainConfig(str(tmp_path / "model"), str(text), str(tmp_path / name), force=True))
    assert (tmp_path / "model" / "config.json").read_bytes() == (TARGET / "config.json").read_bytes()
    assert (tmp_path / "notes" / "config.json").read_text() == (tmp_path / "file").read_text() == "mine"


def test_a_training_that_diverges(text, tmp_path, monkeypatch):
    config = train.TrainConfig(str(TARGET), str(text), str(tmp_path / "head"), tokens=1 << 9, width=32, drafts=1)
    monkeypatch.setattr(Trainer, "learn", lambda self, window, progress: torch.tensor(torch.nan))
    with pytest.raises(BuildError, match="the loss is nan after 0 steps: training diverged; lower --learning-rate, an"):
        train.train_head(config)
    assert not (tmp_path / "head" / "model.safetensors").exists()
    for rate in (0.0, -1.0, float("nan"), float("inf"), 1.5):
        with pytest.raises(BuildError, match=f"learning_rate is {rate}; expected a number above 0, at most 1"):
            replace(config, learning_rate=rate)


def test_a_training_that_cannot_begin_leaves_no_folder(tmp_path):
    with pytest.raises(BuildError, match="nothing.txt"):
        train.train_head(train.TrainConfig(str(TARGET), str(tmp_path / "nothing.txt"), str(tmp_path / "a" / "head")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-9], lambda data: b"hello", "other"])
def test_a_damaged_state_of_training(text, tmp_path, damage):
    options = dict(tokens=1 << 9, drafts=1, width=32, batch=4, draft_vocab=64)
    config = train.TrainConfig(str(TARGET), str(text), str(tmp_path / "head"), **options)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train_head(config, on_step=stop)
    state = tmp_path / "head" / train.STATE
    state.write_bytes(damage(state.read_bytes())) if callable(damage) else torch.save({"x": 1}, state)
    with pytest.raises(BuildError, match="training.pt, the training to go on with, is damaged .*--force to begin anew"):
        train.train_head(config)
    with pytest.raises(KeyboardInterrupt):
        train.train_head(replace(config, force=True), on_step=stop)
    with pytest.raises(KeyboardInterrupt):  # of what had not learnt anything, nothing is held against other settings
        train.train_head(replace(config, seed=1), on_step=stop)
    state.rename(state.with_name(f"{state.name}.new"))  # as if it had been killed in the first step
    with pytest.raises(KeyboardInterrupt):
        train.train_head(config, on_step=stop)


def test_training_that_was_stopped_comes_to_the_same_head(text, tmp_path, monkeypatch):
    options = dict(tokens=1 << 10, drafts=2, width=32, batch=4, draft_vocab=64)

    def run(name, on_step=lambda *args: None, **changes):
        folder = tmp_path / name
        train.train_head(train.TrainConfig(str(TARGET), str(text), str(folder), **options | changes), on_step=on_step)
        return load_file(folder / "model.safetensors")

    whole = run("whole")
    monkeypatch.setattr(train, "SECONDS", 0.0)  # saved after each step

    def stop(done, total, loss):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop)
    with pytest.raises(BuildError, match="begun with learning_rate=0.002, now it is 0.1; give the same settings"):
        run("stopped", learning_rate=0.1)
    words = text.read_text()
    text.write_text(words.upper())  # another text of the same name
    with pytest.raises(BuildError, match="begun with digest of the text="):
        run("stopped")
    text.write_text(words)
    steps = []
    again = run("stopped", lambda done, total, loss: steps.append(done))
    assert steps == [5, 6, 7, 8] and all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    with pytest.raises(BuildError, match="is there already; pass --force"):
        run("stopped")
    shutil.rmtree(tmp_path / "stopped")
    later = run("later", begin_with=str(tmp_path / "whole"), learning_rate=1e-6, tokens=300)
    assert 0 < max(float((later[n] - whole[n]).abs().max()) for n in whole if "proj" in n) < 0.01, (
        "it goes on from there"
    )
    with pytest.raises(
        BuildError, match="is no EAGLE-3 head of this target's sizes, hidden states and draft vocabulary"
    ):
        run("other", begin_with=str(tmp_path / "whole"), draft_vocab=63)
    with pytest.raises(BuildError, match="the device is 'tpu'; expected auto, cpu or cuda"):
        run("device", device="tpu")
