"""Small engines for a GPU whose drafts are verified, built by whichever of pytest's workers comes first."""

from pathlib import Path

from ingot import build_engine
from ingot.builder import BuildConfig
from made_once import made_once

# few buckets: they are compiled while all other tests run
SIZES = dict(target="cuda", dtype="float32", max_num_seqs=4, max_num_batched_tokens=16, page_size=4, tune=False,
             max_draft_tokens=3)  # fmt: skip
ROOMY = {"num_kv_pages": 400}
TIGHT = {"num_kv_pages": 32}  # requests are thrown out


def built(shared: Path, name: str, checkpoint, **options) -> Path:
    """The engine of what `checkpoint` gives a folder for."""

    def make(out: Path) -> None:
        build_engine(BuildConfig(str(checkpoint()), str(out), **SIZES | options))

    return made_once(shared / f"speculation-{name}", make)
