"""How the executor binds and drives TensorRT, with a driver and a runtime that compute nothing: what is bound to what,
in which shapes, by which context, and what is refused. No engine of TensorRT has been run by these tests."""

from types import SimpleNamespace

import pytest
from fake_driver import FakeDriver
from hand_made import DEMO
from ingot import LLM, SamplingParams

pytest.importorskip("triton")
pytest.importorskip("tensorrt_rtx_bindings")

from ingot.builder.targets import tactics
from ingot.builder.targets.cubin import Cubin
from ingot.calibration.recipe import Recipe
from ingot.engines.errors import EngineError
from ingot.engines.plan import Plan
from ingot.engines.step import LOGITS, STEP_INPUTS
from ingot.plugins import gpu as gpus
from ingot.plugins.tensorrt import api, flavour
from tensorrt_build import compile_for, quantised, write_graph

FOUR = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)  # the driver's zeros are end tokens


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A real engine of pycoder-draft-2m in FP8 for 8.9, but for ingot's cubins, which hold nothing."""
    source, folder = tmp_path_factory.mktemp("graph"), tmp_path_factory.mktemp("engine")
    model = write_graph(DEMO / "pycoder-draft-2m", source)
    quantised(source, folder, Recipe.open("fp8"), "fp8_e4m3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tactics, "compile_all", lambda sources, capability: {
            source: Cubin(b"\x7fELF%d" % i, f"k{i}", 0, source.num_warps, False) for i, source in enumerate(sources)
        })  # fmt: skip
        return compile_for(folder, model, 89, max_num_seqs=2)


class FakeContext:
    def __init__(self, log):
        self.log, self.shapes, self.addresses, self.profile, self.runs = log, {}, {}, None, 0
        log.append(self)

    def set_device_memory(self, memory, size):
        self.memory = memory

    def set_optimization_profile_async(self, profile, stream):
        self.profile = profile
        return True

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name, memory):
        self.addresses[name] = memory
        return True

    def is_stream_capturable(self, stream):
        return True

    def execute_async_v3(self, stream):
        self.runs += 1
        return True


@pytest.fixture
def machine(engine, monkeypatch):
    """driver, the contexts that were made, and what the runtime says of the plan (None: it refuses)."""
    driver = FakeDriver(COMPUTE_CAPABILITY_MAJOR=8, COMPUTE_CAPABILITY_MINOR=9)
    monkeypatch.setattr(gpus, "_driver", lambda: driver)
    values = engine.graph.graph
    pools = [value.name for value in values.inputs if "pages." in value.name]
    names = [*STEP_INPUTS, *pools, LOGITS, *(f"{name}.updated" for name in pools)]
    contexts, said = [], SimpleNamespace(refuses=False)
    outputs = set(names[len(STEP_INPUTS) + len(pools) :])
    made = SimpleNamespace(
        num_io_tensors=len(names), device_memory_size_v2=1000, get_tensor_name=names.__getitem__,
        get_tensor_mode=lambda name: api.TensorIOMode.OUTPUT if name in outputs else api.TensorIOMode.INPUT,
        create_execution_context=lambda strategy: FakeContext(contexts),
    )  # fmt: skip
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: None if said.refuses else made)
    monkeypatch.setattr(api, "Runtime", lambda logger: runtime, raising=False)
    return SimpleNamespace(driver=driver, contexts=contexts, pools=pools, said=said)


def test_each_bucket_has_a_context_bound_to_the_step(engine, machine):
    plan = Plan.open(engine.folder / "tensorrt")
    with LLM(engine.folder, num_kv_pages=6) as llm:
        assert len(machine.contexts) == len(plan.buckets)
        for number, (context, bucket) in enumerate(zip(machine.contexts, plan.buckets, strict=True)):
            assert context.profile == engine.plugins.profile_of(number)
            assert context.shapes["tokens"] == (bucket.tokens,) and context.shapes["kv_len"] == (bucket.sequences,)
            assert context.shapes["query_start"] == (bucket.sequences + 1,)
            assert context.shapes["pages"] == (bucket.sequences, engine.plugins.page_columns[number])
            assert context.shapes.keys() == {*STEP_INPUTS, *machine.pools}
            assert all(context.shapes[pool][0] == 6 for pool in machine.pools)
            assert all(context.addresses[pool] == context.addresses[f"{pool}.updated"] for pool in machine.pools)
            inputs = [context.addresses[name] for name in (*STEP_INPUTS, *machine.pools, LOGITS)]
            assert len(set(inputs)) == len(inputs) and all(inputs)
            assert context.runs == 2, "once before it is captured, and in the capture"
        out = llm.generate([[5, 6, 7], [8]], FOUR, progress=False)
        assert all(len(each.outputs[0].token_ids) == 4 for each in out)
        assert {context.runs for context in machine.contexts} == {2}, "steps replay graphs"
        assert machine.driver.calls["cuGraphLaunch"] >= 4
    assert not machine.driver.left, "all of it is given back"


def test_a_context_that_cannot_be_captured_is_run_each_time(engine, machine, monkeypatch):
    monkeypatch.setattr(FakeContext, "is_stream_capturable", lambda self, stream: False)
    with LLM(engine.folder, num_kv_pages=6) as llm:
        before = sum(context.runs for context in machine.contexts)
        llm.generate([[5, 6, 7]], FOUR, progress=False)
        assert sum(context.runs for context in machine.contexts) - before >= 4
        assert machine.driver.calls["cuGraphLaunch"] == 0


def refused(engine, words, **options):
    with pytest.raises(EngineError, match=words):
        LLM(engine.folder, num_kv_pages=6, **options)


def test_plans_and_gpus_that_do_not_fit(engine, machine, monkeypatch):
    machine.said.refuses = True
    refused(engine, "cannot open .*model.plan .*it gave no reason.*--retarget .* --target tensorrt")
    name, version = flavour.about()
    monkeypatch.setattr(flavour, "about", lambda: (name, "9.9"))
    refused(engine, f"it was built by {name} {version}, here is {name} 9.9")
    monkeypatch.setattr(flavour, "about", lambda: ("tensorrt", "11.0"))
    refused(engine, f"built by {name}, but tensorrt 11.0 is installed")
    monkeypatch.undo()


GPUS = [(9, 0, "runs on 75, .*is 90; use full TensorRT"), (8, 6, "for compute capability 89, but .* has 86")]


@pytest.mark.parametrize("major, minor, words", GPUS)
def test_another_gpu(engine, machine, major, minor, words):
    machine.driver.attributes |= {"COMPUTE_CAPABILITY_MAJOR": major, "COMPUTE_CAPABILITY_MINOR": minor}
    refused(engine, words)
    assert not machine.driver.left


def test_random_weights_are_refused(engine, machine):
    refused(engine, "has its weights inside", load_format="dummy")
