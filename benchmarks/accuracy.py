"""Is the engine the model? Greedy continuations and loss of an engine against transformers on a text file.

    python benchmarks/accuracy.py TEXT [--model engines/demo/pycoder-14m] [--prompts 64] [--new-tokens 48]

Two figures, each from one run over the same text (documents separated by a line `<|endoftext|>`):
greedy tokens in fp32 (identical or not, per prompt), and mean loss in bf16 over all windows of the text.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from ingot import LLM, BuildConfig, SamplingParams, build_engine
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW = 1024


def documents(path: Path, tokenizer) -> list[list[int]]:
    """Token ids of each document, the separator token first, as the model was trained."""
    texts = [t.strip("\n") for t in path.read_text().split("<|endoftext|>")]
    return [[tokenizer.bos_token_id, *tokenizer.encode(t, add_special_tokens=False)] for t in texts if t.strip()]


@torch.inference_mode()
def greedy_agreement(model_dir: str, docs: list[list[int]], num_prompts: int, new_tokens: int, work: Path) -> int:
    """Number of prompts whose fp32 greedy continuation is identical, all prompts in one in-flight batch."""
    build_engine(BuildConfig(model=model_dir, out=str(work / "fp32"), dtype="float32"))
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    pieces = [d[i : i + 256] for d in docs for i in range(0, len(d) - 255, 256)]
    # from all over the text, 16 to 142 tokens, all lengths different
    prompts = [pieces[i * len(pieces) // num_prompts][: 16 + 2 * i] for i in range(num_prompts)]
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    with LLM(work / "fp32") as llm:
        ours = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, progress=False)]
    same = 0
    for prompt, tokens in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
                                eos_token_id=None, pad_token_id=0)[0, len(prompt):].tolist()  # fmt: skip
        same += theirs == tokens
    print(f"greedy fp32: {same} of {len(prompts)} continuations of {new_tokens} tokens identical to transformers")
    return same


@torch.inference_mode()
def losses(model_dir: str, docs: list[list[int]], work: Path) -> tuple[float, float]:
    """Mean loss (nats per token) of transformers and of the engine in bf16, over the same windows."""
    windows = [d[i : i + WINDOW] for d in docs for i in range(0, len(d), WINDOW) if len(d[i : i + WINDOW]) > 1]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    start, total, count = time.perf_counter(), 0.0, 0
    for window in windows:
        ids = torch.tensor([window])
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += len(window) - 1
    theirs, middle = total / count, time.perf_counter()
    build_engine(BuildConfig(model=model_dir, out=str(work / "bf16"), dtype="bfloat16"))
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with LLM(work / "bf16", prefix_cache=False) as llm:
        outputs = llm.generate(windows, params, progress=True)
    total = 0.0
    for window, output in zip(windows, outputs, strict=True):
        total -= sum(output.prompt_logprobs[i][window[i]].logprob for i in range(1, len(window)))
    ours = total / count
    print(f"loss bf16 over {count} tokens: transformers {theirs:.5f} ({middle - start:.0f} s), "
          f"ingot {ours:.5f}, difference {100 * (ours / theirs - 1):+.3f}%")  # fmt: skip
    return theirs, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / "engines/demo/pycoder-14m"))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=48)
    args = parser.parse_args()
    docs = documents(args.text, AutoTokenizer.from_pretrained(args.model))
    with tempfile.TemporaryDirectory() as work:
        same = greedy_agreement(args.model, docs, args.prompts, args.new_tokens, Path(work))
        theirs, ours = losses(args.model, docs, Path(work))
    raise SystemExit(0 if same == args.prompts and abs(ours / theirs - 1) < 0.005 else 1)


if __name__ == "__main__":
    main()
