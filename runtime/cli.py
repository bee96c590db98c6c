"""`ingot generate`: an engine from the command line, through the AsyncLLM that a server uses. And the options that
`ingot bench` and `ingot serve` share."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..engines.cli import Debug, Engine

if TYPE_CHECKING:
    from .request import RequestOutput, SamplingParams

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Speculate = Annotated[
    str | None, typer.Option(help="Draft tokens and verify them: ngram, suffix, draft, eagle or medusa.")
]
Draft = Annotated[
    Path | None,
    typer.Option("--draft-engine", "--draft", help="The engine that drafts: of a smaller model, or of a head."),
]
NumDrafts = Annotated[int, typer.Option(help="Tokens drafted at a time for a request at most.")]
NumNodes = Annotated[int, typer.Option(help="Of a tree of drafts that is that deep, where it pays; 0: chains only.")]
MaxSeqs = Annotated[int | None, typer.Option(help="Sequences in one step at most.")]
MaxTokens = Annotated[int | None, typer.Option(help="Tokens in one step at most.")]
PrefixCache = Annotated[bool, typer.Option(help="Reuse the KV pages of prompts that begin alike.")]
LoadFormat = Annotated[str, typer.Option(help="dummy: random weights, the file is not read.")]


def generate(
    engine: Engine,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text; - reads stdin.", show_default=False)],
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many tokens; 0 keeps all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the likeliest one.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages tokens already seen.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given more than once.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at the model's end token.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's message.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message.")] = None,
    speculate: Speculate = None,
    draft_engine: Draft = None,
    num_draft_tokens: NumDrafts = 4,
    num_draft_nodes: NumNodes = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Stream the continuation of a prompt. Only the text goes to stdout."""
    from .request import SamplingParams

    if system is not None and not chat:
        raise typer.BadParameter("--system needs --chat.")
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, stop=stop, ignore_eos=ignore_eos,
    )  # fmt: skip
    text = sys.stdin.read() if prompt == "-" else prompt
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    drafts = {"speculate": speculate, "draft_engine": draft_engine, "num_draft_tokens": num_draft_tokens,
              "num_draft_nodes": num_draft_nodes}  # fmt: skip
    output = asyncio.run(_stream(engine, drafts, messages if chat else text, params, show=not as_json))
    if as_json:
        answer = output.outputs[0]
        print(json.dumps({
            "text": answer.text,
            "token_ids": list(answer.token_ids),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
            "num_prompt_tokens": len(output.prompt_token_ids),
            "num_cached_tokens": output.num_cached_tokens,
            "metrics": asdict(output.metrics) if output.metrics else None,
        }, indent=1))  # fmt: skip
    else:
        print()


async def _stream(
    engine: Path, drafts: dict[str, Any], prompt: str | list[dict], params: SamplingParams, show: bool
) -> RequestOutput:
    """Print the text as it grows (`show`) and return the whole answer. drafts: what `AsyncLLM` is told of them."""
    from .async_llm import AsyncLLM

    async with AsyncLLM(engine, max_num_seqs=1, **drafts) as llm:
        answers = llm.generate(prompt, params) if isinstance(prompt, str) else llm.chat(prompt, params)
        printed = 0
        async for output in answers:
            if show:
                text = output.outputs[0].text
                print(text[printed:], end="", flush=True)
                printed = len(text)
        return output
