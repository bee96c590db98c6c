"""The layers of a built engine, read from what TensorRT printed at DETAILED verbosity: the only account of what was
fused where there is no GPU, since the engine inspector needs one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: (?P<reads>.*?)(?P<rest>(, Outputs: .*)?)$")
PROFILE = re.compile(r" \[profile (\d+)\]")
NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
PLUGIN = re.compile(r"PluginType: (\w+)")
ELEMENT = re.compile(r"Datatype: (\w+)")


def layers_of(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The layers in order: `name`, `type` (gemm, kgen, PluginV3, ..), number of the `profile` that it is for, the ONNX
    `nodes` that are in it, element types (BFloat16, FP8, Int4, ..) that it `reads`, and the op of a `plugin`."""
    found, current = [], 0
    for line in (line for text in lines for line in text.splitlines()):
        if match := LAYER.match(line):
            rest = match["rest"]
            # profiles follow each other, and not every layer says which it is of
            current = max(current, *map(int, PROFILE.findall(line)), 0)
            layer: dict[str, Any] = {
                "name": PROFILE.sub("", match["name"]), "type": match["type"], "profile": current,
                "nodes": list(dict.fromkeys(PROFILE.sub("", node) for node in NODE.findall(rest))),
                "reads": list(dict.fromkeys(ELEMENT.findall(match["reads"]))),
            }  # fmt: skip
            plugin = PLUGIN.search(rest)
            found.append(layer | ({"plugin": plugin[1]} if plugin else {}))
    return found
