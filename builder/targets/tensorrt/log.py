"""What TensorRT says while it parses and builds: all of it is kept, for it is the only account of what was fused where
there is no GPU (no engine inspector then).

Errors are turned into one sentence each by what they say; TensorRT reports an error of the CUDA runtime beside every
other on a machine without a GPU, which means nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ....plugins.tensorrt import api as trt
from ..timing_cache import cache_folder

LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: (?P<rest>.*)$")
PROFILE = re.compile(r" \[profile (\d+)\]")
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
NOISE = ("CUDA driver version is insufficient", "CUDA initialization failure")
MEMORY = ("std::bad_alloc", "out of memory", "Out of memory", "Cannot allocate memory", "insufficient memory")


def last_log() -> Path:
    """Where the log of the last build is."""
    return cache_folder() / "tensorrt" / "last-build.log"


class Log:
    """logger: for TensorRT. lines: (severity, text) in order."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.logger = _logger(self.lines)

    @property
    def errors(self) -> list[str]:
        """What it called errors, without noise."""
        found = [text for severity, text in self.lines if severity in ("ERROR", "INTERNAL_ERROR")]
        return [text for text in found if not any(noise in text for noise in NOISE)]

    @property
    def out_of_memory(self) -> bool:
        return any(word in text for text in self.errors for word in MEMORY)

    def keep(self) -> None:
        """Writes all of it to `last_log()`, where an error's message sends the reader."""
        try:
            path = last_log()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{severity}: {text}\n" for severity, text in self.lines), encoding="utf-8")
        except OSError:  # the build does not depend on it
            pass

    def layers(self) -> list[dict[str, Any]]:
        """The layers of the engine that was built, in order: name, type, profile, the ONNX nodes in it, and where it
        has them op of the plugin and bytes of its constants' types."""
        found = []
        for _, text in self.lines:
            for line in text.splitlines():
                match = LAYER.match(line)
                if match:
                    found.append(describe(match["name"], match["type"], match["rest"]))
        return found


def describe(name: str, kind: str, rest: str) -> dict[str, Any]:
    """One layer of the dump; `rest`: from its inputs on."""
    profile = PROFILE.search(name + rest)
    layer: dict[str, Any] = {"name": PROFILE.sub("", name), "type": kind, "profile": int(profile[1]) if profile else 0}
    if plugin := re.search(r"PluginType: (\w+)", rest):
        layer["plugin"] = plugin[1]
    if tactic := re.search(r"TacticName: ([^,]+),", rest):
        layer["tactic"] = tactic[1].strip()
    if nodes := ONNX_LAYER.findall(rest):
        layer["nodes"] = list(dict.fromkeys(nodes))
    return layer


def _logger(lines: list[tuple[str, str]]) -> trt.ILogger:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            lines.append((str(severity).rpartition(".")[2], msg))

    return Logger()
