"""`ingot inspect`: an engine explained, for a reader (tables) or a script (`--json`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

# what several commands take
Engine = Annotated[Path, typer.Argument(metavar="DIR", help="An engine directory.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def inspect(
    engine: Engine,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    verify: Annotated[bool, typer.Option(help="Check the hash of every file.")] = True,
    debug: Debug = False,
) -> None:
    """Explain an engine: model, sizes, operations per layer, KV bytes per token, target, build."""
    from .inspect import describe
    from .manifest import Manifest

    facts = describe(engine, Manifest.open(engine, verify=verify)) | {"verified": verify}
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        show(facts)


def show(facts: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    model, build, kv = facts["model"], facts["build"], facts["kv_layers"]
    windows = sorted({layer["window"] for layer in kv})
    rows = {
        "model": f"{model['source']} ({model['architecture']})",
        "parameters": f"{model['num_parameters']:,} in {model['dtype']}, {model['num_layers']} layers of width "
        f"{model['hidden_size']}, vocabulary {model['vocab_size']:,}",
        "context": f"{model['max_model_len']:,} tokens; end tokens {list(model['eos_token_ids']) or 'none'}",
        "KV cache": f"{facts['kv_bytes_per_token']:,} bytes per token over {len(kv)} layers of "
        + ", ".join(sorted({layer["dtype"] or model["dtype"] for layer in kv}))
        + (f", windows {windows}" if windows != [0] else ""),
        "size": f"{size(facts['bytes'])} in {len(facts['files'])} files",
        "target": facts["target"] + "".join(f"; {key}: {value}" for key, value in facts["target_info"].items()),
        "built": f"{build['time']} by ingot {facts['ingot_version']} in {build['seconds']:.1f} s ("
        + ", ".join(f"{name} {seconds:.1f}" for name, seconds in build["phases"].items())
        + ")",
        "checked": "no figure recorded"
        if build["self_check_error"] is None
        else f"largest relative error {build['self_check_error']:.1e} against transformers, small random model",
        "files": "every hash is right" if facts["verified"] else "sizes are right, hashes not checked",
    }
    if head := facts["head"]:
        states = ", ".join(map(str, head["reads"]))
        rows["drafts"] = f"{head['kind']}, from the hidden states {states} of {head['target_hidden_size']} columns"
    if facts["hidden_states"]:
        rows["for heads"] = "gives the hidden states " + ", ".join(map(str, facts["hidden_states"]))
    summary = Table(box=box.SIMPLE, show_header=False, title=facts["engine"], title_justify="left")
    summary.add_column(style="bold")
    summary.add_column(overflow="fold")
    for row in rows.items():
        summary.add_row(*row)
    console = Console()
    console.print(summary)
    console.print(_operations(facts["ops"]))
    if facts["tensorrt"]:
        console.print(_tensorrt(facts["tensorrt"]))


def _operations(ops: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, title=f"{ops['total']} operations in {ops['graph']}", title_justify="left")
    table.add_column("where")
    table.add_column("nodes", justify="right")
    table.add_column("operations")
    groups = [(_span(layer["first"], layer["last"]), layer["ops"]) for layer in ops["layers"]]
    for where, counts in [*groups, ("outside", ops["outside"])]:
        names = ", ".join(f"{n} {op}" if n > 1 else op for op, n in sorted(counts.items()))
        table.add_row(where, str(sum(counts.values())), names)
    return table


def _tensorrt(facts: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    sizes = ", ".join(
        f"{size(facts[f'{name}_bytes'])} of {words}"
        for name, words in (("plan", "plan"), ("cubin", "ingot's kernels"), ("workspace", "workspace for plugins"))
    )
    table = Table(box=box.SIMPLE, title=f"TensorRT: {sizes}", title_justify="left")
    for column in ("profile", "steps", "layers", "plugins", "reading"):
        table.add_column(column)
    for i, profile in enumerate(facts["profiles"]):
        kind = "decoding" if profile["decoding"] else "any"
        counts = (
            ", ".join(f"{n} {name}" for name, n in profile[key].items()) for key in ("layers", "plugins", "stored")
        )
        table.add_row(str(i), f"{kind}, up to {profile['tokens']} tokens", *counts)
    return table


def _span(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"each of layers {first} to {last}"


def size(num_bytes: float) -> str:
    """Bytes for a reader: 28.3 MB (powers of 1000, as disks are sold)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} bytes" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
