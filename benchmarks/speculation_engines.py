"""The engines that `gpu_speculation.py` measures: demo checkpoints as they are and in larger shapes, and a head.

Each is built in a process of its own, once: what is there already is taken, and what was cut off is made again.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedded_checkpoint import DEMO, SHAPES, Shape, embed
from embedded_head import embed_head
from ingot.builder.checkpoint import Checkpoint
from ingot.builder.heads.checkpoint import HeadCheckpoint
from ingot.builder.targets import FOR_TARGETS

PAGE = 8  # tokens, of the engines in float32: the small pool of `speculation.py` wants it
TARGET, DRAFT = "pycoder-14m", "pycoder-draft-2m"
TINY = {"tiny": Shape(512, 4608, 10, 8, 2, 64, 4608, False), "tiny-draft": Shape(256, 640, 3, 4, 2, 64, 4608, True)}
BUILD = "import json, sys; from ingot import *; build_engine(BuildConfig(**json.loads(sys.argv[1])))"


@dataclass(frozen=True)
class Engines:
    """Where they are made, for which target of ingot's, and the checkpoint of the head, if there is one."""

    work: Path
    target: str
    head: Path | None = None
    tune: bool = False
    drafts: int = 7  # of a request, that they verify

    @property
    def dtype(self) -> str:
        """Of the large ones: that in which a machine is meant to run them."""
        return "bfloat16" if self.target == "cuda" else "float32"

    def small(self) -> dict[str, Path]:
        """By drafter, and "" the target's: the demo checkpoints in float32."""
        options = dict(dtype="float32", tune=False, max_num_seqs=16, max_num_batched_tokens=512, page_size=PAGE)
        states = self._states(self.reads) if self.head else {}
        found = {"": self.build(DEMO / TARGET, self._name(f"{TARGET}-fp32", states), **options, **states),
                 "draft": self.build(DEMO / DRAFT, self._name(f"{DRAFT}-fp32", {}), **options)}  # fmt: skip
        if self.head:
            out = self._name(f"{self._head}-fp32", {})
            found["eagle"] = self.build(self.head, out, draft_for=str(DEMO / TARGET), **options)
        return found

    def large(self, shape: str, draft_shape: str) -> dict[str, Path]:
        """By drafter, and "" the target's: in these shapes."""
        out, states = self._name(f"{DRAFT}-{draft_shape}", {}), {}
        found = {"draft": self._in_shape(DRAFT, draft_shape, out, {})}
        if self.head:
            reads = tuple(i if i < self._layers else shape_of(shape).num_hidden_layers for i in self.reads)
            states = self._states(reads)
            found["eagle"] = self._name(f"{self._head}-{shape}", {})
        found[""] = self._name(f"{TARGET}-{shape}", states)
        self._in_shape(TARGET, shape, found[""], states, found.get("eagle"))
        return found

    @property
    def reads(self) -> tuple[int, ...]:
        assert self.head is not None
        return HeadCheckpoint.open(self.head).layers_read(Checkpoint.open(str(DEMO / TARGET)))

    @property
    def _layers(self) -> int:
        return int(Checkpoint.open(str(DEMO / TARGET)).config.num_hidden_layers)

    @property
    def _head(self) -> str:
        assert self.head is not None
        return f"head-{self.head.resolve().name}"

    @staticmethod
    def _states(reads: tuple[int, ...]) -> dict[str, Any]:
        return {"hidden_states": ",".join(map(str, reads))}

    def _name(self, name: str, states: dict[str, Any]) -> Path:
        """Engines that give other hidden states, or verify other numbers of drafts, are other engines."""
        parts = [name, *(v.replace(",", "-") for v in states.values()), f"{self.drafts}-{self.target}.engine"]
        return self.work / "-".join(parts)

    def build(self, model: Path, out: Path, **options: Any) -> Path:
        if (out / "engine.json").exists():
            return out
        options = {"max_draft_tokens": self.drafts} | options
        options = {
            name: value for name, value in options.items() if self.target in FOR_TARGETS.get(name, (self.target,))
        }
        config = json.dumps({"model": str(model), "out": str(out), "target": self.target, **options})
        with_time(
            f"built {out.name}",
            lambda: subprocess.run([sys.executable, "-c", BUILD, config], check=True, stdout=subprocess.DEVNULL),
        )
        return out

    def _in_shape(
        self, checkpoint: str, shape: str, out: Path, states: dict[str, Any], head_out: Path | None = None
    ) -> Path:
        """The engine of a demo checkpoint in a shape and that of its head, from checkpoints that are deleted then."""
        wanted = [each for each in (out, head_out) if each and not (each / "engine.json").exists()]
        if not wanted:
            return out
        options = dict(max_num_batched_tokens=1024, tune=self.tune, **states)  # prompts are short here
        folder = self._made(
            f"{checkpoint}-{shape}", lambda new: embed(DEMO / checkpoint, new, shape_of(shape), self.dtype)
        )
        if head_out in wanted:  # before the target's checkpoint goes
            assert self.head is not None and head_out is not None
            given, small, sizes = self.head, DEMO / checkpoint, shape_of(shape)
            head = self._made(
                f"{self._head}-{shape}",
                lambda new: embed_head(given, small, new, sizes, self.dtype, min(32000, sizes.vocab_size - 256)),
            )
            self.build(head, head_out, draft_for=str(folder), max_num_batched_tokens=1024, tune=self.tune)
            shutil.rmtree(head)
        self.build(folder, out, **options)
        shutil.rmtree(folder)
        return out

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        """The checkpoint of the name, whole or not there."""
        folder, new = self.work / name, self.work / f"{name}.new"
        if not folder.exists():
            shutil.rmtree(new, ignore_errors=True)
            with_time(f"wrote {name}", lambda: make(new))
            new.replace(folder)
        return folder


def shape_of(name: str) -> Shape:
    return (SHAPES | TINY)[name]


def with_time(what: str, do: Callable[[], object]) -> None:
    start = time.perf_counter()
    do()
    print(f"{what} in {time.perf_counter() - start:.0f} s", flush=True)
