"""Speculative decoding: is greedy text that of the same engine without drafts, and what do drafts gain?

    python benchmarks/speculation.py ENGINE DRAFT_ENGINE TEXT [--head HEAD_ENGINE] [--nodes 16] [--prompts 200]
        [--max-tokens 48] [--drafts 4]

TEXT: documents separated by a line `<|endoftext|>`; prompts are parts of them, of 16 to 160 tokens. Every drafter
answers all of them, always drafting: one at a time, in a batch (twice the same, so that prefixes are found), and in a
KV pool so small that requests are thrown out and come back; with --nodes engines that draft do so again, with trees of
so many nodes. Engines in float32, else the shape of a batch decides on ties. Answers that differ are shown with the gap
of the logits where they part; the exit status is their number.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ingot import LLM, SamplingParams

PART = 600  # characters of a document that a prompt begins in
DRAFTERS: dict[str, dict[str, Any]] = {"ngram": {}, "suffix": {}, "draft": {}}
SETTINGS: dict[str, dict[str, Any]] = {
    "one at a time": {"max_num_seqs": 1},
    "batched": {"max_num_seqs": 16},
    "small pool": {"max_num_seqs": 16, "page_size": 8, "num_kv_pages": 90, "max_num_batched_tokens": 96},
}


def answers(llm: LLM, prompts: Sequence[Any], num: int, repeats: int = 1) -> list[Sequence[int]]:
    """Token ids of the answers; where they are asked for more than once, the last time."""
    params = SamplingParams(temperature=0, max_tokens=num, ignore_eos=True)
    for _ in range(repeats):
        outputs = llm.generate(prompts, params, progress=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def prompts_of(llm: LLM, path: Path, num: int) -> list[list[int]]:
    assert llm.text is not None, "the engine has no tokenizer"
    return beginnings(llm.text.encode, path, num)


def beginnings(encode: Callable[[str], list[int]], path: Path, num: int) -> list[list[int]]:
    """The first 16 to 160 tokens of parts of the documents."""
    documents = [part.strip() for part in path.read_text(encoding="utf-8").split("<|endoftext|>")]
    parts = [document[at : at + PART] for document in documents for at in range(0, len(document), 2 * PART)]
    found: list[list[int]] = []
    for i, text in enumerate(parts[:: max(1, len(parts) // num)]):
        ids = encode(text)
        if len(ids) >= 16:
            found.append(ids[: 16 + 37 * i % 145])
    if len(found) < num:
        sys.exit(f"{path} holds {len(found)} prompts, {num} are wanted")
    return found[:num]


def gap(llm: LLM, prompt: list[int], answer: Sequence[int], at: int) -> float:
    """Between the two most likely tokens at a place of an answer, in nats."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=2)
    (output,) = llm.generate([[*prompt, *answer[:at]]], params, progress=False)
    best = sorted((entry.logprob for entry in output.outputs[0].logprobs[0].values()), reverse=True)
    return best[0] - best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("draft", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--head", type=Path, help="of ENGINE, which then gives the hidden states that it reads")
    parser.add_argument("--nodes", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--drafts", type=int, default=4)
    args = parser.parse_args()
    DRAFTERS["draft"] = {"draft_engine": args.draft}
    if args.head:
        DRAFTERS["eagle"] = {"draft_engine": args.head}
    for name, options in list(DRAFTERS.items()) if args.nodes else ():
        if options:
            DRAFTERS[f"{name} trees"] = options | {"num_draft_nodes": args.nodes}
    with LLM(args.engine, max_num_seqs=16) as llm:
        prompts = prompts_of(llm, args.text, args.prompts)
        wanted = answers(llm, prompts, args.max_tokens)
    num_wrong = 0
    for name, options in DRAFTERS.items():
        for setting, room in SETTINGS.items():
            start = time.perf_counter()
            with LLM(
                args.engine,
                speculate=name.split()[0],
                num_draft_tokens=args.drafts,
                adapt_drafts=False,
                **options,
                **room,
            ) as llm:
                found = answers(llm, prompts, args.max_tokens, 2 if setting == "batched" else 1)
                metrics = llm.metrics()
                wrong = [i for i in range(len(prompts)) if found[i] != wanted[i]]
                for i in wrong[:5]:
                    at = next(j for j, pair in enumerate(zip(found[i], wanted[i], strict=True)) if len({*pair}) == 2)
                    print(f"  prompt {i} differs at {at}: gap {gap(llm, prompts[i], wanted[i], at):.2e} nats")
            num_wrong += len(wrong)
            stats = metrics.speculation
            places = " ".join(f"{number / stats.drafts:.2f}" for number in stats.accepted_at)
            print(
                f"{name}, {setting}: {len(prompts) - len(wrong)} of {len(prompts)} the same; "
                f"{stats.mean_length:.2f} tokens a verification, {stats.accepted} of {stats.drafted} drafted accepted, "
                f"by position {places}; {metrics.preemptions} thrown out, {metrics.prefix_hits} prefix hits; "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    sys.exit(min(num_wrong, 100))


if __name__ == "__main__":
    main()
