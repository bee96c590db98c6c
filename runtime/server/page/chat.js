// The playground: one form, two modes, each with an output of its own. One request runs at a time.
// A run writes into its own turn only; stopping aborts the fetch, which frees the request on the server, and keeps what
// had come. Screen readers get the stream through a hidden live region, in pieces that can be listened to.

import { Answer, element, hideTip } from "./answer.js";
import { ApiError, keepApiKey, apiKey, stream } from "./api.js";
import { bodyOf, read, Timing } from "./request.js";

const get = (id) => document.getElementById(id);
const form = get("form");
const prompt = get("prompt");
const log = get("log");

const MODES = {
  completion: {
    path: "v1/completions",
    turns: get("completion-turns"),
    label: "Prompt",
    hint: "Text to go on from",
    empty: "The model goes on from your prompt. Each token is shaded by how unsure the model was; point at it or go there with the arrow keys to see what else could have come.",
  },
  chat: {
    path: "v1/chat/completions",
    turns: get("chat-turns"),
    label: "Message",
    hint: "Say something",
    empty: "A conversation with the model, in its own chat template. A system prompt can be set below.",
  },
};
const ENDS = { length: "ended at max tokens", content_filter: "filtered", abort: "ended by the server" };

let running = null; // AbortController of the request under way
let messages = []; // the conversation so far
let model = null;

export function useModel(name) {
  model = name;
}

const mode = () => form.elements.mode.value;

/** Reads the stream aloud: at most one announcement in 2 seconds, of whole words. */
const voice = {
  text: "",
  timer: 0,
  add(text) {
    this.text += text;
    this.timer ||= setTimeout(() => this.say(false), 2000);
  },
  say(all) {
    clearTimeout(this.timer);
    this.timer = 0;
    const end = all ? this.text.length : this.text.search(/\S*$/);
    if (end) get("live").textContent = this.text.slice(0, end);
    this.text = this.text.slice(end);
  },
};

/** Keeps the end in view, unless the reader has scrolled away from it. Once a frame: it costs a layout. */
const tail = {
  kept: true,
  asked: false,
  follow() {
    if (this.asked || !this.kept) return;
    this.asked = true;
    requestAnimationFrame(() => {
      this.asked = false;
      log.scrollTop = log.scrollHeight;
    });
  },
};
log.addEventListener("scroll", () => {
  if (!tail.asked) tail.kept = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
});

function showError(message) {
  get("error").textContent = message ?? "";
  get("error").hidden = !message;
}

function turn(role, name) {
  const item = element("li", `turn ${role}`);
  item.append(element("h3", "", name));
  MODES[mode()].turns.append(item);
  get("empty").hidden = true;
  return item;
}

/** Puts the question and a place for the answer on the page. */
function begin(text) {
  if (mode() === "completion") {
    MODES.completion.turns.replaceChildren();
    const item = turn("continued", "Completion");
    const box = element("div", "text");
    const made = element("span", "made");
    box.append(element("span", "given", text), made);
    item.append(box, element("p", "note"));
    return { items: [item], made, note: item.lastChild };
  }
  const asked = turn("user", "You");
  asked.append(element("div", "text", text));
  const answered = turn("assistant", "Model");
  const made = element("div", "text made");
  answered.append(made, element("p", "note"));
  return { items: [asked, answered], made, note: answered.lastChild };
}

/** The place for what a model thinks aloud; open, since it is what streams. */
function thought(made) {
  const box = element("details", "thought");
  const text = element("div", "text");
  box.open = true;
  box.append(element("summary", "", "Reasoning"), text);
  made.before(box);
  return new Answer(text);
}

function setRunning(controller) {
  const wasOn = document.activeElement;
  running = controller;
  get("send").hidden = Boolean(controller);
  get("stop").hidden = !controller;
  get("clear").disabled = Boolean(controller);
  for (const radio of form.elements.mode) radio.disabled = Boolean(controller);
  log.setAttribute("aria-busy", String(Boolean(controller)));
  // the button that was pressed is gone: focus must not fall off the page
  if (wasOn === get("send") && controller) get("stop").focus();
  if (wasOn === get("stop") && !controller) prompt.focus();
}

/** One request and what is shown of it. */
class Run {
  reasoning = null;
  end = null; // why it ended

  constructor(text) {
    this.mode = mode(); // cannot change while a request runs
    this.text = text;
    Object.assign(this, begin(text)); // items, made, note
    this.answer = new Answer(this.made);
    this.current = this.answer; // what the stream is writing
    this.timing = new Timing(performance.now());
  }

  write(part) {
    let { tokens } = part;
    this.timing.chunk(part, performance.now());
    this.end = part.finish ?? this.end;
    if (part.reasoning) {
      this.reasoning ??= thought(this.made);
      this.current = this.reasoning;
      this.current.push(part.reasoning, tokens);
      tokens = [];
    }
    if (part.text && this.current !== this.answer) {
      tokens = [...this.current.flush(), ...tokens];
      this.current = this.answer;
    }
    this.current.push(part.text, tokens);
    this.note.textContent = String(this.timing);
    voice.add(part.text);
    tail.follow();
  }

  /** Says how it ended, and takes it back where nothing came. */
  finish() {
    this.current.flush();
    const failed = this.end === "stopped" || this.end === "broken";
    const kept = Boolean(this.answer.text || this.reasoning || !failed);
    const ending = { stopped: "stopped", broken: "broken off", ...ENDS }[this.end];
    this.note.textContent = [String(this.timing), ending].filter(Boolean).join(" · ");
    voice.add(` ${this.note.textContent.replaceAll(" · ", ", ")}`);
    voice.say(true);
    tail.follow();
    if (!kept) for (const item of this.items) item.remove();
    get("empty").hidden = MODES[this.mode].turns.childElementCount > 0;
    if (this.mode !== "chat") return;
    if (kept) messages.push({ role: "user", content: this.text }, { role: "assistant", content: this.answer.text });
    // a question that got nothing goes back to where it can be sent again
    else if (!prompt.value) prompt.value = this.text;
  }
}

async function run(text) {
  const body = bodyOf(mode(), model, Object.fromEntries(new FormData(form)), text, messages);
  const shown = new Run(text);
  const controller = new AbortController();
  setRunning(controller);
  tail.kept = true;
  tail.follow();
  shown.made.classList.add("coming");
  try {
    for await (const chunk of stream(MODES[shown.mode].path, body, controller.signal)) {
      shown.write(read(shown.mode, chunk));
    }
  } catch (error) {
    shown.end = controller.signal.aborted ? "stopped" : "broken";
    if (!controller.signal.aborted) showError(error.message);
    if (!controller.signal.aborted && !(error instanceof ApiError)) console.error(error);
  } finally {
    shown.made.classList.remove("coming");
    setRunning(null);
    shown.finish();
  }
}

function send() {
  if (running) return;
  showError(null);
  // a field that is wrong must be in sight for the browser to say so
  if (!form.checkValidity()) get("settings").open = true;
  if (!form.reportValidity()) return;
  const text = prompt.value;
  if (mode() === "chat") {
    if (!text.trim()) return;
    prompt.value = "";
  }
  if (!model) return showError("The server has not told its model yet; is it up, and is the API key right?");
  return run(text);
}

function showMode() {
  const now = MODES[mode()];
  for (const { turns } of Object.values(MODES)) turns.hidden = turns !== now.turns;
  get("prompt-label").textContent = now.label;
  prompt.placeholder = now.hint;
  get("empty").textContent = now.empty;
  get("empty").hidden = now.turns.childElementCount > 0;
  get("system-field").hidden = mode() !== "chat";
  document.body.dataset.mode = mode();
  showError(null);
}

function clear() {
  MODES[mode()].turns.replaceChildren();
  if (mode() === "chat") messages = [];
  hideTip();
  showMode();
  prompt.focus();
}

/** onKey: called when another API key is to be used. */
export function startPlayground(onKey) {
  // a link to /#chat opens the chat
  if (location.hash === "#chat") form.elements.mode.value = "chat";
  form.elements.key.value = apiKey();
  form.elements.key.addEventListener("change", (event) => {
    keepApiKey(event.target.value.trim());
    onKey();
  });
  // no submit button: Enter in a settings field must not send
  get("send").addEventListener("click", send);
  for (const radio of form.elements.mode) {
    radio.addEventListener("change", () => {
      history.replaceState(null, "", mode() === "chat" ? "#chat" : location.pathname + location.search);
      showMode();
    });
  }
  get("stop").addEventListener("click", () => running?.abort());
  get("clear").addEventListener("click", clear);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      hideTip();
      running?.abort();
    } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      send();
    }
  });
  showMode();
}
