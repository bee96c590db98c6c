// Start of the page: the engine's card, and the charts that follow /metrics once a second while anyone looks.
// Nothing here is stored and nothing comes from elsewhere; all that the server says goes in as text.

import { ApiError, getJson, getText } from "./api.js";
import { Chart } from "./charts.js";
import { startPlayground, useModel } from "./chat.js";
import { History, parse, snapshot } from "./metrics.js";

const SMOOTH = 3; // seconds a rate is taken over: the server's counts come in steps
const RECENT = 10; // seconds for percentiles, which need observations
const QS = [0.5, 0.9, 0.99];

const count = (value) => (value >= 10000 ? `${+(value / 1000).toPrecision(3)}k` : `${+value.toPrecision(3)}`);
const share = (value) => `${+(value * 100).toFixed(1)}%`;
const seconds = (value) => (value >= 1 ? `${+value.toPrecision(3)} s` : `${+(value * 1000).toPrecision(3)} ms`);

const CHARTS = [
  {
    title: "Output tokens/s",
    series: ["tokens/s"],
    format: count,
    values: (h) => [h.rate("generation_tokens_total", SMOOTH)],
  },
  {
    title: "Time to first token",
    series: ["p50", "p90", "p99"],
    format: seconds,
    values: (h) => h.quantiles(["time_to_first_token_seconds"], QS, RECENT),
  },
  {
    title: "Inter-token time",
    series: ["p50", "p90", "p99"],
    format: seconds,
    values: (h) => h.quantiles(["inter_token_latency_seconds", "time_per_output_token_seconds"], QS, RECENT),
  },
  {
    title: "Requests",
    series: ["running", "waiting"],
    format: count,
    values: (h) => [h.gauge("num_requests_running"), h.gauge("num_requests_waiting")],
  },
  {
    title: "KV pages in use",
    series: ["in use"],
    format: share,
    max: 1,
    // replicas have caches of their own: their mean, not their sum
    values: (h) => [h.gauge("kv_cache_usage_perc", "means")],
  },
  {
    title: "Prefix hit rate",
    series: ["hit rate"],
    format: share,
    max: 1,
    values: (h) => [h.ratio("prefix_cache_hits_total", "prefix_cache_queries_total", RECENT)],
  },
];

const get = (id) => document.getElementById(id);
const charts = CHARTS.map((chart) => [new Chart(get("charts"), chart), chart.values]);
const recent = new History();

function showState(state, text) {
  const shown = get("card-state");
  if (shown.dataset.state === state && shown.textContent === text) return; // a status role reads out each change
  shown.dataset.state = state;
  shown.textContent = text;
}

/** Model and version; asked again after a restart and for another API key. */
async function fillCard() {
  const [models, version] = await Promise.allSettled([getJson("v1/models"), getJson("version")]);
  const model = models.value?.data?.[0];
  useModel(model?.id ?? null);
  document.title = model ? `${model.id} · ingot` : "ingot";
  get("card-model").textContent = model?.id ?? (models.reason?.status === 401 ? "needs an API key" : "–");
  get("card-context").textContent = model?.max_model_len ? `${model.max_model_len.toLocaleString("en")} tokens` : "–";
  get("card-version").textContent = version.value?.version ?? "–";
  return Boolean(model);
}

/** Ready, not ready (with the reason the server gives) or gone; returns the first. */
async function checkReady() {
  try {
    await getText("ready");
    showState("ready", "ready");
    return true;
  } catch (error) {
    const answered = error instanceof ApiError && error.status;
    showState(answered ? "busy" : "gone", answered ? "not ready" : "unreachable");
    get("card-state").title = error.message;
    return false;
  }
}

function showTotals() {
  const total = (name) => recent.gauge(name);
  const parts = [
    ["prompt tokens", total("prompt_tokens_total")],
    ["output tokens", total("generation_tokens_total")],
    ["preemptions", total("num_preemptions_total")],
  ];
  get("totals").textContent = parts
    .filter(([, value]) => value !== null)
    .map(([name, value]) => `${value.toLocaleString("en")} ${name}`)
    .join(" · ");
}

async function updateCharts() {
  try {
    const text = await getText("metrics");
    const at = performance.now() / 1000;
    recent.add(snapshot(parse(text), at));
    for (const [chart, values] of charts) chart.add(at, values(recent));
    showTotals();
    get("live-note").textContent = "every second, last 2 minutes";
  } catch (error) {
    // a hole in the lines says it; the next second may be better
    recent.clear();
    get("live-note").textContent = error.status === 404 ? "this server has no metrics" : "no metrics right now";
  }
}

let known = false; // the card is filled in, and the server has been ready since

async function checkEngine() {
  const ready = await checkReady();
  known = (known && ready) || (await fillCard());
}

const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, Math.max(100, milliseconds)));

let following = false;

/** Asks once a second while the tab is in sight; a slow server is not asked faster than it answers. */
async function follow() {
  if (following) return;
  following = true;
  recent.clear(); // what happened out of sight is no rate of now
  for (let second = 0; !document.hidden; second++) {
    const start = performance.now();
    await Promise.allSettled(second % 5 ? [updateCharts()] : [updateCharts(), checkEngine()]);
    await wait(1000 - (performance.now() - start));
  }
  following = false;
}

document.addEventListener("visibilitychange", follow);
startPlayground(fillCard);
follow();
