"""What ptxas made of a kernel, where it is known to go wrong."""

from __future__ import annotations

import re
import subprocess
import tempfile

# the upper half of a matrix operand's descriptor: its swizzle, in the highest bits, added to a uniform register
DESCRIPTOR = re.compile(r"UIADD3\.X UR\d+, (UR(\d+)), (?:-0x[37][0-9a-f]{7}|0x[48c][0-9a-f]{7}), URZ")
ZERO = re.compile(r"URZ, URZ, URZ|UMOV \w+, (?:URZ|0x0)\b")


def lost_operands(cubin: bytes) -> list[str]:
    """Instructions that make a matrix operand's address from a uniform register which holds something else.

    ptxas 12.8 (sm_90) makes such code where keys and values of narrow heads are converted in one loop and come as they
    are multiplied in the next: the shared memory's address, shifted, ought to be in a pair of registers that is used
    and never set. What is in them came from the kernel's arguments, or from a register of the hardware, and the kernel
    reads other memory or none that exists. The upper half of that address is always zero, and here it is not.
    """
    lines = [re.sub(r"/\*[0-9a-f]+\*/", "", line).strip() for line in disassembled(cubin).splitlines()]
    found = []
    for i, line in enumerate(lines):
        if not (match := DESCRIPTOR.search(line)):
            continue
        name, pair = match[1], f"UR{int(match[2]) - 1}"  # some instructions set two registers
        sets = re.compile(rf"\b(?:U?[A-Z0-9]+(?:\.\w+)*) {name}\b,|(?:ULDC\.64|CS2R\S*) {pair}\b,")
        came = next((before for before in reversed(lines[:i]) if sets.search(before)), "")
        if not ZERO.search(came):
            found.append(f"{line} <- {came}")
    return found


def disassembled(cubin: bytes) -> str:
    """Its machine code as text, by the nvdisasm that Triton has."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
