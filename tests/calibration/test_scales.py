"""The file of scales: what was saved comes back, and nothing else is taken for one."""

import pytest
import torch
from ingot.calibration.formats import Format, round_to_nearest
from ingot.calibration.scales import Scales
from ingot.engines.errors import BuildError
from safetensors.torch import save_file


def test_what_was_saved_comes_back(tmp_path):
    weight = torch.randn(6, 32)
    formats = [Format("int4", 16), Format("int4", 16, symmetric=False), Format("int8"), Format("fp8_e4m3", 16, 2)]
    scales = Scales(
        {f"layers.{i}.weight": round_to_nearest(weight, form) for i, form in enumerate(formats)},
        {"a.weight": torch.rand(32)}, {"a.weight": torch.rand(6, 2)}, {"a.weight": torch.tensor(0.25)},
        {"k_pages.0": torch.rand(1)}, {"recipe": "r", "rules": [1, None]},
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
