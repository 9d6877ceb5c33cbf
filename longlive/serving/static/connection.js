// The WebSocket of a session, docs/serving.md: joins each announcement with the binary messages that follow it, and comes back
// when the connection is lost. Knows nothing about players or the page.

import { socketAddress } from "./access.js";
import { splitJpegs } from "./jpegs.js";

const SHORTEST_WAIT = 250; // milliseconds before the first attempt to come back; doubled after each
const LONGEST_WAIT = 4000;
const ATTEMPT = 5000; // after this long an attempt counts as failed
export const KEPT = 30_000; // how long the server keeps a session that nobody watches

export class Connection {
  next = 0; // number of the first chunk that has not come yet
  #events;
  #format;
  #start; // the message that begins a new session
  #session = null;
  #socket = null;
  #announced = null; // whose binary messages are expected
  #parts = [];
  #lostAt = null;
  #wait = SHORTEST_WAIT;
  #timer = null;
  #finished = false;
  #offline = () => this.#dropped(this.#socket);
  #online = () => this.#again();

  /**
   * `events`: `message(object)` for what has no binary part, `header(object, bytes)`, `chunk(object, parts)`, `lost()` when the
   * connection broke and is being restored, `gone()` when it could not be restored in time.
   */
  constructor(format, events) {
    this.#format = format;
    this.#events = events;
    // without this a laptop that lost its network would notice only minutes later
    addEventListener("offline", this.#offline);
    addEventListener("online", this.#online);
  }

  start(message) {
    this.#start = message;
    this.#open();
  }

  resume(session, next) {
    this.#session = session;
    this.next = next;
    this.#open();
  }

  /** The same session from here on in another format. */
  change(format) {
    this.#format = format;
    this.#abandon();
    this.#open();
  }

  /** Whether it was sent. */
  send(message) {
    if (this.#socket?.readyState !== WebSocket.OPEN || this.#lostAt !== null) return false;
    this.#socket.send(JSON.stringify(message));
    return true;
  }

  close() {
    this.#finished = true;
    this.#abandon();
    removeEventListener("offline", this.#offline);
    removeEventListener("online", this.#online);
  }

  #open() {
    const socket = new WebSocket(socketAddress("/live"));
    const attempt = setTimeout(() => this.#dropped(socket), ATTEMPT);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      clearTimeout(attempt);
      const first =
        this.#session === null
          ? { type: "start", ...this.#start, format: this.#format }
          : { type: "resume", session: this.#session, next: this.next, format: this.#format };
      socket.send(JSON.stringify(first));
    };
    socket.onmessage = ({ data }) => (typeof data === "string" ? this.#text(JSON.parse(data)) : this.#binary(data));
    socket.onclose = () => {
      clearTimeout(attempt);
      this.#dropped(socket);
    };
    this.#socket = socket;
    this.#announced = null;
  }

  #text(message) {
    this.#lostAt = null;
    this.#wait = SHORTEST_WAIT;
    if (message.type === "hello") this.#session = message.session;
    if (message.type === "chunk" || (message.type === "header" && message.format === "mp4")) {
      this.#announced = message;
      this.#parts = [];
    } else if (message.type === "header") {
      this.#events.header(message, null);
    } else {
      this.#events.message(message);
    }
  }

  #binary(data) {
    const about = this.#announced;
    if (about === null) return;
    if (about.type === "header") {
      this.#announced = null;
      this.#events.header(about, data);
      return;
    }
    this.#parts.push(...(this.#format === "mp4" ? [data] : splitJpegs(data)));
    if (this.#format === "jpeg" && this.#parts.length < about.images) return;
    this.#announced = null;
    this.next = about.chunk + 1;
    this.#events.chunk(about, this.#parts);
  }

  #dropped(socket) {
    if (this.#finished || socket === null || socket !== this.#socket) return;
    this.#abandon();
    this.#lostAt ??= performance.now();
    if (performance.now() - this.#lostAt > KEPT) {
      this.#events.gone();
      return;
    }
    this.#events.lost();
    if (this.#finished) return; // by whoever was told
    this.#timer = setTimeout(() => this.#again(), this.#wait);
    this.#wait = Math.min(2 * this.#wait, LONGEST_WAIT);
  }

  #again() {
    if (this.#finished || this.#socket !== null || this.#lostAt === null) return;
    clearTimeout(this.#timer);
    this.#open();
  }

  #abandon() {
    clearTimeout(this.#timer);
    const socket = this.#socket;
    this.#socket = null;
    if (socket === null) return;
    socket.onopen = socket.onmessage = socket.onclose = null;
    socket.close();
  }
}
