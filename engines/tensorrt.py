"""What an engine for TensorRT holds beside TensorRT's own plan: how plugins are launched, and what the layers are.

TensorRT's plan (`ENGINE_FILE`) has the weights and all it compiled. An op of ingot in it is a plugin that carries a
`PluginNode` and finds its launches in `Plugins` by the shapes of the step. What TensorRT has no part in (spreading the
packed step, sampling) is an ordinary `Plan` whose buckets have `stage` and `sample.KIND` alone, and whose arena is
the logits. All kernels are cubins of that plan.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .plan import Bucket, Launch, pack_launch, unpack_launch
from .step import KV_LEN, LOGIT_ROWS, PAGES, POSITIONS, QUERY_START, SLOTS, TOKENS

FOLDER = "tensorrt"
ENGINE_FILE = "model.plan"
PLUGINS_FILE = "plugins.json"
LAYERS_FILE = "layers.json"  # what TensorRT says of its layers
LOG_FILE = "build.log.xz"  # all that TensorRT said while it built
NAMESPACE = "ingot"


@dataclass(frozen=True, eq=False)  # a node is itself, and attributes are no key
class PluginNode:
    """A node of the graph that a plugin runs.

    inputs: which inputs of the op's schema are there; types: ONNX element types of those. pools: which of those are
    updated in place, as places among them; each is an output more, behind the op's own `num_outputs`. kernels: its
    entry in `Plugins.kernels`.
    """

    op: str
    attributes: dict[str, Any]
    inputs: tuple[int, ...]
    types: tuple[int, ...]
    pools: tuple[int, ...]
    num_outputs: int
    kernels: str

    def text(self) -> str:
        """As the plugin's one attribute, in ONNX and in TensorRT's plan."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def of(cls, text: str) -> PluginNode:
        fields = json.loads(text)
        return cls(**fields | {name: tuple(fields[name]) for name in ("inputs", "types", "pools")})


@dataclass(frozen=True)
class PluginKernels:
    """Launches by the shapes of a node's inputs (`shape_key`), and the most bytes of workspace that any of them needs.

    Their arguments are `input` with the name `in.I` or `out.I` (number of the schema's input or output) or
    `plan.ZEROS`, and `arena`, which is the workspace.
    """

    op: str
    workspace: int
    launches: dict[str, tuple[Launch, ...]]


@dataclass(frozen=True)
class Plugins:
    """Everything that TensorRT's engine needs to be opened.

    module: TensorRT's, which built it (tensorrt, or tensorrt_rtx_bindings). version: its version. capability: 89 for
    8.9. profiles: for each optimisation profile the buckets of the plan that it covers. page_columns: of the page table
    in each bucket. kernels: by the name in a `PluginNode`.
    """

    module: str
    version: str
    capability: int
    profiles: tuple[tuple[int, ...], ...]
    page_columns: tuple[int, ...]
    kernels: dict[str, PluginKernels]

    def profile_of(self, bucket: int) -> int:
        """Number of the optimisation profile that covers a bucket."""
        return next(i for i, buckets in enumerate(self.profiles) if bucket in buckets)

    def save(self, folder: Path) -> None:
        """Write `plugins.json` into the target's folder."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields["kernels"] = {name: _pack(kernels) for name, kernels in self.kernels.items()}
        (folder / PLUGINS_FILE).write_text(json.dumps(fields, separators=(",", ":")) + "\n", encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> Plugins:
        """What `save` wrote; the manifest has verified the file."""
        fields = json.loads((folder / PLUGINS_FILE).read_text(encoding="utf-8"))
        fields["kernels"] = {name: _unpack(kernels) for name, kernels in fields["kernels"].items()}
        fields["profiles"] = tuple(map(tuple, fields["profiles"]))
        return cls(**fields | {"page_columns": tuple(fields["page_columns"])})


def step_shapes(bucket: Bucket, page_columns: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the step tensors in a bucket."""
    tokens, sequences = (bucket.tokens,), bucket.sequences
    return {
        TOKENS: tokens, POSITIONS: tokens, SLOTS: tokens, QUERY_START: (sequences + 1,), KV_LEN: (sequences,),
        PAGES: (sequences, page_columns), LOGIT_ROWS: (bucket.rows,),
    }  # fmt: skip


def updated(pool: str) -> str:
    """Name of the output that is a KV pool after the step; it is bound to the memory of the input."""
    return f"{pool}.updated"


def shape_key(shapes: Iterable[Sequence[int]]) -> str:
    """The shapes of a node's inputs without those of KV pools, whose pages are counted when an engine is opened."""
    return ",".join("x".join(map(str, shape)) for shape in shapes)


def _pack(kernels: PluginKernels) -> dict[str, Any]:
    launches = {key: [pack_launch(launch) for launch in part] for key, part in kernels.launches.items()}
    return {"op": kernels.op, "workspace": kernels.workspace, "launches": launches}


def _unpack(fields: dict[str, Any]) -> PluginKernels:
    launches = {key: tuple(unpack_launch(launch) for launch in part) for key, part in fields["launches"].items()}
    return PluginKernels(fields["op"], fields["workspace"], launches)
