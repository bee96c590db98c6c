"""Text as a model writes it itself, to train a head on (`ingot train-head`): what it will have to guess.

    python benchmarks/own_text.py ENGINE TEXT OUT [--tokens 300000]

Beginnings of 48 tokens from anywhere in TEXT, continued by 208 tokens, half of them greedily, half sampled at 0.8.
"""

import argparse
import random
import time
from pathlib import Path

from ingot import LLM, SamplingParams

BATCH, BEGINNING, LENGTH = 128, 48, 208  # requests, tokens of a prompt, tokens of an answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    text, rng, num, start = args.text.read_text(encoding="utf-8"), random.Random(args.seed), 0, time.perf_counter()
    with LLM(args.engine, max_num_seqs=64) as llm, args.out.open("w", encoding="utf-8") as out:
        assert llm.text is not None, "the engine has no tokenizer"
        while num < args.tokens:
            places = [rng.randrange(len(text)) for _ in range(BATCH)]
            prompts = [llm.text.encode(text[at : at + 8 * BEGINNING])[:BEGINNING] or [0] for at in places]
            params = [
                SamplingParams(temperature=0.8 * (i % 2), max_tokens=LENGTH, ignore_eos=True, seed=num + i)
                for i in range(BATCH)
            ]
            for output in llm.generate(prompts, params, progress=False):
                ids = [*(output.prompt_token_ids or ()), *output.outputs[0].token_ids]
                out.write(llm.text.tokenizer.decode(ids, skip_special_tokens=False) + "<|endoftext|>")
            num += BATCH * LENGTH
            print(f"{num} tokens in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
