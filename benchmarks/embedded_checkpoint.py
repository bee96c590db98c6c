"""A small Llama inside a large one: the outputs of the small model at the cost of the large, so that what is measured
has real text, and a draft model that is right as often as it really is.

    python benchmarks/embedded_checkpoint.py CHECKPOINT DIR [--shape llama-8b] [--dtype bfloat16]

CHECKPOINT: pycoder-14m, pycoder-draft-2m, or a folder. Each matrix is the upper left part of a larger one; the rest is
random wherever it cannot reach the output (it is multiplied by zeros, or makes what is), else zero:
* hidden values past the small model's width are zero, norms are scaled for the larger width, their epsilon likewise;
* a head's columns are spread so that each keeps its frequency of rotation, queries scaled for the larger head;
* query heads that share a key head stay with a copy of it; further key heads have no values;
* gates past the small MLP are zero, and further layers add zero: they have neither values nor gates;
* one hidden value is a small constant that only the head reads: tokens past the small vocabulary get logits far below.
"""

import argparse
import json
import math
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import transformers
from safetensors.torch import load_file

DEMO = Path(__file__).parents[1] / "engines/demo"
TEXT_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
DTYPES: dict[str, tuple[Any, str]] = {"bfloat16": (ml_dtypes.bfloat16, "BF16"), "float32": (np.float32, "F32")}
# the constant among the hidden values, its weight in the last norm, and what further tokens multiply it by
CONSTANT, LOUDNESS, DESPISED = 1e-3, 1e4, -100.0
NOISE = 1 << 24  # random numbers, again and again


@dataclass(frozen=True)
class Shape:
    """Of a Llama, as its config calls it."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    @classmethod
    def of(cls, config: Any) -> "Shape":
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})

    @property
    def group(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads


SHAPES = {
    "llama-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256, False),
    "llama-1b": Shape(2048, 8192, 16, 32, 8, 64, 128256, True),
    # of draft models (Miao et al., arXiv:2305.09781), with the vocabulary of the others
    "llama-160m": Shape(768, 3072, 12, 12, 12, 64, 128256, True),
    "llama-68m": Shape(768, 3072, 2, 12, 12, 64, 128256, True),
}


class Embedding:
    """Tensors of the large model one by one: those of `small` (by name, fp32) inside noise."""

    def __init__(self, small: dict[str, np.ndarray], config: Any, large: Shape):
        self.weights, self.old, self.new = small, Shape.of(config), large
        old, new = self.old, large
        heads = [h for kv in range(old.num_key_value_heads) for h in range(kv * old.group, (kv + 1) * old.group)]
        self.places: dict[int, int] = {}  # query head -> its place in the large model
        kv_place = -1
        for h in heads:
            if h % old.group % new.group == 0:  # the first of its key head, or what does not fit there any more
                kv_place += 1
            self.places[h] = kv_place * new.group + h % old.group % new.group
        fits = (
            new.hidden_size > old.hidden_size and new.head_dim % old.head_dim == 0
            and new.intermediate_size >= old.intermediate_size and new.num_hidden_layers >= old.num_hidden_layers
            and new.vocab_size >= old.vocab_size and kv_place < new.num_key_value_heads
        )  # fmt: skip
        if not fits:
            raise SystemExit(f"{old} does not fit into {new}: each size must be as large, head_dim a multiple.")
        step, half = new.head_dim // old.head_dim, old.head_dim // 2
        i = np.arange(half)
        self.columns = np.concatenate((i * step, i * step + new.head_dim // 2))  # of a head, where the old ones go
        self.norm = math.sqrt(old.hidden_size / new.hidden_size)
        self.noise = np.random.default_rng(0).standard_normal(NOISE, np.float32) * 0.02

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of the file."""
        new, h = self.new, self.new.hidden_size
        yield "model.embed_tokens.weight", (new.vocab_size, h)
        for i in range(new.num_hidden_layers):
            yield from self.layer(f"model.layers.{i}", h)
        yield "model.norm.weight", (h,)
        if not new.tie_word_embeddings:
            yield "lm_head.weight", (new.vocab_size, h)

    def layer(self, prefix: str, read: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Those of a layer whose attention reads so many values."""
        new, h = self.new, self.new.hidden_size
        q, kv = new.num_attention_heads * new.head_dim, new.num_key_value_heads * new.head_dim
        for name, shape in (
            ("input_layernorm", (h,)), ("self_attn.q_proj", (q, read)), ("self_attn.k_proj", (kv, read)),
            ("self_attn.v_proj", (kv, read)), ("self_attn.o_proj", (h, q)), ("post_attention_layernorm", (h,)),
            ("mlp.gate_proj", (new.intermediate_size, h)), ("mlp.up_proj", (new.intermediate_size, h)),
            ("mlp.down_proj", (h, new.intermediate_size)),
        ):  # fmt: skip
            yield f"{prefix}.{name}.weight", shape

    def reading(self, kind: str) -> np.ndarray:
        """The columns of a matrix that the small one's are put in."""
        return np.arange(self.old.hidden_size)

    def make(self, name: str, shape: tuple[int, ...], noise: np.ndarray) -> np.ndarray:
        """One of them, of noise's type."""
        parts, old = name.split("."), self.old
        kind, w, x = parts[-2], self.weights.get(name), np.resize(noise, shape)
        h, used = old.hidden_size, old.intermediate_size
        match kind:
            case "embed_tokens" | "lm_head":
                words = self.weights.get(name, self.weights["model.embed_tokens.weight"])
                x[:, :h], x[: len(words), :h] = 0, words
                x[: len(words), h], x[len(words) :, h] = CONSTANT if kind == "embed_tokens" else 0, DESPISED
                if kind == "embed_tokens":
                    x[: len(words), h + 1 :] = 0
            case "norm":
                x[:], x[:h], x[h] = 1, w * self.norm, LOUDNESS
            case "input_layernorm" | "hidden_norm" | "post_attention_layernorm":
                x[:], x[h] = 1, 0
                if w is not None:
                    x[:h] = w * self.norm
            case "up_proj":
                if w is not None:
                    x[:used, :h] = w
            case "gate_proj":
                x[:, :h] = 0
                if w is not None:
                    x[:used, :h] = w
            case "down_proj":
                if w is not None:
                    x[:, :used], x[:h, :used] = 0, w
            case _:
                self._attention(kind, w, x)
        return x

    def _attention(self, kind: str, w: np.ndarray | None, x: np.ndarray) -> None:
        old, new, h, places = self.old, self.new, self.old.hidden_size, self.reading(kind)
        if kind == "v_proj":
            x[:, places] = 0
        if w is None:
            return
        if kind == "o_proj":
            columns = x.reshape(new.hidden_size, -1, new.head_dim)
            values = w.reshape(h, -1, old.head_dim)
            for place in range((max(self.places.values()) // new.group + 1) * new.group):
                columns[:, place, self.columns] = 0  # of heads that have values
            for head, place in self.places.items():
                columns[:h, place, self.columns] = values[:, head]
            return
        rows, given = x.reshape(-1, new.head_dim, x.shape[1]), w.reshape(-1, old.head_dim, len(places))
        scale = math.sqrt(new.head_dim / old.head_dim) if kind == "q_proj" else 1.0
        for head, place in self.places.items():
            source, target = (head, place) if kind == "q_proj" else (head // old.group, place // new.group)
            rows[target][:, places] = 0
            rows[target][np.ix_(self.columns, places)] = given[source] * scale


def embed(checkpoint: Path, out: Path, shape: Shape, dtype: str = "bfloat16") -> int:
    """Writes the checkpoint; returns the bytes of its weights."""
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    small = {name: w.float().numpy() for name, w in load_file(checkpoint / "model.safetensors").items()}
    embedding = Embedding(small, config, shape)
    element, word = DTYPES[dtype]
    for name in shape.__dataclass_fields__:
        setattr(config, name, getattr(shape, name))
    config.rms_norm_eps *= embedding.norm**2
    config.dtype = dtype
    out.mkdir(parents=True)
    config.save_pretrained(out)
    for name in TEXT_FILES:
        shutil.copy(checkpoint / name, out)
    header, end = {}, 0
    for name, dims in embedding.tensors():
        size = math.prod(dims) * np.dtype(element).itemsize
        header[name] = {"dtype": word, "shape": dims, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    noise = embedding.noise.astype(element)
    with (out / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, dims in embedding.tensors():
            file.write(embedding.make(name, dims, noise).view(np.uint8).data)
    return end


def checkpoint_of(name: str) -> Path:
    """Of the demo, or a folder."""
    return DEMO / name if (DEMO / name).is_dir() else Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="llama-8b", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    args = parser.parse_args()
    num_bytes = embed(checkpoint_of(args.checkpoint), args.folder, SHAPES[args.shape], args.dtype)
    print(f"{args.folder}: {num_bytes / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
