// One session as the person sees it: what was asked for, what is made, what is on screen. Knows nothing about the page.

import { Connection } from "./connection.js";
import { createPlayer } from "./player.js";

/** Whole words for `queued`. */
function inQueue(place) {
  if (place === 0) return "In the queue: you are next";
  return `In the queue: ${place} ${place === 1 ? "session comes" : "sessions come"} before yours`;
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

const NO_ANSWER = { state: "error", title: "The server does not answer", text: "It was tried for half a minute. Is it running?" };
const GONE = { state: "ended", title: "The session is over", text: "The server does not have it any more. Start another one." };

export class Session {
  id = null;
  over = null; // { state, title, text, theirs } once it is; `theirs`: another tab has it
  paused = false;
  seed = null;
  chunks = 0; // that can be played
  seconds = 0; // of video that can be played
  fps = null; // of generation, images a second
  timings = null;
  latency = null; // seconds from the last prompt until its first image
  pending = null; // what was asked for and is not on screen yet
  shown = null; // what is said of the chunk on screen
  #format;
  #screen;
  #events;
  #connection;
  #player = null;
  #connected = false;
  #greeted = false; // the server has answered at least once
  #place = null; // in the queue, until it is admitted
  #newest = null; // what is said of the chunk that came last

  /**
   * `screen`: the elements `{ video, canvas }`. `events`: `changed()`; `model(about)`; `limits(about)`; `chunk(about)` when it can
   * be played; `shown(about, time)` for every image; `notice(text)` for what the person should read.
   */
  constructor(format, screen, events) {
    this.#format = format;
    this.#screen = screen;
    this.#events = events;
    this.#connection = this.#connect();
  }

  // what the person does

  start({ prompt, seed, keepSink }) {
    this.pending = { prompt, message: null, since: performance.now(), again: false, take: null, first: null, words: "Starting" };
    const message = { prompts: [{ text: prompt }], keep_sink: keepSink };
    if (seed !== null) message.seed = seed;
    this.#connection.start(message);
    this.#events.changed();
  }

  /** What a page that was reloaded has kept of its session: see `kept`. */
  resume({ session, next, seconds }) {
    this.id = session;
    this.seconds = seconds;
    this.chunks = next;
    this.#connection.resume(session, next);
    this.#events.changed();
  }

  get kept() {
    return { session: this.id, next: this.#connection.next, seconds: this.seconds };
  }

  prompt(text, keepSink) {
    this.#ask({ prompt: text, words: "Switching to the new prompt" }, { prompts: [{ text }], transition: { keep_sink: keepSink } });
  }

  restart(seed) {
    const message = { reset_cache: true };
    if (seed !== null) message.seed = seed;
    const prompt = this.pending?.prompt ?? this.#newest?.prompt;
    this.#ask({ prompt, words: "Starting again", take: this.#newest?.take ?? null }, message);
  }

  pause(paused) {
    this.paused = paused;
    this.#connection.send({ type: "update", paused });
    this.#play();
    this.#events.changed();
  }

  stop() {
    this.#connection.send({ type: "stop" });
    this.#end({ state: "ended", title: "The session has ended", text: "You can still download its recording and its timeline." });
  }

  /** After another tab has taken the session: take it back. */
  takeBack() {
    const { next } = this.#connection;
    this.over = null;
    this.#greeted = false;
    this.#connection = this.#connect();
    this.#connection.resume(this.id, next);
    this.#play();
    this.#events.changed();
  }

  /** Makes place for another session on the same screen. */
  close() {
    this.#connection.close();
    this.#player?.close();
  }

  // what can be seen of it

  get state() {
    if (this.over !== null) return this.over.state;
    if (!this.#connected) return this.#greeted ? "reconnecting" : "connecting";
    if (this.#place !== null) return "queued";
    if (this.paused) return "paused";
    return this.pending === null ? "generating" : "switching";
  }

  get words() {
    switch (this.state) {
      case "connecting":
        return "Connecting";
      case "reconnecting":
        return "Connection lost, coming back";
      case "queued":
        return inQueue(this.#place);
      case "paused":
        return "Paused";
      case "switching":
        return this.pending.words;
      case "generating":
        return "Generating";
      default:
        return this.over.title;
    }
  }

  // asking

  #ask({ prompt, words, take = this.pending?.take ?? null }, content) {
    const message = { type: "update", ...content };
    if (this.paused) {
      message.paused = this.paused = false; // who asks for something wants to see it
      this.#play();
    }
    const inForce = this.#newest?.prompt;
    this.pending = { prompt, words, take, message, since: performance.now(), again: prompt === inForce && take === null, first: null };
    if (this.#place === null) this.#connection.send(message); // if it is not sent now, it is when the server greets
    this.#events.changed();
  }

  // Whether a chunk that has come is the first of what was asked for last.
  #answers(about) {
    const { prompt, take, again, message } = this.pending;
    if (about.prompt !== prompt || (take !== null && about.take <= take)) return false;
    return !again || message === null; // the same prompt again: chunks from before look alike, until it was accepted
  }

  // what the server says

  #connect() {
    return new Connection(this.#format, {
      message: (message) => this.#told(message),
      header: (about, bytes) => this.#header(about, bytes),
      chunk: (about, parts) => this.#chunk(about, parts),
      lost: () => this.#lost(),
      gone: () => this.#end(this.id === null ? NO_ANSWER : GONE),
    });
  }

  #told(message) {
    switch (message.type) {
      case "hello":
        this.#hello(message);
        break;
      case "queued":
        this.#connected = this.#greeted = true;
        this.#place = message.place;
        break;
      case "admitted":
        this.#place = null;
        break;
      case "accepted":
        if (message.prompt === this.pending?.prompt) this.pending.message = null;
        break;
      case "state":
        this.seed = message.seed;
        break;
      case "error":
        this.#error(message);
        break;
      case "ended":
        this.#end({ state: "ended", title: "The session has ended", text: sentence(message.reason) });
        break;
    }
    this.#events.changed();
  }

  #hello({ session, model, limits, resumed, seed, paused, prompt, take }) {
    const reloaded = resumed && this.#newest === null && this.pending === null;
    this.id = session;
    this.seed = seed;
    this.#connected = this.#greeted = true;
    this.#place = null;
    this.#events.model(model);
    this.#events.limits(limits);
    if (reloaded) {
      this.paused = paused;
      this.#newest = { prompt, take };
    } else if (paused !== this.paused) {
      this.#connection.send({ type: "update", paused: this.paused });
    }
    if (this.pending?.message) this.#connection.send(this.pending.message);
  }

  #error({ code, message, fatal }) {
    const text = sentence(message);
    if (code === "taken_over") {
      this.#end({ state: "ended", title: "Continued in another tab", text: "Another tab or window shows this session now.", theirs: true });
    } else if (code === "unknown_session") {
      this.#end(GONE);
    } else if (code === "idle") {
      this.#end({ state: "ended", title: "The session has ended", text });
    } else if (fatal) {
      this.#end({ state: "error", title: code === "busy" ? "The server is busy" : "Something went wrong", text });
    } else {
      if (code === "bad_prompt") this.pending = null;
      this.#events.notice(text);
    }
  }

  #lost() {
    this.#connected = false;
    this.#events.changed();
  }

  #end(over) {
    if (this.over !== null) return; // the first reason is the one that explains
    this.over = over;
    this.pending = null;
    this.#connection.close();
    this.#connected = false;
    this.#events.changed();
  }

  // playing

  #header(about, bytes) {
    this.#player ??= createPlayer(
      this.#format,
      this.#screen,
      {
        appended: (about, ahead) => this.#appended(about, ahead),
        shown: (about, time, at) => this.#onScreen(about, time, at),
        blocked: () => this.#blocked(),
        failed: (reason) => this.#failed(reason),
      },
      this.seconds,
    );
    this.#player.header(about, bytes);
    this.#play();
  }

  #play() {
    if (this.paused) this.#player?.pause();
    else this.#player?.play();
  }

  #chunk(about, parts) {
    this.#newest = about;
    if (this.pending !== null && this.pending.first === null && this.#answers(about)) {
      this.pending.first = about.chunk;
      this.pending.message = null;
    }
    this.#player.push(about, parts);
  }

  #appended(about, ahead) {
    this.chunks = about.chunk + 1;
    this.seconds += about.seconds;
    this.#connection.send({ type: "ack", chunk: about.chunk, ahead });
    this.#events.chunk(about);
  }

  #onScreen(about, time, at) {
    this.fps = about.fps;
    this.timings = about.timings;
    const { pending } = this;
    if (pending !== null && pending.first !== null && about.chunk >= pending.first) {
      this.latency = (at - pending.since) / 1000;
      this.pending = null;
    }
    const another = this.shown?.chunk !== about.chunk;
    this.shown = about;
    this.#events.shown(about, time);
    if (another || pending !== this.pending) this.#events.changed();
  }

  // A phone that saves power plays nothing by itself, not even a muted video.
  #blocked() {
    this.#events.notice("Tap the page to play.");
    addEventListener("pointerdown", () => this.#play(), { once: true });
  }

  #failed(reason) {
    this.#player.close();
    this.#player = null;
    if (this.#format === "jpeg") {
      this.#end({ state: "error", title: "The video cannot be shown", text: sentence(reason) });
      return;
    }
    this.#events.notice("This browser cannot play the video stream; single images follow instead.");
    this.#format = "jpeg";
    this.#connection.change("jpeg");
  }
}
