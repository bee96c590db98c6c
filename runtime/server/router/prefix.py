"""What a request asks of a server, and which beginnings of prompts a server has seen: both guessed from the bytes.

The router has no tokenizer and no template. The prompt, or tools and messages, is taken as the client wrote it and cut
into blocks; a block's hash covers all before it, as the keys of a prefix cache do, so that the next turn of a
conversation begins with the hashes of the last one. A wrong guess costs some speed and nothing else.
Invariant: a memory that holds a block holds all blocks before it, so the longest prefix is found by bisection.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec

BLOCK = 256  # bytes of a prompt as it is written
MAX_BLOCKS = 1024  # of a prompt that are looked at
BYTES_PER_TOKEN = 4  # English in common vocabularies; a token id in JSON has 5 or 6
MEMORY = 16384  # blocks that a server is taken to remember: a million tokens
_SEVERAL = re.compile(rb'\s*\[\s*["\[]')  # a list of prompts; a list of numbers is one prompt
_MISSING = msgspec.Raw(b"")


@dataclass(frozen=True)
class Demand:
    """What one request asks for. prefix: hashes of the prompt's beginnings, each a block longer than the last; key:
    the same for requests that begin alike, also where that is shorter than a block."""

    num_sequences: int = 1
    num_tokens: int = 0
    prefix: tuple[bytes, ...] = ()
    key: bytes = b""


class _Asked(msgspec.Struct):
    prompt: msgspec.Raw = _MISSING
    tools: msgspec.Raw = _MISSING
    messages: msgspec.Raw = _MISSING
    n: Any = 1


_decoder = msgspec.json.Decoder(_Asked)
_prompts = msgspec.json.Decoder(list[msgspec.Raw])


def demand_of(body: bytes) -> Demand:
    """What a request with this body asks for. One that cannot be read is a plain one: its server will say what is
    wrong with it."""
    try:
        asked = _decoder.decode(body)
        num_prompts = len(_prompts.decode(asked.prompt)) if _SEVERAL.match(asked.prompt) else 1
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Demand()
    text = bytes(asked.prompt) + bytes(asked.tools) + bytes(asked.messages)
    n = asked.n if isinstance(asked.n, int) else 1
    prefix = hashes(text)
    return Demand(
        num_sequences=max(1, num_prompts) * min(max(1, n), 1024),  # more is refused by any server
        num_tokens=len(text) // BYTES_PER_TOKEN,
        prefix=prefix,
        key=prefix[0] if prefix else text,
    )


def hashes(text: bytes) -> tuple[bytes, ...]:
    """One for each whole block of `text`, which covers the text from its start to the end of the block."""
    found, last = [], b""
    for start in range(0, min(len(text) - BLOCK + 1, MAX_BLOCKS * BLOCK), BLOCK):
        last = blake2b(last + text[start : start + BLOCK], digest_size=8).digest()
        found.append(last)
    return tuple(found)


class PrefixMemory:
    """The blocks last sent to a server, `size` of them at most; those of long ago are forgotten first."""

    def __init__(self, size: int = MEMORY):
        self._size = size
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, prefix: Sequence[bytes]) -> int:
        """How many blocks of `prefix` are known."""
        return bisect_left(prefix, True, key=lambda block: block not in self._blocks)

    def record(self, prefix: Sequence[bytes]) -> None:
        """Remember a prompt. Its ends go in first, so that they are forgotten before what they continue."""
        for block in reversed(prefix):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._size:
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        """Nothing is known any more: the server has lost its cache."""
        self._blocks.clear()
