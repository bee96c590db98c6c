"""The layers of a built engine, read from what TensorRT printed at DETAILED verbosity: the only account of what was
fused where there is no GPU, since the engine inspector needs one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: (?P<rest>.*)$")
PROFILE = re.compile(r" \[profile (\d+)\]")
NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
PLUGIN = re.compile(r"PluginType: (\w+)")


def layers_of(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The layers in order: `name`, `type` (gemm, kgen, PluginV3, ..), number of the `profile` that it is for, the ONNX
    `nodes` that are in it, and the op of a `plugin`."""
    found = []
    for line in (line for text in lines for line in text.splitlines()):
        if match := LAYER.match(line):
            name, rest = match["name"], match["rest"]
            profile = PROFILE.search(name) or PROFILE.search(rest)
            layer: dict[str, Any] = {
                "name": PROFILE.sub("", name), "type": match["type"], "profile": int(profile[1]) if profile else 0,
                "nodes": list(dict.fromkeys(PROFILE.sub("", node) for node in NODE.findall(rest))),
            }  # fmt: skip
            plugin = PLUGIN.search(rest)
            found.append(layer | ({"plugin": plugin[1]} if plugin else {}))
    return found
