"""What `/metrics` says against what the engine did."""

import asyncio

import pytest
from ingot import AsyncLLM, SamplingParams
from ingot.runtime.server.metrics import Observed, ServerMetrics
from prometheus_client.parser import text_string_to_metric_families


def samples(page):
    """{(name, finished_reason or bucket): value}"""
    found = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            found[sample.name, sample.labels.get("finished_reason") or sample.labels.get("le")] = sample.value
    return found


@pytest.mark.parametrize("deltas", [True, False])
def test_counts_and_latencies_are_those_of_the_requests(demo_engine, deltas):
    async def main():
        async with AsyncLLM(demo_engine) as llm:
            metrics = ServerMetrics(llm, "pycoder")
            observed = Observed(llm, metrics)
            assert observed.vocab_size == llm.vocab_size

            async def one(prompt, num_tokens):
                """Tokens that came after the first output, which has several where the consumer is late."""
                sizes = []
                params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
                async for output in observed.generate(prompt, params, deltas=deltas):
                    sizes.append(len(output.outputs[0].token_ids))
                return num_tokens - sizes[0]

            num_later = sum(await asyncio.gather(one("import os\n", 9), one("class A:\n    def", 17)))
            both = samples(await metrics.page())
            left = observed.generate("def f():", SamplingParams(max_tokens=100, ignore_eos=True), deltas=deltas)
            await anext(left)
            await left.aclose()
            while llm.metrics().running or llm.metrics().kv_utilisation:  # pages are given back after the last token
                await asyncio.sleep(0.01)
            return samples(await metrics.page()), both, llm.metrics(), num_later

    found, both, engine, num_later = asyncio.run(main())
    assert found["ingot:request_success_total", "length"] == 2
    assert found["ingot:request_success_total", "abort"] == 1
    assert found["ingot:generation_tokens_total", None] == engine.output_tokens >= 26
    assert found["ingot:prompt_tokens_total", None] == engine.prompt_tokens > 0
    assert found["ingot:engine_steps_total", None] == engine.steps
    assert found["ingot:num_requests_running", None] == found["ingot:num_requests_waiting", None] == 0
    assert found["ingot:kv_cache_usage_perc", None] == 0 and found["ingot:engine_healthy", None] == 1
    assert found["ingot:step_seconds_p50", None] > 0
    assert found["ingot:e2e_request_latency_seconds_count", None] == 2
    for name in ("time_to_first_token_seconds", "request_queue_time_seconds"):  # also of the one that was left
        assert found[f"ingot:{name}_count", None] == 3, name
    assert found["ingot:request_generation_tokens_sum", None] == 26
    # the third request may have had some before it was left
    assert num_later <= found["ingot:inter_token_latency_seconds_count", None] < num_later + 100
    ttft, e2e = (both[f"ingot:{name}_sum", None]
                 for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"))  # fmt: skip
    assert 0 < ttft < e2e < 60
    buckets = [
        (float(le), value) for (name, le), value in found.items() if name == "ingot:time_to_first_token_seconds_bucket"
    ]
    assert [value for _, value in sorted(buckets)] == sorted(value for _, value in buckets)
