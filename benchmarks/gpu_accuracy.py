"""Does a GPU engine say what the CPU engine says? Two engines of one checkpoint and dtype, one for each target.

    python benchmarks/gpu_accuracy.py CPU_ENGINE CUDA_ENGINE [--text FILE] [--prompts 64] [--new-tokens 48]
                                      [--tokens 4096] [--kv-mib 512] [--details 4]

Greedy continuations on both; where one first differs, the gap between the two candidates on either engine. Then every
token that the GPU chose is scored by the CPU engine along the GPU's own continuation: it must be the CPU's first choice
or within rounding of it, also behind a near tie, where the two texts have parted. Last the loss of both on the text.

Rounding: log-probabilities closer than `ROUNDING[dtype]` of the largest one met in the text, which stands for the size
of the logits. An engine without a tokenizer gets random tokens. Exit code 1 if a token is beyond rounding, or the loss
differs by more than 0.2 %.
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ingot
from ingot import LLM, SamplingParams
from ingot.engines.manifest import Manifest

ROUNDING = {"bfloat16": 2**-6, "float16": 2**-9, "float32": 2**-14}  # four units of bf16, fp16; sums in any order
LOSS = 0.002
WINDOW = 512
CANDIDATES = 5


@dataclass(frozen=True)
class Said:
    """What an engine made of the prompts and windows: tokens, candidates of each token, loss per window token."""

    tokens: list[list[int]]
    candidates: list[list[dict[int, Any]]]
    losses: list[float]


def pieces(args: argparse.Namespace, llm: LLM) -> list[int]:
    """One long list of tokens to cut prompts and windows from."""
    if llm.text is None:
        generator = random.Random(0)
        return [generator.randrange(3, llm.vocab_size) for _ in range(args.tokens)]
    if args.text:
        return llm.text.encode(args.text.read_text(encoding="utf-8"))
    sources = sorted((Path(ingot.__file__).parent / "runtime").rglob("*.py"))
    return llm.text.encode("".join(path.read_text(encoding="utf-8") for path in sources))


def prompts_of(tokens: list[int], num: int, longest: int) -> list[list[int]]:
    """From all over the text, lengths from 1 to `longest`, or to the text's own."""
    longest = min(longest, len(tokens))
    lengths = [1 + 2 * i % longest for i in range(num)]
    starts = [i * (len(tokens) - longest) // num for i in range(num)]
    return [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def scores(llm: LLM, texts: list[list[int]], num: int = 0) -> list[list[dict[int, Any]]]:
    """The candidates of each token of each text but its first."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=num)
    return [list(output.prompt_logprobs[1:]) for output in llm.generate(texts, params, progress=False)]


def say(llm: LLM, prompts: list[list[int]], windows: list[list[int]], new_tokens: int) -> Said:
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, logprobs=CANDIDATES)
    answers = [output.outputs[0] for output in llm.generate(prompts, params, progress=False)]
    losses = [
        -found[token].logprob
        for window, entries in zip(windows, scores(llm, windows), strict=True)
        for token, found in zip(window[1:], entries, strict=True)
    ]
    return Said([list(a.token_ids) for a in answers], [list(a.logprobs) for a in answers], losses)


def partings(cpu: Said, gpu: Said) -> list[tuple[int, int, float, float]]:
    """Prompt and place of each first difference, and by how much either engine prefers its own token to the other's."""
    found = []
    for number, (ours, theirs) in enumerate(zip(gpu.tokens, cpu.tokens, strict=True)):
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if at is not None:
            mine, other = ours[at], theirs[at]
            gaps = (
                said.candidates[number][at][one].logprob
                - (said.candidates[number][at][two].logprob if two in said.candidates[number][at] else float("-inf"))
                for said, one, two in ((gpu, mine, other), (cpu, other, mine))
            )
            found.append((number, at, *gaps))
    return found


def forced_gaps(llm: LLM, prompts: list[list[int]], tokens: list[list[int]]) -> list[list[float]]:
    """By how much `llm`, led along the tokens, prefers its own choice to each of them; 0: it is its choice."""
    texts = [prompt + own for prompt, own in zip(prompts, tokens, strict=True)]
    found = []
    for own, entries in zip(tokens, scores(llm, texts, num=1), strict=True):
        last = entries[-len(own) :]
        found.append(
            [max(e.logprob for e in entry.values()) - entry[t].logprob for t, entry in zip(own, last, strict=True)]
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cpu", type=Path)
    parser.add_argument("cuda", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=4096, help="of the text whose loss is compared")
    parser.add_argument("--kv-mib", type=int, default=512, help="for the KV pages of either engine")
    parser.add_argument("--details", type=int, default=4, help="tokens that are shown in full")
    args = parser.parse_args()

    models = [Manifest.open(folder).model for folder in (args.cpu, args.cuda)]
    if len({(m.model_type, m.dtype, m.vocab_size, m.max_model_len) for m in models}) != 1:
        parser.error("the engines are of different models or dtypes")
    most = models[0].max_model_len - 1
    if not 1 <= args.new_tokens <= most:
        parser.error(f"--new-tokens is {args.new_tokens}, expected 1 to {most}")
    options: dict[str, Any] = dict(prefix_cache=False, kv_cache_memory=args.kv_mib << 20)
    with LLM(args.cuda, **options) as llm:
        tokens = pieces(args, llm)
        longest = min(144, models[0].max_model_len - args.new_tokens)
        prompts = prompts_of(tokens, args.prompts, longest)
        width = min(WINDOW, models[0].max_model_len - 1)
        scored = tokens[: max(0, args.tokens)]
        windows = [window for i in range(0, len(scored), width) if len(window := scored[i : i + width]) > 1]
        if not windows:
            parser.error(f"the loss would be that of {len(scored)} tokens, but it needs at least 2 tokens")
        gpu = say(llm, prompts, windows, args.new_tokens)
    with LLM(args.cpu, **options) as llm:
        cpu = say(llm, prompts, windows, args.new_tokens)
        gaps = forced_gaps(llm, prompts, gpu.tokens)

    bound = ROUNDING[models[0].dtype] * max(cpu.losses)
    parted = partings(cpu, gpu)
    first_beyond = [entry for entry in parted if not max(entry[2:]) <= bound]
    every = [gap for row in gaps for gap in row]
    ties, beyond = [gap for gap in every if 0 < gap <= bound], [gap for gap in every if not gap <= bound]
    theirs, ours = (sum(said.losses) / len(said.losses) for said in (cpu, gpu))
    apart = max(abs(a - b) for a, b in zip(cpu.losses, gpu.losses, strict=True))
    right = not first_beyond and not beyond and abs(ours / theirs - 1) <= LOSS
    print(
        f"{args.cuda.name} ({models[0].dtype}): {'right' if right else 'WRONG'}. "
        f"{len(prompts) - len(parted)} of {len(prompts)} identical, {len(parted) - len(first_beyond)} part at a near "
        f"tie, {len(first_beyond)} beyond rounding ({bound:.3g}). Forced: {len(every)} tokens, "
        f"{len(ties)} near ties (largest gap {max(ties, default=0):.3g}), {len(beyond)} beyond"
        f"{f' (largest {max(beyond):.3g})' if beyond else ''}. Loss over {len(gpu.losses)} tokens: CPU {theirs:.5f}, "
        f"GPU {ours:.5f}, {100 * (ours / theirs - 1):+.4f} %; a token differs by {apart:.3g} at most"
    )
    for number, at, mine, other in sorted(parted, key=lambda entry: -max(entry[2:]))[: args.details]:
        print(f"  prompt {number} of {len(prompts[number])} tokens parts at its token {at}: gap {mine:.4g} on the GPU, "
              f"{other:.4g} on the CPU")  # fmt: skip
    worst = [(number, at, gap) for number, row in enumerate(gaps) for at, gap in enumerate(row) if not gap <= bound]
    for number, at, gap in worst[: args.details]:
        print(f"  prompt {number} of {len(prompts[number])} tokens: token {at} of the GPU is {gap:.4g} below the CPU's")
    raise SystemExit(0 if right else 1)


if __name__ == "__main__":
    main()
