"""`/metrics` of the router: its own numbers and those of all servers that answer."""

import time

from ingot.runtime.server.router import metrics as metrics_module
from prometheus_client.parser import text_string_to_metric_families
from stub_backend import Stub, asynchronous, routing

SERVER = b"""# HELP ingot:generation_tokens_total Tokens generated.
# TYPE ingot:generation_tokens_total counter
ingot:generation_tokens_total{model_name="m"} %d
# HELP ingot:time_to_first_token_seconds From arrival to the first token.
# TYPE ingot:time_to_first_token_seconds histogram
ingot:time_to_first_token_seconds_bucket{le="0.1",model_name="m"} 1.0
ingot:time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} 2.0
ingot:time_to_first_token_seconds_count{model_name="m"} 2.0
ingot:time_to_first_token_seconds_sum{model_name="m"} 0.5
# HELP ingot:build_info What is serving.
# TYPE ingot:build_info gauge
ingot:build_info{model_name="m",version="1"} 1.0
"""
TOKENS = "ingot:generation_tokens_total"


def samples(page):
    """{name: {replica: value}}, and every family once."""
    families = list(text_string_to_metric_families(page))
    assert len({family.name for family in families}) == len(families)
    assert page.count("# TYPE") == len(families)
    found = {}
    for family in families:
        for sample in family.samples:
            of_name = found.setdefault(sample.name, {})
            key = sample.labels.get("replica"), sample.labels.get("le")
            assert sample.labels.get("backend") or key not in of_name, sample
            of_name[key] = sample.value
    return found


@asynchronous
async def test_all_servers_are_on_one_page():
    one, other, router = Stub(), Stub(), Stub()
    one.metrics, other.metrics = SERVER % 3, SERVER % 4
    router.metrics = f'# TYPE {TOKENS} counter\n{TOKENS}{{replica="http://a"}} 5\n'.encode()
    router.metrics += b'# TYPE ingot:router_work gauge\ningot:router_work{backend="http://a"} 1\n'
    async with routing(one, other, router) as (client, _):
        page = (await client.get("/metrics")).text
    found = samples(page)
    assert found[TOKENS] == {(one.url, None): 3, (other.url, None): 4, (f"{router.url} http://a", None): 5}
    assert found["ingot:time_to_first_token_seconds_bucket"][other.url, "+Inf"] == 2
    assert {replica for replica, _ in found["ingot:build_info"]} == {one.url, other.url}
    assert {replica for replica, _ in found["ingot:router_work"]} == {None, router.url}
    assert "# HELP ingot:generation_tokens_total Tokens generated." in page


@asynchronous
async def test_who_does_not_answer_is_left_out(monkeypatch):
    monkeypatch.setattr(metrics_module, "SCRAPE_TIMEOUT", 1.0)
    one, slow, odd, half = Stub(), Stub(), Stub(), Stub()
    one.metrics, odd.metrics, half.metrics = SERVER % 3, b"\xff <html>", SERVER % 4 + b"# " + b"x" * (1 << 20)
    slow.metrics_after = 20
    gone = Stub()
    async with routing(one, slow, odd, half, gone) as (client, router):
        await gone.stop()
        began = time.monotonic()
        page = (await client.get("/metrics")).text
        assert time.monotonic() - began < 15
        assert samples(page)[TOKENS] == {(one.url, None): 3}
        assert page.count("ingot:router_backend_ready{") == 5
