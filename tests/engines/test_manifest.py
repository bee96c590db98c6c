"""An engine opens only if it is whole, unchanged, of this format and target; every refusal names the remedy."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
from ingot.engines import tree_hash
from ingot.engines.errors import EngineError
from ingot.engines.manifest import FILE_NAME, BuildRecord, KVLayer, Manifest, ModelInfo

MANIFEST = Manifest(
    model=ModelInfo("some/model", "LlamaForCausalLM", "llama", 1234, "bfloat16", 100, 2, 64, 4096, (0, 7), 0),
    kv_layers=(KVLayer(2, 64, 64), KVLayer(2, 64, 32, window=16)),
    target="cpu",
    target_info={"kernels": None, "reason": "no C++ compiler"},
    build=BuildRecord("2026-01-01T00:00:00Z", 1.5, {"export": 1.0}, {"exported": 90, "optimised": 22}, 1e-6),
    ingot_version="0.1.0",
)


@pytest.fixture
def engine(tmp_path):
    folder = tmp_path / "engine"
    (folder / "cpu").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"graph" * 100)
    (folder / "cpu" / "kernels.so").write_bytes(b"code")
    (folder / "empty.txt").write_bytes(b"")
    MANIFEST.save(folder)
    return folder


def test_round_trip(engine):
    manifest = Manifest.open(engine, targets={"cpu"})
    assert manifest.model == MANIFEST.model and manifest.kv_layers == MANIFEST.kv_layers
    assert manifest.build == MANIFEST.build and manifest.target_info == MANIFEST.target_info
    assert set(manifest.files) == {"model.onnx", "cpu/kernels.so", "empty.txt"}
    assert manifest.num_bytes == 504
    assert manifest.kv_bytes_per_token == 2 * (2 * 128 + 2 * 96)


def test_a_file_beside_the_engine_is_not_its_business(engine):
    (engine / "notes.txt").write_text("mine")
    assert "notes.txt" not in Manifest.open(engine).files


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(engine, **changes):
    """Change fields of engine.json and give it the right hash again, as an engine made by another version has."""
    fields = json.loads((engine / FILE_NAME).read_text()) | changes
    del fields["hash"]
    own = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    (engine / FILE_NAME).write_text(json.dumps(fields | {"hash": own}))


DAMAGES = {
    "no directory": (shutil.rmtree, "does not exist"),
    "no manifest": (lambda e: (e / FILE_NAME).unlink(), "not an engine"),
    "missing file": (lambda e: (e / "model.onnx").unlink(), "model.onnx is missing"),
    "truncated": (lambda e: (e / "model.onnx").write_bytes(b"gra"), "truncated"),
    "extended": (lambda e: (e / "empty.txt").write_bytes(b"x"), "longer"),
    "one bit": (lambda e: flip(e / "model.onnx"), "damaged"),
    "nested bit": (lambda e: flip(e / "cpu/kernels.so"), "damaged"),
    "half a manifest": (lambda e: (e / FILE_NAME).write_text('{"model": {'), "damaged"),
    "not an object": (lambda e: (e / FILE_NAME).write_text("[]"), "damaged"),
    "nested without end": (lambda e: (e / FILE_NAME).write_text("[" * 100_000), "damaged"),
    "edited manifest": (
        lambda e: (e / FILE_NAME).write_text((e / FILE_NAME).read_text().replace('"window": 16', '"window": 17')),
        "changed after the build",
    ),
    "other version": (lambda e: edit(e, format_version=2), "format version 2"),
    "other target": (lambda e: edit(e, target="cuda"), "target 'cuda', but here only 'cpu' can run; compile it for"),
    "path outside": (lambda e: edit(e, files={"../x": {"bytes": 0, "hash": ""}}), "outside"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refused_in_one_sentence_with_the_remedy(engine, damage):
    spoil, words = DAMAGES[damage]
    spoil(engine)
    with pytest.raises(EngineError) as refusal:
        Manifest.open(engine, targets={"cpu"})
    message = str(refusal.value)
    assert words in message and str(engine) in message
    assert ("--retarget" if damage == "other target" else "build-engine") in message
    assert "\n" not in message and message.endswith(".")


def test_a_checkpoint_is_told_apart(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EngineError, match="is a checkpoint, not an engine"):
        Manifest.open(tmp_path)


def test_remedy_is_the_build_that_it_was(engine):
    options = {"quant": "my recipes/4.yaml", "calibration_data": "text", "accept_accuracy": True, "tune": False}
    manifest = Manifest.open(engine)
    replace(manifest, target="cuda", build=replace(manifest.build, options=options)).save(engine)
    flip(engine / "model.onnx")
    with pytest.raises(EngineError) as refusal:
        Manifest.open(engine)
    words = "--quant 'my recipes/4.yaml' --calibration-data text --accept-accuracy --no-tune"
    assert f"`build-engine some/model -o {engine} --force --target cuda {words}`" in str(refusal.value)


def test_tree_hash_is_its_definition(tmp_path, monkeypatch):
    monkeypatch.setattr(tree_hash, "CHUNK_BYTES", 1 << 21)
    contents = {"none": b"", "small": b"abc", "exact": bytes(1 << 21), "odd": bytes(range(256)) * 20_000 + b"end"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    seen = []
    hashes = tree_hash.tree_hashes({n: tmp_path / n for n in contents}, lambda done, total: seen.append((done, total)))
    for name, content in contents.items():
        chunks = [content[i : i + (1 << 21)] for i in range(0, len(content), 1 << 21)]
        assert hashes[name] == hashlib.sha256(b"".join(hashlib.sha256(c).digest() for c in chunks)).hexdigest()
    assert seen[-1] == (sum(map(len, contents.values())),) * 2
