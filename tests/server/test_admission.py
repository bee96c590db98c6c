"""What is let in, what is refused, and that everything let in is given back."""

import asyncio
import random

import pytest
from ingot import RequestError
from ingot.runtime.server.admission import LONGEST_RETRY, Admission
from ingot.runtime.server.errors import Refused


def test_sequences_past_running_and_waiting_are_refused_with_the_numbers():
    async def main():
        admission = Admission(max_running=2, max_waiting=1, max_waiting_tokens=100)
        async with admission.admit(10, 2), admission.admit(10, 1):
            with pytest.raises(Refused) as found:
                async with admission.admit(1, 1):
                    pass
            assert found.value.status == 429 and "3 sequences are open" in str(found.value)
            assert 1 <= found.value.retry_after <= LONGEST_RETRY
        async with admission.admit(10, 3):  # all places are free again
            pass
        with pytest.raises(RequestError, match="asks for 4 answers; this server takes 3"):  # also with nobody there
            async with admission.admit(1, 4):
                pass
        assert admission.sequences_open == admission.tokens_waiting == 0

    asyncio.run(main())


def test_tokens_wait_until_the_first_token_is_there():
    async def main():
        admission = Admission(max_running=8, max_waiting=8, max_waiting_tokens=100)
        async with admission.admit(80) as first:
            with pytest.raises(Refused, match="80 tokens are waiting, the limit is 100"):
                async with admission.admit(30):
                    pass
            first.started()
            first.started()  # a second word changes nothing
            assert admission.tokens_waiting == 0
            async with admission.admit(30):
                assert admission.tokens_waiting == 30
        assert admission.tokens_waiting == 0

    asyncio.run(main())


def test_a_prompt_longer_than_may_wait_is_served_when_nothing_waits():
    async def main():
        admission = Admission(max_running=8, max_waiting=8, max_waiting_tokens=100)
        async with admission.admit(5000):
            with pytest.raises(Refused, match="5000 tokens are waiting"):
                async with admission.admit(1):
                    pass

    asyncio.run(main())


def test_draining_admits_nobody_and_ends_with_the_last_request():
    async def main():
        admission = Admission(max_running=8, max_waiting=8, max_waiting_tokens=100)
        async with admission.admit(5):
            assert not await admission.drain(0.02)
            with pytest.raises(Refused, match="shutting down") as found:
                async with admission.admit(1):
                    pass
            assert found.value.status == 503
            done = asyncio.create_task(admission.drain(5))
            await asyncio.sleep(0.01)
            assert not done.done()
        assert await done

    asyncio.run(main())


def test_whatever_ends_a_request_its_place_is_free():
    """A thousand requests at random: served, failed, cancelled; limits hold at every moment."""

    async def main():
        rng = random.Random(7)
        admission = Admission(max_running=4, max_waiting=4, max_waiting_tokens=200)

        async def one():
            try:
                async with admission.admit(rng.randrange(1, 90), rng.randrange(1, 4)) as ticket:
                    assert admission.sequences_open <= 8
                    await asyncio.sleep(rng.random() / 500)
                    if rng.random() < 0.7:
                        ticket.started()
                    if rng.random() < 0.2:
                        raise ZeroDivisionError
                    await asyncio.sleep(rng.random() / 500)
            except ZeroDivisionError:
                return "failed"
            except Refused as refused:
                return refused.status
            return "served"

        tasks = [asyncio.create_task(one()) for _ in range(1000)]
        for task in tasks:
            if rng.random() < 0.3:
                await asyncio.sleep(0.0005)
            if rng.random() < 0.1:
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {"served", "failed", 429} <= {result for result in results if not isinstance(result, BaseException)}
        assert admission.sequences_open == admission.tokens_waiting == 0
        assert await admission.drain(1)

    asyncio.run(main())
