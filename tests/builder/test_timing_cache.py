"""Times kept on disk: found under the same conditions only, never half written, and no fault of the disk matters."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fake_driver import FakeDriver
from ingot.builder.targets import timing_cache
from ingot.builder.targets.cubin import Cubin
from ingot.builder.targets.planner import key_of
from ingot.builder.targets.tactics import Candidates, timed
from ingot.builder.targets.timing_cache import TimingCache, cache_folder, conditions, sources_hash
from ingot.plugins import gpu as gpus
from ingot.plugins import tactics_of
from ingot.plugins.gpu import Gpu
from ingot.plugins.tactic import Device, Site, Tensor

# no warning but those that a test waits for
pytestmark = pytest.mark.filterwarnings("error:the timing cache", "error:timings are not cached")

X, W, Y = Tensor((4, 64), "bfloat16"), Tensor((32, 64), "bfloat16", cold=True), Tensor((4, 32), "bfloat16")
SITE = Site("Linear", {"alpha": 1.0, "kind": "silu"}, (X, W, None), (Y,))
NAMES, TIMES = ["row 2", "row 4", "tile"], [2.5, None, 1.25]
CONDITIONS = {"gpu": "NVIDIA Fake", "driver": "1.2", "cublas": None}


@pytest.fixture
def cache(tmp_path):
    return TimingCache(tmp_path / "tactics", CONDITIONS)


def only_file(folder):
    (found,) = (path for path in folder.rglob("*") if path.is_file())
    return found


def test_what_was_written_is_found(cache, tmp_path):
    assert cache.read(SITE, NAMES) is None
    assert not tmp_path.joinpath("tactics").exists(), "asking leaves nothing behind"
    cache.write(SITE, NAMES, TIMES)
    assert cache.read(SITE, NAMES) == TIMES
    later = TimingCache(tmp_path / "tactics", dict(reversed(CONDITIONS.items())))
    assert later.read(replace(SITE, attributes=dict(reversed(SITE.attributes.items()))), NAMES) == TIMES
    cache.write(SITE, NAMES, [1.0, 2.0, 3.0])
    assert later.read(SITE, NAMES) == [1.0, 2.0, 3.0]
    only_file(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        dict(op="GatedLinear"),
        dict(attributes={"alpha": 1.5, "kind": "silu"}),
        dict(attributes={"alpha": 1.0}),
        dict(inputs=(replace(X, shape=(5, 64)), W, None)),
        dict(inputs=(replace(X, dtype="float16"), W, None)),
        dict(inputs=(X, replace(W, cold=False), None)),
        dict(inputs=(X, W, Tensor((32,), "bfloat16"))),
        dict(outputs=(replace(Y, dtype="float32"),)),
        dict(max_query=1),
        dict(max_context=1024),
        dict(device=Device(100)),
        dict(device=Device(90, 114)),
        dict(device=Device(90, cublas=True)),
    ],
    ids=str,
)
def test_each_site_has_its_own_times(cache, change):
    cache.write(SITE, NAMES, TIMES)
    other = replace(SITE, **change)
    assert cache.read(other, NAMES) is None
    cache.write(other, NAMES, [4.0, 5.0, 6.0])
    assert cache.read(other, NAMES) == [4.0, 5.0, 6.0] and cache.read(SITE, NAMES) == TIMES


@pytest.mark.parametrize("names", [["row 4", "row 2", "tile"], ["row 2", "row 4"], [*NAMES, "new"], []])
def test_times_of_other_candidates_do_not_count(cache, names):
    cache.write(SITE, NAMES, TIMES)
    assert cache.read(SITE, names) is None
    cache.write(SITE, names, [7.0] * len(names))
    assert cache.read(SITE, NAMES) is None


@pytest.mark.parametrize("change", [{"gpu": "NVIDIA Other"}, {"driver": "1.3"}, {"cublas": 130100}, {"new": 1}])
def test_times_under_other_conditions_do_not_count(cache, tmp_path, change):
    cache.write(SITE, NAMES, TIMES)
    other = TimingCache(tmp_path / "tactics", CONDITIONS | change)
    assert other.read(SITE, NAMES) is None
    other.write(SITE, NAMES, [4.0, 5.0, 6.0])
    assert cache.read(SITE, NAMES) == TIMES


def entry(**changes):
    """Makes an entry's bytes with some of its fields changed."""
    return lambda data: json.dumps(json.loads(data) | changes).encode()


def time(value):
    """Makes an entry's bytes with one time changed."""
    return lambda data: data.replace(b"1.25", value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b"\0" * len(data),
        lambda data: b"\xff\xfe\xfd",
        lambda data: b"[" * 100_000,
        lambda data: b"null",
        lambda data: b"[" + data + b"]",
        lambda data: b'{"key": 1}',
        lambda data: data.replace(b"NVIDIA Fake", b"NVIDIA Real"),
        lambda data: data.replace(b'"tile"', b'"tilf"'),
        entry(times=None),
        entry(times=[2.5, None, 1.25]),
        entry(times={}),
        entry(times=dict.fromkeys(NAMES)),
        *map(time, [b"0.0", b"-1.5", b"NaN", b"Infinity", b"1e999", b'"1.25"', b"true", b"[1.25]", b"9" * 400]),
    ],
)
def test_a_damaged_entry_counts_as_none(cache, tmp_path, damage):
    cache.write(SITE, NAMES, TIMES)
    file = only_file(tmp_path)
    damaged = damage(file.read_bytes())
    assert damaged != file.read_bytes()
    file.write_bytes(damaged)
    assert cache.read(SITE, NAMES) is None
    cache.write(SITE, NAMES, TIMES)
    assert cache.read(SITE, NAMES) == TIMES


def test_a_folder_that_is_none_is_told_once(tmp_path):
    (tmp_path / "tactics").write_text("a file")
    cache = TimingCache(tmp_path / "tactics", CONDITIONS)
    with pytest.warns(UserWarning, match="the timing cache cannot be read: .*tactics"):
        assert cache.read(SITE, NAMES) is None
    cache.write(SITE, NAMES, TIMES)
    assert cache.read(SITE, NAMES) is None, "and no second warning"
    with pytest.warns(UserWarning, match="timings are not cached: .*tactics"):
        TimingCache(tmp_path / "tactics", CONDITIONS).write(SITE, NAMES, TIMES)
    assert only_file(tmp_path).read_text() == "a file"


def test_a_folder_in_the_place_of_an_entry(cache, tmp_path):
    cache.write(SITE, NAMES, TIMES)
    file = only_file(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.warns(UserWarning, match="cannot be read"):
        assert cache.read(SITE, NAMES) is None
    cache.write(SITE, NAMES, TIMES)
    assert list(file.parent.iterdir()) == [file], "nothing half written is left"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_used(cache, tmp_path):
    cache.write(SITE, NAMES, TIMES)
    (tmp_path / "tactics").chmod(0)
    try:
        with pytest.warns(UserWarning, match="Permission denied"):
            assert cache.read(SITE, NAMES) is None
        cache.write(SITE, NAMES, TIMES)
    finally:
        (tmp_path / "tactics").chmod(0o700)


@pytest.mark.parametrize("failing", ["replace", "fdopen"])
def test_a_write_that_fails_leaves_the_old_entry(cache, tmp_path, monkeypatch, failing):
    cache.write(SITE, NAMES, TIMES)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="timings are not cached: .*No space left"):
        patch.setattr(os, failing, full)
        cache.write(SITE, NAMES, [4.0, 5.0, 6.0])
    assert cache.read(SITE, NAMES) == TIMES
    only_file(tmp_path)


def test_an_interrupted_write_leaves_the_old_entry(cache, tmp_path, monkeypatch):
    cache.write(SITE, NAMES, TIMES)

    def interrupted(entry, file):
        file.write('{"key":')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(json, "dump", interrupted)
        cache.write(SITE, NAMES, [4.0, 5.0, 6.0])
    assert cache.read(SITE, NAMES) == TIMES
    only_file(tmp_path)


def test_who_reads_meanwhile_sees_one_or_the_other(cache, tmp_path):
    both, written = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], threading.Event()

    def write():
        for i in range(100):
            cache.write(SITE, NAMES, both[i % 2])
        written.set()

    cache.write(SITE, NAMES, both[1])
    writers = [threading.Thread(target=write) for _ in range(2)]
    for thread in writers:
        thread.start()
    while not written.is_set():
        assert cache.read(SITE, NAMES) in both
    for thread in writers:
        thread.join()
    only_file(tmp_path)


# -- where it is, and what times depend on -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables, folder",
    [
        ({"INGOT_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"INGOT_CACHE": "", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/ingot"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/ingot"),
        ({"XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/ingot"),
        ({"HOME": "/c"}, "/c/.cache/ingot"),
    ],
)
def test_where_it_is(monkeypatch, variables, folder):
    for name in ("INGOT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


@pytest.fixture
def driver(monkeypatch, tmp_path):
    driver = FakeDriver()
    monkeypatch.setattr(gpus, "_driver", lambda: driver)
    monkeypatch.setattr(timing_cache, "DRIVER", tmp_path / "version")
    (tmp_path / "version").write_text("NVRM version: 580.1\nGCC version: 12\n")
    monkeypatch.setenv("INGOT_CACHE", str(tmp_path / "cache"))
    return driver


def test_times_depend_on_gpu_driver_compiler_and_sources(driver, tmp_path, monkeypatch):
    import triton

    gpu = Gpu()
    found = conditions(gpu)
    assert found["gpu"] == "NVIDIA Fake" and found["driver"] == "NVRM version: 580.1"
    assert found["triton"] == triton.__version__ and found["sources"] == sources_hash()
    TimingCache.of(gpu).write(SITE, NAMES, TIMES)
    assert (tmp_path / "cache" / "tactics").is_dir()
    assert TimingCache.of(gpu).read(SITE, NAMES) == TIMES
    (tmp_path / "version").write_text("NVRM version: 580.2\n")
    assert TimingCache.of(gpu).read(SITE, NAMES) is None
    (tmp_path / "version").unlink()
    assert conditions(gpu)["driver"] == "", "not known, and no reason to fail"
    (tmp_path / "version").write_text("NVRM version: 580.1\nGCC version: 13\n")
    assert TimingCache.of(gpu).read(SITE, NAMES) == TIMES
    gpu.name = "NVIDIA Other"
    assert TimingCache.of(gpu).read(SITE, NAMES) is None
    gpu.name = "NVIDIA Fake"
    monkeypatch.setattr(triton, "__version__", "99.0")
    assert TimingCache.of(gpu).read(SITE, NAMES) is None


def test_a_user_without_a_home_has_no_cache(driver, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for name in ("INGOT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.warns(UserWarning, match="timings are not cached: Could not determine home"):
        assert TimingCache.of(Gpu()) is None


def test_sources_that_times_depend_on(tmp_path, monkeypatch):
    targets, op = tmp_path / "builder" / "targets", tmp_path / "plugins" / "linear"
    for folder in (targets, op):
        folder.mkdir(parents=True)
    timing = [targets / f"{name}.py" for name in timing_cache.TIMING]
    for file in (*timing, targets / "table.py", op / "kernel.py", op / "notes.md"):
        file.write_text("1")
    monkeypatch.setattr(timing_cache, "HERE", targets)
    monkeypatch.setattr(timing_cache, "PLUGINS", tmp_path / "plugins")
    hash_now = sources_hash.__wrapped__
    seen = [hash_now()]
    for file in (*timing, op / "kernel.py", op / "new.py"):
        file.write_text("2")
        seen.append(hash_now())
    (op / "new.py").rename(op / "renamed.py")
    seen.append(hash_now())
    assert len(set(seen)) == len(seen)
    for file in (targets / "table.py", op / "notes.md"):
        file.write_text("2")
    assert hash_now() == seen[-1]


# -- in a build --------------------------------------------------------------------------------------------------------


def test_a_second_build_times_nothing(driver, monkeypatch):
    """And compiles only what the times say; a site that is new is timed alone."""
    compiled = []

    def compile_all(sources, capability):
        compiled.extend(sources)
        return {source: Cubin(b"", source.function, 0, source.num_warps, False) for source in sources}

    monkeypatch.setattr("ingot.builder.targets.tactics.compile_all", compile_all)
    gpu = Gpu()
    norm = {"epsilon": 1e-5, "weight_offset": 0.0, "fp32_multiply": 0}

    def candidates(*sizes):
        sites = [Site("RMSNorm", norm, (Tensor((4, n), "bfloat16"), Tensor((n,), "bfloat16"), None),
                      (Tensor((4, n), "bfloat16"),), gpu.device) for n in sizes]  # fmt: skip
        return {key_of(site): Candidates(site, "norm", tactics_of("RMSNorm")(site)) for site in sites}

    def build(*sizes):
        cache, before = TimingCache.of(gpu), driver.calls["cuGraphLaunch"]
        found = candidates(*sizes)
        compiled.clear()
        chosen = timed(found, gpu, cache)
        return [chosen[key] for key in found], cache, driver.calls["cuGraphLaunch"] - before

    (first,), cache, launches = build(256)
    assert launches > 0 and (cache.num_sites, cache.num_hits) == (1, 0) and len(first.ranking) > 1
    (second,), cache, launches = build(256)
    assert launches == 0 and (cache.num_sites, cache.num_hits) == (1, 1)
    assert second == first and compiled == [launch.kernel for launch in first.tactic.launches]

    (each,) = candidates(256).values()
    slow = [9.0] * len(each.names)
    cache.write(each.site, each.names, [*slow[:-1], 1.5])
    (choice, _), cache, launches = build(256, 512)
    assert launches > 0 and (cache.num_sites, cache.num_hits) == (2, 1)
    assert choice.tactic.name == each.names[-1] and choice.ranking[0][1] == 1.5
    assert choice.cubins.keys() == {launch.kernel for launch in choice.tactic.launches}

    cache.write(each.site, each.names, [None, *slow[:-1]])
    assert [tactic.name for tactic, _ in build(256)[0][0].ranking] == each.names[1:], "what did not run is not in it"
