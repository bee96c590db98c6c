"""SamplingParams refuses by name what it cannot honour, and fan_out makes n requests of one prompt."""

import math
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
from ingot.engines.errors import EngineError
from ingot.runtime.capacity import ServeConfig
from ingot.runtime.request import Request, RequestError, SamplingParams, State, fan_out
from ingot.runtime.server.config import ServerConfig


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (16, 0, None, None)
    assert params.skip_special_tokens and params.prefix_cache and not params.ignore_eos and not params.greedy


@pytest.mark.parametrize(
    "name, value",
    [
        ("n", 0), ("n", 129), ("n", True), ("n", 2.0), ("n", None),
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
        ("temperature", 1e39),  # infinite in float32: -inf / inf broke the step, and with it the engine
        ("temperature", True), ("temperature", None),
        ("top_p", 0), ("top_p", 1.01), ("top_p", -1), ("top_k", -2), ("top_k", 1.5), ("top_k", False),
        ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0), ("repetition_penalty", math.nan),
        ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("seed", 1.0), ("seed", 1 << 63),
        ("max_tokens", 0), ("max_tokens", "16"), ("min_tokens", -1), ("min_tokens", 17),
        ("stop", ""), ("stop", ["a", ""]), ("stop", [1]), ("stop", 3), ("stop_token_ids", [-1]),
        ("stop_token_ids", "12"), ("stop_token_ids", 3), ("stop_token_ids", [True]),
        ("logit_bias", [1]), ("logit_bias", {1: 101}), ("logit_bias", {1: math.nan}), ("logit_bias", {-1: 1}),
        ("logit_bias", {"x": 1}), ("logprobs", -1), ("logprobs", 21), ("prompt_logprobs", True),
        ("ignore_eos", 1), ("skip_special_tokens", None), ("prefix_cache", "no"),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(name, value):
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


def test_the_message_names_value_and_range():
    with pytest.raises(RequestError, match=r"top_p is 1\.5; it must be a finite number above 0 and at most 1\."):
        SamplingParams(top_p=1.5)
    with pytest.raises(RequestError, match=r"temperature is NaN, which is not a number; it must be .* at least 0 and"):
        SamplingParams(temperature=math.nan)
    wrong = {"x": "'x'", -1: "-1", "9" * 5000: "'999", True: "True", "²": "'²'"}
    for key, shown in wrong.items():
        with pytest.raises(RequestError, match=f"^logit_bias has the key {shown}.*; its keys must be token ids"):
            SamplingParams(logit_bias={3: 1, key: 1})
    for value, shown in {
        "a": "'a'",
        101: "101",
        math.nan: "NaN, ",
        True: "True",
        10**400: "1000",
        None: "None",
    }.items():
        with pytest.raises(RequestError, match=rf"^logit_bias\[7\] is {shown}.*; it must be .* at most 100\.$"):
            SamplingParams(logit_bias={3: 1, 7: value})
    with pytest.raises(RequestError, match="logit_bias has token 5 twice"):
        SamplingParams(logit_bias={"5": 1, "05": 2})


def test_integers_that_python_does_not_write():
    """Of more than 4300 digits, wherever they are; one of fewer is cut."""
    huge = 10**5000
    for name in (field.name for field in fields(SamplingParams)):
        for value in (huge, -huge, [-huge], {huge: huge}, {"choice": [huge]}, {"json": {"enum": [huge]}}):
            with pytest.raises(RequestError) as error:
                SamplingParams(**{name: value})
            assert len(str(error.value)) < 200, name
    with pytest.raises(RequestError, match="seed is a number of thousands of digits; it must be an integer of at"):
        SamplingParams(seed=huge)
    with pytest.raises(RequestError, match=r"seed is 10{59}\.\.; it must"):
        SamplingParams(seed=10**4000)
    for known in ({"stop_token_ids": [huge]}, {"logit_bias": {huge: 1}}):
        with pytest.raises(RequestError, match="names token a number of thousands of digits; the model's tokens are"):
            SamplingParams(**known).check_vocabulary(10)
    for options in ({"max_num_seqs": huge}, {"kv_cache_memory": huge}, {"gpu_memory_utilization": huge},
                    {"num_draft_tokens": -huge}, {"speculate": huge}, {"load_format": [huge]}):  # fmt: skip
        with pytest.raises(EngineError, match=f"{next(iter(options))} is (a number of thousands|a value that is too)"):
            ServeConfig(**options)
    with pytest.raises(EngineError, match="max_num_seqs is 999999999; it must be an integer of at most 65536"):
        ServeConfig(max_num_seqs=999999999)  # whose rows alone would fill the memory
    with pytest.raises(EngineError, match="max_model_len is 2147483648; it must be an integer of at most 2147483647"):
        ServeConfig(max_model_len=1 << 31)
    for options in ({"port": huge}, {"max_waiting": -huge}, {"watchdog": -huge}, {"drain_timeout": -huge}):
        with pytest.raises(EngineError, match=f"{next(iter(options))} is a number of thousands of digits; it must be"):
            ServerConfig(engine=Path("e"), **options)


def test_unknown_options_get_the_closest_name():
    with pytest.raises(RequestError, match="temprature.*did you mean temperature"):
        SamplingParams.of(temprature=1)
    with pytest.raises(RequestError, match="zzz.*known are.*top_p"):
        SamplingParams.of(zzz=1)
    assert SamplingParams.of(top_k=3).top_k == 3


def test_values_are_normalised():
    params = SamplingParams(top_k=-1, stop="x", stop_token_ids=[3], logit_bias={"7": 1, 8: -2.5}, temperature=0)
    assert params.top_k == 0 and params.stop_strings == ("x",) and params.stop_token_ids == (3,)
    assert params.logit_bias == {7: 1.0, 8: -2.5} and params.greedy
    stops = ["a", "b"]
    params = SamplingParams(stop=stops)
    stops.append("c")
    assert params.stop_strings == ("a", "b"), "a caller's list must not reach into a frozen object"
    with pytest.raises(FrozenInstanceError):
        params.n = 2


def test_numpy_scalars_are_numbers():
    numpy = pytest.importorskip("numpy")
    assert SamplingParams(top_k=numpy.int64(5), temperature=numpy.float32(0.5)).top_k == 5


def test_tokens_outside_the_vocabulary():
    SamplingParams(logit_bias={9: 1}, stop_token_ids=[9]).check_vocabulary(10)
    with pytest.raises(RequestError, match="logit_bias names token 10; the model's tokens are 0 to 9"):
        SamplingParams(logit_bias={10: 1}).check_vocabulary(10)
    with pytest.raises(RequestError, match="stop_token_ids"):
        SamplingParams(stop_token_ids=[10]).check_vocabulary(10)


def test_fan_out():
    many = fan_out("r", [1, 2], SamplingParams(n=3, seed=7), priority=2)
    assert [r.id for r in many] == ["r#0", "r#1", "r#2"]
    assert [r.seed for r in many] == [7, 8, 9]
    assert all(r.params.n == 1 and r.tokens == [1, 2] and r.priority == 2 for r in many)
    assert many[0].tokens is not many[1].tokens and many[0].metrics is not many[1].metrics
    (one,) = fan_out("r", [1], SamplingParams(seed=7))
    assert one.id == "r" and one.seed == 7 and one.state is State.WAITING


def test_unseeded_requests_draw_a_seed():
    seeds = {Request("a", [1], SamplingParams()).seed for _ in range(8)}
    assert len(seeds) == 8 and min(seeds) >= 0


def test_a_request_keeps_its_own_prompt():
    prompt = [1, 2]
    request = Request("a", prompt, SamplingParams())
    request.tokens.append(3)
    assert prompt == [1, 2] and request.num_prompt == 2 and request.output == [3] and request.num_output == 1
