// A session as its user sees it: what was requested, what is made, what is on screen. Knows nothing about the page.

import { Connection } from "./connection.js";
import { createPlayer } from "./player.js";
import { ENDED, GONE, NO_ANSWER, STOPPED, sentence, words } from "./words.js";

export class Session {
  id = null;
  key = null; // of this client
  watchKey = null; // for others, who only watch
  watching = false; // somebody else's session
  ended = null; // { state, title, text, takenOver, serverGone } once it has; `takenOver`: another tab shows it
  paused = false;
  ownerPaused = false; // of a session that is watched
  seed = null;
  videos = 0; // that were ended by a restart
  segments = 0; // that can be played
  seconds = 0; // of video that can be played
  fps = null; // of generation, frames per second
  timings = null;
  latency = null; // seconds from the last prompt until its first image
  pending = null; // what was requested and is not on screen yet
  shown = null; // the message of the segment on screen
  #format;
  #screen;
  #events;
  #connection;
  #player = null;
  #connected = false;
  #answered = false; // whether the server has answered since the connection was opened
  #position = null; // in the queue, until it is admitted
  #newest = null; // the message of the newest segment

  /**
   * `screen`: the elements `{ video, canvas }`. `events`: `changed()`; `model(description)`; `limits(limits)`; `segment(message)` when
   * it can be played; `shown(message, time)` for every image; `notice(text)` for what the user should read.
   */
  constructor(format, screen, events) {
    this.#format = format;
    this.#screen = screen;
    this.#events = events;
    this.#connection = this.#connect();
  }

  // actions of the user

  start({ prompt, seed, keepSink }) {
    this.pending = { prompt, message: null, since: performance.now(), repeats: false, after: null, first: null, words: "Starting" };
    const message = { prompts: [{ text: prompt }], keep_sink: keepSink };
    if (seed !== null) message.seed = seed;
    this.#connection.start(message);
    this.#events.changed();
  }

  /** Continues a session after the page was reloaded, with what `resumable` gave. */
  resume({ session, key, next, seconds }) {
    this.id = session;
    this.key = key;
    this.seconds = seconds;
    this.segments = next;
    this.#connection.resume({ session, key, next });
    this.#events.changed();
  }

  /** Shows a session of somebody else. */
  watch({ session, key }) {
    this.id = session;
    this.key = key;
    this.watching = true;
    this.#connection.watch({ session, key });
    this.#events.changed();
  }

  get resumable() {
    return { session: this.id, key: this.key, next: this.#connection.next, seconds: this.seconds };
  }

  prompt(text, keepSink) {
    this.#request({ prompt: text, words: "Switching to the new prompt" }, { prompts: [{ text }], transition: { keep_sink: keepSink } });
  }

  restart(seed) {
    const message = { reset_cache: true };
    if (seed !== null) message.seed = seed;
    const prompt = this.pending?.prompt ?? this.#newest?.prompt;
    this.#request({ prompt, words: "Starting again", after: this.#newest?.video_index ?? null }, message);
  }

  // looking back at what was shown, while the video goes on

  /** `{ time, start, end }`: seconds of the video on screen, and of what can be shown again; null before the first image. */
  get span() {
    return this.#player?.span ?? null;
  }

  get lookingBack() {
    return this.#player?.lookingBack ?? false;
  }

  lookAt(time) {
    this.#player?.seek(time);
    this.#events.changed();
  }

  /** Returns to the newest images. */
  goLive() {
    this.#player?.goLive();
    this.#events.changed();
  }

  pause(paused) {
    this.paused = paused;
    this.#connection.send({ type: "update", paused });
    this.#play();
    this.#events.changed();
  }

  stop() {
    this.#connection.send({ type: "stop" });
    this.#end(ENDED);
  }

  /** Continues the session here after another tab has taken it over. */
  takeOver() {
    const { next } = this.#connection;
    this.ended = null;
    this.#answered = false;
    this.#connection = this.#connect();
    this.#connection.resume({ session: this.id, key: this.key, next });
    this.#play();
    this.#events.changed();
  }

  /** Closes the connection and the player, so that another session can use the screen. */
  close() {
    this.#connection.close();
    this.#player?.close();
  }

  // its state

  get state() {
    if (this.ended !== null) return this.ended.state;
    if (!this.#connected) return this.#answered ? "reconnecting" : "connecting";
    if (this.#position !== null) return "queued";
    if (this.paused || this.ownerPaused) return "paused";
    return this.pending === null ? "generating" : "switching";
  }

  get words() {
    return words(this.state, this, this.#position);
  }

  // requests

  // `after`: the index of the video that a restart ends.
  #request({ prompt, words, after = this.pending?.after ?? null }, content) {
    const message = { type: "update", ...content };
    if (this.paused) {
      message.paused = this.paused = false; // whoever requests something wants to see it
      this.#play();
    }
    this.#player?.goLive();
    const repeats = prompt === this.#newest?.prompt && after === null;
    this.pending = { prompt, words, after, message, since: performance.now(), repeats, first: null };
    if (this.#position === null) this.#connection.send(message); // if there is no connection, it is sent after `hello`
    this.#events.changed();
  }

  // Whether a segment shows what was requested last.
  #answers(segment) {
    const { prompt, after, repeats, message } = this.pending;
    if (segment.prompt !== prompt || (after !== null && segment.video_index <= after)) return false;
    return !repeats || message === null; // when the same prompt is sent again, only segments after `accepted` answer it
  }

  // messages of the server

  #connect() {
    return new Connection(this.#format, {
      message: (message) => this.#onMessage(message),
      header: (message, bytes) => this.#onHeader(message, bytes),
      segment: (segment, parts) => this.#onSegment(segment, parts),
      lost: () => this.#onLost(),
      stopped: () => this.#end(STOPPED),
      gone: () => this.#end(this.id === null ? NO_ANSWER : GONE),
    });
  }

  #onMessage(message) {
    switch (message.type) {
      case "hello":
        this.#onHello(message);
        break;
      case "queued":
        this.#connected = this.#answered = true;
        this.#position = message.position;
        break;
      case "admitted":
        this.#position = null;
        break;
      case "accepted":
        if (message.prompt === this.pending?.prompt) this.pending.message = null;
        break;
      case "state":
        this.seed = message.seed;
        this.videos = message.video_index;
        this.ownerPaused = this.watching && message.paused;
        break;
      case "notice":
        this.#events.notice(sentence(message.message));
        break;
      case "error":
        this.#onError(message);
        break;
      case "ended":
        this.#end(message.reason === "the server stops" ? STOPPED : { ...ENDED, text: sentence(message.reason) });
        break;
    }
    this.#events.changed();
  }

  #onHello({ session, owner_key: ownerKey, watch_key: watchKey, model, limits, resumed, seed, paused, prompt, video_index }) {
    const reloaded = resumed && this.#newest === null && this.pending === null;
    this.id = session;
    this.key = ownerKey ?? watchKey;
    this.watchKey = watchKey;
    this.seed = seed;
    this.videos = video_index;
    this.#connected = this.#answered = true;
    this.#position = null;
    this.#events.model(model);
    this.#events.limits(limits);
    if (this.watching) {
      this.ownerPaused = paused;
    } else if (reloaded) {
      this.paused = paused;
      this.#newest = { prompt, video_index };
    } else if (paused !== this.paused) {
      this.#connection.send({ type: "update", paused: this.paused });
    }
    if (this.pending?.message) this.#connection.send(this.pending.message);
  }

  #onError({ code, message, fatal }) {
    const text = sentence(message);
    if (code === "taken_over") {
      this.#end({ state: "ended", title: "Continued in another tab", text: "Another tab or window shows this session now.", takenOver: true });
    } else if (code === "unknown_session") {
      this.#end(this.watching ? { ...GONE, text: "Its owner has ended it, or left." } : GONE);
    } else if (code === "wrong_key") {
      this.#end(!this.watching ? GONE : { state: "error", title: "This link is not valid", text: "Ask for it again: it has the session's name and a key." });
    } else if (code === "idle") {
      this.#end({ ...ENDED, text });
    } else if (fatal) {
      this.#end({ state: "error", title: code === "busy" ? "The server is busy" : "Something went wrong", text });
    } else {
      if (code === "bad_prompt") this.pending = null;
      this.#events.notice(text);
    }
  }

  #onLost() {
    this.#connected = false;
    this.#events.changed();
  }

  #end(ended) {
    if (this.ended !== null) return; // the first reason explains the end
    this.ended = ended;
    this.pending = null;
    this.#connection.close();
    this.#connected = false;
    this.#events.changed();
  }

  // playing

  #onHeader(message, bytes) {
    this.#player ??= createPlayer(
      this.#format,
      this.#screen,
      {
        appended: (segment, buffered, end) => this.#onAppended(segment, buffered, end),
        shown: (segment, time, at) => this.#onShown(segment, time, at),
        blocked: () => this.#onBlocked(),
        failed: (reason) => this.#onFailed(reason),
      },
      this.seconds,
    );
    this.#player.header(message, bytes);
    this.#play();
  }

  #play() {
    if (this.paused) this.#player?.pause();
    else this.#player?.play();
  }

  #onSegment(segment, parts) {
    this.#newest = segment;
    if (this.pending !== null && this.pending.first === null && this.#answers(segment)) {
      this.pending.first = segment.index;
      this.pending.message = null;
    }
    this.#player.push(segment, parts);
  }

  #onAppended(segment, buffered, end) {
    this.segments = segment.index + 1;
    this.seconds = end;
    if (!this.watching) this.#connection.send({ type: "ack", segment: segment.index, buffered });
    this.#events.segment(segment);
  }

  #onShown(segment, time, at) {
    this.fps = segment.fps;
    this.timings = segment.timings;
    const { pending } = this;
    if (pending !== null && pending.first !== null && segment.index >= pending.first) {
      this.latency = (at - pending.since) / 1000;
      this.pending = null;
    }
    const isNew = this.shown?.index !== segment.index;
    this.shown = segment;
    this.#events.shown(segment, time);
    if (isNew || pending !== this.pending) this.#events.changed();
  }

  // A phone in power-saving mode does not even play a muted video by itself.
  #onBlocked() {
    this.#events.notice("Tap the page to play.");
    addEventListener("pointerdown", () => this.#play(), { once: true });
  }

  #onFailed(reason) {
    this.#player.close();
    this.#player = null;
    if (this.#format === "jpeg") {
      this.#end({ state: "error", title: "The video cannot be shown", text: sentence(reason) });
      return;
    }
    this.#events.notice("This browser cannot play the video stream; it is sent as single images instead.");
    this.#format = "jpeg";
    this.#connection.change("jpeg");
  }
}
