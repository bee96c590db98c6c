"""Code that ptxas is known to get wrong is found: in listings made up here, and in one of ours without its wait."""

import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

from ingot.builder.targets.cubin import Cubin, compile_all, triton_cache
from ingot.builder.targets.sass import disassembled, faults, overwritten_operands
from ingot.plugins import tactics_of
from ingot.plugins.tactic import Device, Site, Tensor

LOOP = """
.L_x_0:
LDS R8, [R2] ;
{first}
F2FP.BF16.F32.PACK_AB R12, R9, R8 ;
WARPGROUP.ARRIVE ;
HGMMA.64x64x16.F32.BF16 R24, R12, gdesc[UR4], R24, gsb0 ;
WARPGROUP.DEPBAR.LE gsb0, {left} ;
{last}
@!P0 BRA `(.L_x_0) ;
EXIT ;
"""


@pytest.mark.parametrize("first,left,last,found", [
    ("NOP ;", "0x1", "NOP ;", "F2FP.BF16.F32.PACK_AB R12"),  # around the end of the loop
    ("WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "0x1", "NOP ;", None),
    ("NOP ;", "0x0", "NOP ;", None),
    ("NOP ;", "0x1", "IADD3 R15, P2, R4, 0x80, RZ ;\nWARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "IADD3 R15, P2"),
    ("NOP ;", "0x1", "IADD3 R16, P2, R4, 0x80, RZ ;\nWARPGROUP.DEPBAR.LE gsb0, 0x0 ;", None),  # the next register
    ("NOP ;", "0x1", "LDSM.16.M88.4 R10, [R4+0x20] ;\nWARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "LDSM"),  # sets R10 to R13
    ("NOP ;", "0x1", "HMMA.16816.F32.BF16 R8, R4, R2, R8 ;\nWARPGROUP.DEPBAR.LE gsb0, 0x0 ;", None),  # R8 to R11
    ("NOP ;", "0x1", "HMMA.16816.F32.BF16 R10, R4, R2, R8 ;\nWARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "HMMA"),
    ("NOP ;", "0x1", "IMAD.WIDE.U32 R11, R3, 0x2, R20 ;\nWARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "IMAD.WIDE"),
    ("NOP ;", "0x1", "SHFL.BFLY PT, R14, R3, 0x1, 0x1f ;\nWARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "SHFL"),
    ("NOP ;", "0x1", "ISETP.GE.U32.AND P1, PT, R12, 0x3, PT ;\nWARPGROUP.DEPBAR.LE gsb0, 0x0 ;", None),  # reads
    ("NOP ;", "0x1", "STS [R12], R13 ;\nWARPGROUP.DEPBAR.LE gsb0, 0x0 ;", None),
])  # fmt: skip
def test_registers_that_a_product_may_still_read(first, left, last, found):
    wrong = overwritten_operands(LOOP.format(first=first, left=left, last=last).splitlines())
    assert len(wrong) == (found is not None) and all(found in each for each in wrong), wrong


def test_a_group_of_products_is_awaited_as_a_whole():
    """Only the last product of a group ends it: two groups may be under way, so the first is done and free."""
    code = """
HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4], R24, gsb0 ;
HGMMA.64x64x16.F32.BF16 R24, R12, gdesc[UR4], R24, gsb0 ;
HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
WARPGROUP.DEPBAR.LE gsb0, 0x2 ;
MOV R5, R0 ;
MOV R9, R0 ;
MOV R13, R0 ;
"""
    (wrong,) = overwritten_operands(code.splitlines())
    assert "MOV R13" in wrong


def test_a_kernel_without_its_wait_is_refused():
    x, weight, scale = Tensor((256, 4096), "bfloat16"), Tensor((4096, 4096), "int4"), Tensor((4096, 32), "float32")
    attributes = {"dtype": 16, "group": 128, "x_group": 0}
    site = Site("QuantisedLinear", attributes, (x, weight, scale, None, None, None), (x,), Device(90))
    tactic = next(tactic for tactic in tactics_of(site.op)(site) if tactic.name.startswith("scaled"))
    (cubin,) = compile_all([tactic.launches[-1].kernel], 90).values()
    assert isinstance(cubin, Cubin) and faults(cubin.data) == []
    lines = [re.sub(r"/\*[0-9a-f]+\*/", "", line).strip() for line in disassembled(cubin.data).splitlines()]
    waits = [i for i, line in enumerate(lines) if "WARPGROUP.DEPBAR.LE gsb0, 0x0" in line]
    assert len(waits) == 2, "at the loop's beginning, and behind it"
    assert overwritten_operands(lines[: waits[0]] + lines[waits[0] + 1 :])


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch):
    """Triton compiles nothing without a cache; one of our own goes with the build."""
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with triton_cache() as env:
        assert env == {}
    (tmp_path / "file").write_text("")  # which root cannot write into either
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    site = Site("GatedActivation", {"activation": "silu"}, (Tensor((4, 64), "float32"),), (Tensor((4, 32), "float32"),),
                Device(90))  # fmt: skip
    kernel = tactics_of(site.op)(site)[0].launches[0].kernel
    found = compile_all([kernel], 90)[kernel]
    assert isinstance(found, Cubin) and found.data[:4] == b"\x7fELF"
    with triton_cache() as env:
        folder = Path(env["TRITON_CACHE_DIR"])
        assert folder.is_dir()
    assert not folder.exists()
