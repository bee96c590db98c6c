"""4- and 8-bit integers out of the int32 words that checkpoints pack them into, the first in the lowest bits."""

import torch
from torch import Tensor

BITS = 4, 8
WORD = 32


def unpack(words: Tensor, bits: int) -> Tensor:
    """[R, C] int32 -> [R, C * 32 / bits] uint8: unsigned numbers, in order along the rows."""
    numbers = words.contiguous().view(torch.uint8)  # little-endian, as safetensors are
    if bits == 8:
        return numbers
    return torch.stack((numbers & 15, numbers >> 4), -1).flatten(1)


def centred(numbers: Tensor, bits: int) -> Tensor:
    """Unsigned numbers less half their range, in int8: 0 .. 15 -> -8 .. 7, 0 .. 255 -> -128 .. 127."""
    return (numbers ^ 128).view(torch.int8) if bits == 8 else numbers.view(torch.int8) - 8


def num_words(numbers: int, bits: int) -> int:
    """int32 words that hold so many numbers."""
    return -(-numbers * bits // WORD)
