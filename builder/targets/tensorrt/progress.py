"""TensorRT's progress monitor, told to whoever watches the build."""

from __future__ import annotations

from collections.abc import Callable

from ....plugins.tensorrt import api as trt


def monitor(on_progress: Callable[[int, int], None]) -> trt.IProgressMonitor:
    """Counts the steps of the outermost phase and says them as (done, all). TensorRT calls from threads of its own."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost: dict[str, int] = {}  # phase -> steps

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.outermost[phase_name] = num_steps
                on_progress(0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """True: go on."""
            if phase_name in self.outermost:
                on_progress(step + 1, self.outermost[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            if (steps := self.outermost.pop(phase_name, None)) is not None:
                on_progress(steps, steps)

    return Monitor()
