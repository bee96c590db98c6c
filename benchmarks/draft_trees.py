"""Would a tree of drafts pay? Tokens of a verification with chains and with trees, and the speed-up that they make.

    python benchmarks/draft_trees.py TARGET --draft CHECKPOINT [--head EAGLE_CHECKPOINT] [--text FILE]
        [--temperature 0] [--run 8] [--draft-ms 0.3] [--batches 1,4] [--rows-ms 1:5.33,8:5.6,16:5.9,32:6.2,64:6.6]

The target answers beginnings of this project's own files (or of FILE); every drafter then guesses at every place of an
answer, all places at once. Followed from the beginning, that is what serving would have accepted:
* chain: the likeliest token, again and again;
* static: the best tree of N nodes by the chance of each rank at each depth (Medusa, arXiv:2401.10774; Sequoia,
  arXiv:2402.12374), which the first half of the answers decide and the second half measures;
* dynamic: the N nodes likeliest by the drafter's own probabilities (EAGLE-2, arXiv:2406.16858), of trees of which --run
  nodes of a level go on (`runtime/speculation/costs.py: run_of_level`: 5 with 16 nodes 4 deep, 2 with 16 nodes 8 deep).
--rows-ms: a verification by its tokens, --draft-ms: a step of the drafter, of which a tree takes one for each depth;
both by default as measured or expected on an H100 for an 8B model in bf16. Speed-up: against one token a step.
"""

import argparse
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from ingot.builder.checkpoint import Checkpoint
from ingot.builder.heads import unrolled
from ingot.builder.heads.checkpoint import HeadCheckpoint, load
from ingot.builder.heads.module import Head
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

BEAMS, DEPTH, RANKS = 8, 8, 8  # of a dynamic tree; of all trees; of a static tree
NODES = (4, 8, 16, 32)
PROMPT, ANSWER = 64, 128
Step = Callable[[Tensor, Tensor], Tensor]  # tokens [B, A] that are next, parents [B, A] -> log-probabilities [B, A, V]


@dataclass(frozen=True)
class Lengths:
    """Drafts that hold at each place of each answer [answers, A], by (nodes, depth)."""

    static: dict[tuple[int, int], Tensor]
    dynamic: dict[tuple[int, int], Tensor]
    chain: dict[tuple[int, int], Tensor]


class DraftModel:
    """All places of a text at once: place a guesses what follows token a."""

    def __init__(self, path: str):
        unrolled.install()
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=unrolled.ATTENTION
        ).eval()

    def begin(self, window: Tensor, _: Tensor, num: int) -> tuple[Tensor, Step]:
        """window [W] -> log-probabilities of the first guesses [1, num, V], and what goes on from there."""
        unrolled.begin(self.model)
        depth = 0

        def step(tokens: Tensor, parents: Tensor) -> Tensor:
            nonlocal depth
            depth += 1
            _follow(self.model, parents)
            return self._run(tokens, depth)

        return self._run(window[None, :num], 0), step

    def _run(self, tokens: Tensor, depth: int) -> Tensor:
        positions = torch.arange(tokens.shape[1])[None] + depth
        return self.model(input_ids=tokens, position_ids=positions, use_cache=False).logits.log_softmax(-1)


class EagleHead:
    """The same with a head: the state at token a - 1 and token a; so nothing is guessed at place 0."""

    def __init__(self, path: str, target: str):
        unrolled.install()
        given, checkpoint = HeadCheckpoint.open(path), Checkpoint.open(target)
        self.reads, self.ids = given.layers_read(checkpoint), given.target_ids()
        features = len(self.reads) * checkpoint.config.get_text_config().hidden_size
        bias = "fc.bias" in given.tensors
        self.head = Head(given.config, given.kind, features, len(self.ids), bias, unrolled.ATTENTION).eval()
        self.head.load_state_dict({k: v.float() for k, v in load(self.head, given, checkpoint).items()}, strict=False)
        self.vocab_size = given.config.vocab_size

    def begin(self, window: Tensor, features: Tensor, num: int) -> tuple[Tensor, Step]:
        unrolled.begin(self.head)
        hidden, depth = self.head.combine(features[None, : num - 1]), 0

        def run(tokens: Tensor) -> Tensor:
            nonlocal hidden
            hidden = self.head.advance(tokens[:, 1:], torch.arange(num - 1)[None] + depth, hidden)
            found = torch.full((*tokens.shape, self.vocab_size), -torch.inf)
            found[:, 1:, self.ids] = self.head.logits(hidden).log_softmax(-1)
            return found

        def step(tokens: Tensor, parents: Tensor) -> Tensor:
            nonlocal hidden, depth
            depth += 1
            _follow(self.head, parents[:, 1:])
            hidden = hidden.gather(0, parents[:, 1:, None].expand(-1, -1, hidden.shape[-1]))
            return run(tokens)

        return run(window[None, :num]), step


def _follow(module: torch.nn.Module, parents: Tensor) -> None:
    """Each beam goes on from its parent's keys and values. The keys of step 0, the text's own, are all beams'."""
    for layer in module.modules():
        if isinstance(steps := getattr(layer, "steps", None), list):
            for i in range(1, len(steps)):
                index = parents[:, None, :, None].expand(-1, steps[i][0].shape[1], -1, steps[i][0].shape[3])
                steps[i] = tuple(part.gather(0, index) for part in steps[i])


def ranks(first: Tensor, step: Step, window: Tensor, num: int) -> Tensor:
    """[DEPTH, num]: how many tokens the drafter thinks likelier than the true one, all before being true."""
    found, logprobs = [], first
    for depth in range(DEPTH):
        true = window[depth + 1 : depth + 1 + num]
        found.append((logprobs[0] > logprobs[0].gather(-1, true[:, None])).sum(-1))
        if depth + 1 < DEPTH:
            logprobs = step(true[None], torch.zeros(1, num, dtype=torch.long))
    return torch.stack(found)


def places(first: Tensor, step: Step, window: Tensor, num: int, run: int) -> Tensor:
    """[DEPTH (allowed), DEPTH (of a node), num]: place of the true node among all by cumulated probability."""
    chance, tokens = (x.permute(2, 0, 1).squeeze(1) for x in first.topk(BEAMS, -1))  # [beams, num]
    true_so_far = tokens == window[1 : 1 + num]
    all_chances, true_chances = [chance], [_true(chance, true_so_far)]
    chance, tokens, true_so_far = chance[:run], tokens[:run], true_so_far[:run]
    parents = torch.zeros(run, num).long()
    for depth in range(1, DEPTH):
        after, next_tokens = step(tokens, parents).topk(BEAMS, -1)  # [beams, num, beams]
        cumulated = (chance[..., None] + after).permute(0, 2, 1).reshape(-1, num)
        next_tokens = next_tokens.permute(0, 2, 1).reshape(-1, num)
        true = true_so_far.repeat_interleave(BEAMS, 0) & (next_tokens == window[depth + 1 : depth + 1 + num])
        all_chances.append(cumulated)
        true_chances.append(_true(cumulated, true))
        chance, best = cumulated.topk(run, 0)
        parents, tokens, true_so_far = best // BEAMS, next_tokens.gather(0, best), true.gather(0, best)
    found = torch.full((DEPTH, DEPTH, num), 1 << 20)
    for most in range(1, DEPTH + 1):
        nodes = torch.cat(all_chances[:most])
        for depth in range(most):
            likelier = (nodes > true_chances[depth]).sum(0)
            found[most - 1, depth] = torch.where(true_chances[depth] > -torch.inf, likelier, 1 << 20)
    return found


def _true(chance: Tensor, true: Tensor) -> Tensor:
    return torch.where(true, chance, -torch.inf).amax(0)


def best_tree(chances: Tensor, num: int, depth: int) -> set[tuple[int, ...]]:
    """chances [depth, rank] -> the `num` paths of ranks that are likeliest right."""
    heap = [(-float(chances[0, 0]), (0,))]
    found: set[tuple[int, ...]] = set()
    while heap and len(found) < num:
        minus, path = heapq.heappop(heap)
        found.add(path)
        at, rank = len(path) - 1, path[-1]
        if rank + 1 < RANKS:
            heapq.heappush(heap, (minus * float(chances[at, rank + 1] / chances[at, rank]), (*path[:-1], rank + 1)))
        if at + 1 < depth:
            heapq.heappush(heap, (minus * float(chances[at + 1, 0]), (*path, 0)))
    return found


def lengths(drafter: DraftModel | EagleHead, answers: Sequence[tuple[Tensor, Tensor]], run: int) -> Lengths:
    num = PROMPT + ANSWER - DEPTH
    true_ranks, true_places = [], []
    for window, features in answers:
        true_ranks.append(ranks(*drafter.begin(window, features, num), window, num))
        true_places.append(places(*drafter.begin(window, features, num), window, num, run))
    rank, place = torch.stack(true_ranks), torch.stack(true_places)  # [answers, DEPTH, A], [answers, DEPTH, DEPTH, A]
    half = len(answers) // 2
    fit = rank[:half, :, PROMPT - 1 :]
    chances = torch.stack([(fit == r).float().mean((0, 2)) for r in range(RANKS)], 1).clamp(1e-6)
    static, dynamic, chain = {}, {}, {}
    shapes = {(n, depth) for n in (*NODES, 64) for depth in range(1, DEPTH + 1)}
    for nodes, depth in sorted(shapes):
        tree = best_tree(chances, nodes, depth)
        static[nodes, depth] = torch.tensor(
            [[_walk(tree, path[:depth]) for path in each.T.tolist()] for each in rank[half:]]
        )
        dynamic[nodes, depth] = (place[half:, depth - 1] < nodes).int().cumprod(1).sum(1)
    for n in range(1, DEPTH + 1):
        chain[n, n] = (rank[half:, :n] == 0).int().cumprod(1).sum(1)
    return Lengths(static, dynamic, chain)


def _walk(tree: set[tuple[int, ...]], path: Sequence[int]) -> int:
    return next((i for i in range(len(path)) if tuple(path[: i + 1]) not in tree), len(path))


def tokens_of(held: Tensor) -> float:
    """held [answers, A] drafts at each place -> tokens a verification, each beginning where the last one ended."""
    num = tokens = 0
    for each in held.tolist():
        at = PROMPT - 1
        while at < len(each):
            num, tokens, at = num + 1, tokens + each[at] + 1, at + each[at] + 1
    return tokens / num


def answer(target: Any, tokenizer: Any, text: str, num: int, temperature: float) -> Iterator[Tensor]:
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    starts = torch.linspace(0, len(ids) - PROMPT - 1, num).long()
    prompts = torch.stack([ids[at : at + PROMPT] for at in starts])
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    yield from target.generate(prompts, max_new_tokens=ANSWER, min_new_tokens=ANSWER, **how)


def curve(text: str) -> Callable[[float], float]:
    points = [tuple(map(float, pair.split(":"))) for pair in text.split(",")]

    def seconds(rows: float) -> float:
        for (a, x), (b, y) in pairwise(points):
            if rows <= b:
                return x + (y - x) * max(0.0, rows - a) / (b - a)
        return points[-1][1] * rows / points[-1][0]

    return seconds


def show(name: str, found: Lengths, cost: Callable[[float], float], draft_ms: float, batches: Sequence[int]) -> None:
    shapes = {kind: {key: tokens_of(held) for key, held in getattr(found, kind).items()}
              for kind in ("chain", "static", "dynamic")}  # fmt: skip
    chains = " ".join(f"{shapes['chain'][n, n]:.2f}" for n in range(1, DEPTH + 1))
    print(f"\n{name}: tokens a verification, a chain of 1 .. {DEPTH} drafts: {chains}")
    print(f"  nodes        {''.join(f'{n:>8}' for n in NODES)}")
    for kind in ("static", "dynamic"):
        print(f"  {kind:12} {''.join(f'{shapes[kind][n, DEPTH]:8.2f}' for n in NODES)}")
    for batch in batches:
        best = {}
        for kind, some in shapes.items():
            speeds = {key: tokens * cost(batch) / (cost(batch * (key[0] + 1)) + key[1] * draft_ms)
                      for key, tokens in some.items()}  # fmt: skip
            key = max(speeds, key=speeds.__getitem__)
            best[kind] = f"{kind} {speeds[key]:.2f}x ({key[0]} nodes, {key[1]} deep, {some[key]:.2f} tokens)"
        print(f"  {batch} at a time: {'; '.join(best.values())}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--draft")
    parser.add_argument("--head")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--answers", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--run", type=int, default=BEAMS, help=f"1 to {BEAMS}")
    parser.add_argument("--draft-ms", type=float, default=0.3)
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--rows-ms", default="1:5.33,2:5.6,8:5.6,16:5.9,32:6.2,64:6.6")
    args = parser.parse_args()
    torch.manual_seed(0)
    own = sorted(Path(__file__).parents[1].glob("*/*.py"))
    text = args.text.read_text("utf-8") if args.text else "".join(path.read_text("utf-8") for path in own)
    target: Any = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    drafters: dict[str, DraftModel | EagleHead] = {}
    if args.draft:
        drafters["draft"] = DraftModel(args.draft)
    if args.head:
        drafters["head"] = EagleHead(args.head, args.target)
    reads = getattr(drafters.get("head"), "reads", (0,))
    answers = []
    for window in answer(target, tokenizer, text[: 1 << 21], args.answers, args.temperature):
        states = target(window[None], output_hidden_states=True).hidden_states
        answers.append((window, torch.cat([states[i][0] for i in reads], -1)))
    answers = answers[::2] + answers[1::2]  # both halves from everywhere
    batches = [int(number) for number in args.batches.split(",")]
    for name, drafter in drafters.items():
        show(name, lengths(drafter, answers, args.run), curve(args.rows_ms), args.draft_ms, batches)


if __name__ == "__main__":
    main()
