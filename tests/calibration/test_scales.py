"""The file of scales: what was saved comes back, and nothing else is taken for one."""

import json

import pytest
import torch
from ingot.calibration.formats import Format, round_to_nearest
from ingot.calibration.scales import Scales
from ingot.engines.errors import BuildError
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def test_what_was_saved_comes_back(tmp_path):
    weight = torch.randn(6, 32)
    formats = [Format("int4", 16), Format("int4", 16, symmetric=False), Format("int8"), Format("fp8_e4m3", 16, 2)]
    scales = Scales(
        {f"layers.{i}.weight": round_to_nearest(weight, form) for i, form in enumerate(formats)},
        {"a.weight": torch.rand(32) + 0.1}, {"a.weight": torch.rand(6, 2) + 0.1}, {"a.weight": torch.tensor(0.25)},
        {"k_pages.0": torch.rand(1) + 0.1}, {"recipe": {"name": "r"}, "rules": [1, None]},
    )  # fmt: skip
    scales.save(tmp_path / "scales.safetensors")
    found = Scales.open(tmp_path / "scales.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["scales.safetensors"]
    assert found.about == scales.about
    for kind in ("smoothing", "clipping", "activations", "kv"):
        ours, theirs = getattr(found, kind), getattr(scales, kind)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name, quantised in scales.weights.items():
        assert found.weights[name].format == quantised.format
        assert torch.equal(found.weights[name].dequantise(), quantised.dequantise())


@pytest.mark.parametrize("damage", ["missing", "text", "foreign", "cut"])
def test_what_is_no_file_of_scales_is_refused(tmp_path, damage):
    path = tmp_path / "s.safetensors"
    if damage == "text":
        path.write_text("hello")
    elif damage == "foreign":
        save_file({"x": torch.ones(2)}, path)
    elif damage == "cut":
        Scales(kv={"k_pages.0": torch.rand(100)}).save(path)
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BuildError, match=r"is not a file of scales .*ingot calibrate"):
        Scales.open(path)


WHOLE = {"model": "m", "text": "t", "recipe": {"name": "r"}, "accuracy": {
    "num_tokens": 9, "perplexity_before": 2.0, "perplexity": 2.5, "kl": 0.1, "top1": 0.9,
    "layers": [{"name": "a", "format": "rtn int8", "error": 0.1}]}}  # fmt: skip


@pytest.fixture
def change(tmp_path):
    """Changes the header and the tensors of a whole file without hashes, as they once were; returns its path."""
    path, form = tmp_path / "scales.safetensors", Format("int4", 16, symmetric=False)
    kinds = {"a": torch.rand(32) + 0.1}, {"a": torch.rand(6, 2) + 0.1}, {"a": torch.tensor(0.25)}
    kv = {"k_pages.0": torch.rand(1) + 0.1, "k_offset.0": -torch.rand(8)}
    Scales({"w": round_to_nearest(torch.randn(6, 32), form)}, *kinds, kv, WHOLE).save(path)
    Scales.open(path).weights["w"]

    def change(tensors=None, **header):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        metadata.pop("hashes", None)
        save_file(load_file(path) | (tensors or {}), path, metadata | header)
        return path

    return change


@pytest.mark.parametrize(
    "header, words",
    [
        ({"about": "[]"}, "does not say what it is about"),
        ({"about": "[" * 9999}, "recursion"),
        ({"formats": "[]"}, "has no attribute"),
        ({"formats": '{"w": {"dtype": "int3"}}'}, "no such number format: int3"),
        *(({"about": json.dumps(WHOLE | {key: 3})}, f"its {key} is '3'") for key in WHOLE),
        ({"about": json.dumps(WHOLE | {"accuracy": {}})}, "layers"),
        ({"about": json.dumps(WHOLE | {"accuracy": WHOLE["accuracy"] | {"kl": "x"}})}, "a figure that is no number"),
        (
            {"about": json.dumps(WHOLE | {"accuracy": WHOLE["accuracy"] | {"kl": 10**400}})},
            "a figure that is no number",
        ),
        ({"about": json.dumps(WHOLE | {"accuracy": WHOLE["accuracy"] | {"perplexity_before": 0}})}, "perplexity 0"),
    ],
)
def test_a_damaged_header(change, header, words):
    with pytest.raises(BuildError, match=f"is not a file of scales .*{words}.*ingot calibrate"):
        Scales.open(change(**header))


@pytest.mark.parametrize("kind", ["smoothing/a", "clipping/a", "activations/a", "kv/k_pages.0", "kv/k_offset.0"])
@pytest.mark.parametrize("number", [0.0, -1.0, torch.nan, torch.inf])
def test_numbers_that_are_no_scales(change, kind, number):
    path = change()
    tensor = load_file(path)[kind]
    tensor.view(-1)[-1] = number
    change({kind: tensor})
    if kind == "kv/k_offset.0" and number <= 0:
        Scales.open(path)
        return
    for damaged in (tensor, tensor.double(), torch.zeros(0)):
        change({kind: damaged})
        with pytest.raises(BuildError, match=f"'{kind}' is no float32 tensor of finite numbers above 0"):
            Scales.open(path)


@pytest.mark.parametrize(
    "tensor",
    [
        {"scale/w": torch.full((6, 2), torch.nan)},
        {"scale/w": torch.zeros(6, 2)},
        {"scale/w": torch.ones(6, 1)},
        {"scale/w": torch.ones(1, 1, 6, 2)},
        {"zero/w": torch.zeros(6, 1, dtype=torch.int8)},
        {"zero/w": torch.zeros(6, 2, dtype=torch.int32)},
        {"values/w": torch.zeros(6, 16)},
        {"values/w": torch.zeros(96, dtype=torch.uint8)},
    ],
)
def test_damaged_weights(change, tensor):
    weights = Scales.open(change(tensor)).weights
    with pytest.raises(BuildError, match="the weight 'w' in .* is damaged: .*; find it again with `ingot calibrate`"):
        weights["w"]


def test_a_flipped_bit_anywhere(tmp_path):
    """In whatever tensor, and in what the header says of them: as floats, nearly all are numbers that could be."""
    path, form = tmp_path / "scales.safetensors", Format("int4", 16, symmetric=False)
    kinds = {"a": torch.rand(32) + 0.1}, {"a": torch.rand(6, 2) + 0.1}, {"a": torch.tensor(0.25)}
    Scales({"w": round_to_nearest(torch.randn(6, 32), form)}, *kinds, {"k_offset.0": -torch.rand(8)}, WHOLE).save(path)
    whole, found = path.read_bytes(), set()
    start = 8 + int.from_bytes(whole[:8], "little")
    places = {name: start + at["data_offsets"][0] for name, at in json.loads(whole[8:start]).items() if name[0] != "_"}
    for name, at in [*places.items(), ("about", whole.index(b"2.5")), ("formats", whole.index(b": 16,") + 2)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(BuildError, match=f"safetensors is damaged: '{name}' in it is not what was written; copy"):
            Scales.open(path).weights["w"]
        found.add(name)
    assert len(found) == 9
