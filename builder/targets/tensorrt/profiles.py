"""Optimisation profiles: the ranges of shapes that TensorRT compiles for, from the buckets of a step.

A profile for each bucket would be the fastest, but TensorRT compiles the whole graph again for each (pycoder-14m: 1.2 s
and 4 MB of plan a profile on two shared cores), so neighbouring buckets share one, which is best at its largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ....engines.plan import Bucket
from ....engines.tensorrt import step_shapes
from ....plugins.tensorrt import api as trt

SMALL_DECODE, SMALL_STEP = 16, 512  # tokens of the last bucket in the first profile of each kind
LEAST_PAGES, LIKELY_PAGES = 2, 4096  # of a KV pool
MOST_ELEMENTS = 2**31 - 1  # of a tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Range:
    """Shapes of an input: the least, the one to be best at, the most."""

    least: Shape
    best: Shape
    most: Shape


def share(buckets: Sequence[Bucket]) -> tuple[tuple[int, ...], ...]:
    """Buckets (by number) of each profile: decoding and any step apart, few tokens and many apart."""
    groups: dict[tuple[bool, bool], list[int]] = {}
    for i, bucket in enumerate(buckets):
        decoding = bucket.max_query == 1
        large = bucket.tokens > (SMALL_DECODE if decoding else SMALL_STEP)
        groups.setdefault((not decoding, large), []).append(i)
    return tuple(tuple(groups[key]) for key in sorted(groups))


def ranges(graph: ir.Graph, buckets: Sequence[Bucket], page_columns: Sequence[int], page_size: int) -> dict[str, Range]:
    """Of every input of the graph, over the buckets of one profile."""
    steps = [step_shapes(bucket, columns) for bucket, columns in zip(buckets, page_columns, strict=True)]
    found: dict[str, Range] = {}
    for value in graph.inputs:
        if value.is_initializer() or value.name is None or value.shape is None:
            continue
        if value.name in steps[0]:
            shapes = [step[value.name] for step in steps]
            most = tuple(map(max, zip(*shapes, strict=True)))
            found[value.name] = Range(tuple(map(min, zip(*shapes, strict=True))), most, most)
            continue
        heads, dim = (int(size) for size in value.shape[2:])  # type: ignore[arg-type]
        most_pages = MOST_ELEMENTS // (page_size * heads * dim)
        pool = [(pages, page_size, heads, dim) for pages in (LEAST_PAGES, min(LIKELY_PAGES, most_pages), most_pages)]
        found[value.name] = Range(*pool)
    return found


def add_profile(builder: trt.Builder, config: trt.IBuilderConfig, shapes: Mapping[str, Range]) -> None:
    profile = builder.create_optimization_profile()
    for name, each in shapes.items():
        profile.set_shape(name, each.least, each.best, each.most)
    config.add_optimization_profile(profile)
