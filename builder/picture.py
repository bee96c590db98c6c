"""`accuracy.png`: what quantising cost, as a picture in the engine. Drawn where matplotlib is, for people only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..calibration.accuracy import Accuracy
from ..engines.extras import pip_install

PICTURE = "accuracy.png"
SHOWN = 16  # layers


def draw_accuracy(
    quantised: Mapping[str, Any], folder: Path, on_note: Callable[[str], None] | None = None
) -> Path | None:
    """Draws what a manifest's `quantisation` says; without matplotlib, says so in a note and returns None."""
    try:
        import matplotlib
    except ImportError:
        if on_note:
            on_note(f"the accuracy is not drawn: it needs matplotlib; install it with {pip_install('bench')}.")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    accuracy, bound = Accuracy.of(quantised["accuracy"]), float(quantised["bound"])
    worst = accuracy.worst(SHOWN)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(12, max(3.2, 0.28 * len(worst) + 1.6)), width_ratios=(1, 2), layout="constrained"
    )
    good = accuracy.rise <= bound
    left.bar(["before", "quantised"], [accuracy.perplexity_before, accuracy.perplexity],
             color=["tab:gray", "tab:blue" if good else "tab:red"])  # fmt: skip
    highest = accuracy.perplexity_before * (1 + bound)
    left.axhline(highest, color="tab:orange", label=f"bound: {100 * bound:+g}%")
    left.set_ylim(0, 1.25 * max(highest, min(accuracy.perplexity, 10 * highest)))
    for place, value in enumerate((accuracy.perplexity_before, accuracy.perplexity)):
        left.text(place, min(value, 10 * highest), f"{value:.4f}", ha="center", va="bottom", fontsize=8)
    left.set_title(f"perplexity {100 * accuracy.rise:+.2f}%", fontsize=10, loc="left")
    left.set_xlabel(
        f"KL {accuracy.kl:.5f} nats, top-1 agreement {100 * accuracy.top1:.2f}%\nof {accuracy.num_tokens} tokens",
        fontsize=9,
    )
    left.legend(loc="upper left", fontsize=8)
    places = range(len(worst))
    right.barh(places, [layer.error for layer in worst], color="tab:blue")
    for place, layer in enumerate(worst):
        right.text(layer.error, place, f" {layer.error:.4f}  {layer.format}", va="center", fontsize=7)
    right.set_yticks(places, [layer.name for layer in worst], fontsize=7)
    right.invert_yaxis()
    right.set_xlim(0, 1.8 * max((layer.error for layer in worst), default=1.0) or 1.0)  # room for what is written
    right.set_xlabel("error of the outputs, root mean square over that of the outputs", fontsize=9)
    right.set_title(f"the worst of {len(accuracy.layers)} layers", fontsize=10, loc="left")
    state = "within the bound" if good else "over the bound, accepted"
    figure.suptitle(f"{quantised['recipe']}: {state}", fontsize=11)
    path = folder / PICTURE
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
