"""What ptxas made of a kernel, where it is known to go wrong: with the operands of the tensor cores of sm_90."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator

# the upper half of a matrix operand's descriptor: its swizzle, in the highest bits, added to a uniform register
DESCRIPTOR = re.compile(r"UIADD3\.X UR\d+, (UR(\d+)), (?:-0x[37][0-9a-f]{7}|0x[48c][0-9a-f]{7}), URZ")
ZERO = re.compile(r"URZ, URZ, URZ|UMOV \w+, (?:URZ|0x0)\b")

# a product of a warpgroup: the registers of its first operand (absent: it is in shared memory), and whether more follow
# before the group of products ends
PRODUCT = re.compile(r"\b[A-Z]GMMA\.\S+ R\d+, (?:R(\d+)|gdesc)(.*)")
AWAITED = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
SETS = re.compile(r"(?:@!?U?P\w+ )?([A-Z]\w*)((?:\.\w+)*) (?:(?:PT|P\d), (?=R))?R(\d+)\b")
COMPARES = ("ISETP", "FSETP", "DSETP", "HSETP2", "PLOP3")  # set predicates alone
LABEL, JUMP = re.compile(r"\.(L_\w+):"), re.compile(r"BRA(?:\.\w+)* (?:\S+, )?`\(\.(L_\w+)\)")


def faults(cubin: bytes) -> list[str]:
    """Instructions by which a kernel with warpgroup products would compute something else; [] where it is well."""
    lines = [re.sub(r"/\*[0-9a-f]+\*/", "", line).strip() for line in disassembled(cubin).splitlines()]
    return lost_operands(lines) + overwritten_operands(lines)


def lost_operands(lines: list[str]) -> list[str]:
    """Instructions that make a matrix operand's address from a uniform register which holds something else.

    ptxas 12.8 (sm_90) makes such code where keys and values of narrow heads are converted in one loop and come as they
    are multiplied in the next: the shared memory's address, shifted, ought to be in a pair of registers that is used
    and never set. What is in them came from the kernel's arguments, or from a register of the hardware, and the kernel
    reads other memory or none that exists. The upper half of that address is always zero, and here it is not.
    """
    found = []
    for i, line in enumerate(lines):
        if not (match := DESCRIPTOR.search(line)):
            continue
        name, pair = match[1], f"UR{int(match[2]) - 1}"  # some instructions set two registers
        sets = re.compile(rf"\b(?:U?[A-Z0-9]+(?:\.\w+)*) {name}\b,|(?:ULDC\.64|CS2R\S*) {pair}\b,")
        came = next((before for before in reversed(lines[:i]) if sets.search(before)), "")
        if not ZERO.search(came):
            found.append(f"an operand is lost, {line} <- {came}")
    return found


def overwritten_operands(lines: list[str]) -> list[str]:
    """Instructions that set a register which a warpgroup's product may still have to read as its first operand.

    Products are issued and read their registers when the tensor cores come to them; only waiting for their group frees
    those (PTX ISA, wgmma.mma_async). ptxas 12.8 heeds that within a loop's body, not from its end to its beginning.
    Every loop is therefore followed twice.
    """
    found: dict[str, None] = {}
    groups: list[set[int]] = []  # that were issued and not waited for
    issued: set[int] = set()  # of the group that has not ended
    for line in _twice(lines):
        if match := AWAITED.search(line):
            groups = groups[max(0, len(groups) - int(match[1], 16)) :]
        elif match := PRODUCT.search(line):
            if match[1]:
                issued |= set(range(int(match[1]), int(match[1]) + 4))
            if "gsb0" in match[2]:
                groups, issued = [*groups, issued], set()
        elif (match := SETS.match(line)) and match[1] not in COMPARES:
            first, width = int(match[3]), _registers_set(match[1], match[2])
            if any(group & set(range(first, first + width)) for group in [*groups, issued]):
                found[f"an operand is overwritten while it may be read, {line}"] = None
    return list(found)


def _registers_set(name: str, suffixes: str) -> int:
    parts = suffixes.split(".")
    if "128" in parts or "4" in parts or name.endswith("MMA"):
        return 4
    return 2 if name == "CS2R" or {"64", "WIDE", "2"} & set(parts) else 1


def _twice(lines: list[str]) -> Iterator[str]:
    """Instructions in their order, and once more each loop whose end is reached."""
    labels = {match[1]: i for i, line in enumerate(lines) if (match := LABEL.match(line))}
    for i, line in enumerate(lines):
        yield line
        match = JUMP.search(line)
        if match and labels.get(match[1], i) < i:
            yield from lines[labels[match[1]] : i + 1]


def disassembled(cubin: bytes) -> str:
    """Its machine code as text, by the nvdisasm that Triton has."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
