// What the form says, as a body for the API, and what the API's chunks say, in one shape for both modes.
// An empty field is left out: the server's defaults (those of the model's generation config) hold.

import { chatTokens, completionTokens } from "./tokens.js";

const TOP = 5; // alternatives asked for per token
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

/** Stop strings, one per line; \n, \t and \\ as in most languages. */
export function stops(text) {
  const unescape = (line) => line.replace(/\\([nt\\])/g, (_, c) => ({ n: "\n", t: "\t", "\\": "\\" })[c]);
  return text.split("\n").filter(Boolean).map(unescape);
}

/** Body of a completion of `prompt`, or of a chat after `messages`. `values`: the form's fields as strings. */
export function bodyOf(mode, model, values, prompt, messages = []) {
  const body = { model };
  for (const name of NUMBERS) if (values[name]?.trim()) body[name] = Number(values[name]);
  const stop = stops(values.stop ?? "");
  if (stop.length) body.stop = stop;
  if (mode === "completion") {
    body.prompt = prompt;
    if (values.logprobs) body.logprobs = TOP;
    return body;
  }
  const system = values.system?.trim() ? [{ role: "system", content: values.system }] : [];
  body.messages = [...system, ...messages, { role: "user", content: prompt }];
  if (values.logprobs) Object.assign(body, { logprobs: true, top_logprobs: TOP });
  return body;
}

/** {reasoning, text, tokens, finish, usage} of a chunk of either mode. */
export function read(mode, chunk) {
  const choice = chunk.choices?.[0];
  const usage = chunk.usage ?? null;
  if (!choice) return { reasoning: "", text: "", tokens: [], finish: null, usage };
  const finish = choice.finish_reason ?? null;
  if (mode === "completion") {
    return { reasoning: "", text: choice.text ?? "", tokens: completionTokens(choice.logprobs), finish, usage };
  }
  const delta = choice.delta ?? {};
  return {
    reasoning: delta.reasoning_content ?? delta.reasoning ?? "",
    text: delta.content ?? "",
    tokens: chatTokens(choice.logprobs),
    finish,
    usage,
  };
}

/** Counts and times of one answer as the client sees them; `now` in milliseconds. */
export class Timing {
  num = 0; // tokens, or chunks where the server tells no tokens and no usage
  #start;
  #first = null;
  #last = null;
  #usage = null;

  constructor(now) {
    this.#start = now;
  }

  chunk({ reasoning, text, tokens, usage }, now) {
    if (usage) this.#usage = usage;
    if (!reasoning && !text && !tokens.length) return;
    this.num += tokens.length || 1;
    this.#first ??= now;
    this.#last = now;
  }

  /** "42 tokens · first after 0.13 s · 87.2 tokens/s" */
  toString() {
    const num = this.#usage?.completion_tokens ?? this.num;
    const parts = [`${num} ${num === 1 ? "token" : "tokens"}`];
    if (this.#first !== null) parts.push(`first after ${((this.#first - this.#start) / 1000).toFixed(2)} s`);
    // the first token is the end of the wait, not a part of the rate
    if (num > 1 && this.#last > this.#first) {
      parts.push(`${(((num - 1) * 1000) / (this.#last - this.#first)).toFixed(1)} tokens/s`);
    }
    const cached = this.#usage?.prompt_tokens_details?.cached_tokens;
    if (cached) parts.push(`${cached} of ${this.#usage.prompt_tokens} prompt tokens cached`);
    return parts.join(" · ");
  }
}
