"""What the manifest says of a build."""

import json
from types import SimpleNamespace

import pytest
from ingot.builder.record import end_tokens
from ingot.engines.errors import BuildError
from transformers import LlamaConfig


@pytest.mark.parametrize(
    "given, expected",
    [({}, (7,)), ({"eos_token_id": None}, ()), ({"eos_token_id": 3}, (3,)), ({"eos_token_id": [3, 4]}, (3, 4))],
)
def test_end_tokens(tmp_path, given, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    assert end_tokens(SimpleNamespace(path=tmp_path, config=LlamaConfig(eos_token_id=7))) == expected


@pytest.mark.parametrize("given", ["</s>", ["</s>"], 2.0, True, {"id": 2}])
def test_end_tokens_that_nothing_would_equal(tmp_path, given):
    """An engine of them would never end a text, without a word."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    with pytest.raises(BuildError, match="expected the id of a token"):
        end_tokens(SimpleNamespace(path=tmp_path, config=LlamaConfig()))
