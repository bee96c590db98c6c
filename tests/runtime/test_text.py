"""Encoding, chat templates and incremental decoding, on the demo tokenizer and on small ones made here."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.engines.errors import EngineError, RequestError
from ingot.runtime.detokenise import ByteLevel, Sentencepiece, Windowed
from ingot.runtime.request import SamplingParams
from ingot.runtime.text import Text
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

DEMO = Path(__file__).parents[2] / "engines/demo/pycoder-14m"
TEXT = Text.open(DEMO)
VOCAB = TEXT.tokenizer.get_vocab_size()
# tokens of one byte above 0x7F make half characters likely; the rest is the vocabulary, specials and ids past it
HIGH_BYTES = [i for i in range(VOCAB) if len(b := TEXT.pieces.get(i)) == 1 and b[0] > 0x7F]
TOKENS = st.lists(st.one_of(st.sampled_from(HIGH_BYTES), st.integers(0, VOCAB + 5)), max_size=40)


def sentencepiece():
    pieces = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁the", "h", "e", "▁▁", "é", "lo", "▁lo"]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<unk>", special=True)])
    return tokenizer


def deltas(text, tokens, prompt=(), **options):
    decoder = text.decoder(SamplingParams(**options), list(prompt))
    parts = [decoder.push(token) for token in tokens]
    return [*parts, decoder.finish()], decoder.stopped


def test_the_decoder_is_recognised():
    assert isinstance(TEXT.pieces, ByteLevel)
    assert isinstance(Text(sentencepiece(), {}).pieces, Sentencepiece)
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    wordpiece.decoder = decoders.WordPiece()
    assert isinstance(Text(wordpiece, {}).pieces, Windowed)


@settings(max_examples=600, deadline=None)
@given(TOKENS, st.booleans())
def test_deltas_concatenate_to_the_whole(tokens, skip):
    parts, _ = deltas(TEXT, tokens, skip_special_tokens=skip)
    assert "".join(parts) == TEXT.decode(tokens, skip)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=20))
def test_no_half_character(text):
    parts, _ = deltas(TEXT, TEXT.encode(text))
    assert "".join(parts) == text
    for part in parts:
        assert "\ufffd" not in part or "\ufffd" in text


@settings(max_examples=300, deadline=None)
@given(TOKENS, st.lists(st.text("ab e\n(", min_size=1, max_size=4), min_size=1, max_size=3), st.booleans())
def test_stop_strings_in_random_tokens(tokens, stops, include):
    whole = TEXT.decode(tokens)
    parts, stopped = deltas(TEXT, tokens, stop=stops, include_stop_str_in_output=include)
    said = "".join(parts)
    found = [(whole.find(s), s) for s in stops if s in whole]
    if not found:
        assert stopped is None and said == whole
    else:  # tokens arrive one by one: the first token that completes a stop string decides
        assert stopped in stops
        at = whole.find(stopped)
        assert said == (whole[: at + len(stopped)] if include else whole[:at])
        if not include:
            assert not any(s in said for s in stops)


def test_a_stop_string_is_held_back_token_by_token():
    tokens = [TEXT.encode(c)[0] for c in "abEXabENDxyz"]
    parts, stopped = deltas(TEXT, tokens, stop="END")
    assert parts[:4] == ["a", "b", "", "EX"]
    assert "".join(parts) == "abEXab" and stopped == "END"


def test_min_tokens_lets_a_stop_string_pass():
    tokens = [TEXT.encode(c)[0] for c in "a;b;c"]
    parts, stopped = deltas(TEXT, tokens, stop=";", min_tokens=2)
    assert "".join(parts) == "a;b" and stopped == ";"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 266), max_size=30), st.text("helo é😀\n", max_size=12))
def test_sentencepiece(noise, sentence):
    text = Text(sentencepiece(), {})
    prompt = text.encode("the")
    for tokens in (text.encode(sentence), noise):
        whole = text.decode([*prompt, *tokens])[len(text.decode(prompt)) :]
        parts, _ = deltas(text, tokens, prompt)
        if "\ufffd" not in whole:
            assert "".join(parts) == whole
    assert deltas(text, text.encode(sentence), prompt)[0][-1] == ""  # nothing left over from whole characters


def test_sentencepiece_bytes_that_are_no_character():
    text = Text(sentencepiece(), {})
    ids = [
        text.tokenizer.token_to_id(p) for p in ("h", "<0xF0>", "<0x9F>", "e", "<0xE2>", "<0x82>", "<0xAC>", "<0xE2>")
    ]
    parts, _ = deltas(text, ids)
    assert parts == ["h", "", "", "\ufffd\ufffde", "", "", "€", "", "\ufffd"]


def test_windowed_decoding():
    vocab = {p: i for i, p in enumerate(["[UNK]", "un", "##believ", "##able", "story", ",", "a"])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    text = Text(tokenizer, {})
    tokens = [6, 1, 2, 3, 4, 5, 6, 4] * 5
    assert "".join(deltas(text, tokens)[0]) == text.decode(tokens)


def test_time_per_token_does_not_grow():
    tokens = TEXT.encode(Path(__file__).read_text()) * 8
    decoder = TEXT.decoder(SamplingParams(stop=["never seen", "nowhere"]), [])
    halves = []
    for half in (tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]):
        start = time.thread_time()  # others may have the processor meanwhile
        for token in half:
            decoder.push(token)
        halves.append((time.thread_time() - start) / len(half))
    assert halves[1] < 3 * halves[0]
    assert halves[1] < 50e-6  # measured 2 us


def test_bos_as_the_config_says():
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    bos = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|end|>"}}
    plain = TEXT.encode("x = 1")
    assert Text(tokenizer, bos).encode("x = 1") == plain
    assert Text(tokenizer, bos | {"add_bos_token": True}).encode("x = 1") == [0, *plain]
    both = Text(tokenizer, bos | {"add_bos_token": True, "add_eos_token": True})
    assert both.encode("x = 1") == [0, *plain, 3]
    assert both.encode("x = 1", add_special_tokens=False) == plain


def test_chat_template_of_the_demo():
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "<b>"}]
    theirs = AutoTokenizer.from_pretrained(DEMO).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert TEXT.render(messages) == theirs == "<|user|>hello<|end|><|assistant|><b><|end|><|assistant|>"
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert TEXT.render(parts, add_generation_prompt=False) == "<|user|>ab<|end|>"


def test_what_templates_are_given():
    source = (
        "{{ bos_token }}{{ tools | tojson }}{{ strftime_now('%Y')[:2] }}"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert TEXT.render(messages, template=source, tools=[{"x": "<é>"}]) == '<|endoftext|>[{"x": "<é>"}]20a'


@pytest.mark.parametrize(
    "source, reason",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "not safely callable|access"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ nothing.at_all }}", "undefined"),
        ("{% if %}", "Expected|expected"),
    ],
)
def test_a_template_that_fails_is_a_request_error(source, reason):
    with pytest.raises(RequestError, match=reason):
        TEXT.render([{"role": "user", "content": "a"}], template=source)


@pytest.mark.parametrize(
    "messages", [["hello"], [{"content": "a"}], [{"role": "user", "content": [{"type": "image"}]}]]
)
def test_malformed_messages(messages):
    with pytest.raises(RequestError):
        TEXT.render(messages)


def test_an_engine_without_tokenizer_or_with_a_broken_one(tmp_path):
    assert Text.open(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(EngineError, match="cannot be read"):
        Text.open(tmp_path)
