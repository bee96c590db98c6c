// Small line charts in SVG: two minutes of a few series, drawn anew each second (six paths; no need to be clever).
// Colours and dashes are the style sheet's, so that light and dark follow the system without a line here. A chart can
// be read without sight or pointer: its values are text, and arrow keys move the cursor through time.

import { element } from "./answer.js";

export const SPAN = 120; // seconds on the time axis
const GAP = 4; // a longer pause between points is a break in the line: nothing is known about it
const HEIGHT = 64; // as in the style sheet
const TOP = 6;
const BOTTOM = 4;
const LEFT = 52; // room for the tick labels

/** The next number of the form 1, 2 or 5 × 10ⁿ. */
export function nice(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= value * 0.999);
  return step * power;
}

/** Path data through [[x, y], …], with a new start after each null. */
export function path(points) {
  let pen = "M";
  let made = "";
  for (const point of points) {
    if (point) made += `${pen}${point[0].toFixed(1)} ${point[1].toFixed(1)}`;
    pen = point ? "L" : "M";
  }
  return made;
}

export class Chart {
  #points = []; // [{at, values}]
  #cursor = null; // index of the point that is looked at
  #width = 300;

  /** series: their names; format: number → text; max: a fixed top of the axis. */
  constructor(parent, { title, series, format, max }) {
    const figure = document.getElementById("chart").content.firstElementChild.cloneNode(true);
    Object.assign(this, { title, series, format, max, svg: figure.querySelector("svg") });
    figure.querySelector(".title").textContent = title;
    this.values = series.map((name, i) => {
      const value = element("span", "value", "–");
      const key = element("span", `key series-${i}`, series.length > 1 ? `${name} ` : "");
      key.append(value);
      figure.querySelector(".values").append(key);
      return value;
    });
    this.lines = series.map((_, i) => {
      const line = document.createElementNS(this.svg.namespaceURI, "path");
      line.setAttribute("class", `line series-${i}`);
      this.svg.querySelector(".cursor").before(line);
      return line;
    });
    this.svg.addEventListener("pointermove", (event) => this.#point(event));
    this.svg.addEventListener("pointerleave", () => this.#look(null));
    this.svg.addEventListener("blur", () => this.#look(null));
    this.svg.addEventListener("keydown", (event) => this.#key(event));
    parent.append(figure);
    new ResizeObserver(([entry]) => {
      this.#width = entry.contentRect.width || 300;
      this.#draw();
    }).observe(this.svg);
  }

  /** values: one per series, null where it is not known. */
  add(at, values) {
    this.#points.push({ at, values });
    const old = this.#points.findIndex((point) => point.at >= at - SPAN);
    this.#points.splice(0, old);
    // the cursor stays on its moment while time goes on
    if (this.#cursor !== null) this.#cursor = Math.max(0, this.#cursor - old);
    this.#draw();
  }

  #x(at) {
    return LEFT + (1 - (this.#points.at(-1).at - at) / SPAN) * (this.#width - LEFT - 2);
  }

  #draw() {
    const highest = Math.max(0, ...this.#points.flatMap(({ values }) => values));
    const top = this.max ?? nice(highest);
    const y = (value) => TOP + (1 - Math.min(1, value / top)) * (HEIGHT - TOP - BOTTOM);
    this.#axis(y, top);
    this.lines.forEach((line, i) => {
      const points = [];
      let before = null;
      for (const { at, values } of this.#points) {
        if (before !== null && at - before > GAP) points.push(null);
        points.push(values[i] === null ? null : [this.#x(at), y(values[i])]);
        before = at;
      }
      line.setAttribute("d", path(points));
    });
    this.#legend();
  }

  #axis(y, top) {
    const [upper, middle] = this.svg.querySelectorAll(".grid");
    const place = (line, at) => {
      for (const [name, value] of Object.entries({ x1: LEFT, x2: this.#width, y1: at, y2: at })) {
        line.setAttribute(name, value);
      }
    };
    place(upper, y(top));
    place(middle, y(top / 2));
    place(this.svg.querySelector(".base"), y(0));
    this.svg.querySelectorAll(".tick").forEach((tick, i) => {
      tick.textContent = i ? "0" : this.format(top);
      tick.setAttribute("x", LEFT - 6);
      tick.setAttribute("y", i ? y(0) : y(top) + 8);
    });
  }

  #legend() {
    const point = this.#points[this.#cursor ?? this.#points.length - 1];
    const cursor = this.svg.querySelector(".cursor");
    cursor.style.display = this.#cursor === null ? "none" : "";
    if (!point) return;
    for (const [name, value] of Object.entries({ x1: this.#x(point.at), x2: this.#x(point.at), y1: TOP, y2: HEIGHT })) {
      cursor.setAttribute(name, value);
    }
    const texts = point.values.map((value) => (value === null ? "–" : this.format(value)));
    this.values.forEach((value, i) => (value.textContent = texts[i]));
    const ago = Math.round(this.#points.at(-1).at - point.at);
    const named = this.series.map((name, i) => `${name} ${texts[i] === "–" ? "not known" : texts[i]}`).join(", ");
    this.svg.setAttribute("aria-label", `${this.title}, ${ago ? `${ago} seconds ago` : "now"}: ${named}`);
  }

  #look(index) {
    this.#cursor = index;
    this.#legend();
  }

  #point(event) {
    if (!this.#points.length) return;
    const x = event.clientX - this.svg.getBoundingClientRect().left;
    const far = this.#points.map(({ at }) => Math.abs(this.#x(at) - x));
    this.#look(far.indexOf(Math.min(...far)));
  }

  #key(event) {
    const last = this.#points.length - 1;
    const at = this.#cursor ?? last;
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.#look(Math.max(0, Math.min(last, to)));
  }
}
