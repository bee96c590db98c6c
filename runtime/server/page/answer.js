// An answer on the page: spans shaded by probability, and the tip that shows what else could have come.
// An answer is one tab stop, arrow keys go from token to token: hundreds of tab stops would shut the keyboard out of
// the rest of the page. The tip can be pointed at, and Escape takes it away (WCAG 1.4.13).

import { Aligner, percent, visible } from "./tokens.js";

const tip = document.getElementById("tip");
let owner = null; // the token that the tip belongs to
let leaving = 0;

/** Tokens of a span; kept beside the DOM, so that an answer's markup holds its text and nothing else. */
const tokensOf = new WeakMap();

/** An element with a class and a text, which is never markup. */
export const element = (name, className, text) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

function row(token, logprob, chosen) {
  const share = Math.exp(logprob);
  const made = element("div", chosen ? "row chosen" : "row");
  const bar = element("span", "share");
  bar.style.setProperty("--share", share); // through CSSOM: the page's policy forbids style attributes
  // screen readers get the tip as one line of text
  const said = element("span", "unseen", chosen ? " chosen, " : ", ");
  made.append(bar, element("code", "", visible(token)), element("span", "number", percent(share)), said);
  return made;
}

function fill(tokens) {
  tip.replaceChildren();
  for (const { token, logprob, top } of tokens) {
    // sampling may have taken one that is not among the most probable
    const rest = top.filter((other) => other.token !== token);
    const rows = [{ token, logprob, chosen: true }, ...rest].filter((one) => one.logprob !== null);
    rows.sort((a, b) => b.logprob - a.logprob);
    const group = element("div", "group");
    group.append(...rows.map((one) => row(one.token, one.logprob, one.chosen)));
    tip.append(group);
  }
}

function place(span) {
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const room = document.documentElement.clientWidth - width - 8;
  const above = box.top - height - 6;
  tip.style.left = `${Math.max(8, Math.min(box.left, room))}px`;
  tip.style.top = `${above > 8 ? above : box.bottom + 6}px`;
}

function show(span) {
  clearTimeout(leaving);
  if (span === owner) return;
  hideTip();
  owner = span;
  fill(tokensOf.get(span));
  tip.hidden = false;
  span.setAttribute("aria-describedby", "tip");
  span.classList.add("shown");
  place(span);
}

export function hideTip() {
  clearTimeout(leaving);
  owner?.removeAttribute("aria-describedby");
  owner?.classList.remove("shown");
  owner = null;
  tip.hidden = true;
}

/** A moment of grace lets the pointer get from the token to the tip. */
function hideSoon() {
  clearTimeout(leaving);
  leaving = setTimeout(hideTip, 150);
}

tip.addEventListener("pointerenter", () => clearTimeout(leaving));
tip.addEventListener("pointerleave", hideSoon);

/** The stream scrolls under the tip: it follows its token as long as that is in sight. */
function follow() {
  if (!owner) return;
  const box = owner.getBoundingClientRect();
  const frame = document.getElementById("log").getBoundingClientRect();
  if (box.bottom < frame.top || box.top > frame.bottom) hideTip();
  else place(owner);
}
addEventListener("scroll", follow, { capture: true, passive: true });
addEventListener("resize", follow);

const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };

/** Text that grows inside `box`. */
export class Answer {
  #box;
  #aligner;
  #spans = [];
  text = "";

  constructor(box) {
    this.#box = box;
    this.#aligner = new Aligner((text, tokens) => this.#piece(text, tokens));
    const span = (event) => event.target.closest?.(".token");
    box.addEventListener("pointerover", (event) => span(event) && show(span(event)));
    box.addEventListener("pointerout", (event) => span(event) && hideSoon());
    box.addEventListener("focusin", (event) => this.#focused(span(event)));
    box.addEventListener("focusout", hideTip);
    box.addEventListener("keydown", (event) => this.#key(event));
  }

  push(text, tokens) {
    this.text += text;
    this.#aligner.push(text, tokens);
  }

  /** The end of this text; returns tokens that belong to what comes after it. */
  flush() {
    return this.#aligner.flush();
  }

  #piece(text, tokens) {
    if (!tokens.some(({ logprob }) => logprob !== null)) {
      // one text node that grows: thousands of them make every layout slow
      if (this.#box.lastChild?.nodeType === Node.TEXT_NODE) this.#box.lastChild.appendData(text);
      else this.#box.append(text);
      return;
    }
    const span = element("span", "token", text);
    const logprob = tokens.reduce((sum, token) => sum + (token.logprob ?? 0), 0);
    span.style.setProperty("--p", Math.exp(logprob).toFixed(4));
    if (/^\n+$/.test(text)) span.classList.add("break");
    span.tabIndex = this.#spans.length ? -1 : 0;
    if (!this.#spans.length) {
      this.#box.setAttribute("role", "group");
      this.#box.setAttribute("aria-label", "Answer; arrow keys go from token to token");
    }
    tokensOf.set(span, tokens);
    this.#spans.push(span);
    this.#box.append(span);
  }

  #focused(span) {
    if (!span) return;
    for (const other of this.#box.querySelectorAll('.token[tabindex="0"]')) other.tabIndex = -1;
    span.tabIndex = 0;
    show(span);
  }

  #key(event) {
    const at = this.#spans.indexOf(event.target);
    const step = STEPS[event.key];
    if (at < 0 || step === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.#spans[Math.max(0, Math.min(this.#spans.length - 1, at + step))].focus();
  }
}
