"""Opening a checkpoint: lazily, sharded or not; and every way in which it can be unusable, in one sentence."""

import json

import pytest
import torch
from families import FAMILIES
from ingot.builder.checkpoint import INDEX, SINGLE, Checkpoint
from ingot.engines.errors import BuildError
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES["llama"](), dtype=torch.float32)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refusal(path) -> str:
    with pytest.raises(BuildError) as error:
        Checkpoint.open(str(path))
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("shard_size", ["1GB", "200KB"])
def test_tensors_are_those_saved(model, tmp_path, shard_size):
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    checkpoint = Checkpoint.open(str(tmp_path))
    assert (tmp_path / INDEX).exists() == (shard_size == "200KB")
    assert checkpoint.config.model_type == "llama"
    state = model.state_dict()
    assert checkpoint.stored.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert checkpoint.stored[name].shape == tensor.shape and checkpoint.stored[name].length == tensor.nbytes


def test_no_such_directory(tmp_path):
    assert "is not a directory" in refusal(tmp_path / "absent")


def test_unknown_hub_id(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("the network is unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = refusal("nobody/nothing")
    assert "nobody/nothing is not a directory" in message and "network is unreachable" in message


def test_hub_download_leaves_pickles_out(monkeypatch, folder):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **k: asked.update(k, name=name) or folder)
    assert Checkpoint.open("org/name").path == folder
    assert asked["name"] == "org/name" and not any("bin" in pattern for pattern in asked["allow_patterns"])


def test_a_file_instead_of_a_directory(folder):
    assert "is a file" in refusal(folder / SINGLE)


def test_not_a_checkpoint(tmp_path):
    assert "no config.json" in refusal(tmp_path)


def test_config_of_unknown_type(folder):
    (folder / "config.json").write_text('{"model_type": "abacus"}')
    assert "abacus" in refusal(folder)


def test_config_is_not_json(folder):
    (folder / "config.json").write_text("{")
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_key_value_heads", "max_position_embeddings"])
def test_config_of_nothing(folder, name):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: 0}))
    assert f"{name} is 0, expected at least 1" in refusal(folder)


def test_pickled_weights_only(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "python -c" in message and "save_pretrained" in message and str(folder) in message


def test_no_weights(folder):
    (folder / SINGLE).unlink()
    assert "neither" in refusal(folder)


def test_quantised_already(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    assert "says that it is quantised by awq, but stores no weight so" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated(folder, keep):
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:keep])
    assert "not a whole safetensors file" in refusal(folder)


def test_longer_than_its_header_says(folder):
    with (folder / SINGLE).open("ab") as file:
        file.write(b"\0")
    assert "not a whole safetensors file" in refusal(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]},  # the shape does not fill the bytes
        {"dtype": "F32", "shape": [3], "data_offsets": [-12, 0]},
        {"dtype": "F32", "shape": [3]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},  # a hole in front of it
        {"dtype": "F32", "shape": [-1, -3], "data_offsets": [0, 12]},
        ["F32"],
    ],
)
def test_damaged_header(folder, entry):
    header = json.dumps({"x": entry}).encode()
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    assert "not a whole safetensors file" in refusal(folder)


@pytest.mark.parametrize("metadata", [["format", "pt"], {"format": 1}, "pt", {"format": {"pt": None}}])
def test_metadata_that_is_no_map_of_strings(folder, metadata):
    header = json.dumps({"__metadata__": metadata, "x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}})
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(12))
    message = refusal(folder)
    assert "not a whole safetensors file" in message and "invalid type" in message and "download it again" in message


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"x": {"dtype": "F32", "shape": [3.0], "data_offsets": [0, 12]}}',
        b'{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0.0, 12.0]}}',
        b'{"x": {"dtype": "F32", "shape": [3, true], "data_offsets": [0, 12]}}',
    ],
)
def test_a_header_that_only_python_would_read(folder, header):
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    assert "not a whole safetensors file" in refusal(folder)


def test_damaged_json_in_header(folder):
    data = bytearray((folder / SINGLE).read_bytes())
    data[8:10] = b"\xff\xff"
    (folder / SINGLE).write_bytes(data)
    assert "not a whole safetensors file" in refusal(folder)


def test_two_tensors_in_one_place(folder):
    places = {"x": [0, 8], "y": [4, 12]}
    header = json.dumps({n: {"dtype": "F32", "shape": [2], "data_offsets": at} for n, at in places.items()}).encode()
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    assert "'y' begins at byte" in refusal(folder)


def test_an_index_of_something_else(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    for shard in (5, ["model-00001-of-00002.safetensors"]):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shard, "b": "model.safetensors"}}))
        assert "has no weight_map" in refusal(tmp_path)


def test_code_of_a_checkpoint_is_not_run_nor_asked_for(folder, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('it was run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    assert "contains custom code" in refusal(folder)


@pytest.mark.parametrize("name", ["~nobody-is-called-so/model", "x" * 300])
def test_a_name_that_no_path_can_have(name):
    assert "is not a directory; give a model directory" in refusal(name)


def test_unknown_data_type(folder):
    header = json.dumps({"x": {"dtype": "F4", "shape": [24], "data_offsets": [0, 12]}}).encode()
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    message = refusal(folder)
    assert "'x' as F4" in message


def test_missing_shard(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(tmp_path)


def test_shard_without_its_tensor(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["absent.weight"] = next(iter(index["weight_map"].values()))
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "lacks the tensor 'absent.weight'" in refusal(tmp_path)
