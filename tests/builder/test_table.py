"""Default tactics: their order by what was measured near a site, tables on disk, and tables made from plans."""

import gzip
import json
import math
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from ingot.builder.targets import table as tables
from ingot.builder.targets.table import Measured, Table, apart, default_table, distance
from ingot.builder.targets.tabulate import derive, main, read_plan, site_of, tabulate
from ingot.builder.targets.tactics import Choice
from ingot.engines.errors import BuildError
from ingot.plugins import tactics_of
from ingot.plugins.tactic import Device, Gemm, Launch, Site, Tactic, Tensor


def linear(rows, width=4096, depth=4096, dtype="bfloat16", bias=False, **rest):
    inputs = Tensor((rows, depth), dtype), Tensor((width, depth), dtype, cold=True)
    return Site("Linear", {}, (*inputs, Tensor((width,), dtype) if bias else None), (Tensor((rows, width), dtype),),
                **rest)  # fmt: skip


def attention(max_query=None, max_context=None, **attributes):
    q, pages, pool = Tensor((8, 6144), "float16"), Tensor((8, 512), "int32"), Tensor((1, 16, 8, 128), "float16")
    sizes = {"num_heads": 32, "scale": 128**-0.5, "window": 0, **attributes}
    return Site("PagedAttention", sizes, (q, None, pages, pool), (Tensor((8, 4096), "float16"),),
                max_query=max_query, max_context=max_context)  # fmt: skip


def order(measured, site, offered):
    """Names of the offered tactics as a table of (site, names) pairs puts them."""
    table = Table(90, "a test", tuple(Measured(each, tuple(names.split())) for each, names in measured))
    return " ".join(tactic.name for tactic in table.order(site, [Tactic(name, ()) for name in offered.split()]))


def test_a_measured_site_keeps_its_ranking():
    measured = [(linear(8), "c a"), (linear(9), "b a c"), (linear(8, bias=True), "b a c")]
    assert order(measured, linear(8), "a b c d") == "c a b d", "what was not measured here comes by what is near, last"
    assert order(measured, linear(9), "a b c d") == "b a c d"
    assert order(measured, linear(8, bias=True), "a b c d") == "b a c d"
    assert order(measured, replace(linear(8), device=Device(120, 188, cublas=True)), "a b c d") == "c a b d"
    assert order(measured, linear(8), "x b a") == "a b x", "the winner is not offered"


def test_the_nearest_site_speaks_for_one_that_was_not_measured():
    measured = [(linear(32), "small"), (linear(64), "large")]
    assert order(measured, linear(45), "own large small") == "small large own"
    assert order(measured, linear(48), "own small large") == "large small own", "48 is nearer to 64 by octaves"
    measured = [(linear(16, width=1024), "narrow"), (linear(16, depth=1024), "shallow")]
    assert order(measured, linear(16, width=2048), "own shallow narrow") == "narrow shallow own"
    measured = [(linear(16, bias=True), "with"), (linear(24), "without")]
    assert order(measured, linear(20), "own with without") == "without with own"
    assert order(measured, linear(20, bias=True), "own without with") == "with without own"


def test_attributes_and_contexts_are_part_of_the_distance():
    measured = [(attention(window=0), "all"), (attention(window=4096), "near")]
    assert order(measured, attention(window=1024), "own all near") == "near all own"
    assert order(measured, attention(scale=0.09), "own near all") == "all near own"
    measured = [(attention(1), "long"), (attention(1, 1024), "short")]
    assert order(measured, attention(1, 1024, window=8), "own long short") == "short long own"
    assert order(measured, attention(1, None, window=8), "own short long") == "long short own"


@pytest.mark.parametrize(
    "other",
    [
        Site("Gemm", {}, linear(8).inputs, linear(8).outputs),
        linear(8, dtype="float32"),
        linear(8, max_query=1),
    ],
    ids=["op", "element type", "decoding"],
)
def test_without_a_comparable_site_the_order_stays(other):
    assert order([(other, "c b a")], linear(8), "a c b") == "a c b"
    assert order([(other, "c b a")], other, "a c b") == "c b a"
    assert order([], linear(8), "a c b") == "a c b"


def test_prompts_say_nothing_about_decoding():
    measured = [(attention(), "chunk"), (attention(1, 1024, window=9), "decode")]
    assert order(measured, attention(1, 1024), "chunk decode") == "decode chunk"
    assert order(measured, attention(None, 1024), "decode chunk") == "chunk decode"


def test_both_types_of_16_bits_take_the_same_time():
    assert order([(linear(8), "b a")], linear(8, dtype="float16"), "a b") == "b a"
    assert order([(linear(8, dtype="float16"), "b a")], linear(8), "a b") == "b a"


def test_distance_counts_octaves():
    assert distance(linear(8), linear(8)) == 0
    assert distance(linear(8), linear(32)) == pytest.approx(math.hypot(2, 2)), "rows of input and output"
    assert distance(linear(8), linear(8, bias=True)) == 1
    assert distance(attention(window=0), attention(window=1023)) == pytest.approx(10)
    assert distance(attention(), attention(kind="silu")) == 1
    assert distance(attention(kind="gelu"), attention(kind="silu")) == 1
    for one, other in ((linear(3), linear(700, bias=True)), (attention(1), attention(1, 1024))):
        assert distance(one, other) == distance(other, one) > 0


@pytest.mark.parametrize(
    "one, other, octaves",
    [
        ("row 2x2048", "row 2x2048", 0),
        ("row 2x2048", "row 4x2048", 1),
        ("parts12", "parts10", math.log2(1.2)),
        ("64x96", "48x64", math.hypot(math.log2(64 / 48), math.log2(96 / 64))),
        ("row 2x2048", "row 8x2048", math.inf),  # too far
        ("64x64", "128x128", math.inf),
        ("row 2x2048", "row 2048", math.inf),
        ("row 2", "column 2", math.inf),
        ("row", "row", 0),
        ("row", "column", math.inf),
        ("cublas 0", "cublas 1", 1),
    ],
)
def test_names_with_other_numbers(one, other, octaves):
    assert apart(one, other) == apart(other, one) == pytest.approx(octaves)


def test_a_name_with_other_numbers_stands_in():
    """But behind what was measured itself, and before what is unlike anything measured."""
    measured = [(linear(8), "parts12 row4")]
    assert order(measured, linear(8), "own parts10 parts8 row4") == "row4 parts10 parts8 own"
    assert order(measured, linear(8), "own parts4 row1") == "own parts4 row1"
    # as near as both together: 0.26 octaves between the names, none or 1.41 between the sites
    measured = [(linear(8), "a12"), (linear(16), "b")]
    assert order(measured, linear(8), "b a10") == "a10 b"


MEASURED = (
    Measured(linear(8), ("row 2x2048", "cublas 3")),
    Measured(linear(16), ("cublas 3",)),
    Measured(linear(8, bias=True), ("row 2x2048", "row 4x2048")),
    Measured(attention(1, 1024), ("decode 64",)),
    Measured(attention(None), ("chunk 64x64, decode 64",)),
    Measured(
        Site("Neg", {"text": 'a "b"', "flag": True}, (Tensor((), "float32"), None), (Tensor((), "int32"),)), ("a",)
    ),
)


def test_a_table_comes_back_from_its_file(tmp_path):
    table, path = Table(90, 'measured on a "GPU"', MEASURED), tmp_path / "sm_90.json"
    table.save(path)
    assert Table.open(path) == table
    text = path.read_text()
    assert sum(line.startswith("    ") for line in text.splitlines()) == len(MEASURED), "a line each"
    assert text.count('"op":"Linear"') == 2 and text.count('"op":"PagedAttention"') == 2
    Table.open(path).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == text
    empty = Table(80, "not measured", ())
    empty.save(path)
    assert Table.open(path) == empty


def test_a_number_that_sites_have_no_longer_or_not_yet(tmp_path):
    path = tmp_path / "sm_90.json"
    Table(90, "", MEASURED).save(path)
    path.write_text(path.read_text().replace('"max_context"', '"max_moon"'))
    found = Table.open(path).measured
    assert [each.tactics for each in found] == [each.tactics for each in MEASURED]
    assert found[3].site == attention(1)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Tables of 8.0, 9.0 and 12.0 in the place of those shipped."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    for capability in (80, 90, 120):
        Table(capability, f"a test of {capability}", ()).save(tmp_path / f"sm_{capability}.json")
    default_table.cache_clear()
    yield
    default_table.cache_clear()


@pytest.mark.parametrize("asked, found", [(75, 80), (80, 80), (89, 80), (90, 90), (103, 90), (120, 120), (121, 120)])
def test_the_default_is_the_newest_that_is_not_newer(shipped, asked, found):
    assert default_table(asked).describe() == f"table sm_{found} (a test of {found})"


def test_every_shipped_table_opens():
    found = sorted(tables.FOLDER.glob("*.json"))
    assert found
    for path in found:
        table = Table.open(path)
        assert path.name == f"sm_{table.capability}.json" and table.source
        assert all(each.tactics for each in table.measured)


# -- from plans --------------------------------------------------------------------------------------------------------


def entry(site, **times):
    """What a plan says about a site timed with these results, as it comes from a file."""
    ranking = tuple((Tactic(name, ()), us) for name, us in times.items())
    tactic = ranking[0][0] if ranking else Tactic("first", ())
    return json.loads(json.dumps(Choice(site, tactic, {}, ranking).describe()))


def plan(*entries, capability=90):
    return {"capability": capability, "tactics": list(entries)}


def test_a_plan_names_the_best_and_one_of_our_own():
    product = (Launch(Gemm(8, 8, 8, "bfloat16"), (1, 1, 1), ()),)
    ranking = [(Tactic(f"cublas {i}", product), 2.0 + i) for i in range(6)] + [(Tactic("row", ()), 9.256)]
    found = Choice(linear(8), ranking[0][0], {}, tuple(ranking)).describe()
    assert (found["tactic"], found["us"], found["of"]) == ("cublas 0", 2.0, 7)
    assert list(found["times"].items()) == [("cublas 0", 2.0), ("cublas 1", 3.0), ("cublas 2", 4.0), ("row", 9.26)]
    found = Choice(linear(8), ranking[-1][0], {}, (ranking[-1], *ranking[:5])).describe()
    assert list(found["times"]) == ["row", "cublas 0", "cublas 1", "cublas 2"]


def test_a_plan_brings_sites_back():
    for each in MEASURED:
        assert site_of(entry(each.site)) == each.site


def test_plans_become_a_table():
    one = plan(
        entry(linear(8), b=1.0, a=2.0),
        entry(attention(1, 1024), x=1.0, y=1.5),
        entry(linear(64), only=1.0),
        entry(linear(65)),  # not timed
    )
    other = plan(entry(linear(8), a=1.0, c=2.0), entry(linear(16), c=1.0, a=2.0))
    table = tabulate([one, other], "here")
    assert (table.capability, table.source) == (90, "here")
    assert table.measured == (
        Measured(linear(8), ("a", "c")),  # of the last plan
        Measured(attention(1, 1024), ("x", "y")),
        Measured(linear(16), ("c", "a")),
    )
    assert tabulate([other, one], "here").measured[0] == Measured(linear(8), ("b", "a"))
    assert tabulate([one, other], "here") == table
    turned = entry(attention(1, 1024), y=1.0, x=1.5)
    turned["attributes"] = dict(reversed(turned["attributes"].items()))
    assert tabulate([one, plan(turned)], "here").measured[1] == Measured(attention(1, 1024), ("y", "x"))
    assert len(tabulate([one, plan(turned)], "here").measured) == 2


def test_a_plan_without_a_ranking_gives_the_winner():
    bare = entry(linear(8), b=1.0, a=2.0)
    del bare["times"]
    assert tabulate([plan(bare)], "").measured == (Measured(linear(8), ("b",)),)


def test_plans_that_make_no_table():
    timed = entry(linear(8), b=1.0, a=2.0)
    with pytest.raises(BuildError, match=r"architectures \[80, 90\], expected one"):
        tabulate([plan(timed), plan(timed, capability=80)], "")
    with pytest.raises(BuildError, match="no timed tactics; build the engine on a GPU, without --no-tune"):
        tabulate([plan(entry(linear(8)), entry(linear(9), only=1.0))], "")


def test_a_plan_is_read_with_and_without_gzip(tmp_path):
    content = plan(entry(linear(8), b=1.0, a=2.0)) | {"nodes": []}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    (tmp_path / "plan.json.gz").write_bytes(gzip.compress(json.dumps(content).encode()))
    expected = {name: content[name] for name in ("capability", "tactics")}
    assert read_plan(tmp_path / "plan.json") == read_plan(tmp_path / "plan.json.gz") == expected


@pytest.mark.parametrize(
    "name, data",
    [
        ("plan.json", None),
        ("plan.json", b""),
        ("plan.json", b"\xff\xfe\xfd"),
        ("plan.json", b"[1]"),
        ("plan.json", b"3"),
        ("plan.json", b'{"capability": 90}'),
        ("plan.json.gz", b'{"capability": 90, "tactics": []}'),
        ("plan.json.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9]),
        ("plan.json.gz", gzip.compress(b"{}", mtime=0)[:10] + b"\xff" * 20),
    ],
)
def test_what_is_no_plan(tmp_path, name, data):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(BuildError, match=f"{name} is no plan .*expected the cuda/plan.json of an engine"):
        read_plan(tmp_path / name)


def test_a_derived_table_keeps_what_the_architecture_offers(monkeypatch):
    asked = []

    def offered(site):
        asked.append(site.device)
        newer = ["wide 64", "async 8"] if site.device.capability >= 90 else []
        return [Tactic(name, ()) for name in (f"split {site.device.num_sms}", "cublas 3", "row", *newer)]

    known = {"Linear": offered, "PagedAttention": lambda site: []}
    monkeypatch.setattr("ingot.builder.targets.tabulate.tactics_of", known.get)
    table = Table(
        90,
        "measured here",
        (
            Measured(linear(64), ("wide 64", "cublas 3", "split 132", "split 7", "row")),
            Measured(linear(65), ("async 8", "wide 64")),
            Measured(Site("Abacus", {}, (), ()), ("row",)),
            Measured(attention(), ("row",)),
        ),
    )
    found = derive(table, 86)
    assert found.describe() == "table sm_86 (derived from sm_90, not measured)"
    assert found.measured == (Measured(linear(64), ("cublas 3", "split 132", "row")),), "132 stands in for 84 shares"
    assert set(asked) == {Device(86, 84, cublas=True)}
    assert derive(table, 100).measured[1] == table.measured[1]


def test_the_command(tmp_path, capsys):
    source, out = tmp_path / "plan.json", tmp_path / "sm_90.json"
    own = tactics_of("Linear")(replace(linear(64), device=Device(80, 108)))[0].name
    timed = {own: 1.0, "abacus 7": 2.0}
    source.write_text(json.dumps(plan(entry(linear(64), **timed))))
    main([str(source), str(source), "-o", str(out), "--source", "a test", "--derive", "80", "120"])
    assert capsys.readouterr().out.splitlines()[0] == f"{out}: 1 sites, a test"
    assert sorted(path.name for path in tmp_path.glob("sm_*")) == ["sm_120.json", "sm_80.json", "sm_90.json"]
    assert Table.open(out) == Table(90, "a test", (Measured(linear(64), tuple(timed)),))
    assert Table.open(tmp_path / "sm_80.json").measured == (Measured(linear(64), (own,)),)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["absent.json"], "absent.json is no plan"),
        (["plan.json", "--derive", "90"], "sm_90 is what the plans were timed on"),
    ],
)
def test_the_command_refuses_in_a_sentence(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps(plan(entry(linear(64), b=1.0, a=2.0))))
    with pytest.raises(SystemExit):
        main([*arguments, "-o", "sm_90.json", "--source", "a test"])
    assert words in capsys.readouterr().err and not list(tmp_path.glob("sm_*"))
