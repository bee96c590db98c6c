"""The command line as a user meets it: one sentence and an exit code for every mistake, and nothing left behind."""

import dataclasses
import errno
import inspect
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from families import REFUSED
from ingot import BuildConfig
from ingot import __main__ as cli
from ingot.builder.cli import build

DEMO = Path(__file__).parents[1] / "engines" / "demo"
BUILD = [sys.executable, "-m", "ingot", "build"]
PROMPT = "def fibonacci(n):\n"


@pytest.fixture
def ingot(capsys, monkeypatch):
    """Run a command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")

    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)  # pytest's own handlers stay

    def run(*arguments, app=cli.app):
        with pytest.raises(SystemExit) as end:
            cli.run(app, "ingot", [str(a) for a in arguments])
        output = capsys.readouterr()
        return end.value.code or 0, output.out, output.err

    return run


def refused(result, code, *words):
    """The result of a mistake: this exit code and one sentence on stderr, with these words in it."""
    found, out, err = result
    assert found == code, err
    assert out == "" and "Traceback" not in err
    sentences = [line for line in err.splitlines() if line.strip()]
    assert len(sentences) == 1 and sentences[0].startswith("error: ") and sentences[0].endswith("."), err
    for word in words:
        assert str(word) in err


def test_help_is_quick_because_nothing_heavy_is_imported():
    heavy = "{'torch', 'transformers', 'onnx', 'onnx_ir', 'numpy'}"
    code = f"import sys, ingot.__main__; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_help_version_and_unknown_options(ingot):
    code, out, _ = ingot("--help")
    assert code == 0 and all(
        name in out for name in ("build", "calibrate", "generate", "bench", "serve", "route", "inspect")
    )
    assert ingot("--version")[1].startswith("ingot 0.")
    for command in ("build", "calibrate", "generate", "bench", "serve", "route", "inspect"):
        assert ingot(command, "--help")[0] == 0
        words = "No such option: --no-such-option", f"see `ingot {command} --help`"
        refused(ingot(command, "x", "--no-such-option"), 2, *words)
    assert ingot("--help", app=cli.build_app)[0] == 0
    refused(ingot("frobnicate"), 2, "No such command 'frobnicate'", "see `ingot --help`")
    refused(ingot("generate", "x"), 2, "Missing argument")
    code, out, _ = ingot()
    assert code == 2 and "generate" in out


def test_a_server_without_its_packages(ingot, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for command in (["serve", tmp_path], ["route", "http://127.0.0.1:1"]):
        sentence = "needs FastAPI; install it with `pip install 'ingot[serve]'` in ingot's environment."
        refused(ingot(*command), 3, sentence)


def test_no_engine_there(ingot, tmp_path):
    for command in (["inspect"], ["bench"], ["generate"]):
        tail = ["hello"] if command == ["generate"] else []
        refused(ingot(*command, tmp_path / "none", *tail), 3, "does not exist", "build-engine")
        refused(ingot(*command, tmp_path, *tail), 3, "not an engine", "build-engine")
    refused(ingot("inspect", DEMO / "pycoder-14m"), 3, "is a checkpoint, not an engine")


def test_impossible_sampling_values(ingot, tmp_path):
    for option, value in {"temperature": "-1", "top-p": "0", "min-p": "2", "max-tokens": "0", "top-k": "-5"}.items():
        refused(ingot("generate", tmp_path, "x", f"--{option}", value), 2, option.replace("-", "_"), value)
    refused(ingot("generate", tmp_path, "x", "--temperature", "warm"), 2, "--temperature", "number")
    refused(ingot("bench", tmp_path, "--file", tmp_path / "none"), 2, "not a file")
    refused(ingot("bench", tmp_path, "--concurrency", "0"), 2, "--concurrency")


def checkpoint(folder, **files):
    """A copy of the draft checkpoint with some files replaced (bytes) or left out (None)."""
    shutil.copytree(DEMO / "pycoder-draft-2m", folder)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.unlink() if content is None else path.write_bytes(content)
    return folder


MISTAKES = {
    "no such model": (lambda t: t / "none", []),
    "an empty folder": (lambda t: (t / "empty").mkdir() or t / "empty", []),
    "no weights": (lambda t: checkpoint(t / "c", model__safetensors=None), []),
    "config is not JSON": (lambda t: checkpoint(t / "c", config__json=b"{"), []),
    "weights are garbage": (lambda t: checkpoint(t / "c", model__safetensors=b"\xff" * 64), []),
    "weights are cut off": (
        lambda t: checkpoint(
            t / "c", model__safetensors=(DEMO / "pycoder-draft-2m/model.safetensors").read_bytes()[:-100]
        ),
        [],
    ),
    "unknown architecture": (lambda t: checkpoint(t / "c", config__json=b'{"model_type": "abacus"}'), []),
    "unknown target": (lambda t: DEMO / "pycoder-draft-2m", ["--target", "abacus"]),
    "unknown dtype": (lambda t: DEMO / "pycoder-draft-2m", ["--dtype", "int3"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_build_that_cannot_be(ingot, tmp_path, mistake):
    make, options = MISTAKES[mistake]
    (tmp_path / "out").mkdir()
    refused(ingot("build", make(tmp_path), "-o", tmp_path / "out" / "engine", *options), 2)
    assert not list((tmp_path / "out").iterdir()), "nothing is left behind"


def test_an_architecture_that_is_refused(ingot, tmp_path):
    config = REFUSED["bloom"]()
    config.save_pretrained(tmp_path / "model")
    shutil.copy(DEMO / "pycoder-draft-2m" / "model.safetensors", tmp_path / "model")
    refused(ingot("build", tmp_path / "model", "-o", tmp_path / "engine"), 2, "bloom")
    assert not (tmp_path / "engine").exists()


def test_a_folder_that_is_no_engine_is_not_replaced(ingot, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    refused(ingot("build", DEMO / "pycoder-draft-2m", "-o", tmp_path, "--force"), 2, "not an engine")
    assert (tmp_path / "thesis.tex").exists()


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    """The draft model, built through the command line with --json; (folder, manifest)."""
    out = tmp_path_factory.mktemp("cli") / "draft"
    command = [*BUILD, DEMO / "pycoder-draft-2m", "-o", out, "--json", "--dtype", "float32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return out, json.loads(done.stdout)


def test_build_and_inspect(ingot, draft):
    out, manifest = draft
    assert manifest == json.loads((out / "engine.json").read_text())
    refused(ingot("build", DEMO / "pycoder-draft-2m", "-o", out), 2, "--force")
    code, text, _ = ingot("inspect", out, "--json")
    facts = json.loads(text)
    config = json.loads((DEMO / "pycoder-draft-2m" / "config.json").read_text())
    assert code == 0 and facts["model"]["num_layers"] == config["num_hidden_layers"] == len(facts["kv_layers"])
    width = config["num_key_value_heads"] * config["head_dim"]
    assert facts["kv_bytes_per_token"] == 2 * 4 * width * config["num_hidden_layers"]
    counts = [layer["ops"]["PagedAttention"] * (layer["last"] - layer["first"] + 1) for layer in facts["ops"]["layers"]]
    assert sum(counts) == config["num_hidden_layers"]
    total = sum(facts["ops"]["outside"].values())
    for layer in facts["ops"]["layers"]:
        total += sum(layer["ops"].values()) * (layer["last"] - layer["first"] + 1)
    assert total == facts["ops"]["total"]
    code, text, _ = ingot("inspect", out)
    assert code == 0 and "LlamaForCausalLM" in text and "PagedAttention" in text and "KV cache" in text


def test_generate_streams_what_json_says(ingot, draft, monkeypatch):
    code, text, err = ingot("generate", draft[0], PROMPT, "--max-tokens", 24)
    assert code == 0 and err == ""
    code, out, _ = ingot("generate", draft[0], PROMPT, "--max-tokens", 24, "--json")
    answer = json.loads(out)
    assert answer["text"] + "\n" == text and 0 < len(answer["token_ids"]) <= 24
    assert answer["finish_reason"] in ("stop", "length")
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO(PROMPT))
    assert ingot("generate", draft[0], "-", "--max-tokens", 24)[1] == text
    sampling = "--temperature", "1.5", "--seed", "7"
    drafts = [], [], ["--speculate", "ngram"], ["--speculate", "draft", "--draft", draft[0], "--num-draft-nodes", 9]
    sampled = {ingot("generate", draft[0], PROMPT, *sampling, *options)[:2] for options in drafts}
    assert len(sampled) == 1 and sampled.pop()[0] == 0
    code, out, _ = ingot("generate", draft[0], "Sort a list", "--chat", "--max-tokens", 4, "--json")
    assert code == 0 and json.loads(out)["num_prompt_tokens"] > 4


def test_requests_that_cannot_be(ingot, draft):
    refused(ingot("generate", draft[0], ""), 2, "empty")
    refused(ingot("generate", draft[0], "x = 1\n" * 5000), 2, "4096")
    refused(ingot("generate", draft[0], PROMPT, "--speculate", "draft"), 3, "needs a draft engine")


def test_bench(ingot, draft, tmp_path):
    sizes = ["-n", 6, "--input-len", "4:20", "--output-len", "3:9", "-c", 4]
    code, out, err = ingot("bench", draft[0], *sizes, "--json")
    figures = json.loads(out)
    assert code == 0 and figures["requests"] == 6 and figures["failed"] == 0
    assert 24 <= figures["input_tokens"] <= 120 and 18 <= figures["output_tokens"] <= 54
    assert 0 < figures["ttft_ms"]["p50"] <= figures["end_to_end_ms"]["p99"]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "import os\\n", "max_tokens": 5}\n' * 3)
    code, out, _ = ingot("bench", draft[0], "--file", tmp_path / "prompts.jsonl", "--rate", "50")
    assert code == 0 and "output tokens/s" in out and "time to first token" in out
    for options in (["--rate", "nan"], ["--warmup", "-1"], ["--speculate", "ngram", "--levels", ""]):
        refused(ingot("bench", draft[0], *options), 2, options[-2])


def test_a_damaged_engine(ingot, draft, tmp_path):
    engine = shutil.copytree(draft[0], tmp_path / "engine")
    weights = bytearray((engine / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (engine / "weights.safetensors").write_bytes(weights)
    refused(ingot("generate", engine, "x"), 3, "weights.safetensors is damaged", "build-engine", "pycoder-draft-2m")
    refused(ingot("inspect", engine), 3, "weights.safetensors is damaged")


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_build_that_is_stopped_leaves_nothing(tmp_path, sent, code):
    command = [*BUILD, DEMO / "pycoder-draft-2m", "-o", tmp_path / "deep" / "engine", "-v"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while "export" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(sent)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == code and "Traceback" not in err, err
    assert not list(tmp_path.iterdir())


def test_a_bug_says_so(ingot, monkeypatch, tmp_path):
    def broken(*_, **__):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("ingot.engines.manifest.Manifest.open", broken)
    code, out, err = ingot("inspect", tmp_path)
    assert code == 70 and out == "" and "ZeroDivisionError: by zero" in err and "--debug" in err
    with pytest.raises(ZeroDivisionError):
        cli.run(cli.app, "ingot", ["inspect", str(tmp_path), "--debug"])


def test_a_disk_that_is_full_is_no_bug_of_ours(ingot, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ingot.engines.manifest.Manifest.open", full)
    assert ingot("inspect", tmp_path) == (2, "", "error: reading or writing: No space left on device.\n")


def test_generate_that_is_stopped(draft):
    command = [sys.executable, "-m", "ingot", "generate", draft[0], PROMPT, "--max-tokens", "4000", "--ignore-eos"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.read(20), "it streams before it ends"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err == "interrupted\n"


def test_whatever_a_manifest_records_of_a_build_is_an_option_of_one():
    """The sentences that tell to build an engine again repeat it."""
    fields = {field.name for field in dataclasses.fields(BuildConfig)} - {"model", "out"}
    assert fields <= inspect.signature(build).parameters.keys()
