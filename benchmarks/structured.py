"""Structured outputs: are answers what their schema says, what is refused, and what masks cost.

    python benchmarks/structured.py ENGINE SCHEMAS ... [--answers 2] [--max-tokens 200] [--batch 32]

SCHEMAS: folders of schema cases, as JSON Schema's test suite has them (a list of schemas with tests) or MaskBench (one
schema with tests a file). Three parts: every instance is checked against the matcher token by token (a valid one must
be accepted; an invalid one that is accepted is a hole, through which an answer might be wrong); answers are generated
hot under each schema and checked by the `jsonschema` library; a batch with masks is timed against one without.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
from ingot import LLM, RequestError, SamplingParams
from ingot.runtime.grammar import Grammars, StructuredOutputs


def cases(folder: Path) -> Iterator[tuple[str, Any, list[tuple[Any, bool]]]]:
    """(name, schema, [(instance, whether it is valid)]) of each schema below a folder."""
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for i, entry in enumerate(content if isinstance(content, list) else [content]):
            tests = [(test["data"], bool(test["valid"])) for test in entry.get("tests", [])]
            yield f"{path.stem}[{i}]", entry["schema"], tests


def accepts(grammars: Grammars, wanted: StructuredOutputs, tokens: list[int]) -> bool:
    """Whether an answer of these tokens could come out and be complete."""
    matcher = grammars.matcher(wanted)
    for i, token in enumerate(tokens):
        if not matcher.mask[token // 32] >> (token % 32) & 1:
            return False
        if matcher.advance(token):
            return i == len(tokens) - 1
    return matcher.complete


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("schemas", type=Path, nargs="+")
    parser.add_argument("--answers", type=int, default=2, help="for each schema")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    with LLM(args.engine) as llm:
        assert llm.text is not None, "the engine has no tokenizer"
        grammars = Grammars(llm.text.tokenizer.to_str(), llm.vocab_size, llm._session.scheduler.eos_token_ids)
        for folder in args.schemas:
            check(folder, llm, grammars, args.answers, args.max_tokens)
        cost(llm, grammars, args.batch)


def check(folder: Path, llm: LLM, grammars: Grammars, num_answers: int, max_tokens: int) -> None:
    counts, refused, wrong = Counter[str](), Counter[str](), []
    jobs, milliseconds = [], []
    for name, schema, tests in cases(folder):
        counts["schemas"] += 1
        start = time.perf_counter()
        try:
            wanted = StructuredOutputs(json=json.dumps(schema))
            grammars.matcher(wanted)
        except RequestError as error:
            refused[str(error).partition(": ")[2].split(":")[0][:40]] += 1
            continue
        milliseconds.append(1000 * (time.perf_counter() - start))
        counts["supported"] += 1
        for instance, valid in tests:
            tokens = llm.text.encode(json.dumps(instance, ensure_ascii=False), add_special_tokens=False)  # type: ignore[union-attr]
            accepted = accepts(grammars, wanted, tokens)
            counts[("valid" if valid else "invalid") + (" accepted" if accepted else " rejected")] += 1
            if accepted and not valid:
                wrong.append(f"{name} lets {json.dumps(instance)[:60]} through")
        jobs.append((name, schema, wanted))
    params = [
        SamplingParams(temperature=1.0, seed=1, n=num_answers, max_tokens=max_tokens, structured_outputs=wanted)
        for _, _, wanted in jobs
    ]
    outputs = llm.generate(["answer = json.loads('"] * len(jobs), params, progress=False)
    for (name, schema, _), output in zip(jobs, outputs, strict=True):
        for answer in output.outputs:
            if answer.finish_reason != "stop":
                counts["answers cut off"] += 1
                continue
            try:
                jsonschema.validate(json.loads(answer.text), schema)
                counts["answers right"] += 1
            except jsonschema.SchemaError:  # patterns that Python's re cannot read
                counts["answers not checked"] += 1
            except (ValueError, jsonschema.ValidationError) as error:
                counts["answers WRONG"] += 1
                wrong.append(f"{name}: {answer.text[:80]!r} ({str(error).splitlines()[0][:80]})")
    print(f"{folder.name}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    if milliseconds:
        print(f"  compiled in {statistics.median(milliseconds):.1f} ms (median), {max(milliseconds):.0f} at most")
    print("  refused: " + ", ".join(f"{what} ({count})" for what, count in refused.most_common(12)))
    for line in wrong[:20]:
        print("  " + line)


def cost(llm: LLM, grammars: Grammars, batch: int) -> None:
    """Seconds of a batch with masks and without, in turns, and of the masks alone."""
    regex = {"regex": "[a-z ,.]{100}"}
    prompts = [f"# number {i}\n" for i in range(batch)]
    plain = SamplingParams(temperature=1.0, seed=1, max_tokens=60, ignore_eos=True)
    bound = SamplingParams(temperature=1.0, seed=1, max_tokens=60, structured_outputs=regex)
    times: dict[str, list[float]] = {"plain": [], "bound": []}
    tokens = 0
    for _ in range(5):
        for name, params in (("plain", plain), ("bound", bound)):
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, progress=False)
            count = sum(len(output.outputs[0].token_ids) for output in outputs)
            times[name].append((time.perf_counter() - start) / count)
            tokens = count
    matcher = grammars.matcher(StructuredOutputs(**regex))
    start = time.perf_counter()
    for _ in range(50):
        matcher.mask  # noqa: B018  worked out here
        matcher.advance(int(next(t for t in range(llm.vocab_size) if matcher.mask[t // 32] >> (t % 32) & 1)))
    mask = (time.perf_counter() - start) / 50
    free, held = (statistics.median(times[name]) for name in ("plain", "bound"))
    print(
        f"batch of {batch}: {1e6 * free:.0f} us a token without masks, {1e6 * held:.0f} with ({held / free:.2f} x, "
        f"{tokens} tokens); a mask and its token {1e6 * mask:.0f} us"
    )


if __name__ == "__main__":
    main()
