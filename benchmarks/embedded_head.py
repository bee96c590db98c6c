"""A head of a small Llama inside that of a large one (`embedded_checkpoint.py`): its guesses at the cost of the large.

    python benchmarks/embedded_head.py HEAD TARGET DIR [--shape llama-8b] [--dtype bfloat16] [--draft-vocab 32000]

HEAD: an EAGLE-3 head of TARGET as `ingot train-head` writes it. DIR is a head of TARGET in that shape, with the layer
that EAGLE-3 heads of such models have. Filled like the model around it: what reads the target's states, the embedding
or the head's own state reads only their first values; the constant that only the output head reads comes with the
states; further draft tokens are tokens that the small model has not. The layers that are real are the large model's
first, so the states that enter them are those that the head was trained on: it names them, and the target has to be
built with `--hidden-states` of the same (printed).
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedded_checkpoint import DESPISED, DTYPES, SHAPES, Embedding, Shape, checkpoint_of
from ingot.builder.checkpoint import Checkpoint
from ingot.builder.heads.checkpoint import DRAFT_TO_TARGET, TARGET_TO_DRAFT, HeadCheckpoint
from ingot.builder.hidden_states import EAGLE3
from safetensors.torch import save_file

DRAFT_VOCAB = 32000  # of the published heads for Llama-3.1-8B (yuhuili/EAGLE3-LLaMA3.1-Instruct-8B)


class HeadEmbedding(Embedding):
    """Tensors of the large head: those of `small` inside noise."""

    def __init__(
        self, small: dict[str, np.ndarray], config: Any, large: Shape, reads: tuple[int, ...], draft_vocab: int
    ):
        super().__init__(small, config, large)
        self._num_reads, self._rows = len(reads), max(draft_vocab, len(small["lm_head.weight"]))
        self._quiet = reads.index(min(reads)) * large.hidden_size  # where a state begins that is not normed, and loud

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        h = self.new.hidden_size
        yield "fc.weight", (h, self._num_reads * h)
        yield from self.layer("midlayer", 2 * h)
        yield "midlayer.hidden_norm.weight", (h,)
        yield "norm.weight", (h,)
        yield "lm_head.weight", (self._rows, h)

    def reading(self, kind: str) -> np.ndarray:
        num, own = {"fc": self._num_reads, "q_proj": 2, "k_proj": 2, "v_proj": 2}.get(kind, 1), super().reading(kind)
        return np.concatenate([i * self.new.hidden_size + own for i in range(num)])

    def make(self, name: str, shape: tuple[int, ...], noise: np.ndarray) -> np.ndarray:
        kind, h, width = name.split(".")[-2], self.old.hidden_size, self.new.hidden_size
        if kind == "fc":
            x, places = np.resize(noise, shape), self.reading(kind)
            x[:, places] = 0
            x[:, h::width] = 0  # the constant of each state
            x[:h, places] = self.weights[name]
            x[h] = 0
            x[h, self._quiet + h] = 1  # goes on to the output head
            return x
        if kind == "lm_head":
            x, known = np.resize(noise, shape), self.weights[name]
            x[:, : h + 1] = 0
            x[: len(known), :h], x[len(known) :, h] = known, DESPISED
            return x
        return super().make(name, shape, noise)


def embed_head(
    head: Path, target: Path, out: Path, shape: Shape, dtype: str = "bfloat16", draft_vocab: int = DRAFT_VOCAB
) -> tuple[int, ...]:
    """Writes the checkpoint; returns the hidden states of the large target that it reads."""
    small, given = Checkpoint.open(str(target)), HeadCheckpoint.open(head)
    config, old = given.config, small.config.get_text_config()
    sizes = [(name, getattr(config, name), getattr(old, name)) for name in ("hidden_size", "vocab_size")]
    if given.kind != EAGLE3 or "fc.bias" in given.tensors or getattr(config, "norm_before_residual", False):
        raise SystemExit(
            f"{head} is no EAGLE-3 head as `ingot train-head` writes it (no bias, norm behind the residual)"
        )
    if wrong := next((each for each in sizes if each[1] != each[2]), None):
        raise SystemExit(f"{head} has {wrong[0]} {wrong[1]}, {target} has {wrong[2]}: give the target of the head.")
    reads = given.layers_read(small)
    large = tuple(i if i < old.num_hidden_layers else shape.num_hidden_layers for i in reads)
    weights = {name: w.float().numpy() for name, w in given.tensors.items() if name.endswith(".weight")}
    embedding = HeadEmbedding(weights, config, shape, reads, draft_vocab)
    element = DTYPES[dtype][0]
    noise = embedding.noise.astype(element)
    tensors = {name: _torch(embedding.make(name, dims, noise)) for name, dims in embedding.tensors()}
    ids = given.target_ids()
    further = torch.arange(old.vocab_size, old.vocab_size + len(tensors["lm_head.weight"]) - len(ids))
    ids = torch.cat((ids, further))
    if int(ids[-1]) >= shape.vocab_size:
        raise SystemExit(
            f"there are no {len(ids)} draft tokens among {shape.vocab_size}: give a smaller --draft-vocab."
        )
    tensors[DRAFT_TO_TARGET] = ids - torch.arange(len(ids))
    tensors[TARGET_TO_DRAFT] = torch.zeros(shape.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    for name in set(shape.__dataclass_fields__) - {"num_hidden_layers", "tie_word_embeddings"}:
        setattr(config, name, getattr(shape, name))
    config.draft_vocab_size, config.dtype = len(ids), dtype
    config.rms_norm_eps *= embedding.norm**2
    config.eagle_aux_hidden_state_layer_ids = list(large)
    out.mkdir(parents=True)
    config.save_pretrained(out)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return large


def _torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x) if x.dtype == np.float32 else torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("head", type=Path)
    parser.add_argument("target")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="llama-8b", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--draft-vocab", type=int, default=DRAFT_VOCAB)
    args = parser.parse_args()
    target = checkpoint_of(args.target)
    reads = embed_head(args.head, target, args.folder, SHAPES[args.shape], args.dtype, args.draft_vocab)
    num_bytes = (args.folder / "model.safetensors").stat().st_size
    print(f"{args.folder}: {num_bytes / 1e9:.2f} GB; for a target with --hidden-states {','.join(map(str, reads))}")


if __name__ == "__main__":
    main()
