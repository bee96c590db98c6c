"""`ingot bench`: a workload, drafts or the ops of a step, measured (`bench.py`, `speculation/`, `profiling/`)."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..engines.cli import Debug, Engine
from ..engines.errors import RequestError, shown
from ..engines.extras import pip_install
from .cli import AsJson, Draft, LoadFormat, MaxSeqs, MaxTokens, NumDrafts, NumNodes, PrefixCache, Speculate

if TYPE_CHECKING:
    from .bench import Job

DRAWN = (".png", ".svg", ".pdf", ".jpg", ".webp")
PROFILE = "Show the time of each op in a step against its floor instead, and draw it (--plot, or profile.png)."


def bench(
    engine: Engine,
    num_requests: Annotated[int | None, typer.Option("--num-requests", "-n", help="64, or all of the file.")] = None,
    input_len: Annotated[str, typer.Option(help="Prompt tokens: 128, or a range 16:512.")] = "128",
    output_len: Annotated[str, typer.Option(help="Output tokens: 64, or a range 16:256.")] = "64",
    prefix_len: Annotated[int, typer.Option(min=0, help="Tokens that all synthetic prompts begin with, on top.")] = 0,
    file: Annotated[Path | None, typer.Option(help="Prompts instead: text, one a line, or JSONL.")] = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", "-c", help="Requests at any time.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second, Poisson arrivals.")] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Requests sent before and not counted.")] = 2,
    max_num_seqs: MaxSeqs = None,
    max_num_batched_tokens: MaxTokens = None,
    prefix_cache: PrefixCache = True,
    load_format: LoadFormat = "auto",
    seed: Annotated[int, typer.Option(help="Of lengths, tokens and arrivals.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw the latencies into this file (needs ingot\\[bench]).")] = None,
    profile: Annotated[bool, typer.Option("--profile", help=PROFILE)] = False,
    batches: Annotated[str | None, typer.Option(help="With --profile: sequences of a decode step, as 1,64.")] = None,
    context: Annotated[int, typer.Option(help="With --profile: keys of each sequence while decoding.")] = 200,
    prefill: Annotated[
        str | None, typer.Option(help="With --profile: prompts a step each, as 1024,4096; 0: none.")
    ] = None,
    speculate: Speculate = None,
    draft_engine: Draft = None,
    num_draft_tokens: NumDrafts = 4,
    num_draft_nodes: NumNodes = 0,
    levels: Annotated[str, typer.Option(help="With --speculate: requests at a time, each measured.")] = "1,4,16,64",
    rounds: Annotated[int, typer.Option(min=1, help="With --speculate: measurements of each.")] = 3,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure latency and throughput of an engine under load (8 requests at any time, if not told otherwise)."""
    from ..engines.manifest import Manifest
    from . import bench as benchmark

    options: dict[str, Any] = {
        "max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens, "prefix_cache": prefix_cache,
        "load_format": load_format,
    }  # fmt: skip
    if profile:
        if rate is not None or file is not None or num_requests is not None:
            raise typer.BadParameter("--profile makes its own load; leave out --rate, --file and --num-requests.")
        if speculate is not None or draft_engine is not None:
            raise typer.BadParameter("--profile is of steps without drafts; leave out --speculate and --draft-engine.")
        sizes = _sizes("batches", batches) or ([concurrency] if concurrency else [])
        prompts = None if prefill is None else _sizes("prefill", "" if prefill == "0" else prefill)
        return _profile(engine, options, sizes, context, prompts, seed, plot, as_json)
    if batches is not None or prefill is not None:
        raise typer.BadParameter("--batches and --prefill belong to --profile; add it or leave them out.")
    if speculate is not None or draft_engine is not None:
        if rate is not None or concurrency is not None or num_requests is not None:
            raise typer.BadParameter(
                "--speculate measures --levels one after the other; leave out --rate, --concurrency and --num-requests."
            )
        options |= {"speculate": speculate, "draft_engine": draft_engine, "num_draft_tokens": num_draft_tokens}
        options |= {"num_draft_nodes": num_draft_nodes, "prefix_cache": False}
        sizes = _sizes("levels", levels)
        if not sizes:
            raise typer.BadParameter("--levels is empty, expected numbers above 0 such as 1,64.")
        return _speculation(engine, options, file, input_len, output_len, sizes, rounds, seed, plot, as_json)
    if concurrency is None and rate is None:
        concurrency = 8
    for name, value in {"num-requests": num_requests, "concurrency": concurrency, "rate": rate}.items():
        if value is not None and not value > 0:  # nor what is no number
            raise typer.BadParameter(f"--{name} must be above 0, not {value}.")
    if file:
        jobs = benchmark.from_file(file, num_requests, output_len, seed)
    else:
        vocab = Manifest.read(engine).model.vocab_size
        jobs = benchmark.synthetic(num_requests or 64, input_len, output_len, vocab, seed, prefix_len)
    if plot:
        _check_plot(plot)
    timings, seconds = asyncio.run(_load(engine, options, jobs, warmup, concurrency, rate, seed))
    figures = {"engine": str(engine), "concurrency": concurrency, "rate": rate, **benchmark.report(timings, seconds)}
    if as_json:
        print(json.dumps(figures, indent=1))
    else:
        _show(figures)
    if plot:
        _draw(timings, plot)
    if figures["failed"]:
        raise SystemExit(2)


async def _load(
    engine: Path, options: dict[str, Any], jobs: Sequence[Job], warmup: int, concurrency: int | None,
    rate: float | None, seed: int,
) -> tuple[list[Any], float]:  # fmt: skip
    """Open the engine, warm it with other prompts of the same lengths, send the jobs; timings and seconds."""
    import time

    from rich.console import Console
    from rich.progress import Progress

    from .async_llm import AsyncLLM
    from .bench import Job, run

    async with AsyncLLM(engine, **options) as llm:
        submit = partial(llm.generate, deltas=True)
        # reversed, so that the warm-up leaves nothing of use in the prefix cache
        await run(submit, [Job(job.prompt[::-1], job.params) for job in jobs[:warmup]], concurrency=concurrency)
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(f"{len(jobs)} requests", total=len(jobs))
            start = time.perf_counter()
            timings = await run(
                submit, jobs, concurrency=concurrency, rate=rate, seed=seed, on_done=lambda: bar.advance(task)
            )
            return timings, time.perf_counter() - start


def _show(figures: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    load = {"concurrency": "at a time", "rate": "a second"}
    told = ", ".join(f"{figures[key]:g} {words}" for key, words in load.items() if figures[key])
    title = f"{figures['requests']} requests, {told}: {figures['engine']}"
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    columns = ("mean", "p50", "p90", "p99", "max")
    for column in ("milliseconds", *columns):
        table.add_column(column, justify="left" if column == "milliseconds" else "right")
    names = {"ttft_ms": "time to first token", "tpot_ms": "time per output token", "inter_token_ms": "between tokens",
             "end_to_end_ms": "whole request"}  # fmt: skip
    for key, name in names.items():
        values = figures[key] or {}
        table.add_row(name, *(f"{values[c]:.2f}" if c in values else "-" for c in columns))
    console = Console()
    console.print(table)
    console.print(
        f"{figures['requests_per_s']:.2f} requests/s, {figures['output_tokens_per_s']:.1f} output tokens/s, "
        f"{figures['total_tokens_per_s']:.1f} tokens/s in all; {figures['input_tokens']} in "
        f"({figures['cached_input_tokens']} cached), {figures['output_tokens']} out in {figures['seconds']:.2f} s; "
        f"peak memory {figures['peak_memory_bytes'] / 1e6:.0f} MB",
        highlight=False,
    )
    if figures["failed"]:
        print(f"{figures['failed']} requests failed; the first: {figures['first_error']}", file=sys.stderr)


def _sizes(name: str, text: str | None) -> list[int]:
    """`"1,64"` -> [1, 64]."""
    parts = [part for part in (text or "").split(",") if part]
    if not all(part.isdecimal() and len(part) < 10 and int(part) for part in parts):
        raise typer.BadParameter(f"--{name} is {shown(text)}, expected numbers above 0 such as 1,64.")
    return [int(part) for part in parts]


def _profile(
    engine: Path, options: dict[str, Any], batches: list[int], context: int, prompts: list[int] | None, seed: int,
    plot: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Print where the time of steps goes, and draw it."""
    from rich.console import Console

    from .capacity import ServeConfig
    from .profiling.report import draw, show
    from .profiling.run import profile

    path = plot or Path("profile.png")
    _check_place(path)
    config = ServeConfig(**options | {"prefix_cache": False})
    console = Console(stderr=True)
    with console.status("profiling", spinner="dots") as status:
        report = profile(
            engine, config, batches=batches, context=context, prompts=prompts, seed=seed,
            on_done=lambda title: status.update(f"done: {title}"),
        )  # fmt: skip
    if as_json:
        print(json.dumps(report.describe(), indent=1))
    else:
        show(report, Console())
    try:
        draw(report, path)
        print(f"drawn into {path}", file=sys.stderr)
    except ImportError:
        sentence = f"The profile is not drawn: it needs matplotlib; install it with {pip_install('bench')}."
        print(sentence, file=sys.stderr)


def _speculation(
    engine: Path, options: dict[str, Any], file: Path | None, input_len: str, output_len: str, levels: list[int],
    rounds: int, seed: int, plot: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Print the speed-up by drafts, and draw it."""
    from rich.console import Console

    from . import bench as benchmark
    from .async_llm import AsyncLLM
    from .request import SamplingParams
    from .speculation import bench

    if plot:
        _check_plot(plot)
    num = rounds * sum(map(bench.num_of, levels))
    num_input, num_output = benchmark.lengths(input_len)[1], benchmark.lengths(output_len)[1]
    console = Console(stderr=True)

    async def measure() -> list[bench.Level]:
        num_seqs = max(levels) if options["max_num_seqs"] is None else options["max_num_seqs"]
        async with AsyncLLM(engine, **options | {"max_num_seqs": num_seqs}) as llm:
            if not file and num_input >= llm.max_model_len:
                most = llm.max_model_len
                raise RequestError(f"--input-len is {input_len}, but a request may have {most} tokens; ask for fewer.")
            with console.status("measuring", spinner="dots") as status:
                if file:
                    jobs = benchmark.from_file(file, num, output_len, seed)
                else:
                    prompts = await bench.written(llm, num, num_input, seed)
                    how = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
                    jobs = [benchmark.Job(list(prompt), how) for prompt in prompts]

                def say(level: bench.Level) -> None:
                    status.update(f"done: {level.concurrency} at a time, {level.speedup:.2f}x")

                return await bench.compare(llm, jobs, levels, rounds, say)

    found = asyncio.run(measure())
    title = f"{options['speculate']}, {options['num_draft_tokens']} tokens a draft: {engine}"
    if options["num_draft_nodes"]:
        title = title.replace("a draft", f"a draft, or trees of {options['num_draft_nodes']}", 1)
    if as_json:
        print(json.dumps({"engine": str(engine), "speculate": options["speculate"],
                          "levels": [asdict(level) for level in found]}, indent=1))  # fmt: skip
    else:
        bench.show(title, found, Console())
    if plot:
        bench.draw(title, found, plot)


def _check_plot(path: Path) -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise typer.BadParameter(f"--plot needs matplotlib; install it with {pip_install('bench')}.")
    _check_place(path)


def _check_place(path: Path) -> None:
    if not path.parent.is_dir():
        raise typer.BadParameter(f"the folder of {path} does not exist.")
    if path.is_dir() or path.suffix.lower() not in DRAWN:
        raise typer.BadParameter(f"--plot is {path}, expected a file that ends in {', '.join(DRAWN)}.")
    exists = path.exists()
    try:
        path.open("ab").close()
        if not exists:
            path.unlink()
    except OSError as error:
        raise typer.BadParameter(f"--plot is {path}, which cannot be written ({error.strerror}).") from None


def _draw(timings: Sequence[Any], path: Path) -> None:
    """Two cumulative curves: time to first token, and gaps between tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [t for t in timings if t.deliveries]
    curves = {
        "time to first token": [t.deliveries[0] - t.sent for t in good],
        "between tokens": [b - a for t in good for a, b in zip(t.deliveries, t.deliveries[1:], strict=False)],
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, (name, seconds) in zip(axes, curves.items(), strict=True):
        axis.ecdf([1000 * s for s in seconds])
        axis.set(title=name, xlabel="ms", ylabel="share of values")
    figure.savefig(path)
