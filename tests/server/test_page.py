"""The page at `/`: its files keep to the policy they are served with, its arithmetic is right, and it works.

The last is seen in a real browser against a stand-in for the API: the page is given one script more, which uses it as
a person would and posts what it found. Node and Chromium are optional; without them those tests are skipped.
"""

import json
import re
import shutil
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import ingot
import pytest

PAGE = Path(ingot.__file__).parent / "runtime/server/page"
FILES = sorted(PAGE.iterdir())
HTML = (PAGE / "index.html").read_text()
SCRIPTS = "".join(path.read_text() for path in PAGE.glob("*.js"))
TAGS = [
    (name, dict(re.findall(r'([\w-]+)(?:="([^"]*)")?', attributes)))
    for name, attributes in re.findall(r"<(\w+)([^<>]*)>", HTML)
]
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def test_nothing_is_inline():
    assert not any(inside.strip() for inside in re.findall(r"<script[^>]*>([^<]*)<", HTML)) and "<style" not in HTML
    for tag, attributes in TAGS:
        assert not [name for name in attributes if name == "style" or name.startswith("on")], (tag, attributes)
        assert not any(value.startswith(("javascript:", "data:")) for value in attributes.values())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_nothing_comes_from_elsewhere(path):
    text = path.read_text().replace('<svg xmlns="http://www.w3.org/2000/svg"', "")  # a name, never fetched
    assert not re.search(r"https?:|url\(|@import|[\"']//", text)
    # text from the server must not become markup, nor code
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    assert len(text.splitlines()) <= 300


def test_files_that_are_named_exist_and_no_others():
    named = {attributes[key] for _, attributes in TAGS for key in ("src", "href") if key in attributes}
    named |= {f"page/{name}" for name in re.findall(r'from "\./([^"]+)"', SCRIPTS)}
    assert named | {"page/index.html"} == {f"page/{path.name}" for path in FILES}


def test_every_field_has_a_label_and_every_id_one_element():
    ids = [attributes["id"] for _, attributes in TAGS if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:(?<!\.)get|ById)\("([^"]+)"\)', SCRIPTS)) <= set(ids)
    outside = re.sub(r"<label.*?</label>", "", HTML, flags=re.DOTALL)
    labelled = {attributes["for"] for tag, attributes in TAGS if tag == "label" and "for" in attributes}
    assert set(re.findall(r'<(?:input|textarea|select)\b[^<>]*?id="(\w+)"', outside)) == labelled
    assert len(re.findall(r"<(?:input|textarea|select)\b", outside)) == len(labelled) == 1


NODE_TESTS = r"""
import test from "node:test";
import { deepStrictEqual as same } from "node:assert";
import { EventParser, sentence } from "./api.js";
import { Aligner, chatTokens, completionTokens, percent, visible } from "./tokens.js";
import { History, parse, quantile, snapshot } from "./metrics.js";
import { bodyOf, read, stops, Timing } from "./request.js";

test("events come out the same however the stream is cut; errors are sentences", () => {
  const text = 'data: {"a": 1}\r\n\r\n: ping\n\nid: 3\ndata:two\ndata: lines\n\ndata: é\r\rdata: [DONE]\n\ndata: cut';
  for (let size = 1; size <= text.length; size++) {
    const parser = new EventParser();
    const events = text.match(new RegExp(`[^]{1,${size}}`, "g")).flatMap((piece) => parser.push(piece));
    same(events, ['{"a": 1}', "two\nlines", "é", "[DONE]"], `pieces of ${size}`);
  }
  for (const text of ['{"error": {"message": "No."}}', '{"detail": "No."}', "No."]) same(sentence(text, 9), "No.");
  for (const text of ['{"detail": [{}]}', "<html>Bad</html>", ""]) same(sentence(text, 9), "The server answered 9.");
});
const token = (text, bytes) => ({ token: text, bytes, logprob: -1 });
function align(...pushes) {
  const pieces = [];
  const aligner = new Aligner((text, tokens) => pieces.push(`${text}|${tokens.length}`));
  for (const [text, ...tokens] of pushes) aligner.push(text, chatTokens({ content: tokens }));
  aligner.flush();
  return pieces;
}
test("tokens are laid over text", () => {
  same(align(["a b", token("a"), token(" b")], ["c", token("c")]), ["a|1", " b|1", "c|1"]);
  same([align(["no"], [" tokens"]), align(["cut", token("cut here")])], [["no|0", " tokens|0"], ["cut|1"]]);
  same(align(["", token("late")], ["la"], ["te"]), ["late|1"]);
  same(align(["", token("?", [0xc3])], ["é!", token("?", [0xa9]), token("!")]), ["é|2", "!|1"]);
  same(align(["hi", token("<s>"), token("hi"), token("</s>")]), ["hi|1"]);
  same(align(["other", token("wrong")], ["ok", token("ok")]), ["other|0", "ok|1"]);
  same(align(["a\ufffdb", token("a"), token("?", [0xff]), token("b")]), ["a|1", "\ufffdb|2"]);
});
test("tokens of both endpoints read alike", () => {
  const top = [{ token: " a", logprob: -0.5 }, { token: " b", logprob: -2 }];
  const old = { tokens: [" a", "bytes:\\xe2\\x80"], token_logprobs: [-0.5, -1] };
  const [one, half] = completionTokens({ ...old, top_logprobs: [{ " b": -2, " a": -0.5 }] });
  same([one.top, [...half.bytes]], [top, [0xe2, 0x80]]);
  same(chatTokens({ content: [{ token: " a", logprob: -0.5, bytes: null, top_logprobs: top }] }), [one]);
  same([completionTokens(null), chatTokens(undefined), visible(" a\n\t"), visible("")], [[], [], "␣a↵⇥", "(empty)"]);
  same([0.42, 1, 0.0001, 0].map(percent), ["42.0%", "100%", "<0.1%", "0.0%"]);
});
test("metrics text is read; quantiles are those of Prometheus", () => {
  const label = 'model_name="a \\"b\\" \\\\ {c},\\n"';
  const samples = parse(`# HELP x y\ni:run{e="0",${label}} 3.0\nplain 1e3 170000\nx{le="+Inf"} +Inf\nbroken\nn NaN`);
  same(samples.map(({ name, value }) => [name, value]), [["run", 3], ["plain", 1000], ["x", Infinity], ["n", NaN]]);
  same(samples[0].labels, { e: "0", model_name: 'a "b" \\ {c},\n' });
  const bounds = [[1, 10], [2, 20], [4, 20], [Infinity, 40]];
  same([0, 0.25, 0.375, 0.5, 0.99].map((q) => quantile(q, bounds)), [0, 1, 1.5, 2, 4]);
  same([quantile(0.5, []), quantile(0.5, [[1, 0], [Infinity, 0]])], [null, null]);
});
test("history takes differences, and starts anew after a restart", () => {
  const history = new History();
  const at = (second, tokens, num) => history.add(snapshot(parse(`i:use{e="0"} 0.25\ni:use{e="1"} 0.75
i:t_total{e="0"} ${tokens}\ni:t_total{e="1"} 1\nd_bucket{le="0.5"} ${num}\nd_bucket{le="+Inf"} ${num}`), second));
  at(0, 1000, 500);
  same([history.rate("t_total", 3), history.gauge("use", "means")], [null, 0.5]);
  for (let second = 1; second <= 5; second++) at(second, 1000 + 10 * second, 500 + second);
  same([history.rate("t_total", 3), history.growth("t_total", 60), history.rate("none", 3)], [10, 50, null]);
  same(history.quantiles(["none", "d"], [0.5], 2), [0.25]);
  same([history.ratio("d_bucket", "t_total", 5), history.ratio("t_total", "none", 5)], [0.2, null]);
  const rates = [at(6, 4, 0), history.rate("t_total", 3), at(7, 6, 0), history.rate("t_total", 3)];
  same([...rates, history.quantiles(["d"], [0.5], 3)], [undefined, null, undefined, 2, [null]]);
  const others = ["a", "a", "b"].map((r) => history.add(snapshot(parse(`t_total{replica="${r}"} 9`), 8)));
  same([others.length, history.rate("t_total", 3)], [3, null]);
});
test("the form becomes a body", () => {
  same(stops("a\n\n\\n\\n\n\\\\n"), ["a", "\n\n", "\\n"]);
  const values = { temperature: "0", top_p: "", max_tokens: "8", stop: "x", system: "S", logprobs: "on", key: "k" };
  same(bodyOf("completion", "m", values, "p"),
    { model: "m", temperature: 0, max_tokens: 8, stop: ["x"], prompt: "p", logprobs: 5 });
});
test("an answer is timed", () => {
  const timing = new Timing(0);
  timing.chunk(read("chat", { choices: [{ delta: { role: "assistant", content: "" } }] }), 10);
  for (const now of [250, 500, 750]) timing.chunk(read("completion", { choices: [{ text: "a" }] }), now);
  same(String(timing), "3 tokens · first after 0.25 s · 4.0 tokens/s");
  timing.chunk(read("chat", { choices: [], usage: { completion_tokens: 5 } }), 760);
  same(String(timing), "5 tokens · first after 0.25 s · 8.0 tokens/s");
});"""


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_arithmetic_in_node(tmp_path):
    for path in PAGE.glob("*.js"):
        shutil.copy(path, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "arithmetic.test.js").write_text(NODE_TESTS)
    ran = subprocess.run(["node", "--test", "."], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr


WORDS = ["def", " read", "(", "<b>", "é", ")", ":", "\n", "    return", " 1", "\n"]


def logprobs(chat: bool, word: str) -> dict:
    top = {word: -0.4, " other": -1.2, "\n\n": -3.0}
    if not chat:
        return {"tokens": [word], "token_logprobs": [-0.4], "top_logprobs": [top]}
    others = [{"token": token, "logprob": logprob} for token, logprob in top.items()]
    return {"content": [{"token": word, "logprob": -0.4, "bytes": list(word.encode()), "top_logprobs": others}]}


def metrics(polls: int) -> str:
    values = {"num_requests_running": 3.0, "num_requests_waiting": polls % 4, "num_preemptions_total": 2}
    values |= {"generation_tokens_total": polls * 120, "prompt_tokens_total": polls * 500, "kv_cache_usage_perc": 0.25}
    values |= {"prefix_cache_hits_total": polls * 30, "prefix_cache_queries_total": polls * 40}
    lines = [f'ingot:{name}{{engine="0",model_name="stand-in"}} {value}' for name, value in values.items()]
    for name in ("time_to_first_token_seconds", "time_per_output_token_seconds"):
        buckets = {"0.01": 2, "0.05": 8, "0.1": 10, "+Inf": 10}.items()
        lines += [f'ingot:{name}_bucket{{engine="0",le="{bound}"}} {polls * num}' for bound, num in buckets]
    return "\n".join(["# TYPE ingot:num_requests_running gauge", *lines, ""])


class StandIn(BaseHTTPRequestHandler):
    """The server as far as the page goes, with `/drive.js` added to the page (not to `/?plain`); notes what it saw."""

    def log_message(self, *_): ...

    def answer(self, body: str, kind: str = "application/json", status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", "default-src 'self'")
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self):
        self.seen.polls += self.path == "/metrics"
        answers = {f"/page/{path.name}": (path.read_text(), TYPES[path.suffix]) for path in FILES} | {
            "/": (HTML.replace("</head>", '<script type="module" src="drive.js"></script></head>'), TYPES[".html"]),
            "/?plain": (HTML, TYPES[".html"]),
            "/drive.js": (DRIVER, TYPES[".js"]),
            "/metrics": (metrics(self.seen.polls), "text/plain; version=0.0.4"),
            "/ready": ("{}",),
            "/version": ('{"version": "1.2.3"}',),
            "/v1/models": ('{"data": [{"id": "stand-in", "max_model_len": 4096}]}',),
        }
        self.answer(*answers.get(self.path, ("{}", "application/json", 404)))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/results":
            self.seen.results = body
            return self.seen.done.set()
        self.seen.requests.append((self.path, self.headers["Authorization"], body))
        chat = "messages" in body
        asked = body["messages"][-1]["content"] if chat else body["prompt"]
        if asked == "refuse":
            return self.answer('{"error": {"message": "top_k is 0; it must not be."}}', status=400)
        self.answer("", "text/event-stream")
        try:
            for i, word in enumerate(WORDS * (200 if asked == "long" else 1)):
                key = "reasoning_content" if asked == "think" and i < 3 else "content"
                made = {"delta": {key: word}} if chat else {"text": word}
                annotated = logprobs(chat, word) if body.get("logprobs") else None
                self.event({"choices": [{**made, "logprobs": annotated, "finish_reason": None}]})
                if asked == "break" and i == 2:
                    return self.event({"error": {"message": "The engine failed."}})
                time.sleep(0.01)
            self.event({"choices": [{"delta": {}, "text": "", "finish_reason": "length"}]})
            self.event({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": len(WORDS)}})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.seen.left.set()

    def event(self, data: dict) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())


# each step of a visit throws or passes; later ones go on from where earlier ones left the page
DRIVER = r"""
const get = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];
const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
async function until(test) {
  for (let i = 0; !test(); i++, await wait(20)) ok(i < 500, `never: ${test}`);
}
const ok = (right, message) => { if (!right) throw new Error(message); };
const json = JSON.stringify;
const same = (a, b) => ok(json(a) === json(b), `${json(a)} is not ${json(b)}`);
const like = (text, pattern) => ok(pattern.test(text), `${text} is not like ${pattern}`);
const press = (on, key, ctrlKey = false) =>
  on.dispatchEvent(new KeyboardEvent("keydown", { key, ctrlKey, bubbles: true, cancelable: true }));
const idle = () => get("stop").hidden;
async function send(text, end = idle) {
  Object.assign(get("prompt"), { value: text }).focus();
  press(get("prompt"), "Enter", true);
  await until(() => !idle());
  await until(end);
}
const made = (mode, i) => get(`${mode}-turns`).children[i].querySelector(".made").textContent;
const faults = [];
for (const type of ["error", "unhandledrejection", "securitypolicyviolation"]) {
  addEventListener(type, (event) => faults.push(event.message ?? event.violatedDirective ?? String(event.reason)));
}
console.error = (...args) => faults.push(args.join(" "));
const TEXT = "def read(<b>é):\n    return 1\n";

const STEPS = {
  async card() {
    await until(() => get("card-state").textContent === "ready" && document.title === "stand-in · ingot");
    same(all("#card dd").map((cell) => cell.textContent), ["stand-in", "4,096 tokens", "1.2.3", "ready"]);
  },
  async completion() {
    await send("x = <i>");
    same([all("#log .given")[0].textContent, made("completion", 0)], ["x = <i>", TEXT]);
    same([all(".token").length, all("#log b, #log i").length], [11, 0]);
    like(all(".note")[0].textContent, /^11 tokens · first after \d\.\d\d s · [\d.]+ tokens\/s · ended at max tokens$/);
    await until(() => get("live").textContent.includes("11 tokens"));
  },
  async tokens() {
    const tokens = all(".token");
    tokens[0].focus();
    press(tokens[0], "ArrowRight");
    same([document.activeElement === tokens[1], tokens[1].getAttribute("aria-describedby")], [true, "tip"]);
    same([get("tip").hidden, get("tip").textContent], [false, "␣read67.0% chosen, ␣other30.1%, ↵↵5.0%, "]);
    same(tokens.map((token) => token.tabIndex), [-1, 0, ...Array(9).fill(-1)]);
    press(tokens[1], "Escape");
    same([get("tip").hidden, tokens[1].hasAttribute("aria-describedby")], [true, false]);
    tokens[3].dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
    like(get("tip").textContent, /^<b>67.0%/);
    tokens[3].dispatchEvent(new PointerEvent("pointerout", { bubbles: true }));
    await until(() => get("tip").hidden);
  },
  async errors() {
    await send("refuse");
    same([get("error").textContent, all(".turn").length], ["top_k is 0; it must not be.", 0]);
    await send("break");
    same([get("error").textContent, made("completion", 0)], ["The engine failed.", "def read("]);
  },
  async stopped() {
    await send("long", () => all(".token").length > 20);
    press(get("prompt"), "Escape");
    await until(idle);
    like(all(".note")[0].textContent, /tokens\/s · stopped$/);
    same([get("error").hidden, document.activeElement === get("prompt")], [true, true]);
  },
  async chat() {
    get("form").elements.top_p.value = "7"; // is refused by the form
    press(get("prompt"), "Enter", true);
    same([get("settings").open, idle()], [true, true]);
    all('[value="chat"]')[0].click();
    same([get("completion-turns").hidden, get("system-field").hidden, location.hash], [true, false, "#chat"]);
    const fields = { system: "Be brief.", stop: "\\n\\n", seed: "7", top_p: "0.5", key: "secret" };
    for (const [name, value] of Object.entries(fields)) all(`[name="${name}"]`)[0].value = value;
    get("form").elements.key.dispatchEvent(new Event("change"));
    same([sessionStorage.length, localStorage.length, document.cookie], [1, 0, ""]);
    await send("think");
    same([get("prompt").value, all(".thought .text")[0].textContent], ["", "def read("]);
    await send("again");
    same(made("chat", 3), TEXT);
    get("form").elements.logprobs.checked = false;
    await send("plain");
    same([all("#chat-turns > :last-child .token").length, made("chat", 5)], [0, TEXT]);
    await send("refuse");
    same([get("chat-turns").children.length, get("prompt").value], [6, "refuse"]);
  },
  async charts() {
    await until(() => all(".line").every((line) => line.getAttribute("d").includes("L")));
    const labels = all("figure svg").map((svg) => svg.getAttribute("aria-label"));
    like(labels[0], /^Output tokens\/s, now: tokens\/s \d+/);
    for (const i of [1, 2]) like(labels[i], /now: p50 30 ms, p90 75 ms, p99 97.5 ms$/);
    like(labels[3], /running 3, waiting [0-3]$/);
    same(labels.slice(4), ["KV pages in use, now: in use 25%", "Prefix hit rate, now: hit rate 75%"]);
    press(all("figure svg")[0], "ArrowLeft");
    like(all("figure svg")[0].getAttribute("aria-label"), /[12] seconds ago/);
    like(get("totals").textContent, /prompt tokens · [\d,]+ output tokens · 2 preemptions$/);
  },
  async hidden() {
    const polls = () => performance.getEntriesByType("resource").filter(({ name }) => /metrics$/.test(name)).length;
    const hide = (value) => {
      Object.defineProperty(document, "hidden", { value, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    };
    hide(true);
    const before = await wait(1300).then(polls);
    same(await wait(1500).then(polls), before);
    hide(false);
    await until(() => polls() > before);
  },
  async narrow() {
    const frame = Object.assign(document.createElement("iframe"), { src: "./?plain", width: 360, height: 740 });
    document.body.append(frame);
    const inside = (selector) => frame.contentDocument?.querySelector(selector);
    await until(() => inside("#card-model")?.textContent === "stand-in");
    inside("#settings").open = true;
    same(inside("html").scrollWidth, inside("html").clientWidth);
  },
  faults: async () => same(faults, []),
};

const results = {};
for (const [name, step] of Object.entries(STEPS)) results[name] = await step().then(() => "passed", String);
await fetch("results", { method: "POST", body: json(results) });
"""
STEPS = [*re.findall(r"^  async (\w+)\(\) \{", DRIVER, re.MULTILINE), "faults"]


@pytest.fixture(scope="module")
def visit(tmp_path_factory):
    """A visit of Chromium to the page: what the stand-in saw, and the result of each step."""
    if not shutil.which("chromium"):
        pytest.skip("needs chromium")
    seen = SimpleNamespace(requests=[], polls=0, left=threading.Event(), done=threading.Event())
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (StandIn,), {"seen": seen})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --window-size=1280,900".split()
        flags += [f"--user-data-dir={tmp_path_factory.mktemp('profile')}", f"http://127.0.0.1:{server.server_port}/"]
        browser = subprocess.Popen(["chromium", *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert seen.done.wait(90), "the visit did not come to an end"
        finally:
            browser.terminate()
            browser.wait(20)
            server.shutdown()
    return seen


@pytest.mark.parametrize("step", STEPS)
def test_in_a_browser(visit, step):
    assert visit.results[step] == "passed"


def test_what_the_browser_asked_for(visit):
    assert visit.left.wait(30)  # stopping tells the server
    assert [path for path, _, _ in visit.requests] == ["/v1/completions"] * 4 + ["/v1/chat/completions"] * 4
    assert [key for _, key, _ in visit.requests] == [None] * 4 + ["Bearer secret"] * 4
    bodies = [body for _, _, body in visit.requests]
    assert all(body["stream"] and body["model"] == "stand-in" and body["max_tokens"] == 256 for body in bodies)
    assert bodies[0]["prompt"] == "x = <i>" and bodies[0]["logprobs"] == 5
    assert not {"temperature", "top_p", "top_k", "seed", "stop"} & set(bodies[0])
    # a model is not shown its own reasoning
    said = [("system", "Be brief."), ("user", "think"), ("assistant", "".join(WORDS[3:])), ("user", "again")]
    assert [(message["role"], message["content"]) for message in bodies[5]["messages"]] == said
    assert bodies[5]["stop"] == ["\n\n"] and bodies[5]["seed"] == 7 and bodies[5]["top_p"] == 0.5
    assert bodies[5]["logprobs"] is True and "logprobs" not in bodies[6]
