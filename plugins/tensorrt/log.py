"""What TensorRT says while it parses, builds and runs, and what of it is worth a sentence.

On a machine without a GPU it reports an error of the CUDA runtime beside every other, which means nothing.
"""

from __future__ import annotations

from pathlib import Path

from . import api as trt

NOISE = ("CUDA driver version is insufficient", "CUDA initialization failure", "no CUDA-capable device")
MEMORY = ("std::bad_alloc", "out of memory", "Out of memory", "OutOfMemory", "Cannot allocate memory")


class Log:
    """logger: for TensorRT. lines: (severity, text) in order."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.logger = _logger(self.lines)

    @property
    def errors(self) -> list[str]:
        """What it called errors, without noise, each in one line."""
        found = (text for severity, text in self.lines if severity in ("ERROR", "INTERNAL_ERROR"))
        return [one_line(text) for text in found if not any(noise in text for noise in NOISE)]

    @property
    def out_of_memory(self) -> bool:
        return any(word in text for text in self.errors for word in MEMORY)

    def why(self) -> str:
        """The last error, for a sentence."""
        return next(iter(self.errors[::-1]), "it gave no reason")

    def save(self, path: Path) -> None:
        """All of it, a line for each; nothing depends on it, so a disk that refuses is ignored."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{severity}: {text}\n" for severity, text in self.lines), encoding="utf-8")
        except OSError:
            pass


def one_line(text: str) -> str:
    return " ".join(text.split())[:400]


def _logger(lines: list[tuple[str, str]]) -> trt.ILogger:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            lines.append((str(severity).rpartition(".")[2], msg))

    return Logger()
