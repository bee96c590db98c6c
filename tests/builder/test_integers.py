"""Configurations made in Python refuse integers that cannot be, in a sentence that names the field."""

import pytest
from ingot.builder import LOWEST, BuildConfig
from ingot.builder.heads import train
from ingot.engines.errors import BuildError

CONFIGS = [(BuildConfig, ("model", "out"), LOWEST), (train.TrainConfig, ("model", "text", "out"), train.LOWEST)]


@pytest.mark.parametrize("kind, given, lowest", CONFIGS, ids=["build", "train"])
def test_integers_that_cannot_be(kind, given, lowest):
    for name, low in lowest.items():
        wrong = ((low - 1, str(low - 1)), (1 << 31, "2147483648"), (10**5000, "a number of thousands of digits"),
                 (1.5, "1.5"), ("3", "'3'"), (True, "True"))  # fmt: skip
        for value, found in wrong:
            with pytest.raises(BuildError, match=f"^{name} is {found}; expected an integer from {low} to 2147483647.$"):
                kind(*given, **{name: value})
        assert getattr(kind(*given, **{name: low}), name) == low


def test_more_text_than_there_is(tmp_path):
    """That much may be asked for: all of a text is taken then."""
    from hand_made import DEMO
    from ingot.builder.calibration_text import Text
    from ingot.builder.checkpoint import Checkpoint

    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 900)
    text = Text.read(tmp_path / "text.txt", Checkpoint.open(str(DEMO / "pycoder-draft-2m")), (1 << 31) - 1)
    assert sum(text.num_tokens) > 2048
