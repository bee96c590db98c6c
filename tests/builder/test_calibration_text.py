"""Calibration text: files, JSON Lines, chats, datasets; what is held out; and one sentence for what is no text."""

import json
import shutil
import sys
from types import ModuleType

import pytest
import torch
from hand_made import DEMO
from ingot.builder.calibration_text import Text
from ingot.builder.checkpoint import Checkpoint
from ingot.builder.text_files import copy_text_files
from ingot.engines.errors import BuildError
from tokenizers import Tokenizer

DRAFT = DEMO / "pycoder-draft-2m"
LINES = [f"def f{i}(x):\n    return x * {i} + {i * i % 97}\n" for i in range(2500)]


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint.open(str(DRAFT))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(DRAFT / "tokenizer.json"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES), encoding="utf-8")
    return path


def rows(part):
    return [tuple(row) for windows in part for row in windows.tokens.tolist()]


def test_a_file_in_windows_of_which_every_fifth_is_held_out(checkpoint, tokenizer, file):
    text = Text.read(file, checkpoint)
    ids = tokenizer.encode("".join(LINES)).ids
    assert text.num_tokens == (64 * 512, 16 * 512) and len(ids) > 80 * 512
    windows = rows(text.calibration) + rows(text.held_out)
    assert len(set(windows)) == 80, "no window is in both"
    cut = {tuple(ids[at : at + 512]) for at in range(0, len(ids), 512)}
    assert cut.issuperset(windows)
    assert rows(text.calibration)[0] == tuple(ids[:512])  # spread over all of it
    assert rows(text.held_out)[-1] == tuple(ids[len(ids) // 512 * 512 - 512 : len(ids) // 512 * 512])


@pytest.mark.parametrize("num_tokens, width, expected", [(4096, 128, (32, 8, 128)), (512, 256, (2, 1, 256)),
                                                         (1, 64, (1, 1, 64))])  # fmt: skip
def test_how_much_text(checkpoint, file, num_tokens, width, expected):
    text = Text.read(file, checkpoint, num_tokens, width)
    num, held, width = expected
    assert text.num_tokens == (num * width, held * width)
    assert all(w.tokens.shape[1] == width and w.tokens.numel() <= 2048 for w in text.calibration + text.held_out)
    assert text.digest != Text.read(file, checkpoint, num_tokens, width // 2).digest
    assert text.digest == Text.read(file, checkpoint, num_tokens, width).digest


def test_a_short_text_has_short_windows(checkpoint, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("".join(LINES[:150]), encoding="utf-8")
    text = Text.read(path, checkpoint)
    assert len(rows(text.held_out)) >= 2 and text.held_out[0].tokens.shape[1] < 512


def test_lines_and_chats(checkpoint, tokenizer, tmp_path):
    path = tmp_path / "mixed.jsonl"
    chats = [[{"role": "user", "content": line}, {"role": "assistant", "content": "Yes."}] for line in LINES[:40]]
    entries = [{"text": line} for line in LINES[40:200]] + [{"messages": chat} for chat in chats]
    path.write_text("\n\n".join(map(json.dumps, entries)) + "\n")
    text = Text.read(path, checkpoint, width=16)
    found = tokenizer.decode([i for row in rows(text.calibration) for i in row], skip_special_tokens=False)
    assert "def f50(x)" in found and "Yes." in found
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(DRAFT).apply_chat_template
    ids = [i for line in LINES[40:200] for i in tokenizer.encode(line).ids]
    for chat in chats:
        ids += tokenizer.encode(template(chat, tokenize=False), add_special_tokens=False).ids
    assert rows(text.calibration)[0] == tuple(ids[:16])
    assert {tuple(ids[at : at + 16]) for at in range(0, len(ids), 16)}.issuperset(rows(text.held_out))


@pytest.mark.parametrize("name, content, words", [
    ("few.txt", "def f(): pass\n", "tokens of text; calibration needs at least 2048"),
    ("empty.txt", " \n", "is empty"),
    ("empty.jsonl", "", "is empty"),
    ("blank.jsonl", '{"text": " "}\n', "is empty"),
    ("bytes.txt", b"\xff\xfe\xff", "cannot be read"),
    ("bytes.jsonl", b'{"text": "\xff"}', "cannot be read"),
    ("lines.jsonl", '{"text": "a"}\n{"words": 1}\n', 'line 2 of .* is not an object with a "text".*; found the keys w'),
    ("list.jsonl", '{"text": "a"}\n[1]\n', r"line 2 of .* found \[1\]"),
    ("plain.jsonl", "hello\n", "line 1 of .* found 'hello'"),
    ("chat.jsonl", '{"messages": [{"role": "user"}, 3]}\n', "cannot be put through the chat template"),
])  # fmt: skip
def test_text_that_is_none(checkpoint, tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BuildError, match=words):
        Text.read(path, checkpoint)


def test_windows_that_cannot_be(checkpoint, file, tmp_path):
    with pytest.raises(BuildError, match="windows of 5000 tokens were asked for; expected 2 to 4096"):
        Text.read(file, checkpoint, width=5000)
    short = tmp_path / "short.txt"
    short.write_text("".join(LINES[:150]), encoding="utf-8")
    with pytest.raises(BuildError, match="no two windows of 4000"):
        Text.read(short, checkpoint, width=4000)
    for missing in (tmp_path / "none.txt", "texts/none.txt", tmp_path / "none"):
        with pytest.raises(BuildError, match="cannot be read: .*No such file"):
            Text.read(missing, checkpoint)


def test_a_checkpoint_without_a_tokenizer(file, tmp_path):
    shutil.copytree(DRAFT, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(BuildError, match="has no tokenizer.json, so .* cannot be read for it"):
        Text.read(file, Checkpoint.open(str(tmp_path / "model")))


# -- datasets ----------------------------------------------------------------------------------------------------------


def test_half_of_a_surrogate_pair(checkpoint, tmp_path):
    """What a program writes that cuts text in the middle of an emoji; JSON allows it."""
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": line + "\ud83d"}) for line in LINES))
    assert Text.read(tmp_path / "t.jsonl", checkpoint, 2048, 128).num_tokens == (2048, 512)


def test_what_editors_put_before_a_text_is_none_of_it(checkpoint, tmp_path):
    texts = []
    for mark in "", "\ufeff":
        (tmp_path / "t.jsonl").write_text(mark + "\n".join(json.dumps({"text": line}) for line in LINES), "utf-8")
        texts.append(Text.read(tmp_path / "t.jsonl", checkpoint, 2048, 128))
    assert texts[0].digest == texts[1].digest


def test_a_damaged_tokenizer(tmp_path, file):
    shutil.copytree(DRAFT, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text('{"version":')
    (tmp_path / "engine").mkdir()
    with pytest.raises(BuildError, match="tokenizer.json cannot be read"):
        Text.read(file, Checkpoint.open(str(tmp_path / "model")))
    with pytest.raises(BuildError, match="tokenizer.json cannot be read"):
        copy_text_files(tmp_path / "model", tmp_path / "engine")


@pytest.fixture
def library(monkeypatch):
    """A stand-in for the library `datasets` that has one data set."""
    asked, module = [], ModuleType("datasets")

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        if name != "org/code":
            raise ConnectionError("offline")
        return ({"text": line, "stars": 3} for line in LINES)

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_dataset_of_the_hub(checkpoint, library, tokenizer):
    text = Text.read("org/code:validation", checkpoint, 4096, 128)
    ids = [i for line in LINES for i in tokenizer.encode(line).ids]
    assert text.num_tokens == (4096, 1024) and rows(text.calibration)[0] == tuple(ids[:128])
    Text.read("org/code", checkpoint, 4096, 128)
    assert library == [("org/code", "validation", True), ("org/code", "train", True)]
    with pytest.raises(BuildError, match=r"dataset org/other cannot be read \(ConnectionError: offline\); check its"):
        Text.read("org/other", checkpoint)


def test_without_the_library(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BuildError, match=r"`datasets`, which is not installed; .*pip install 'ingot\[datasets\]'"):
        Text.read("org/code:train", checkpoint)


def test_the_library_itself(checkpoint, tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in LINES))
    text = Text.read(str(tmp_path), checkpoint, 4096, 128)
    assert text.num_tokens == (4096, 1024)
    assert isinstance(text.calibration[0].tokens, torch.Tensor)
