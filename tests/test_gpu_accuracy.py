"""`benchmarks/gpu_accuracy.py` says right of the same engine and WRONG of another; CPU engines stand for both."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import ingot
import pytest
from hand_made import DEMO, cast_llama
from ingot import LLM
from safetensors.torch import load_file, save_file

CHECKPOINT = DEMO / "pycoder-draft-2m"
FEW = ("--prompts", 6, "--new-tokens", 8, "--tokens", 300, "--kv-mib", 16)


@pytest.fixture(scope="module")
def script():
    path = Path(ingot.__file__).parent / "benchmarks/gpu_accuracy.py"
    spec = importlib.util.spec_from_file_location("gpu_accuracy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """The draft model, once more in bf16, and with other weights: one layer louder, or only its last norm."""
    folder = tmp_path_factory.mktemp("accuracy")
    found = {name: cast_llama(CHECKPOINT, folder / name, name) for name in ("float32", "bfloat16")}
    for name, weight, factor in (
        ("layer", "model.layers.0.mlp.down_proj.weight", 3.0),
        ("norm", "model.norm.weight", 0.5),
    ):
        changed = shutil.copytree(CHECKPOINT, folder / f"checkpoint-{name}")
        weights = load_file(changed / "model.safetensors")
        weights[weight] = weights[weight] * factor
        save_file(weights, changed / "model.safetensors")
        found[name] = cast_llama(changed, folder / name)
    return found


@pytest.fixture
def compare(script, capsys, monkeypatch):
    """The script on two engines: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu_accuracy.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            script.main()
        output = capsys.readouterr()
        return end.value.code, output.out, output.err

    return run


def test_the_same_weights_are_right(compare, engines):
    code, out, _ = compare(engines["float32"], engines["float32"], *FEW)
    assert code == 0 and len(out.splitlines()) == 1, out
    assert out.startswith("float32 (float32): right. 6 of 6 identical, 0 part at a near tie, 0 beyond rounding")
    assert "Forced: 48 tokens" in out and "Loss over 299 tokens" in out


def test_a_changed_layer_is_wrong(compare, engines):
    code, out, _ = compare(engines["float32"], engines["layer"], *FEW, "--details", 2)
    first, *details = out.splitlines()
    assert code == 1 and first.startswith("layer (float32): WRONG.") and " 0 beyond\n" not in out
    assert 2 <= len(details) <= 4 and "parts at its token" in details[0] and "below the CPU's" in details[-1]


def test_a_loss_that_differs_is_wrong_though_no_token_is(compare, engines):
    """Half of the last norm keeps the order of all logits."""
    code, out, _ = compare(engines["float32"], engines["norm"], *FEW)
    assert code == 1 and "WRONG. 6 of 6 identical" in out and "0 beyond. Loss" in out


def test_what_cannot_be_compared_is_a_usage_error(compare, engines, tmp_path):
    def refused(words, *arguments):
        code, out, err = compare(*arguments)
        assert code == 2 and not out and words in err.splitlines()[-1]

    refused("different models or dtypes", engines["float32"], engines["bfloat16"])
    refused("the following arguments are required: cuda", engines["float32"])
    same = engines["float32"], engines["float32"]
    refused("--new-tokens is 4096, expected 1 to 4095", *same, "--new-tokens", 4096)
    refused("--new-tokens is 0, expected 1 to 4095", *same, "--new-tokens", 0)
    (tmp_path / "x.txt").write_text("x")
    refused("at least 2 tokens", *same, *FEW, "--text", tmp_path / "x.txt")
    refused("at least 2 tokens", *same, *FEW, "--tokens", 0)


def test_a_short_text_is_enough(compare, engines, tmp_path):
    (tmp_path / "short.txt").write_text("def add(a, b):\n    return a + b\n")
    code, out, _ = compare(engines["float32"], engines["float32"], *FEW, "--text", tmp_path / "short.txt")
    assert code == 0 and "6 of 6 identical" in out


@pytest.mark.parametrize("num, longest", [(6, 40), (200, 144), (3, 1), (5, 7)])
def test_prompts_are_cut_from_all_over_the_text(script, num, longest):
    text = list(range(1000))
    prompts = script.prompts_of(text, num, longest)
    lengths = [len(prompt) for prompt in prompts]
    assert len(prompts) == num and lengths[0] == 1 and max(lengths) <= longest
    assert len(set(lengths)) == min(num, longest if longest % 2 else longest // 2)
    assert all(prompt == text[prompt[0] :][: len(prompt)] for prompt in prompts)
    assert [prompt[0] for prompt in prompts] == [i * (1000 - longest) // num for i in range(num)]
    assert all(1 <= len(prompt) <= 5 for prompt in script.prompts_of(text[:5], num, longest))


def test_partings_are_first_differences_with_their_gaps(script):
    def entries(*pairs):
        return [{token: SimpleNamespace(logprob=value) for token, value in pair.items()} for pair in pairs]

    gpu = script.Said([[1, 2, 3], [1, 5, 6], [7]], [
        entries({1: -0.1}, {2: -0.2}, {3: -0.3}), entries({1: -0.1}, {5: -1.0, 4: -1.5}, {6: 0}), entries({7: -0.5}),
    ], [])  # fmt: skip
    cpu = script.Said([[1, 2, 3], [1, 4, 9], [8]], [
        entries({1: -0.1}, {2: -0.2}, {3: -0.3}), entries({1: -0.1}, {4: -1.0, 5: -1.1}, {9: 0}),
        entries({8: -0.25, 7: -3}),
    ], [])  # fmt: skip
    first, second = script.partings(cpu, gpu)
    assert first == (1, 1, pytest.approx(0.5), pytest.approx(0.1))
    assert second == (2, 0, float("inf"), pytest.approx(2.75)), "not among the candidates: beyond any rounding"
    assert script.partings(cpu, cpu) == []


def test_forced_gaps_are_below_the_engines_own_choice(script, engines):
    with LLM(engines["float32"], prefix_cache=False, kv_cache_memory=16 << 20) as llm:
        prompts = script.prompts_of(llm.text.encode("def add(a, b):\n    return a + b\n" * 4), 3, 20)
        own = script.say(llm, prompts, [prompts[-1]], 5)
        assert all(gap == 0 for row in script.forced_gaps(llm, prompts, own.tokens) for gap in row)
        other = [list(row) for row in own.tokens]
        second = [token for token in own.candidates[1][2] if token != other[1][2]][0]
        other[1][2] = second
        gaps = script.forced_gaps(llm, prompts, other)
    entry = own.candidates[1][2]
    assert (
        gaps[1][2] == pytest.approx(entry[own.tokens[1][2]].logprob - entry[second].logprob, abs=1e-4)
        and gaps[1][2] > 0
    )
    assert gaps[0] == gaps[2] == [0] * 5 and gaps[1][:2] == [0, 0], "only behind the token that was forced"
