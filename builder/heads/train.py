"""`ingot train-head`: reads text, trains a head for a checkpoint, writes it as EAGLE-3 heads are published.

Training that was stopped goes on from `training.pt` in the folder, and comes to the same head as if it had not been,
unless it was to end by the clock. It is there from the first step until the head is written, so a disk that is full or
cannot be written is told of before an hour of training, or costs none.
"""

from __future__ import annotations

import math
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from ...engines.errors import BuildError, shown
from ...engines.weights import of_tensor, write_weights
from ..calibration_text import Text
from ..checkpoint import Checkpoint
from ..hidden_states import EAGLE3, parse, read_by
from ..integers import check_integers
from . import unrolled, written
from .checkpoint import DRAFT_TO_TARGET, TARGET_TO_DRAFT, HeadCheckpoint
from .folder import STATE, claimed, disk
from .module import Head
from .training import Agreement, Trainer, head_config, initialise

SECONDS = 60.0  # between two savings of where training stands
HELD_OUT = 1 << 14  # tokens to check with at most
CHECKS, LOOKS = 8, 16  # in a training; steps between two looks at the loss on a GPU, which waits for it
# integers of a config, and the lowest that each can be
LOWEST = {"tokens": 1, "epochs": 1, "drafts": 1, "draft_vocab": 0, "width": 8, "batch": 1, "seed": 0, "mlp_width": 0}


@dataclass(frozen=True)
class TrainConfig:
    """What to train. `model`: the target's checkpoint; `text`: as text for calibration.

    tokens: of the text to train on at most, `epochs` times. drafts: steps of drafting it is trained for. draft_vocab:
    so many tokens, the most frequent, are all that it can say; 0: any. width, batch: tokens of a window, windows of a
    step. begin_with: an EAGLE-3 checkpoint for this target, instead of first weights. reads: the target's hidden states
    as `hidden_states` of an engine, "": those of EAGLE-3. mlp_width: of its MLP, 0: as the target's. written: share of
    the windows that the target goes on with itself. seconds: of training at most, 0: any.
    Raises BuildError for an integer or a learning rate that cannot be.
    """

    model: str
    text: str
    out: str
    tokens: int = 1 << 20
    epochs: int = 1
    drafts: int = 3
    draft_vocab: int = 0
    width: int = 256
    batch: int = 4
    learning_rate: float = 2e-3
    seed: int = 0
    begin_with: str = ""
    reads: str = ""
    mlp_width: int = 0
    written: float = 0.0
    seconds: float = 0.0
    device: str = "auto"
    force: bool = False

    def __post_init__(self) -> None:
        check_integers(self, LOWEST)
        if not 0 < self.learning_rate <= 1:
            raise BuildError(f"learning_rate is {shown(self.learning_rate)}; expected a number above 0, at most 1")


def train_head(
    config: TrainConfig,
    on_phase: Callable[[str], None] = lambda name: None,
    on_step: Callable[[int, int, float], None] = lambda done, total, loss: None,
    on_check: Callable[[float, Agreement], None] = lambda share, found: None,
) -> Agreement:
    """Trains and writes the head; what it is worth on text held out of the training, on what the target writes itself
    where it learns from that.

    on_step(done, total, loss) after each step, on_check(share, found) after each eighth of the training.
    Raises BuildError: no checkpoint or text, a folder that is in use, a disk that is full.
    """
    out, device = Path(config.out), _device(config.device)
    with claimed(out, config.force):
        return _train_and_write(config, out, device, on_phase, on_step, on_check)


def _train_and_write(
    config: TrainConfig, out: Path, device: torch.device, on_phase: Callable[[str], None],
    on_step: Callable[[int, int, float], None], on_check: Callable[[float, Agreement], None],
) -> Agreement:  # fmt: skip
    on_phase("read the text")
    checkpoint = Checkpoint.open(config.model)
    text = Text.read(config.text, checkpoint, config.tokens, config.width)
    windows = torch.cat([part.tokens for part in text.calibration]).long()
    if config.width - config.drafts <= written.kept(config.width):
        raise BuildError(f"windows of {config.width} tokens are too short for {config.drafts} drafts; raise --width")
    if len(windows) < config.batch:
        raise BuildError(f"{config.text} gives {len(windows)} windows of {config.width} tokens, too few for --batch")
    held = torch.cat([part.tokens for part in text.held_out]).long()[: max(1, HELD_OUT // config.width)].to(device)
    on_phase("read the target")
    torch.manual_seed(config.seed)
    given = HeadCheckpoint.open(config.begin_with) if config.begin_with else None
    vocab_size = checkpoint.config.get_text_config().vocab_size
    ids = given.target_ids() if given else most_frequent(windows, vocab_size, config.draft_vocab)
    trainer = _trainer(config, checkpoint, ids.to(device), given)
    windows, begin = windows.to(device), 0
    if config.written:
        on_phase("let the target write")
        some = torch.linspace(0, len(windows) - 1, max(1, int(config.written * len(windows))), device=device).long()
        windows[some] = written.go_on(trainer.target, windows[some])
        held, begin = written.go_on(trainer.target, held), written.kept(config.width)
    check = partial(trainer.agreement, held.split(config.batch), begin)
    on_phase("train")
    _train(config, text.digest, trainer, windows, lambda share: on_check(share, check()), on_step)
    on_phase("check on text held out")
    found = check()
    with disk(out):
        write(trainer.head, ids, out)
    (out / STATE).unlink(missing_ok=True)
    return found


def _train(
    config: TrainConfig, text: str, trainer: Trainer, windows: Tensor, on_check: Callable[[float], None],
    on_step: Callable[[int, int, float], None],
) -> None:  # fmt: skip
    """All steps, or as many as there is time for: the learning rate falls with the one that is nearer to its end."""
    out, generator = Path(config.out), torch.Generator().manual_seed(config.seed)
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(config.epochs)])
    batches = order[: len(order) // config.batch * config.batch].to(windows.device).split(config.batch)
    begin, spent = _go_on(trainer, out, config, text)
    done = begin
    save = partial(_save_state, trainer, out, _settings(config, text))
    save(done, spent)
    began = saved = time.monotonic()
    num_checks = int(CHECKS * begin / len(batches))
    for i in range(begin, len(batches)):
        by_clock = (spent + time.monotonic() - began) / config.seconds if config.seconds else 0.0
        if by_clock >= 1:
            break
        progress = max(i / len(batches), by_clock)
        if progress * CHECKS > num_checks + 1:
            num_checks += 1
            on_check(progress)
        loss = trainer.learn(windows[batches[i]], progress)
        if i == begin or i % LOOKS == 0 or not windows.is_cuda:
            seen = float(loss)
            if not math.isfinite(seen):
                raise BuildError(
                    f"the loss is {seen} after {i} steps: training diverged; lower --learning-rate, and pass --force "
                    "to begin anew"
                )
        on_step(i + 1, len(batches), seen)
        done = i + 1
        if time.monotonic() - saved > SECONDS:
            save(done, spent + time.monotonic() - began)
            saved = time.monotonic()
    save(done, spent + time.monotonic() - began)


def most_frequent(windows: Tensor, vocab_size: int, num: int) -> Tensor:
    """The `num` most frequent tokens in ascending order, all of the vocabulary where that is 0."""
    if not num or num >= vocab_size:
        return torch.arange(vocab_size)
    return torch.bincount(windows.flatten(), minlength=vocab_size).topk(num).indices.sort().values


def write(head: Head, ids: Tensor, folder: Path) -> None:
    """A checkpoint in the published format, in the target's dtype. The embedding is the target's and left out."""
    ids = ids.cpu()
    config: Any = head.config
    tensors = {
        name: tensor.detach().to("cpu", config.dtype).contiguous()
        for name, tensor in head.state_dict().items()
        if not name.startswith(("embed_tokens.", "rotary_emb."))
    }
    tensors[DRAFT_TO_TARGET] = ids - torch.arange(len(ids))
    tensors[TARGET_TO_DRAFT] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    config.save_pretrained(folder)
    beside = folder / "model.safetensors.part"
    try:
        write_weights(beside, [of_tensor(name, tensor) for name, tensor in tensors.items()])
        os.replace(beside, folder / "model.safetensors")
    finally:
        beside.unlink(missing_ok=True)


def _trainer(config: TrainConfig, checkpoint: Checkpoint, ids: Tensor, given: HeadCheckpoint | None) -> Trainer:
    if checkpoint.quantised:
        raise BuildError(f"{config.model} is quantised; give the checkpoint that it was made from")
    disable_progress_bar()  # of loading: `on_phase` says what goes on
    target: Any = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype="auto").eval().requires_grad_(False)
    target.to(ids.device)
    text: Any = checkpoint.config.get_text_config()
    num = text.num_hidden_layers
    reads = parse(config.reads, num) if config.reads else given and given.reads or read_by(EAGLE3, num)
    unrolled.install()
    sizes = head_config(target, len(ids), reads, config.mlp_width)
    head = Head(sizes, EAGLE3, len(reads) * text.hidden_size, len(ids), False, unrolled.ATTENTION).to(
        ids.device, torch.float32
    )
    initialise(head, target, ids)
    if given:
        _begin_with(head, given, config.draft_vocab, reads, read_by(EAGLE3, num))
    return Trainer(target, head, reads, ids, config.drafts, config.learning_rate, all_at_once=given is not None)


@torch.no_grad()
def _begin_with(
    head: Head, given: HeadCheckpoint, draft_vocab: int, reads: tuple[int, ...], usual: tuple[int, ...]
) -> None:
    parameters = {name: p for name, p in head.named_parameters() if not name.startswith("embed_tokens.")}
    fits = given.kind == EAGLE3 and draft_vocab in (0, head.lm_head.out_features)
    if (
        not fits
        or (given.reads or usual) != reads
        or any(name not in given.tensors or given.tensors[name].shape != p.shape for name, p in parameters.items())
    ):
        raise BuildError(
            f"{given.path} is no EAGLE-3 head of this target's sizes, hidden states and draft vocabulary; begin with "
            "another, or anew"
        )
    for name, parameter in parameters.items():
        parameter.copy_(given.tensors[name])


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise BuildError(f"the device is {name!r}; expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise BuildError("the device is cuda, but torch finds no GPU; pass --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _settings(config: TrainConfig, text: str) -> dict[str, Any]:
    """What a training depends on; `text` is the digest of what was read, since a file of the same name may change."""
    given = {name: value for name, value in asdict(config).items() if name not in ("out", "device", "force")}
    return given | {"digest of the text": text[:16]}


def _save_state(trainer: Trainer, out: Path, settings: dict[str, Any], done: int, spent: float) -> None:
    state = {"settings": settings, "done": done, "spent": spent, "head": trainer.head.state_dict(),
             "optimiser": trainer.optimiser.state_dict()}  # fmt: skip
    beside = out / f"{STATE}.new"
    try:
        with disk(out), beside.open("wb") as file:  # not by its name: torch would forget what the disk said
            torch.save(state, file)
        beside.replace(out / STATE)
    finally:
        beside.unlink(missing_ok=True)


def _go_on(trainer: Trainer, out: Path, config: TrainConfig, text: str) -> tuple[int, float]:
    """Steps that are done, and the seconds that they took.

    Raises BuildError: what was begun in the folder has other settings, or is damaged.
    """
    if not (out / STATE).is_file():
        return 0, 0.0
    try:
        state = torch.load(out / STATE, map_location="cpu", weights_only=True)
        wanted, found = _settings(config, text), dict(state["settings"])
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError) as error:
        if config.force:
            return 0, 0.0
        raise BuildError(
            f"{out / STATE}, the training to go on with, is damaged ({' '.join(str(error).split())[:100]}); pass "
            "--force to begin anew"
        ) from error
    if found != wanted:
        if config.force or not state.get("done"):
            return 0, 0.0
        name = next(name for name in wanted if found.get(name) != wanted[name])
        raise BuildError(
            f"{out} holds training that was begun with {name}={found.get(name)!r}, now it is {wanted[name]!r}; give "
            "the same settings to go on, or --force to begin anew"
        )
    trainer.head.load_state_dict(state["head"])
    trainer.optimiser.load_state_dict(state["optimiser"])
    return int(state["done"]), float(state["spent"])
