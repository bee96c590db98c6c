"""Does lm-eval give a model the same scores over HTTP as in transformers?

    python benchmarks/lm_eval_score.py ENGINE CHECKPOINT TEXT [--lm-eval PYTHON] [--items 120]

Three tasks are made from a text file (documents separated by a line `<|endoftext|>`), in a temporary folder: the true
next line among four (loglikelihood), the perplexity of whole documents (loglikelihood_rolling), and the end of a line
written out (generate_until). lm-eval (0.4.13) runs them twice, through `local-completions` against `ingot serve`, which
is echo with log-probabilities, and through `hf`. The engine must be built with --dtype float32.
Printed: each score twice, and how far apart single answers are. Exit code 1 unless the scores are equal.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from serving import server

WINDOW = 1024  # tokens of a window of loglikelihood_rolling
METRICS = {
    "next_line": ("acc", "acc_norm"),
    "documents": ("byte_perplexity", "bits_per_byte"),
    "end_line": ("exact_match",),
}


def tasks(text: Path, num_items: int, folder: Path) -> None:
    """Writes the data and the descriptions of the tasks. lm-eval reads a description in JSON too: it is YAML."""
    rng = random.Random(0)
    documents = [each.strip("\n") for each in text.read_text(encoding="utf-8").split("<|endoftext|>")]
    documents = [each for each in documents if each.count("\n") > 20]
    lines = [line for each in documents for line in each.split("\n") if len(line.strip()) > 10]
    items = []
    while len(items) < num_items:
        before = rng.choice(documents).split("\n")
        at = rng.randrange(8, len(before))
        true, start = before[at], max(0, at - 40)
        choices = [true, *rng.sample(lines, 3)]
        if len(true.strip()) <= 10 or len(set(choices)) < 4:
            continue
        rng.shuffle(choices)
        context = "\n".join(before[start:at]) + "\n"
        half = true.rindex(" ", 0, -1) if " " in true.strip() else len(true) - 4
        head, rest = context + true[:half], true[half:]
        items.append({"context": context, "choices": choices, "label": choices.index(true), "head": head, "rest": rest})
    data = {"items": items, "documents": [{"text": each} for each in documents[:20]]}
    for name, rows in data.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def task(name: str, rows: str, **more: object) -> None:
        description = {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / rows)}},
            "test_split": "test", "target_delimiter": "",
            "metric_list": [{"metric": metric} for metric in METRICS[name]], **more,
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(description), encoding="utf-8")

    task("next_line", "items.jsonl", output_type="multiple_choice", doc_to_text="{{context}}", doc_to_target="label",
         doc_to_choice="choices")  # fmt: skip
    task("documents", "documents.jsonl", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text")
    task("end_line", "items.jsonl", output_type="generate_until", doc_to_text="{{head}}", doc_to_target="rest",
         generation_kwargs={"until": ["\n"], "max_gen_toks": 40, "do_sample": False})  # fmt: skip


def evaluate(python: str, folder: Path, kind: str, **options: object) -> tuple[dict, dict]:
    """(scores, answers) that lm-eval finds through one of its models, each by task."""
    out = folder / kind
    command = [python, "-m", "lm_eval", "run", "--model", kind, "--include_path", str(folder), "--log_samples",
               "--output_path", str(out), "--batch_size", "1", "--device", "cpu", "--tasks", *METRICS,
               "--model_args", ",".join(f"{name}={value}" for name, value in options.items())]  # fmt: skip
    # a small model is slower with threads that wait for each other than with one
    ones = {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "OMP_NUM_THREADS")}
    environment = {**os.environ, **ones, "HF_HOME": str(folder / "cache"), "LMEVAL_LOG_LEVEL": "ERROR"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"lm-eval with {kind} failed:\n{ran.stderr[-4000:]}")
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    answers = {}
    for name in METRICS:
        lines = next(out.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
        samples = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
        answers[name] = [answer for sample in samples for answer in sample["filtered_resps"]]
    return results, answers


def apart(ours: list, theirs: list) -> str:
    """How far single answers are from each other: log-likelihoods by their difference, texts by whether they are equal.

    An answer is (log-likelihood, whether each token is the likeliest), a log-likelihood, or a text.
    """
    if isinstance(ours[0], str) and not ours[0].lstrip("-").replace(".", "", 1).isdigit():
        return f"{sum(map(str.__eq__, ours, theirs))} of {len(ours)} texts are equal"
    pairs = [(a, b) if isinstance(a, list) else ([a, True], [b, True]) for a, b in zip(ours, theirs, strict=True)]
    furthest = max(abs(float(a[0]) - float(b[0])) for a, b in pairs)
    greedy = sum(str(a[1]) == str(b[1]) for a, b in pairs)
    return f"{len(pairs)} log-likelihoods, {furthest:.1e} nats apart at most; is_greedy equal in {greedy}"


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--lm-eval", default=sys.executable, help="the Python that has lm-eval[api]")
    parser.add_argument("--items", type=int, default=120)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        tasks(args.text, args.items, folder)
        theirs = evaluate(args.lm_eval, folder, "hf", pretrained=args.checkpoint, dtype="float32",
                          max_length=WINDOW)  # fmt: skip
        async with server(args.engine) as (port, _):
            # lm-eval takes two from max_length: one for the token that is generated, one for the window's prefix
            ours = await asyncio.to_thread(
                evaluate, args.lm_eval, folder, "local-completions", model="m", tokenizer=args.checkpoint,
                base_url=f"http://127.0.0.1:{port}/v1/completions", num_concurrent=8, max_length=WINDOW + 2,
            )  # fmt: skip
    equal = True
    for name, metrics in METRICS.items():
        print(f"{name}: {apart(ours[1][name], theirs[1][name])}")
        for metric in metrics:
            a, b = (results[name][f"{metric},none"] for results in (ours[0], theirs[0]))
            print(f"  {metric}: ingot serve {a:.6f}, transformers {b:.6f}, difference {a - b:+.1e}")
            equal &= abs(a - b) < 1e-5
    raise SystemExit(0 if equal else 1)


if __name__ == "__main__":
    asyncio.run(main())
