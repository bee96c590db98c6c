"""What a calibration has done so far, in a folder beside the output: one that was killed goes on where it was.

Every weight's result is a file of its own as soon as it is found; what is alive between two nodes is saved now and
then, and at once when the process is asked to stop. A file is complete or not there. Results are the same numbers
whenever they are found, so whatever was found after the last snapshot is used as it is when a walk comes by again.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..calibration.accuracy import Accuracy, Layer
from ..calibration.scales import KINDS, Scales, StoredWeights
from ..engines.errors import BuildError
from ..engines.weights import of_tensor, write_weights
from ..engines.writer import lock_folder, remove_empty

ABOUT, FINISHED, FOUND = "about.json", "accuracy.json", "found-{:05d}.safetensors"
SECONDS, SHARE = 30.0, 0.05  # between snapshots at least; of all the time they may take at most


class Journal:
    """`scales` and `layers`: all that was found. `accuracy`: once it is complete.

    about: what the results depend on, as plain JSON; a journal with another one is begun anew, which `on_note` is told.
    As a context it removes the folder at the end, unless the process is stopped, the disk is full or the model was
    refused for its accuracy. Raises BuildError: a folder that is no journal, one that is in use, a full disk.
    """

    def __init__(
        self, folder: Path | None, about: Mapping[str, Any], on_note: Callable[[str], None] = lambda sentence: None
    ):
        self.folder = folder
        self.scales, self.layers = Scales(StoredWeights()), dict[str, Layer]()
        self.accuracy: Accuracy | None = None
        self._saved, self._num = set[tuple[str, str]](), 0
        self._lock: int | None = None
        self._walks = dict[str, Kept]()
        self._made = [path for path in folder.parents if not path.exists()] if folder else []  # the innermost first
        if folder:
            with disk(folder):
                self._lock = self._open(folder, json.loads(json.dumps(about)), on_note)

    @classmethod
    def none(cls) -> Journal:
        """One that keeps everything in memory, and nothing longer than its process."""
        return cls(None, {})

    def add(self, scales: Scales, layer: Layer | None = None) -> None:
        """Keeps what was found: all of the scales that is not kept yet, and the error of a layer."""
        new = layer is not None and self.layers.get(layer.name) != layer
        part = Scales(about={"layer": asdict(layer)} if layer and new else {})
        for kind in ("weights", *KINDS) if self.folder else ():
            for name in getattr(scales, kind).keys() - {name for k, name in self._saved if k == kind}:
                getattr(part, kind)[name] = getattr(scales, kind)[name]
                new = True
        if layer:
            self.layers[layer.name] = layer
        if self.folder and new:
            path = self.folder / FOUND.format(self._num)
            with disk(self.folder):
                part.save(path)
            self._take(path, part)

    def remember(self, key: str, value: Any) -> None:
        """Keeps anything else that JSON can say."""
        if self.folder:
            with disk(self.folder):
                _write(self.folder / f"{key}.json", json.dumps(value))

    def remembered(self, key: str) -> Any:
        """What was kept so, or None."""
        path = self.folder / f"{key}.json" if self.folder else None
        return json.loads(path.read_text()) if path and path.is_file() else None

    def walk(self, name: str) -> Kept:
        """What is kept of one walk over the graph."""
        return self._walks.setdefault(name, Kept(self.folder, name))

    def trial(self) -> Journal:
        """For another recipe on the same held-out text: it has the logits of the model as it is, and keeps nothing."""
        other = Journal.none()
        other._walks["before"] = self.walk("before")
        return other

    def finish(self, accuracy: Accuracy) -> None:
        """All is found. The logits of the model as it is stay until the end: others may be compared with them."""
        self.accuracy = accuracy
        if self.folder:
            with disk(self.folder):
                _write(self.folder / FINISHED, json.dumps(accuracy.describe()))
                self._remove("walk-after-*")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self.folder:
            return
        failed = isinstance(error and error.__cause__, OSError)  # the disk: what was found is good, once there is room
        refused = isinstance(error, BuildError) and not failed and self.accuracy is None
        if isinstance(error, BuildError):
            self._remove("walk-*")
            self._remove("*.part")
        if self._lock is not None:
            os.close(self._lock)
        if error is None or refused or {path.name for path in self.folder.iterdir()} <= {ABOUT}:
            shutil.rmtree(self.folder, ignore_errors=True)
            remove_empty(self._made)

    def _remove(self, pattern: str) -> None:
        for path in self.folder.glob(pattern) if self.folder else ():
            path.unlink()

    def _open(self, folder: Path, about: Any, on_note: Callable[[str], None]) -> int | None:
        """Reads what is there, if it is of the same calibration; returns the lock, if the file system has any."""
        file = folder / ABOUT
        mine = {ABOUT, f"{ABOUT}.part"}  # the latter alone: it was killed, or the disk was full, right here
        if folder.exists() and (
            not folder.is_dir() or (not file.is_file() and {path.name for path in folder.iterdir()} - mine)
        ):
            raise BuildError(f"{folder} is in the way of what a calibration keeps; move it or give another `-o`.")
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
        try:
            found = json.loads(file.read_text()) if file.is_file() else about
            other = sorted(key for key in {*found, *about} if found.get(key) != about.get(key))
            if not other:
                self._read(folder)
        except (OSError, ValueError, AttributeError, KeyError, TypeError, BuildError):
            other = ["what is in it is damaged"]
        if other:
            on_note(f"{folder} is of another calibration (differs: {', '.join(other)}), so this one begins anew.")
            for path in folder.iterdir():
                path.unlink()
            self.__dict__.update(scales=Scales(StoredWeights()), layers={}, accuracy=None, _saved=set(), _num=0)
        elif self._num:
            on_note(f"going on with what {folder} has: {len(self.layers)} layers.")
        _write(file, json.dumps(about))
        return lock

    def _read(self, folder: Path) -> None:
        for path in sorted(folder.glob(FOUND.format(0).replace("00000", "*"))):
            part = Scales.open(path)
            for name in part.weights:
                part.weights[name]  # refuses a damaged one
            self._take(path, part)
        self._remove_damaged(folder)
        if (folder / FINISHED).is_file():
            self.accuracy = Accuracy.of(json.loads((folder / FINISHED).read_text()))

    def _remove_damaged(self, folder: Path) -> None:
        """Of what can be had again: all of a walk that has a file which is not whole, what was remembered."""
        for path in sorted(folder.iterdir()):
            try:
                if path.suffix == ".json":
                    json.loads(path.read_text())
                elif path.suffix == ".safetensors":
                    with safe_open(path, "pt"):  # looks at header and length
                        pass
            except (ValueError, RecursionError, SafetensorError):
                self._remove(f"{path.name.rpartition('-')[0]}-*" if path.name.startswith("walk-") else path.name)
            except FileNotFoundError:  # of a walk that is removed
                continue

    def _take(self, path: Path, part: Scales) -> None:
        if part.about:
            layer = Layer(**part.about["layer"])
            self.layers[layer.name] = layer
        self._num += 1
        weights = self.scales.weights
        assert isinstance(weights, StoredWeights)
        for name in part.weights:
            weights.stored(name, path)
            self._saved.add(("weights", name))
        for kind in KINDS:
            getattr(self.scales, kind).update(getattr(part, kind))
            self._saved.update((kind, name) for name in getattr(part, kind))


class Kept:
    """Of one walk: the last snapshot of what is alive between two nodes, and the logits it ended with.

    Without a folder logits are kept in memory, and snapshots nowhere.
    """

    def __init__(self, folder: Path | None, name: str):
        self._folder, self._name = folder, name
        self._last, self._cost = time.monotonic(), 0.0
        self._logits: list[Tensor] = []
        self._all = False

    def due(self) -> bool:
        """Whether it is time for a snapshot."""
        return self._folder is not None and time.monotonic() - self._last >= max(SECONDS, self._cost / SHARE)

    def save(self, node: int, alive: Sequence[Mapping[int, Tensor]]) -> None:
        """Keeps what is alive before a node, [batch][slot], in place of the snapshot before."""
        start = time.monotonic()
        tensors = {f"{b}/{slot}": value for b, values in enumerate(alive) for slot, value in values.items()}
        if self._folder and all(isinstance(value, Tensor) for value in tensors.values()):  # an ONNX sequence ends soon
            self._write("alive", tensors, {"node": str(node), "batches": str(len(alive))})
        self._last = time.monotonic()
        self._cost = self._last - start

    def load(self) -> tuple[int, Sequence[Mapping[int, Tensor]]] | None:
        """The last snapshot."""
        if not self._folder or not self._path("alive").is_file():
            return None
        with safe_open(self._path("alive"), "pt") as file:
            header = file.metadata()
            alive: list[dict[int, Tensor]] = [{} for _ in range(int(header["batches"]))]
            for name in file.keys():
                batch, slot = map(int, name.split("/"))
                alive[batch][slot] = file.get_tensor(name).clone()
        return int(header["node"]), alive

    @property
    def complete(self) -> bool:
        """Whether all logits are there."""
        return self._path("complete").is_file() if self._folder else self._all

    def keep(self, logits: Iterable[Tensor]) -> None:
        """Keeps the logits of each batch, one in memory at a time."""
        num = 0
        for num, each in enumerate(logits, 1):
            if self._folder:
                self._write(str(num - 1), {"logits": each}, {})
            else:
                self._logits.append(each)
        self._all = True
        if self._folder:
            self._write("complete", {}, {"num": str(num)})
            self._path("alive").unlink(missing_ok=True)

    def logits(self) -> Iterator[Tensor]:
        """What `keep` kept, in its order."""
        if not self._folder:
            yield from self._logits
            return
        with safe_open(self._path("complete"), "pt") as file:
            num = int(file.metadata()["num"])
        for i in range(num):
            with safe_open(self._path(str(i)), "pt") as file:
                yield file.get_tensor("logits")

    def _path(self, what: str) -> Path:
        assert self._folder
        return self._folder / f"walk-{self._name}-{what}.safetensors"

    def _write(self, what: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        path = self._path(what)
        beside = path.with_name(path.name + ".part")
        with disk(path.parent):
            write_weights(beside, [of_tensor(name, value) for name, value in tensors.items()], metadata=metadata)
            os.replace(beside, path)


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Tells of a disk that is full or cannot be written. Raises BuildError."""
    try:
        yield
    except OSError as error:
        full = "free some space or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise BuildError(
            f"what a calibration keeps in {folder} cannot be written ({error.strerror or error}); {full}give `-o` "
            "another place."
        ) from error


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(text)
    os.replace(beside, path)
