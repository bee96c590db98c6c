// Generated tokens, and which part of the text each of them made.
// The server's text is what is shown. Its tokens only annotate it: one that has no text of its own (a special token),
// or that cannot be found where it should be, costs its annotation and never a character.

const encode = (text) => new TextEncoder().encode(text);

/** Bytes of a token: the API's list, its "bytes:\xe2\x80" spelling of half a character, or those of its text. */
function bytesOf(token, bytes) {
  if (bytes) return Uint8Array.from(bytes);
  if (/^bytes:(\\x[0-9a-f]{2})+$/i.test(token)) {
    return Uint8Array.from(token.slice(6).match(/[0-9a-f]{2}/gi), (byte) => parseInt(byte, 16));
  }
  return encode(token);
}

/** `logprobs` of a chat chunk as [{token, bytes, logprob, top: [{token, logprob}]}]. */
export function chatTokens(logprobs) {
  return (logprobs?.content ?? []).map((entry) => ({
    token: entry.token,
    bytes: bytesOf(entry.token, entry.bytes),
    logprob: entry.logprob,
    top: (entry.top_logprobs ?? []).map(({ token, logprob }) => ({ token, logprob })),
  }));
}

/** The same of a completion chunk, where alternatives are a dictionary in no order. */
export function completionTokens(logprobs) {
  return (logprobs?.tokens ?? []).map((token, i) => ({
    token,
    bytes: bytesOf(token),
    logprob: logprobs.token_logprobs?.[i] ?? null,
    top: Object.entries(logprobs.top_logprobs?.[i] ?? {})
      .map(([token, logprob]) => ({ token, logprob }))
      .sort((a, b) => b.logprob - a.logprob),
  }));
}

function textOf(tokens) {
  const all = new Uint8Array(tokens.reduce((sum, { bytes }) => sum + bytes.length, 0));
  let at = 0;
  for (const { bytes } of tokens) {
    all.set(bytes, at);
    at += bytes.length;
  }
  return new TextDecoder().decode(all);
}

const LONGEST = 8; // tokens that together make one character; UTF-8 needs 4, the rest is for odd vocabularies

/**
 * Lays tokens over text; either may come first. Calls `emit(text, tokens)` for each piece in order: one token as a
 * rule, several where a character is spread over them, none where the text has no tokens.
 */
export class Aligner {
  #emit;
  #text = "";
  #tokens = [];

  constructor(emit) {
    this.#emit = emit;
  }

  push(text, tokens) {
    this.#tokens.push(...tokens);
    this.#text += text;
    while (this.#text && this.#step(false));
  }

  /** No more text comes: what is held back goes out. Returns the tokens that had no text. */
  flush() {
    while (this.#text && this.#step(true));
    return this.#tokens.splice(0);
  }

  #take(text, from, to) {
    this.#text = this.#text.slice(text.length);
    const made = this.#tokens.splice(0, to).slice(from);
    this.#emit(text, made);
    return true;
  }

  /** Emits one piece; false: more text has to come first. */
  #step(last) {
    const num = this.#tokens.length;
    for (let from = 0; from < num; from++) {
      for (let to = from + 1; to <= Math.min(num, from + LONGEST); to++) {
        const piece = textOf(this.#tokens.slice(from, to));
        if (piece.endsWith("\ufffd")) continue; // half a character: with the next token
        if (piece && this.#text.startsWith(piece)) return this.#take(piece, from, to);
        // the server holds text back while it may begin a stop string, and cuts the last token at one
        if (from === 0 && piece.startsWith(this.#text)) return last ? this.#take(this.#text, from, to) : false;
        break;
      }
    }
    return this.#take(this.#text, num, num);
  }
}

/** A token so that white space can be seen. */
export function visible(token) {
  return token.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣") || "(empty)";
}

export function percent(share) {
  const value = share * 100;
  if (value > 0 && value < 0.1) return "<0.1%";
  return `${value.toFixed(value > 99.95 ? 0 : 1)}%`;
}
