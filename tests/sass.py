"""What ptxas made of a kernel, where it is known to go wrong."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
# a matrix descriptor's upper half is made: a constant with the swizzle in its highest bits, added to a uniform register
DESCRIPTOR = re.compile(r"UIADD3\.X UR\d+, (UR\d+), (?:-0x[37][0-9a-f]{7}|0x[48c][0-9a-f]{7}), URZ")


def lost_descriptors(cubin: bytes) -> list[str]:
    """Matrix operands whose address follows from a uniform register that holds something else, or nothing.

    ptxas 12.8 (sm_90) makes such code where keys and values of narrow heads are converted in a loop before another one:
    the shared memory's address, shifted, ought to be in a pair of registers that is used and never set. What is in them
    came from the kernel's arguments, or from a register of the hardware.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([NVDISASM, "-c", file.name], check=True, capture_output=True, text=True).stdout
    lines = [re.sub(r"/\*[0-9a-f]+\*/", "", line).strip() for line in said.splitlines()]
    found = []
    for i, line in enumerate(lines):
        if not (match := DESCRIPTOR.search(line)):
            continue
        name, pair = match[1], f"UR{int(match[1][2:]) - 1}"
        sets = re.compile(rf"\b(?:U?[A-Z0-9]+(?:\.\w+)*) {name}\b,|ULDC\.64 {pair}\b,|CS2R\S* {pair}\b,")
        came = next((before for before in reversed(lines[:i]) if sets.search(before)), "")
        if not re.search(r"URZ, URZ, URZ|UMOV \w+, (?:URZ|0x0)\b", came):
            found.append(f"{line} <- {came}")
    return found
