"""The files in docs/deploy say what is true of the server: metrics it has, options it takes, times that fit."""

import asyncio
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import ingot
import pytest
import typer
import yaml
from ingot.__main__ import app as commands
from ingot.engines.errors import EngineError
from ingot.runtime.server.metrics import PREFIX, ServerMetrics
from ingot.runtime.server.router.backends import Backend, Fleet
from ingot.runtime.server.router.main import GRACE
from ingot.runtime.server.router.metrics import RouterMetrics
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

DEPLOY = Path(ingot.__file__).parent / "docs/deploy"


# -- grafana.json ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(llm):
    """{sample name: its labels}, of a server and of a router before none."""

    async def nothing(backend, timeout):
        return b""

    async def pages():
        metrics = ServerMetrics(llm, "m")
        async for _ in llm.generate("a", request_id="a"):
            pass
        router = RouterMetrics(Fleet([Backend("http://a")], 4.0), nothing)
        return await metrics.page() + await router.page()

    found = {}
    for family in text_string_to_metric_families(asyncio.run(pages()).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_the_dashboard_asks_for_metrics_that_exist(exported):
    board = json.loads((DEPLOY / "grafana.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    queries += [each["query"]["query"] for each in board["templating"]["list"] if each["type"] == "query"]
    assert len(queries) > 30
    for query in queries:
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}"), query
        names = re.findall(rf"{PREFIX}\w+", query)
        # whatever has a selector or a range is a metric, and whatever is one is ours
        assert names and set(re.findall(r"([\w:]+)[{[]", query)) <= set(names), query
        for name in names:
            assert name in exported, name
        labels = set(re.findall(r"by \((\w+)\)", query)) | set(re.findall(r"(\w+)=~", query))
        assert labels <= set.union(*(exported[name] for name in names)), query
    for panel in panels:
        for target in panel["targets"]:
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert shown <= set(re.findall(r"by \((\w+)\)", target["expr"])), target
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_dashboard_shows_every_histogram(exported):
    text = (DEPLOY / "grafana.json").read_text()
    assert all(name in text for name in exported if name.endswith("_bucket"))


# -- kubernetes.yaml ---------------------------------------------------------------------------------------------------


def test_the_pod_fits_the_server():
    service, deployment = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    template = deployment["spec"]["template"]
    (container,) = template["spec"]["containers"]
    name, command, _ = container["command"]
    assert (name, command) == ("ingot", "serve")
    arguments = container["args"]
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    known = {option for p in typer.main.get_command(commands).commands["serve"].params for option in p.opts}
    assert given.keys() <= known and given["--host"] == "0.0.0.0"
    # one port everywhere
    (port,) = container["ports"]
    notes = template["metadata"]["annotations"]
    assert given["--port"] == str(port["containerPort"]) == notes["prometheus.io/port"]
    assert notes["prometheus.io/path"] == "/metrics" and notes["prometheus.io/scrape"] == "true"
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    probes = {kind: container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
    paths = {kind: probe["httpGet"]["path"] for kind, probe in probes.items()}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert all(probe["httpGet"]["port"] == port["name"] for probe in probes.values())
    # an engine may take its start_timeout to open, and what is open may end before the pod is killed
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 600
    (_, pause) = container["lifecycle"]["preStop"]["exec"]["command"]
    ends = int(pause) + float(given["--drain-timeout"]) + 2 * GRACE
    assert template["spec"]["terminationGracePeriodSeconds"] > ends
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    labels = template["metadata"]["labels"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == labels
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in template["spec"]["volumes"]}


# -- ray_serve.py ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ray_serve(monkeypatch):
    """The file with a stand-in for Ray that keeps what it is told."""
    ray, serve = ModuleType("ray"), ModuleType("ray.serve")
    serve.Application = object

    def deployment(**options):
        def decorate(kind):
            kind.options = options
            kind.bind = classmethod(lambda cls: cls)
            return kind

        return decorate

    def ingress(asgi):
        def decorate(kind):
            kind.asgi = asgi
            return kind

        return decorate

    serve.deployment, serve.ingress, ray.serve = deployment, ingress, serve
    for module in (ray, serve):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    found = {}
    exec(compile((DEPLOY / "ray_serve.py").read_text(), "ray_serve.py", "exec"), found)
    return found


def test_a_replica_of_ray_is_the_server(ray_serve, engine):
    built = ray_serve["build"]({"engine": str(engine), "model": "m", "replicas": "2", "gpus": "0", "max_num_seqs": "4"})
    assert built.options["num_replicas"] == 2 and built.options["ray_actor_options"] == {"num_gpus": 0}
    replica = built()
    replica.check_health()
    with TestClient(built.asgi) as client:
        replica.check_health()
        answer = client.post("/v1/completions", json={"model": "m", "prompt": "a", "max_tokens": 3}).json()
        assert answer["model"] == "m" and answer["usage"]["completion_tokens"] <= 3
        assert client.get("/ready").status_code == 200
        assert built.asgi.engine.max_num_seqs == 4
    with pytest.raises(EngineError, match="closed"):
        replica.check_health()


def test_an_engine_that_ray_cannot_open_is_said(ray_serve, tmp_path):
    built = ray_serve["build"]({"engine": str(tmp_path / "none")})
    sent = []

    async def receive():
        return {"type": "lifespan.startup"}

    async def send(message):
        sent.append(message)

    asyncio.run(built.asgi({"type": "lifespan"}, receive, send))
    assert [message["type"] for message in sent] == ["lifespan.startup.failed"] and "none" in sent[0]["message"]
