"""Plans of heads and of their targets: what is launched in each kind of bucket, and where states go."""

import onnx_ir as ir
import pytest

pytest.importorskip("triton")

from ingot.builder.targets.buckets import Sizes
from ingot.builder.targets.head_planner import HeadPlanner
from ingot.builder.targets.planner import Planner
from ingot.engines import step
from ingot.engines.errors import BuildError
from ingot.engines.manifest import HeadInfo
from ingot.engines.plan import FIRST, GROW, NEXT, Argument
from ingot.engines.sampling import SAMPLE_POSITIONS, SAMPLE_ROWS
from ingot.plugins import tactics_of
from ingot.plugins.tactic import Device, Tensor

DECODE, VERIFY, ANY = Sizes(4, 4, 4, 1), Sizes(8, 4, 8, 4), Sizes(16, 4, 4, 0)
WIDTH, VOCAB = 8, 24


class Graph:
    """Nodes one by one, all values in fp32."""

    def __init__(self, **columns):
        shapes = {name: ("T",) for name in ("tokens", "positions", "slots")} | {"kv_len": ("S",), "logit_rows": ("R",)}
        shapes |= {"query_start": ("S+1",), "pages": ("S", "P")}
        self.inputs = {name: self.value(name, shape, ir.DataType.INT32) for name, shape in shapes.items()}
        self.inputs |= {name: self.value(name, ("T", num)) for name, num in columns.items()}
        self.weights, self.nodes = {}, []

    @staticmethod
    def value(name, shape, kind=ir.DataType.FLOAT):
        return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))

    def weight(self, name, *shape):
        return self.weights.setdefault(name, self.value(name, shape))

    def __call__(self, op, *inputs, rows="T", columns=WIDTH, outputs=1, domain="ingot", **attributes):
        node = ir.node(op, inputs, attributes=attributes, domain=domain, num_outputs=outputs)
        node.name = f"{op}.{len(self.nodes)}"
        for i, value in enumerate(node.outputs):
            value.name, value.shape = f"{node.name}.{i}", ir.Shape((rows, columns))
            value.type = ir.TensorType(ir.DataType.FLOAT)
        self.nodes.append(node)
        return node.outputs if outputs > 1 else node.outputs[0]

    def pick(self, x):
        return self("Gather", x, self.inputs["logit_rows"], rows="R", domain="", axis=0)

    def made(self, *outputs):
        return ir.Graph(list(self.inputs.values()), list(outputs), nodes=self.nodes, name="head",
                        initializers=[], opset_imports={"": 23, "ingot": 1})  # fmt: skip


def first_tactic(site):
    return tactics_of(site.op)(site)[0]


def planner(graph, info):
    return HeadPlanner(graph, Device(90, 8), 4, 16, 4, first_tactic, max_draft_tokens=3, head=info)


def head_graph(join):
    """`join(graph, features' product, drafted)` gives what the logits and the next step's state are made of."""
    graph = Graph(features=2 * WIDTH, drafted=WIDTH)
    combined = graph("Linear", graph.inputs["features"], graph.weight("fc", WIDTH, 2 * WIDTH))
    read, residual = join(graph, combined, graph.inputs["drafted"])
    hidden = graph("Add", graph.pick(read), graph.pick(residual), rows="R", domain="")
    hidden.name = step.HIDDEN
    logits = graph("Linear", hidden, graph.weight("lm_head", VOCAB, WIDTH), rows="R", columns=VOCAB)
    logits.name = step.LOGITS
    return graph.made(logits, hidden)


def norm(graph, combined, drafted):
    return graph("RMSNorm", combined, graph.weight("norm", WIDTH), drafted, outputs=2, epsilon=1e-5)


def total(graph, combined, drafted):
    both = graph("Add", combined, drafted, domain="")
    return both, both


def names_of(values):
    return [value if isinstance(value, str) or value is None else value.name for value in values]


def sites(found, sizes):
    """(part, op, inputs, outputs) of a bucket's nodes."""
    return [(w.part, w.site.op, names_of(w.inputs), names_of(w.outputs)) for w in found.sites(sizes)
            if w.site.op not in ("Unpack", "Sample", "DraftHead", "Grow")]  # fmt: skip


@pytest.mark.parametrize("join", [norm, total])
def test_each_kind_of_bucket_leaves_out_the_input_that_is_zero(join):
    found = planner(head_graph(join), HeadInfo("eagle3", (7, 2), WIDTH, 99))
    own, verify, mixed = (sites(found, sizes) for sizes in (DECODE, VERIFY, ANY))
    pools = ["target.states.0", "target.states.1"]
    assert ("first", "ReadStates", ["state_slots", *pools], ["features"]) in verify
    read = [each for each in verify if each[0] in ("stage", "body", "head")]
    assert read[0] == ("stage", "ReadStates", ["slots", *pools], ["features"])
    assert [each[:3] for each in read] == [each[:3] for each in mixed] and read[1][1:3] == (
        "Linear",
        ["features", "fc", None],
    )
    # levels of trees are as steps of decoding, but that a token's state is that of its parent
    levels = [each for each in verify if each[0] in ("grow", "own.body", "own.head")]
    assert levels[0] == ("grow", "ReadStates", ["parents", "drafted"], ["drafted"])
    assert [(f"own.{part}", *rest) for part, *rest in own] == levels[1:]
    assert not any("drafted" in inputs for _, op, inputs, _ in read[:-1])
    assert not any("features" in inputs or op == "ReadStates" for _, op, inputs, _ in own)
    if join is norm:
        assert own[0] == ("body", "RMSNorm", ["drafted", "norm", None], ["RMSNorm.1.0"])
        assert read[2] == ("body", "RMSNorm", ["Linear.0.0", "norm", None], ["RMSNorm.1.0"])
    # the residual is the state itself, and the head's own goes where the next step reads it
    assert [each[2][0] for each in own if each[1] == "Gather"][-1] == "drafted"
    assert [each[2][0] for each in read if each[1] == "Gather"][-1] == "Linear.0.0"
    for each in (own, read):
        assert each[-2][1:] == ("Add", names_of(each[-2][2]), ["drafted"]) and each[-1][2] == [
            "drafted",
            "lm_head",
            None,
        ]


def test_parts_and_places_of_a_head():
    found = planner(head_graph(norm), HeadInfo("eagle3", (7, 2), WIDTH, 99))
    assert found.vocab_size == VOCAB
    buckets = [found.plan(sizes) for sizes in (DECODE, VERIFY, ANY)]
    own, trees = {"stage", "body", "head", "sample.greedy"}, "sample.branches"
    levels = {FIRST, GROW, "own.body", "own.head"}
    assert [set(bucket.parts) - own for bucket in buckets] == [{NEXT, trees}, {*levels, trees}, set()]
    for bucket in buckets:
        launches = [launch for name in ("body", "head") for launch in bucket.parts[name]]
        names = [a.name for launch in launches for a in launch.arguments if isinstance(a, Argument)]
        assert names.count("hidden") == 0 and "drafted" in names, "its own state is in a buffer, not in the arena"
    (following,) = buckets[0].parts[NEXT]
    assert Argument("weight", step.TOKEN_IDS) in following.arguments


def test_medusa_heads_say_all_at_once():
    graph = Graph(features=WIDTH)
    both = graph("Linear", graph.pick(graph.inputs["features"]), graph.weight("w", 2 * VOCAB, WIDTH), rows="R",
                 columns=2 * VOCAB)  # fmt: skip
    both.name = step.LOGITS
    found = planner(graph.made(both), HeadInfo("medusa", (3,), WIDTH, 99, guesses=2))
    sampling = [work for work in found.sites(VERIFY) if work.site.op == "Sample"]
    assert found.vocab_size == VOCAB and len(sampling) == 2
    assert {work.site.inputs[0] for work in sampling} == {Tensor((16, VOCAB), "float32")}
    (first,) = (work for work in found.sites(VERIFY) if work.site.op == "DraftHead")
    places = dict(zip(names_of(first.outputs), first.site.outputs, strict=True))
    assert {places[name].shape for name in (SAMPLE_ROWS, SAMPLE_POSITIONS)} == {(16,)}
    assert places[step.LOGIT_ROWS].shape == (8,)
    assert not any(work.part == NEXT for work in found.sites(DECODE))


def test_what_becomes_of_zeros_must_be_known():
    def product(graph, combined, drafted):
        both = graph("Mul", combined, drafted, domain="")
        return both, both

    found = planner(head_graph(product), HeadInfo("eagle", (2,), WIDTH, 99))
    with pytest.raises(BuildError, match="Mul reads 'drafted' of the head, of which the cuda target does not know how"):
        found.sites(VERIFY)


def test_a_target_keeps_its_states_by_slot():
    graph = Graph(x=WIDTH)
    state = graph("Relu", graph.inputs["x"], domain="")
    state.name = step.hidden_states(3)
    logits = graph("Linear", graph.pick(state), graph.weight("w", VOCAB, WIDTH), rows="R", columns=VOCAB)
    logits.name = step.LOGITS
    made = graph.made(logits, state)
    found = Planner(made, Device(90, 8), 4, 16, 4, first_tactic)
    for sizes in (DECODE, ANY):
        bucket = found.plan(sizes)
        (keeping,) = bucket.parts["keep.hidden_states.3"]
        assert keeping.grid[0] == sizes.tokens
        assert keeping.arguments[1:] == (Argument("input", "slots"), Argument("input", "hidden_states.3"))
        made_at = bucket.parts["body"][0].arguments[2]
        assert keeping.arguments[0] == made_at and isinstance(made_at, Argument) and made_at.kind == "arena"


def test_a_state_behind_the_choice_of_rows_is_refused():
    graph = Graph(x=WIDTH)
    picked = graph.pick(graph.inputs["x"])
    logits = graph("Linear", picked, graph.weight("w", VOCAB, WIDTH), rows="R", columns=VOCAB)
    late = graph("Relu", graph.inputs["x"], domain="")
    logits.name, late.name = step.LOGITS, step.hidden_states(4)
    found = Planner(graph.made(logits, late), Device(90, 8), 4, 16, 4, first_tactic)
    with pytest.raises(BuildError, match="'hidden_states.4' is made behind the choice of logit rows"):
        found.sites(DECODE)
