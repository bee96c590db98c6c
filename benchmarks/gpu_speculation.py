"""Speculation on a GPU: is it exact, and what does it gain at the cost of an 8B model?

    python benchmarks/gpu_speculation.py TEXT [--head HEAD] [--nodes 7] [--part all|build|exact|speed] [--seconds 540]
        [--work DIR]

TEXT: documents separated by a line `<|endoftext|>`, which prompts are cut from. HEAD: the checkpoint of an EAGLE-3 head
of pycoder-14m (`ingot train-head`), to measure as drafter `eagle`. Models and engines are made in DIR (`build`: the
large ones, and nothing else; what was cut off goes on with the next call) and found there by the next run.
exact: pycoder-14m and its drafters in float32, alone, in a batch (twice, so that prefixes are found) and in a pool so
small that requests are thrown out: greedy answers to 200 prompts against those without drafts. Where they part, the
gap between the two likeliest tokens: other shapes of a step sum in another order, so near ties may differ.
speed: the same inside the shapes of Llama-3.1-8B, of a draft model (`embedded_checkpoint.py`) and of a head for it
(`embedded_head.py`), bf16. Both an engine without speculation (opened as one) and one with it answer the same prompts
in turn; the former twice, which says what the machine's noise is (A/A). So many requests are answered at a time, and
when one is, the next comes (--waves 1: all come at once, and the time is that of the slowest). With --nodes each
drafter is measured with trees of so many nodes, too, where those pay. The exit status is the number of findings: an
answer that parts at a gap beyond rounding, a batch below 0.97x, or batch 1 below 2x (draft) and 2.3x (eagle).
`--target cpu --shape tiny --draft-shape tiny-draft` goes through it all without a GPU; its times say nothing.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from embedded_checkpoint import SHAPES
from ingot import LLM, SamplingParams
from ingot.runtime.stream import Stream
from speculation import DRAFTERS, SETTINGS, answers, gap, prompts_of
from speculation_engines import TINY, Engines

ROUNDING = {"float32": 1e-3, "bfloat16": 0.25}  # nats between two tokens of which either may come out
LEAST, WANTED = 0.97, {"draft": 2.0, "eagle": 2.3}


def parted(one: Sequence[int], two: Sequence[int]) -> int | None:
    """Where two answers part."""
    return next((i for i, pair in enumerate(zip(one, two, strict=True)) if pair[0] != pair[1]), None)


def compare(llm: LLM, prompts: Sequence[list[int]], found: list[Any], wanted: list[Any], most: int = 12) -> list[float]:
    """Gaps, by the engine without drafts, where answers part; of `most` of them."""
    places = [(i, at) for i in range(len(prompts)) if (at := parted(found[i], wanted[i])) is not None]
    return [gap(llm, prompts[i], wanted[i], at) for i, at in places[:most]] + [0.0] * max(0, len(places) - most)


def exact(args: argparse.Namespace, end: float) -> dict[str, Any]:
    engines = args.engines.small()
    target = engines.pop("")
    for name, engine in engines.items():
        DRAFTERS[name] = {"draft_engine": engine}
        if args.nodes:
            DRAFTERS[f"{name} trees"] = {"draft_engine": engine} | trees(args.drafts, args.nodes)
    with LLM(target, num_kv_pages=4000) as llm:
        prompts = prompts_of(llm, args.text, args.prompts)
        wanted = answers(llm, prompts, args.max_tokens)
        alone = [answers(llm, [prompt], args.max_tokens)[0] for prompt in prompts[:20]]
        control = len(compare(llm, prompts[:20], alone, wanted[:20]))
    print(f"exact: {len(prompts)} prompts; without drafts {control} of 20 answers differ alone and in a batch")
    result: dict[str, Any] = {"prompts": len(prompts), "control": control, "settings": []}
    for setting, room in SETTINGS.items():
        for name, how in DRAFTERS.items():
            if time.monotonic() > end:
                print("the seconds are used up")
                return result
            start = time.perf_counter()
            pool = {} if "num_kv_pages" in room else {"num_kv_pages": 4000}
            how = {"num_draft_tokens": args.drafts} | how
            with LLM(target, speculate=name.split()[0], adapt_drafts=False, **how, **room, **pool) as llm:
                found = answers(llm, prompts, args.max_tokens, 2 if setting == "batched" else 1)
                metrics = llm.metrics()
            stats = metrics.speculation
            gaps = []
            if found != wanted:
                with LLM(target, num_kv_pages=4000) as llm:
                    gaps = compare(llm, prompts, found, wanted)
            entry = {
                "drafter": name, "setting": setting, "same": len(prompts) - len(gaps), "gaps": gaps,
                "mean_length": stats.mean_length, "drafted": stats.drafted, "accepted": stats.accepted,
                "preemptions": metrics.preemptions, "prefix_hits": metrics.prefix_hits,
            }  # fmt: skip
            result["settings"].append(entry)
            save(args, {"exact": result})
            print(f"  {name:11} {setting:13} {entry['same']} of {len(prompts)} the same"
                  + (f" (gaps up to {max(gaps):.1e})" if gaps else "") + f"; {stats.mean_length or 1:.2f} tokens a "
                  f"verification; {metrics.preemptions} thrown out, {metrics.prefix_hits} prefix hits; "
                  f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    return result


@contextmanager
def opened(engine: Path, pages: int, target: str, **options: Any) -> Iterator[LLM]:
    start = time.perf_counter()
    if target == "cuda":
        options["gpu_memory_utilization"] = 0.95
    with LLM(engine, num_kv_pages=pages, prefix_cache=False, **options) as llm:
        what = options.get("speculate", "none")
        print(f"opened {engine.name} (speculate: {what}) in {time.perf_counter() - start:.1f} s", flush=True)
        yield llm


def rate(llm: LLM, prompts: list[list[int]], num: int, at_a_time: int | None = None) -> tuple[float, list[list[int]]]:
    """Output tokens a second, and the answers; the next prompt comes when one of `at_a_time` is answered."""
    params = SamplingParams(temperature=0, max_tokens=num, ignore_eos=True)
    session, done = llm._session, SimpleQueue[Stream]()

    def listen(changed: list[Stream]) -> None:  # in the loop's thread, so that no step is without a request
        for stream in changed:
            if stream.finished:
                done.put(stream)
                session.submit(list(islice(waiting, 1)))

    streams = [session.prepare(prompt, params, listen) for prompt in prompts]
    waiting = iter(streams)
    start = time.perf_counter()
    session.submit(list(islice(waiting, at_a_time or len(streams))))
    for _ in streams:
        if error := done.get().error:
            raise error
    seconds = time.perf_counter() - start
    return len(prompts) * num / seconds, [list(stream.output().outputs[0].token_ids) for stream in streams]


def speed(args: argparse.Namespace, end: float) -> dict[str, Any]:
    engines = args.engines.large(args.shape, args.draft_shape)
    target = engines.pop("")
    levels = [int(level) for level in args.levels.split(",")]
    pages = 1 + max(levels) * -(-(160 + args.output + 20) // 16)
    result: dict[str, Any] = {"target": args.shape, "draft": args.draft_shape, "head": str(args.head), "levels": []}
    names = [name for name in args.drafters.split(",") if name in engines]
    names = [each for name in names for each in ((name, f"{name} trees") if args.nodes else (name,))]
    with opened(target, pages, args.target) as plain:
        prompts = prompts_of(plain, args.text, args.prompts)
        rate(plain, prompts[: max(levels)], 8)
        for i, name in enumerate(names):
            until = time.monotonic() + (end - time.monotonic()) / (len(names) - i)
            kind, _, tree = name.partition(" ")
            num = args.head_drafts if kind == "eagle" else args.drafts
            how = dict(speculate=kind, draft_engine=engines[kind], num_draft_tokens=num, adapt_drafts=not args.always)
            how |= trees(num, args.nodes) if tree else {}
            with opened(target, pages, args.target, **how) as drafting:
                result[name] = {"drafts": how["num_draft_tokens"]} | steps_of(drafting)
                print(f"{name}: a step of the target, ms by tokens: ", result[name]["target_ms"], flush=True)
                print(f"{name}: a step of the drafter, ms by sequences: ", result[name]["draft_ms"], flush=True)
                rate(drafting, prompts[: max(levels)], 8)
                print("drafter     batch  plain tok/s  drafting  speed-up   A/A  tokens/verification  ms a step  "
                      "drafting in  differ (gap)")  # fmt: skip
                for j, level in enumerate(levels):
                    budget = (until - time.monotonic()) / (len(levels) - j)
                    entry = {"drafter": name, **one_level(plain, drafting, prompts, level, args, budget)}
                    result["levels"].append(entry)
                    save(args, {"speed": result})
                    gaps = f" ({max(entry['gaps']):.3f})" if entry["gaps"] else ""
                    print(f"{name:11} {level:5} {entry['plain']:12.0f} {entry['drafting']:9.0f} "
                          f"{entry['speedup']:8.2f}x {entry['aa']:5.2f} {entry['mean_length']:20.2f} "
                          f"{entry['step_ms']:10.2f} {entry['share']:12.0%}  {len(entry['gaps'])} of "
                          f"{entry['compared']}{gaps}", flush=True)  # fmt: skip
    return result


def trees(drafts: int, nodes: int) -> dict[str, int]:
    """Options: a little less deep than a chain of `drafts`, if that would leave no nodes for branches."""
    return {"num_draft_tokens": min(drafts, nodes - 2), "num_draft_nodes": nodes}


def steps_of(drafting: LLM) -> dict[str, Any]:
    """What steps of the target and of the drafter cost, as they were measured when it was opened."""
    costs = drafting._session.executor.costs
    assert costs is not None and costs.draft is not None
    sizes = [1, 2, 4, 5, 8, 16, 32, 64, 128, 256, 512]
    return {
        "target_ms": {n: round(1000 * costs.target(n), 3) for n in sizes},
        "draft_ms": {n: round(1000 * costs.draft(n), 3) for n in sizes[:-1]},
    }


def one_level(
    plain: LLM, drafting: LLM, prompts: list[list[int]], level: int, args: argparse.Namespace, budget: float
) -> dict[str, Any]:
    """So many requests at a time, in rounds of which each has its own prompts, `waves` times as many: rates over all of
    them, and A/A."""
    began, pairs, gaps = time.monotonic(), [], []
    before, num_prompts = drafting.metrics().speculation, level * args.waves
    while not pairs or (time.monotonic() - began < 0.9 * budget and len(pairs) < args.rounds):
        some = [prompts[(len(pairs) * num_prompts + i) % len(prompts)] for i in range(num_prompts)]
        order = [plain, drafting, plain] if len(pairs) % 2 else [plain, plain, drafting]
        rates = [rate(llm, some, args.output, level) for llm in order]
        mine, found = rates.pop(order.index(drafting))
        if len(pairs) < 2:
            gaps += compare(plain, some, found, rates[0][1], 6)
        pairs.append((rates[0][0], rates[1][0], mine))
    after = drafting.metrics().speculation
    num_drafts, accepted = after.drafts - before.drafts, after.accepted - before.accepted
    steps, all_steps = after.steps - before.steps, after.all_steps - before.all_steps
    num_tokens = num_prompts * args.output  # of a round
    seconds = sum(num_tokens / mine for *_, mine in pairs)
    without = sum(num_tokens * (1 / a + 1 / b) / 2 for a, b, _ in pairs)
    return {
        "batch": level, "rounds": len(pairs), "plain": len(pairs) * num_tokens / without,
        "drafting": len(pairs) * num_tokens / seconds,
        "speedup": without / seconds, "speedups": [round(2 * mine / (a + b), 3) for a, b, mine in pairs],
        "aa": statistics.median(b / a for a, b, _ in pairs), "mean_length": 1 + accepted / max(1, num_drafts),
        "step_ms": 1000 * seconds / max(1, all_steps), "share": steps / max(1, all_steps),
        "compared": min(2, len(pairs)) * num_prompts, "gaps": gaps,
    }  # fmt: skip


def save(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """What there is so far: a run that is cut off is worth something."""
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


def findings(result: dict[str, Any]) -> list[str]:
    found = [
        f"{entry['drafter']}, {entry['setting']}: answers part where the gap is {max(entry['gaps']):.1e} nats"
        for entry in result.get("exact", {}).get("settings", ())
        if max(entry["gaps"], default=0.0) > ROUNDING["float32"]
    ]
    for entry in result.get("speed", {}).get("levels", ()):
        where = f"{entry['drafter']}, batch {entry['batch']}"
        if entry["speedup"] < (WANTED[entry["drafter"].split()[0]] if entry["batch"] == 1 else LEAST):
            found.append(f"{where}: {entry['speedup']:.2f}x")
        if max(entry["gaps"], default=0.0) > ROUNDING["bfloat16"]:
            found.append(f"{where}: answers part where the gap is {max(entry['gaps']):.2f} nats")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--head", type=Path)
    parser.add_argument("--part", default="all", choices=("all", "build", "exact", "speed"))
    parser.add_argument("--seconds", type=float, default=540, help="engines are built first if they are not there")
    parser.add_argument("--work", type=Path, default=Path("/tmp/ingot-speculation"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--drafters", default="draft,eagle", help="to measure the speed of")
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--head-drafts", type=int, default=7)
    parser.add_argument("--nodes", type=int, default=0, help="of trees, 4 to 16; 0: chains only")
    parser.add_argument("--always", action="store_true", help="draft in every step, whether it pays or not")
    parser.add_argument("--target", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shape", default="llama-8b", choices=SHAPES | TINY)
    parser.add_argument("--draft-shape", default="llama-68m", choices=SHAPES | TINY)
    parser.add_argument("--levels", default="1,4,16,64,256")
    parser.add_argument("--output", type=int, default=128, help="tokens of an answer, where speed is measured")
    parser.add_argument(
        "--waves", type=int, default=3, help="prompts of a round, in batches; 1: all at once, and a tail"
    )
    parser.add_argument("--rounds", type=int, default=32, help="at most, for each batch")
    parser.add_argument("--tune", action="store_true", help="time the tactics of the large engines: minutes more")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    args.work.mkdir(parents=True, exist_ok=True)
    args.engines = Engines(args.work, args.target, args.head, args.tune, max(7, args.nodes))
    result: dict[str, Any] = {}
    if args.part in ("all", "build"):
        args.engines.large(args.shape, args.draft_shape)
    if args.part in ("all", "exact"):
        result["exact"] = exact(args, end if args.part == "exact" else time.monotonic() + args.seconds / 3)
    if args.part in ("all", "speed"):
        result["speed"] = speed(args, end)
    result["findings"] = findings(result)
    print("\n".join(result["findings"]) or "nothing found")
    save(args, result)
    sys.exit(min(100, len(result["findings"])))


if __name__ == "__main__":
    main()
