// The page: connects its controls to a session and shows the session's state.

import { parameters, watched } from "./access.js";
import { Fullscreen } from "./fullscreen.js";
import { LookBack } from "./look_back.js";
import { Pieces } from "./pieces.js";
import { bestFormat } from "./player.js";
import { PromptLine } from "./prompt_line.js";
import { RECONNECT_TIME } from "./connection.js";
import { POLL_INTERVAL, ask, delay } from "./server.js";
import { Session } from "./session.js";
import { Share } from "./share.js";
import { Stage } from "./stage.js";
import { forget, recall, remember } from "./storage.js";
import { Takes, fileAddress } from "./takes.js";
import { Timeline, clock } from "./timeline.js";

const STORED_SESSION = "session";

const TINY = 128; // pixels; a model of images this small is the miniature
const EXAMPLES = {
  tiny: [
    "a red circle moving right on a black background",
    "a blue ring moving up on a white background",
    "a green cross standing still on a pink background",
  ],
  full: ["a sailing boat on a calm sea at sunrise", "a fox runs through deep snow", "rain on a neon street at night"],
};

const element = (id) => document.getElementById(id);
const stage = new Stage();
const timeline = new Timeline(jump);
const pieces = new Pieces();
const line = new PromptLine(send, (text) => pieces.typed(text));
const lookBack = new LookBack(() => session, (prompt) => {
  line.text = prompt;
  element("prompt").focus();
});
const fullscreen = new Fullscreen();
const share = new Share();
new Takes(["download-recording", "download-timeline"].map(element), () => session);
const watching = watched(); // somebody else's session; null: sessions of one's own
const format = bestFormat(parameters.get("format"));

let session = null;
let waiting = { title: "Connecting to the server", text: "" }; // null once there is a model

// actions of the user

function start() {
  if (watching !== null || !checkSeed()) return;
  const prompt = line.text || timeline.entries.at(-1)?.prompt || line.example;
  session?.close();
  timeline.clear();
  element("time").textContent = clock(0, 1);
  session = new Session(format, stage.screen, events);
  line.sent(prompt);
  session.start({ prompt, seed: wantedSeed(), keepSink: element("keep-sink").checked });
  line.focus();
}

function send(text) {
  if (waiting !== null || watching !== null) return;
  if (!running()) {
    start();
  } else if (text !== "" && text !== session.pending?.prompt) {
    line.sent(text);
    session.prompt(text, element("keep-sink").checked);
  }
}

function restart() {
  if (watching !== null || !checkSeed()) return;
  if (!running()) start();
  else if (session.state !== "queued") session.restart(wantedSeed());
}

function pause() {
  if (watching === null && running() && session.state !== "queued") session.pause(!session.paused);
}

const running = () => session !== null && session.ended === null;

/** Jumps to where a prompt of the timeline begins. */
function jump({ start: time }) {
  const span = session?.span ?? null;
  if (span === null) return;
  if (time < span.start - 1) stage.notice("This part is no longer kept here; the recording has it.");
  else session.lookAt(time);
}

/** The seed in the field; null: any. */
function wantedSeed() {
  const digits = element("seed").value.trim();
  return digits === "" ? null : Number(digits);
}

/** Whether the seed can be used; says it when it cannot. */
function checkSeed() {
  const valid = /^\d{0,15}$/.test(element("seed").value.trim());
  element("seed").ariaInvalid = valid ? null : "true";
  if (!valid) stage.notice("A seed is a whole number of at most 15 digits, or nothing for any.");
  return valid;
}

element("start").addEventListener("click", start);
element("examples").addEventListener("click", ({ target }) => {
  if (target.tagName !== "BUTTON") return;
  line.text = target.textContent;
  start(); // one click, and there is a video
});
element("continue").addEventListener("click", () => session.takeOver());
element("pause").addEventListener("click", pause);
element("restart").addEventListener("click", restart);
element("stop").addEventListener("click", () => session.stop());
element("shuffle").addEventListener("click", () => {
  element("seed").value = Math.floor(Math.random() * 1_000_000);
});
element("seed").addEventListener("input", () => {
  if (element("seed").ariaInvalid === "true") checkSeed();
});
element("seed").addEventListener("change", checkSeed);
element("share").addEventListener("click", () => share.open(session));
element("seed").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault(); // the prompt line would send its text, as soon as it has the focus
  restart();
  if (checkSeed()) line.focus();
});
element("help").addEventListener("click", () => element("help-dialog").showModal());
element("help-dialog").addEventListener("click", ({ target }) => {
  if (target === element("help-dialog")) target.close(); // the backdrop
});
element("help-dialog").addEventListener("close", () => line.focus());

document.addEventListener("keydown", (event) => {
  if (event.isComposing || event.repeat || document.querySelector("dialog[open]") !== null) return;
  const shortcuts = {
    KeyR: restart,
    KeyK: () => element("keep-sink").click(),
    KeyL: () => session?.goLive(),
    KeyF: () => fullscreen.toggle(),
  };
  const shortcut = event.altKey ? shortcuts[event.code] : null;
  const action = event.key === "Escape" ? pause : shortcut;
  if (!action) return;
  event.preventDefault();
  action();
});

// events of the session

const events = {
  changed: show,
  model: showModel,
  limits: ({ prompt_chars }) => (line.longest = prompt_chars),
  segment: (segment) => {
    timeline.add(segment, session.seconds);
    storeSession();
  },
  shown: (segment, time) => {
    element("time").textContent = clock(time, 1);
    timeline.show(segment);
    lookBack.show(session);
  },
  notice: (text) => stage.notice(text),
};

/** A page that is reloaded continues its session with this. */
function storeSession() {
  if (watching === null && running() && session.segments > 0) remember(STORED_SESSION, { ...session.resumable, entries: timeline.entries, at: Date.now() });
}
addEventListener("pagehide", storeSession);

function showModel({ name, width, height, words }) {
  element("model").textContent = `${name}, ${width} × ${height}`;
  stage.size = { width, height };
  const examples = width <= TINY ? EXAMPLES.tiny : EXAMPLES.full;
  line.example = examples[0];
  for (const [index, button] of [...element("examples").children].entries()) button.textContent = examples[index];
  element("words").hidden = !words;
  element("word-list").replaceChildren(...Object.entries(words ?? {}).map(wordRow));
}

/** An attribute that the model understands, and its values; the title of each has the other words for it. */
function wordRow([attribute, values]) {
  const [row, term, list] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
  term.textContent = attribute;
  for (const [value, phrases] of Object.entries(values)) {
    const word = document.createElement("span");
    word.textContent = value;
    word.title = phrases.join(", ");
    list.append(list.childElementCount > 0 ? ", " : "", word);
  }
  row.append(term, list);
  return row;
}

function show() {
  const state = waiting !== null ? (waiting.state ?? "loading") : (session?.state ?? "idle");
  const words = waiting?.title ?? (session?.lookingBack ? "Looking back" : session?.words) ?? "Ready";
  const status = element("state");
  status.dataset.state = state;
  if (status.textContent !== words) status.textContent = words; // otherwise screen readers would read it again
  stage.panel(panel(state, words));
  stage.hold(state === "paused" && !session.lookingBack ? words : null);
  lookBack.show(session);
  document.body.classList.toggle("watching", watching !== null);

  const isRunning = running();
  element("send").querySelector("span").textContent = isRunning ? "Send" : "Start";
  element("send").disabled = waiting !== null;
  element("stop").disabled = !isRunning;
  element("share").disabled = !isRunning || session.watchKey === null;
  element("pause").disabled = !isRunning || state === "queued";
  element("restart").disabled = session === null || state === "queued";
  element("pause").querySelector("span").textContent = session?.paused ? "Resume" : "Pause";
  element("pause").querySelector("use").setAttribute("href", session?.paused ? "#icon-play" : "#icon-pause");
  showDownloads();
  if (session === null) return;

  showSeed();
  showNumbers();
  timeline.announce(session.pending !== null && session.pending.first === null ? session.pending.prompt : null);
  stage.description = session.shown === null ? "Generated video" : `Generated video: ${session.shown.prompt}`;
  if (session.ended === null) return;
  forget(STORED_SESSION);
  if (session.ended.serverGone && session.ended !== awaited) awaitServer((awaited = session.ended));
}

function panel(state, words) {
  if (waiting !== null) return { ...waiting, actions: [] };
  if (state === "idle") {
    const text = "Say what the video should show and press Enter. Type other prompts while it plays: it follows.";
    return { title: "Describe a video", text, actions: ["examples", "start"] };
  }
  if (state === "queued") return { title: words, text: "It starts by itself when there is room.", actions: [] };
  if (session.ended === null || session.lookingBack) return null;
  if (session.ended.serverGone || watching !== null) return { ...session.ended, actions: [] };
  return { ...session.ended, actions: session.ended.takenOver ? ["continue", "start"] : ["start"] };
}

function showDownloads() {
  for (const [id, kind, file] of [
    ["download-recording", "recording", "longlive.mp4"],
    ["download-timeline", "timeline", "longlive.timeline.json"],
  ]) {
    const link = element(id);
    const ready = session !== null && session.segments > 0 && session.key !== null;
    link.ariaDisabled = String(!ready);
    if (ready) {
      link.href = fileAddress(kind, session);
      link.download = file;
    } else {
      link.removeAttribute("href");
    }
  }
}

let awaited = null; // the end of a session whose server has stopped
let seedShown = null; // the server's last seed; any other text in the field was typed

function showSeed() {
  const seed = session.seed;
  if (seed === null || seed === seedShown) return;
  seedShown = seed;
  if (document.activeElement !== element("seed")) element("seed").value = seed;
}

let ticking = null;

function showNumbers() {
  const { pending, latency, fps, timings } = session;
  const since = pending === null ? latency : (performance.now() - pending.since) / 1000;
  element("latency").textContent = since === null ? "–" : `${since.toFixed(2)} s`;
  element("latency").classList.toggle("running", pending !== null);
  element("fps").textContent = fps === null ? "–" : fps.toFixed(1);
  if (timings !== null) {
    const parts = Object.entries(timings).map(([part, seconds]) => `${part} ${(1000 * seconds).toFixed(0)} ms`);
    element("fps").title = `the segment on screen took: ${parts.join(", ")}`;
  }
  if (pending === null || session.paused) {
    clearInterval(ticking);
    ticking = null;
  } else {
    ticking ??= setInterval(showNumbers, 100);
  }
}

// for debugging, and for tests of the page
window.longlive = {
  get state() {
    return element("state").dataset.state;
  },
  get session() {
    return session?.id ?? null;
  },
  get segments() {
    return session?.segments ?? 0;
  },
  get span() {
    return session?.span ?? null;
  },
  get lookingBack() {
    return session?.lookingBack ?? false;
  },
  get latency() {
    return session?.latency ?? null;
  },
};

// start of the page

/** Says when a server that has stopped answers again. */
async function awaitServer(ended) {
  do await delay(2 * POLL_INTERVAL);
  while ((await ask(watching !== null)).obstacle !== null);
  if (session.ended === ended) session.ended = { ...ended, serverGone: false, text: "It runs again now. What was recorded is kept." };
  show();
}

async function begin() {
  show();
  let found;
  while ((waiting = (found = await ask(watching !== null)).obstacle) !== null) {
    show();
    await delay(POLL_INTERVAL);
  }
  const { model } = found;
  if (model !== undefined) {
    showModel(model);
    element("keep-sink").checked = model.keep_sink ?? true; // the model's own setting
  }
  const stored = recall(STORED_SESSION);
  if (watching !== null) {
    session = new Session(format, stage.screen, events);
    session.watch(watching);
  } else if (stored !== null && Date.now() - stored.at < RECONNECT_TIME) {
    timeline.restore(stored.entries);
    line.remember(stored.entries.map(({ prompt }) => prompt));
    session = new Session(format, stage.screen, events);
    session.resume(stored);
  }
  show();
}

begin();
