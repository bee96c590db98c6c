"""Numbers that processes share: sums are of all, a limit that is checked under the lock holds for all."""

import asyncio
import subprocess
import sys
import textwrap

import pytest
from ingot import RequestError
from ingot.runtime.server.admission import Admission
from ingot.runtime.server.board import SEQUENCES_OPEN, SIZE, Slot, board
from ingot.runtime.server.errors import Refused
from ingot.runtime.server.metrics import ServerMetrics

PROGRAM = """
import sys
from ingot.runtime.server.board import SEQUENCES_OPEN, Slot

file, index, limit = map(int, sys.argv[1:])
slot, taken = Slot(file, index, 3), 0
for _ in range(20_000):
    with slot.lock():
        if slot.total(SEQUENCES_OPEN) < limit:
            slot.own[SEQUENCES_OPEN] += 1
print(int(slot.own[SEQUENCES_OPEN]))
"""


def test_a_limit_holds_for_processes_that_race():
    file = board(3)
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(file)]
    racing = [subprocess.Popen([*command, str(i), "30000"], stdout=subprocess.PIPE, pass_fds=(file,)) for i in range(3)]
    taken = [int(process.communicate(timeout=300)[0]) for process in racing]
    slot = Slot(file, 0, 3)
    assert sum(taken) == slot.total(SEQUENCES_OPEN) == 30000
    slot.vacate(1)
    assert slot.total(SEQUENCES_OPEN) == taken[0] + taken[2]


def test_admission_counts_what_others_have_open():
    async def main():
        file = board(2)
        one, other = (Admission(2, 1, 100, Slot(file, i, 2)) for i in range(2))
        async with one.admit(60, 2) as ticket:
            with pytest.raises(Refused, match="2 sequences are open, the limit is 3"):
                async with other.admit(1, 2):
                    pass
            with pytest.raises(Refused, match="60 tokens are waiting, the limit is 100"):
                async with other.admit(50):
                    pass
            ticket.started()
            async with other.admit(50):
                assert (one.sequences_open, other.sequences_open) == (2, 1)
                assert await other.drain(0.01) is False
        assert await other.drain(1) and one.accepting  # each drains for itself
        with pytest.raises(RequestError, match="asks for 4"):
            async with one.admit(1, 4):
                pass

    asyncio.run(main())


def test_histograms_are_of_all_processes_and_of_any_value():
    file = board(2)
    one, other = (ServerMetrics(None, "m", Slot(file, i, 2)) for i in range(2))
    one.inter_token.observe(0.004, 3)
    other.inter_token.observe(0.005)  # a bound belongs to its bucket
    other.inter_token.observe(99.0)
    for metrics in (one, other):
        samples = {s.labels.get("le", s.name): s.value for s in metrics.inter_token.family("m").samples}
        assert [samples[le] for le in ("0.002", "0.005", "0.01", "10.0", "+Inf")] == [0, 4, 4, 4, 5]
        assert samples["ingot:inter_token_latency_seconds_count"] == 5
        assert samples["ingot:inter_token_latency_seconds_sum"] == pytest.approx(99.017)
        assert not any(s.value for s in metrics.ttft.family("m").samples)


def test_a_slot_is_not_overdrawn():
    slot = Slot()
    with pytest.raises(ValueError, match="256 numbers"):
        slot.take(SIZE)
