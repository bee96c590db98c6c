// From the text of /metrics to what the charts show; no DOM, so that it can be tested by itself.
// Counters and histograms only say something as differences: a rate or a percentile is taken over a stretch of time,
// between two snapshots. Series of several replicas are added up.

const LINE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?\s*$/;
const LABEL = /([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"/g;

function number(text) {
  if (/^[+-]?inf$/i.test(text)) return text[0] === "-" ? -Infinity : Infinity;
  return Number(text); // "NaN" included
}

/** Prometheus text (exposition format 0.0.4) as [{name, labels, value}]; a name loses its `ingot:`. */
export function parse(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = !line.startsWith("#") && LINE.exec(line);
    if (!found) continue;
    const labels = {};
    for (const [, key, value] of (found[2] ?? "").matchAll(LABEL)) {
      labels[key] = value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
    }
    samples.push({ name: found[1].replace(/^.*:/, ""), labels, value: number(found[3]) });
  }
  return samples;
}

/**
 * A moment: {at (seconds), sums: name → sum, means: name → mean, buckets: name → Map(bound → count), replicas: who was
 * added up, as one string}.
 */
export function snapshot(samples, at) {
  const sums = new Map();
  const nums = new Map();
  const buckets = new Map();
  for (const { name, labels, value } of samples) {
    sums.set(name, (sums.get(name) ?? 0) + value);
    nums.set(name, (nums.get(name) ?? 0) + 1);
    if (!name.endsWith("_bucket") || labels.le === undefined) continue;
    const histogram = name.slice(0, -"_bucket".length);
    if (!buckets.has(histogram)) buckets.set(histogram, new Map());
    const bounds = buckets.get(histogram);
    bounds.set(number(labels.le), (bounds.get(number(labels.le)) ?? 0) + value);
  }
  const means = new Map([...sums].map(([name, sum]) => [name, sum / nums.get(name)]));
  const replicas = [...new Set(samples.map(({ labels }) => labels.replica))].sort().join();
  return { at, sums, means, buckets, replicas };
}

/**
 * Quantile of cumulative counts [[bound, count], …] with bounds ascending, as PromQL's histogram_quantile: linear
 * within a bucket, and the highest finite bound for what lies above it. null without observations.
 */
export function quantile(q, bounds) {
  const total = bounds.at(-1)?.[1] ?? 0;
  if (!(total > 0)) return null;
  const rank = q * total;
  let below = 0;
  let lower = 0;
  for (const [bound, count] of bounds) {
    if (count >= rank && count > below) {
      if (bound === Infinity) return lower;
      return lower + ((bound - lower) * (rank - below)) / (count - below);
    }
    below = count;
    lower = bound;
  }
  return lower;
}

/** Snapshots of the recent past. */
export class History {
  #kept = [];

  constructor(seconds = 60) {
    this.seconds = seconds;
  }

  /** A counter that went down means a restarted server, as do other replicas: what was before says nothing of now. */
  add(snap) {
    const before = this.#kept.at(-1);
    const restarted = before && [...snap.sums].some(([n, v]) => n.endsWith("_total") && v < before.sums.get(n));
    if (restarted || (before && before.replicas !== snap.replicas)) this.clear();
    this.#kept.push(snap);
    while (this.#kept[0].at < snap.at - this.seconds) this.#kept.shift();
  }

  clear() {
    this.#kept = [];
  }

  /** The newest snapshot and the one that many seconds before it, or the oldest there is; null while there is one. */
  #ends(seconds) {
    const now = this.#kept.at(-1);
    if (this.#kept.length < 2) return null;
    // half a second of slack: polls are never exactly a second apart
    const then = this.#kept.find(({ at }) => at >= now.at - seconds - 0.5);
    return then === now ? [this.#kept.at(-2), now] : [then, now];
  }

  gauge(name, of = "sums") {
    return this.#kept.at(-1)?.[of].get(name) ?? null;
  }

  /** Growth of a counter over the last seconds; null where it is not known. */
  growth(name, seconds) {
    const ends = this.#ends(seconds);
    if (!ends || !ends[1].sums.has(name)) return null;
    return ends[1].sums.get(name) - (ends[0].sums.get(name) ?? 0);
  }

  rate(name, seconds) {
    const growth = this.growth(name, seconds);
    const ends = this.#ends(seconds);
    return growth === null ? null : growth / (ends[1].at - ends[0].at);
  }

  ratio(part, whole, seconds) {
    const total = this.growth(whole, seconds);
    return total > 0 ? this.growth(part, seconds) / total : null;
  }

  /** Quantiles of what a histogram saw over the last seconds; of several names the first that the server has. */
  quantiles(names, qs, seconds) {
    const ends = this.#ends(seconds);
    const name = names.find((n) => ends?.[1].buckets.has(n));
    if (!name) return qs.map(() => null);
    const before = ends[0].buckets.get(name) ?? new Map();
    const grown = [...ends[1].buckets.get(name)]
      .sort(([a], [b]) => a - b)
      .map(([bound, count]) => [bound, count - (before.get(bound) ?? 0)]);
    return qs.map((q) => quantile(q, grown));
  }
}
