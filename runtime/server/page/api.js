// The server's API as the page needs it: JSON and text answers, streams of events, and errors as one sentence.
// Paths are relative, so that the page also works behind a proxy that serves it under a prefix.
// The API key lives in sessionStorage: it goes with the tab and never reaches the disk or another tab.

const KEY = "ingot-api-key";

export function apiKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function keepApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** What the server says is wrong, or why it could not be asked; `message` is fit to be shown. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The sentence in an error body: OpenAI's `{error: {message}}`, FastAPI's `{detail}`, or the text itself. */
export function sentence(text, status) {
  let body;
  try {
    body = JSON.parse(text);
  } catch {
    // a proxy's HTML page is of no use to a reader
    return text && text.length < 300 && !text.trimStart().startsWith("<") ? text : `The server answered ${status}.`;
  }
  const found = body?.error?.message ?? body?.error ?? body?.detail ?? body?.message;
  return typeof found === "string" && found ? found : `The server answered ${status}.`;
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options, headers });
  } catch (error) {
    if (options.signal?.aborted && error.name === "AbortError") throw error;
    if (error.name === "TimeoutError") throw new ApiError("The server does not answer.");
    throw new ApiError("The server cannot be reached.");
  }
  if (response.ok) return response;
  let message = sentence(await response.text(), response.status);
  const after = response.headers.get("Retry-After");
  if (after) message += ` Try again in ${after} s.`;
  throw new ApiError(message, response.status);
}

/** Text of a GET; a server that takes longer than 5 seconds counts as gone. Raises ApiError. */
export async function getText(path) {
  const response = await ask(path, { signal: AbortSignal.timeout(5000) });
  return response.text();
}

export async function getJson(path) {
  return JSON.parse(await getText(path));
}

/** Server-Sent Events out of text that comes in any pieces (HTML standard, section 9.2.6); only `data` matters here. */
export class EventParser {
  #rest = "";
  #data = [];

  /** The data of the events that this piece completes. */
  push(piece) {
    const events = [];
    this.#rest += piece;
    // a CR at the very end may be half of a CRLF: it waits
    const ends = /\r\n|\n|\r(?!$)/g;
    let from = 0;
    for (let end; (end = ends.exec(this.#rest)); from = ends.lastIndex) {
      const line = this.#rest.slice(from, end.index);
      if (line.startsWith("data:")) this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      else if (line === "" && this.#data.length) events.push(this.#data.splice(0).join("\n"));
    }
    this.#rest = this.#rest.slice(from);
    return events;
  }
}

/**
 * The chunks of a streamed completion as they come. Raises ApiError for a refusal, an error within the stream and a
 * connection that ends before `[DONE]`: half an answer must not look like a whole one.
 */
export async function* stream(path, body, signal) {
  const response = await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const parser = new EventParser();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      for (const data of parser.push(value)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(sentence(data, 500), 500);
        yield chunk;
      }
    }
  } catch (error) {
    if (error instanceof ApiError || signal.aborted) throw error;
    throw new ApiError("The connection broke before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ApiError("The connection ended before the answer was complete.");
}
