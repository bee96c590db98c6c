"""Speculation as its control would run it on a GPU, simulated: when it drafts, for whom, and what that gains.

    python benchmarks/speculation_control.py TEXT [--drafter draft|eagle] [--nodes 15] [--host 1.0] [--waves 3]

The scheduler and its `Speculation` are the real ones; a step takes as long as it did on an H100 (Llama-3.1-8B's shape,
measured by `gpu_speculation.py`), on a clock of its own. Drafts are as right as they are: pycoder-14m answers prompts
cut from TEXT, pycoder-draft-2m says at each place what would come next; a head is the same with a share of its mistakes
taken away. --host: the host's work, which steps with drafts have to wait for, in units of what it was there. --waves 1:
all requests come at once, and the time is that of the slowest; else the next comes when one is answered. Prints the
speed-up at each number of requests at a time, by rounds, with the share of steps that verified drafts.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedded_checkpoint import DEMO
from ingot.runtime.kv import PagePool
from ingot.runtime.request import Request, SamplingParams
from ingot.runtime.scheduler import Scheduler
from ingot.runtime.speculation.control import Speculation
from ingot.runtime.speculation.costs import Costs, Curve
from ingot.runtime.speculation.tree import Tree
from ingot.runtime.step import Step, Work
from speculation import beginnings
from transformers import AutoModelForCausalLM, AutoTokenizer

MS = {  # of a step: of the target by tokens, of the drafters by sequences
    "target": {1: 5.19, 2: 5.64, 4: 5.75, 8: 6.11, 16: 6.64, 32: 6.74, 64: 7.35, 128: 7.92, 256: 9.31, 512: 15.97},
    "draft": {1: 0.17, 2: 0.18, 4: 0.21, 16: 0.21, 32: 0.22, 64: 0.25, 128: 0.34, 256: 0.49},
    "eagle": {1: 0.32, 2: 0.33, 4: 0.34, 16: 0.35, 32: 0.39, 64: 0.41, 128: 0.49, 256: 0.68},
}
HOST_MS = (0.3, 0.006), (0.8, 0.03)  # of a step, and for each request more: hidden behind the step before, and not
READS = 400  # tokens of a prompt that a drafter reads in the time of a step for one sequence
MENDED = 0.3  # of the draft engine's mistakes a head does not make: 5.2 tokens a verification with 7 drafts
TOKENS, MOST = 128, 140  # of an answer, and as many as drafts may be about
BATCH = 50


def answers(text: Path, num: int) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """Prompts, what the target answers [P, N], and the place of each token among the drafter's guesses [P, N]."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "pycoder-14m")
    target, draft = (AutoModelForCausalLM.from_pretrained(DEMO / name, dtype=torch.float32).eval()
                     for name in ("pycoder-14m", "pycoder-draft-2m"))  # fmt: skip
    prompts = sorted(beginnings(lambda words: tokenizer(words).input_ids, text, num), key=len)
    found, ranks = [], []
    with torch.inference_mode():
        for some in (prompts[i : i + BATCH] for i in range(0, num, BATCH)):
            longest = len(some[-1])
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in some])
            mask = torch.tensor([[i >= longest - len(prompt) for i in range(longest)] for prompt in some])
            whole = target.generate(ids, attention_mask=mask.int(), max_new_tokens=MOST, min_new_tokens=MOST,
                                    do_sample=False, pad_token_id=0)  # fmt: skip
            for prompt, row in zip(some, whole, strict=True):
                answer = row[longest:]
                logits = draft(row[None, longest - len(prompt) :]).logits[0, len(prompt) - 1 : -1]
                ranks.append((logits > logits.gather(-1, answer[:, None])).sum(-1).numpy())
                found.append(answer.numpy())
    order = np.random.default_rng(0).permutation(num)
    return [prompts[i] for i in order], np.stack(found)[order], np.stack(ranks)[order]


class Ahead:
    """A drafter that guesses in the executor."""

    ahead = True

    def propose(self, request: Request, most: int) -> Sequence[int]:
        return request.drafts if isinstance(request.drafts, Tree) else request.drafts[:most]

    def end(self, request: Request) -> None:
        pass


class World:
    """A scheduler and the GPU that it believes to have. speculate=False: the same without drafts."""

    def __init__(self, args: argparse.Namespace, prompts: list[list[int]], tokens: np.ndarray, ranks: np.ndarray,
                 speculate: bool):  # fmt: skip
        self._prompts, self._tokens, self._ranks, self._host = prompts, tokens, ranks, args.host
        self._costs = Costs(*(Curve(list(MS[name]), [ms / 1000 for ms in MS[name].values()])
                              for name in ("target", args.drafter)))  # fmt: skip
        self._most = args.drafts
        self._speculation = Speculation(Ahead(), args.drafts, self._costs, True, args.nodes) if speculate else None
        self.now = self._free = 0.0
        self._scheduler = Scheduler(PagePool(1 << 15, 16, False), 256, 1024, 4096, clock=lambda: self.now,
                                    speculation=self._speculation)  # fmt: skip
        self._prompt_of: dict[str, int] = {}
        self._read: dict[str, int] = {}

    def rate(self, which: Sequence[int], at_a_time: int) -> tuple[float, float]:
        """Tokens a second of answering the prompts, and the share of steps with drafts. The loop is `loop.run`'s."""
        start, waiting, steps, verified = self.now, list(which)[::-1], 0, 0

        def add() -> None:
            i = waiting.pop()
            request = Request(str(len(self._prompt_of)), list(self._prompts[i]),
                              SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True))  # fmt: skip
            self._prompt_of[request.id] = i
            self._scheduler.add(request)

        for _ in range(at_a_time):
            add()
        previous: tuple[Step, float] | None = None
        while previous or self._scheduler.has_work:
            launched = None
            if step := self._scheduler.schedule():
                waits = any(work.drafts or work.num_ahead for work in step)
                once, each = HOST_MS[waits]
                self.now += self._host * (once + each * len(step)) / 1000
                self._free = max(self.now, self._free) + self._seconds(step)
                launched = step, self._free
                steps, verified = steps + 1, verified + any(work.drafts for work in step)
            if previous:
                self.now = max(self.now, previous[1])
                deltas = self._scheduler.commit(previous[0], *self._results(previous[0]))
                for _ in range(min(len(waiting), sum(delta.finish_reason is not None for delta in deltas))):
                    add()
            previous = launched
        return len(which) * TOKENS / (self.now - start), verified / steps

    def _seconds(self, step: Step) -> float:
        seconds, behind = self._costs.target(sum(work.num_tokens for work in step)), 0
        for work in step:
            if work.num_ahead:
                behind += max(0, work.kv_len - self._read.get(work.request.id, 0) - self._most - 1)
                self._read[work.request.id] = work.kv_len
        assert self._costs.draft
        drafting = self._costs.drafting([work.num_ahead for work in step if work.num_ahead], self._most)
        return seconds + drafting + self._costs.draft(1) * behind / READS

    def _results(self, step: Step) -> tuple[list[list[int]], None, None, list[Sequence[int]]]:
        tokens: list[list[int]] = []
        drafts: list[Sequence[int]] = []
        for work in step:
            i = self._prompt_of[work.request.id]
            at = work.kv_len - len(work.drafts) - len(self._prompts[i])
            held = self._held(work, self._tokens[i, at : at + self._most + 1].tolist()) if work.num_samples else []
            tokens.append(held)
            drafts.append(self._guess(i, at + len(held), work.num_ahead) if held and work.num_ahead else ())
        return tokens, None, None, drafts

    def _held(self, work: Work, wanted: list[int]) -> list[int]:
        if isinstance(work.drafts, Tree):
            return wanted[: len(work.drafts.path(wanted)) + 1]
        wrong = (i for i, (draft, token) in enumerate(zip(work.drafts, wanted, strict=False)) if draft != token)
        return wanted[: next(wrong, len(work.drafts)) + 1]

    def _guess(self, i: int, at: int, num: int) -> Sequence[int]:
        """A chain; of more than `most` a tree: the chain, and beside each of its nodes the second and third guess with
        one more behind it, from the first on."""

        def said(place: int, guess: int) -> int:
            place = min(place, self._tokens.shape[1] - 1)
            return int(self._tokens[i, place]) if self._ranks[i, place] == guess else -1 - guess

        depth = min(num, self._most)
        tokens, parents = [said(at + k, 0) for k in range(depth)], list(range(-1, depth - 1))
        for guess, k in ((guess, k) for guess in (1, 2) for k in range(depth)):
            for token, parent in ((said(at + k, guess), k - 1), (said(at + k + 1, 0), len(tokens))):
                if len(tokens) < num and (parent < k or k + 1 < depth):
                    tokens.append(token)
                    parents.append(parent)
        return Tree(tokens, parents) if num > depth else tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--drafter", default="draft", choices=("draft", "eagle"))
    parser.add_argument("--drafts", type=int, help="4 of the draft engine, 7 of a head")
    parser.add_argument("--nodes", type=int, default=0, help="of trees; 0: chains only")
    parser.add_argument("--host", type=float, default=1.0)
    parser.add_argument("--waves", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--levels", default="1,4,16,64,256")
    parser.add_argument("--prompts", type=int, default=200)
    args = parser.parse_args()
    args.drafts = args.drafts or (7 if args.drafter == "eagle" else 4)
    start = time.perf_counter()
    prompts, tokens, ranks = answers(args.text, args.prompts)
    if args.drafter == "eagle":
        mended = np.random.default_rng(5).random(ranks.shape) < MENDED
        ranks = np.where(mended, 0, ranks)
    seconds, right = time.perf_counter() - start, (ranks == 0).mean()
    print(f"{args.prompts} answers in {seconds:.0f} s; {right:.0%} of first guesses are right")
    worlds = [World(args, prompts, tokens, ranks, speculate) for speculate in (False, True)]
    for world in worlds:
        world.rate(range(len(prompts)), len(prompts))
    for level in map(int, args.levels.split(",")):
        rounds: list[Any] = []
        num = level * args.waves
        for k in range(args.rounds):
            some = [(k * num + i) % len(prompts) for i in range(num)]
            rounds.append([world.rate(some, level) for world in worlds])
        plain, drafting = (sum(1 / each[i][0] for each in rounds) for i in range(2))
        shown = ", ".join(f"{after / before:.2f} ({share:.0%})" for (before, _), (after, share) in rounds)
        print(f"{level:4} at a time: {plain / drafting:.2f}x; rounds {shown}", flush=True)


if __name__ == "__main__":
    main()
