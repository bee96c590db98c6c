"""POST /v1/completions: continue texts or token ids, with what evaluation harnesses need (echo with log-probabilities).

Choices are numbered as OpenAI does: answer `a` of prompt `p` is choice `p * n + a`. Streamed or not, a choice is made
of the same parts, so both say the same.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from typing import Any

from msgspec import UNSET, UnsetType

from ...engines.errors import RequestError
from ..request import Logprob
from ..text import Text
from . import answers, sse
from .answers import Answer, TextChoice, TextLogprobs, Usage
from .generation import Collected, Counted, Encoded, Generator, Job, off_loop
from .protocol import CompletionRequest

LONGEST_CHARACTER = 4  # tokens: a byte each in UTF-8
PromptScores = Sequence[dict[int, Logprob] | None] | None


async def prepare(generator: Generator, body: CompletionRequest, request_id: str, arrival: float) -> Job:
    """The job of a request. Raises ApiError and RequestError."""
    generator.check_model(body.model)
    options, scores = body.sampling(), {}
    if body.echo and body.max_tokens == 0:
        options["max_tokens"] = 1  # the engine's least; it is not handed on
    if body.logprobs is not None:
        scores["logprobs"] = body.logprobs
        if body.echo and body.prompt_logprobs is None:
            scores["prompt_logprobs"] = body.logprobs
    params = generator.params(options, **scores)
    special = body.add_special_tokens is not False
    texts = _prompts(body.prompt)
    num_characters = sum(len(text) for text in texts if isinstance(text, str))
    prompts = await off_loop(num_characters, lambda: [_encode(generator.llm.text, text, special) for text in texts])
    for prompt in prompts:
        generator.check_prompt(prompt.ids)
    return Job(f"cmpl-{body.request_id or request_id}", prompts, params, body.priority or 0, arrival)


async def answer(generator: Generator, body: CompletionRequest, job: Job, created: int) -> Answer[TextChoice]:
    """All of it, when it is complete."""
    choices, counted = _choices(generator, body, job), Counted(job)
    collected = [Collected() for _ in choices]
    scored: dict[int, PromptScores] = {}
    async with aclosing(generator.run(job)) as outputs:
        async for p, output in outputs:
            counted.add(p, output)
            scored[p] = output.prompt_logprobs
            for one in output.outputs:
                collected[p * job.params.n + one.index].add(one)

    def assemble() -> list[TextChoice]:
        parts = []
        for choice, whole in zip(choices, collected, strict=True):
            scores = scored[choice.index // job.params.n]
            part = choice.part(whole, scores)
            if body.prompt_logprobs is not None and scores:
                part.prompt_logprobs = answers.prompt_logprobs(scores)
            parts.append(part)
        return parts

    # log-probabilities of long prompts are much to write
    num_scores = (1 + (body.logprobs or 0)) * sum(len(scores or ()) for scores in scored.values())
    parts = await off_loop(num_scores, assemble)
    return Answer(job.id, "text_completion", created, generator.model, parts, counted.usage(_echo_only(body)))


async def events(generator: Generator, body: CompletionRequest, job: Job, created: int) -> AsyncGenerator[bytes, None]:
    """The same as encoded events, as it comes."""
    choices, counted = _choices(generator, body, job), Counted(job)

    def chunk(parts: list[TextChoice], usage: Usage | UnsetType | None) -> bytes:
        return sse.event(Answer(job.id, "text_completion", created, generator.model, parts, usage))

    data = b""
    async with aclosing(generator.run(job)) as outputs:
        async for p, output in outputs:
            counted.add(p, output)
            usage = counted.usage(_echo_only(body)) if body.usage_in_chunks else None if body.include_usage else UNSET
            data = b""
            for one in output.outputs:
                choice = choices[p * job.params.n + one.index]
                if not choice.ended and (one.token_ids or one.finish_reason):
                    delta = Collected()
                    delta.add(one)
                    part = choice.part(delta, output.prompt_logprobs)
                    if part.text or part.logprobs or part.finish_reason or part.token_ids:
                        data += chunk([part], usage)
            if data and not counted.complete:
                yield data
    if body.include_usage:
        data += chunk([], counted.usage(_echo_only(body)))
    yield data + sse.DONE


class _Choice:
    """A choice on its way out: the echoed prompt goes first, once; what is generated follows, with running offsets."""

    def __init__(
        self, index: int, prompt: Encoded, body: CompletionRequest, text: Text | None, unsaid: Collection[int]
    ):
        self.index, self._prompt, self._body, self._text = index, prompt, body, text
        self._unsaid = unsaid  # tokens that an answer's text leaves out
        self._begun = self.ended = False
        self._offsets = _Offsets(text)

    def part(self, delta: Collected, scores: PromptScores) -> TextChoice:
        """The next part. `scores`: the prompt's log-probabilities, complete when the first token is there."""
        body, begins = self._body, not self._begun
        self._begun, self.ended = True, delta.finish_reason is not None
        part = TextChoice(self.index, "", None, delta.finish_reason, delta.stop_reason)
        entries: list[tuple[int, dict[int, Logprob] | None]] = []
        num_echoed = 0
        if body.echo and begins:
            part.text = self._prompt_text()
            if body.logprobs is not None:
                entries += zip(self._prompt.ids, scores or (), strict=True)
                num_echoed = len(entries)
        if _echo_only(body):
            part.finish_reason = delta.finish_reason and "length"
        else:
            part.text += delta.text
            if body.logprobs is not None:
                entries += zip(delta.token_ids, delta.logprobs, strict=True)
        if entries:
            part.logprobs = self._logprobs(entries, num_echoed)
        if body.return_token_ids:
            part.token_ids = [] if _echo_only(body) else delta.token_ids
            part.prompt_token_ids = self._prompt.ids if begins else UNSET
        return part

    def _prompt_text(self) -> str:
        if self._prompt.text is None and self._text:
            return self._text.decode(self._prompt.ids, skip_special_tokens=False)
        return self._prompt.text or ""

    def _logprobs(self, entries: Sequence[tuple[int, dict[int, Logprob] | None]], num_echoed: int) -> TextLogprobs:
        found, as_ids = TextLogprobs([], [], [], []), self._body.return_tokens_as_token_ids
        for i, (token, entry) in enumerate(entries):
            if entry is None:  # nothing precedes the first token
                spelt = self._text.token_text(token) if self._text else answers.spelling(token, None)
                found.token_logprobs.append(None)
                found.top_logprobs.append(None)
            else:
                spelt = answers.spelling(token, entry[token])
                found.token_logprobs.append(answers.score(entry[token]))
                top: dict[str, float] = {}
                for candidate, value in sorted(entry.items(), key=lambda item: -item[1].logprob):
                    top.setdefault(
                        answers.spelling(candidate, value, as_ids), answers.score(value)
                    )  # of equal texts the likelier
                found.top_logprobs.append(top)
            found.tokens.append(answers.spelling(token, None) if as_ids else spelt)
            said = i < num_echoed or token not in self._unsaid
            found.text_offset.append(self._offsets.take(token, spelt) if said else self._offsets.at)
        return found


class _Offsets:
    """Where tokens begin in the text, in characters. Tokens that are parts of one character begin where it does."""

    def __init__(self, text: Text | None):
        self._text, self.at = text, 0
        self._parts: list[int] = []

    def take(self, token: int, spelt: str) -> int:
        at = self.at
        if self._text is None:
            return at
        self._parts.append(token)
        whole = spelt if len(self._parts) == 1 else self._text.decode(self._parts, skip_special_tokens=False)
        if not spelt.startswith("\ufffd"):  # the character before it was never completed
            at += len(whole) - len(spelt)
        if not whole.endswith("\ufffd") or len(self._parts) >= LONGEST_CHARACTER:
            self.at, self._parts = self.at + len(whole), []
        return at


def _echo_only(body: CompletionRequest) -> bool:
    return body.max_tokens == 0


def _choices(generator: Generator, body: CompletionRequest, job: Job) -> list[_Choice]:
    n, text = job.params.n, generator.llm.text
    unsaid = text.pieces.special if text and job.params.skip_special_tokens else ()
    return [_Choice(i, job.prompts[i // n], body, text, unsaid) for i in range(job.num_choices)]


def _prompts(prompt: Any) -> list[Any]:
    """One or several of the API's forms -> several. Raises RequestError for none."""
    several = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
    if not several:
        raise RequestError("The prompt is an empty list; it needs at least one prompt.")
    return several


def _encode(text: Text | None, prompt: str | list[int], special: bool) -> Encoded:
    if not isinstance(prompt, str):
        return Encoded(None, prompt)
    if text is None:
        raise RequestError("The prompt is text, but this engine has no tokenizer; send token ids.")
    return Encoded(prompt, text.encode(prompt, add_special_tokens=special))
