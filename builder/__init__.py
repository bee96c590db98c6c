"""Checkpoint -> engine directory, in one function.

The graph comes from transformers itself, is checked against it on a small random model of the same kind, rewritten by
passes, compiled for a target and written with its weights. Weights stream: none is in memory before it is written.
A build that fails, at any point, leaves nothing behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engines.errors import BuildError
from .integers import check_integers

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..calibration.scales import Scales
    from ..engines.manifest import Manifest
    from .checkpoint import Checkpoint

# fields of a config that say how weights are quantised
OF_QUANTISED = (
    "calibration_data", "calibration_tokens", "calibration_width", "calibration_device", "scales", "accept_accuracy",
)  # fmt: skip
# integers of a config, and the lowest that each can be
LOWEST = {
    "calibration_tokens": 1, "calibration_width": 2, "max_num_seqs": 1, "max_num_batched_tokens": 1, "page_size": 1,
    "max_draft_tokens": 0, "gpu_arch": 0,
}  # fmt: skip


@dataclass(frozen=True)
class BuildConfig:
    """What to build. `model` is a directory or a hub id; `dtype` `auto` is the checkpoint's own.

    Raises BuildError for an integer that cannot be.
    """

    model: str
    out: str
    target: str = "cpu"
    dtype: str = "auto"
    force: bool = False  # replace an engine that is already at `out`
    quant: str = ""  # a recipe, by name or path; none: weights as they are
    kv_cache: str = ""  # a name of calibration.recipe.KV_CACHES: keys and values in 8 bits; else as the recipe says
    calibration_data: str = ""  # text to calibrate with and, held out, to check with: a file, or a dataset of the hub
    calibration_tokens: int = 1 << 15  # to calibrate with at most; a quarter as many again to check with
    calibration_width: int | None = None  # tokens of a window; None: 512, or less where there is little text
    calibration_device: str = "auto"  # cpu, cuda, or auto: the GPU if there is one
    hidden_states: str = ""  # that the engine gives to heads: eagle, eagle3, or numbers with commas
    draft_for: str = ""  # `model` is a head; the checkpoint or engine that it drafts for
    scales: str = ""  # file of what `ingot calibrate` found; nothing is searched for then
    accept_accuracy: bool = False  # build what the recipe's bound refuses
    # of the cuda and tensorrt targets, whose plans have fixed sizes
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 4096
    page_size: int = 16
    max_draft_tokens: int = 0  # of the cuda target: drafts of a sequence that a step can verify; 0: no speculation
    tune: bool = True  # time tactics where there is a GPU
    tensorrt_plugins: str = (
        "Rope"  # of the tensorrt target: ops that ingot's kernels run although it has a form of its own
    )
    gpu_arch: int | None = None  # compute capability times ten; None: that of the GPU at hand, else 90

    def __post_init__(self) -> None:
        check_integers(self, LOWEST)

    def options(self) -> dict[str, Any]:
        """The fields that differ from their defaults, but for where the engine comes from and goes to."""
        own, plain = asdict(self), asdict(BuildConfig(self.model, self.out))
        return {name: value for name, value in own.items() if name != "force" and value != plain[name]}

    def given(self, names: Iterable[str]) -> list[str]:
        """Of these fields the options of the command line that differ from their defaults."""
        options = self.options()
        return [f"--{name.replace('_', '-')}" for name in names if name in options]


@dataclass
class Phases:
    """Times the named phases of a build; `listener` hears each name as it begins."""

    listener: Callable[[str], None] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    begun: float = field(default_factory=time.perf_counter)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.listener:
            self.listener(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def build_engine(
    config: BuildConfig,
    on_phase: Callable[[str], None] | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
    on_pass: Callable[[str, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Manifest:
    """Build the engine that `config` asks for and return its manifest.

    `on_phase(name)` is called as each phase begins, `on_bytes(done, total)` while weights are
    calibrated (nodes) and written, `on_pass(name, num_nodes)` after each pass, `on_note(sentence)` with what to know.
    A quantised build that is stopped leaves `OUT.calibration`, with which the same build goes on where it was.
    Raises BuildError: no such checkpoint, a damaged one, a refused architecture, `out` that may not be written.
    """
    from ..engines.manifest import Manifest
    from ..engines.weights import save_graph
    from ..engines.writer import check_destination, engine_directory
    from .checkpoint import Checkpoint
    from .hidden_states import states_of
    from .picture import draw_accuracy
    from .quantisation import Quantisation
    from .record import activation_dtype, build_record, kv_layers, model_info
    from .stored_weights import check_options, keep_stored
    from .targets import audience_of, target_of
    from .targets import check_options as check_target_options
    from .text_files import copy_text_files
    from .weights import unread

    phase = Phases(on_phase)
    target = target_of(config.target)
    check_target_options(config)
    check_destination(Path(config.out), config.force)
    if config.draft_for:
        from .heads.build import build_head

        return build_head(config, phase, target, audience_of(on_bytes, on_note), on_pass)
    with phase("read the checkpoint"):
        checkpoint = Checkpoint.open(config.model)
        states = states_of(config, checkpoint)
        if checkpoint.quantised:
            check_options(config, checkpoint.quantised)
        quantisation = Quantisation.of(config, checkpoint)
        dtype = activation_dtype(config.dtype, checkpoint.config)
    journal = quantisation.journal(Path(config.out), dtype, on_note) if quantisation else nullcontext()
    with journal as kept, target.begin(config, audience_of(on_bytes, on_note)) as compile:
        graph, error, num_exported = _graph(checkpoint, dtype, phase, on_pass, states)
        if on_note and (left := unread(checkpoint)):
            on_note(
                f"the model that the config.json of {checkpoint.path} describes does not read {len(left)} of its "
                f"tensors, as '{left[0]}'; if that is not meant, use config and weights of the same model."
            )
        quantised = None
        if quantisation and kept is not None:
            with phase(f"calibrate and check {quantisation.recipe.name}"):
                report = on_bytes or (lambda done, total: None)
                recipe, scales = quantisation.find(graph, kept, lambda done, total, name: report(done, total))
                quantised = quantisation.apply(graph, recipe, scales, kept, lambda i, num, name: report(i, num))
        if checkpoint.quantised:
            quantised = keep_stored(graph, checkpoint.quantised)
        with engine_directory(config.out, config.force) as folder:
            with phase("write the weights"):
                save_graph(graph, folder, on_bytes)
                copy_text_files(checkpoint.path, folder)
                if quantised and quantisation:
                    draw_accuracy(quantised, folder, on_note)
            model = model_info(config.model, checkpoint, graph, dtype)
            with phase(f"compile for {config.target}"):
                target_info = compile(graph, model, folder)
            record = build_record(phase, error, num_exported, graph, config.options())
            manifest = Manifest(model, kv_layers(graph), config.target, target_info, record, quantised, states)
            return manifest.save(folder)


def find_scales(
    config: BuildConfig,
    on_phase: Callable[[str], None] | None = None,
    on_node: Callable[[int, int, str], None] = lambda done, total, name: None,
    on_note: Callable[[str], None] | None = None,
) -> Scales:
    """What a build with `config` would search for, saved as the file `config.out` for builds that pass it as `scales`.

    `on_node(done, total, name)` counts nodes, `name` is the weight of the one at hand; other callbacks as in a build.
    One that is stopped leaves `OUT.calibration`, with which the same one goes on where it was. The recipe's bound is
    not checked, but the accuracy is in the file. Raises BuildError as a build does.
    """
    from .checkpoint import Checkpoint
    from .journal import disk
    from .quantisation import Quantisation
    from .record import activation_dtype
    from .stored_weights import check_options

    phase, out = Phases(on_phase), Path(config.out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise BuildError(f"{out} is a directory, or in none; give `-o` a file, as scales.safetensors.")
    if out.is_symlink() or (out.exists() and not out.is_file()):
        raise BuildError(f"{out} is a symbolic link or a device, which is not replaced; give `-o` a file.")
    if out.exists() and not config.force:
        raise BuildError(f"{out} is there already; pass --force to replace it, or give `-o` another file.")
    with phase("read the checkpoint"):
        checkpoint = Checkpoint.open(config.model)
        if checkpoint.quantised:
            check_options(config, checkpoint.quantised)
        quantisation = Quantisation.of(config, checkpoint)
        dtype = activation_dtype(config.dtype, checkpoint.config)
    assert quantisation is not None
    with quantisation.journal(out, dtype, on_note) as journal:
        graph, *_ = _graph(checkpoint, dtype, phase)
        with phase(f"calibrate {quantisation.recipe.name}"):
            _, scales = quantisation.find(graph, journal, on_node)
            with disk(out.absolute()):
                scales.save(out)
    return scales


def _graph(
    checkpoint: Checkpoint,
    dtype: str,
    phase: Phases,
    on_pass: Callable[[str, int], None] | None = None,
    hidden_states: tuple[int, ...] = (),
) -> tuple[ir.Model, float, int]:
    """The optimised graph, the error of the self-check, the number of nodes before it was optimised."""
    from . import gate
    from .export import export
    from .passes import optimise

    with phase("check the architecture"):
        error = gate.self_check(checkpoint.config, optimise, hidden_states)
    with phase("export"):
        graph = export(checkpoint, dtype, hidden_states)
        gate.check_structure(graph, checkpoint.config)
        num_exported = graph.graph.num_nodes()
    with phase("optimise"):
        graph = optimise(graph, on_pass)
    return graph, error, num_exported
