// The WebSocket of a session, as docs/serving.md describes it: joins each message with the binary messages that follow it, and
// reconnects when the connection is lost. Knows nothing about players or the page.

import { socketAddress } from "./access.js";
import { splitJpegs } from "./jpegs.js";

const SHORTEST_WAIT = 250; // milliseconds before the first attempt to reconnect; doubled after each
const LONGEST_WAIT = 4000;
const SERVICE_RESTART = 1012; // with this code the server closes every connection when it stops
const ATTEMPT_TIMEOUT = 5000; // milliseconds
export const RECONNECT_TIME = 30_000; // milliseconds for which the server keeps a session without a client

export class Connection {
  next = 0; // index of the first segment that has not arrived
  #events;
  #format;
  #start; // the message that begins a new session
  #seat = null; // { type: "resume" or "watch", session, key } once there is a session
  #entered = false; // whether the server has said hello
  #socket = null;
  #announced = null; // the message whose binary messages are expected
  #parts = [];
  #lostAt = null;
  #wait = SHORTEST_WAIT;
  #timer = null;
  #finished = false;
  #offline = () => this.#onLost(this.#socket);
  #online = () => this.#reconnect();

  /**
   * `events`: `message(message)` for those without a binary part, `header(message, bytes)`, `segment(message, parts)`, `lost()` when
   * the connection is lost and being restored, `gone()` when it could not be restored in time, `stopped()` when the server ends.
   */
  constructor(format, events) {
    this.#format = format;
    this.#events = events;
    // otherwise a computer that has lost its network would notice minutes later
    addEventListener("offline", this.#offline);
    addEventListener("online", this.#online);
  }

  start(message) {
    this.#start = message;
    this.#open();
  }

  /** Returns to a session of one's own. */
  resume({ session, key, next }) {
    this.#seat = { type: "resume", session, key };
    this.#entered = true;
    this.next = next;
    this.#open();
  }

  watch({ session, key }) {
    this.#seat = { type: "watch", session, key };
    this.#open();
  }

  /** Continues the session in another format. */
  change(format) {
    this.#format = format;
    this.#abandon();
    this.#open();
  }

  /** Returns whether the message was sent. */
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
    const seat = this.#seat;
    const socket = new WebSocket(socketAddress("/live", seat === null ? {} : { session: seat.session, key: seat.key }));
    const attempt = setTimeout(() => this.#onLost(socket), ATTEMPT_TIMEOUT);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      clearTimeout(attempt);
      const first = seat === null ? { type: "start", ...this.#start } : this.#entered ? { ...seat, next: this.next } : seat;
      socket.send(JSON.stringify({ ...first, format: this.#format }));
    };
    socket.onmessage = ({ data }) => (typeof data === "string" ? this.#text(JSON.parse(data)) : this.#binary(data));
    socket.onclose = ({ code }) => {
      clearTimeout(attempt);
      if (code === SERVICE_RESTART) this.#events.stopped();
      else this.#onLost(socket);
    };
    this.#socket = socket;
    this.#announced = null;
  }

  #text(message) {
    this.#lostAt = null;
    this.#wait = SHORTEST_WAIT;
    if (message.type === "hello") {
      this.#seat ??= { type: "resume", session: message.session, key: message.owner_key };
      this.#entered = true;
      this.next = message.next;
    }
    if (message.type === "segment" || (message.type === "header" && message.format === "mp4")) {
      this.#announced = message;
      this.#parts = [];
    } else if (message.type === "header") {
      this.#events.header(message, null);
    } else {
      this.#events.message(message);
    }
  }

  #binary(data) {
    const message = this.#announced;
    if (message === null) return;
    if (message.type === "header") {
      this.#announced = null;
      this.#events.header(message, data);
      return;
    }
    this.#parts.push(...(this.#format === "mp4" ? [data] : splitJpegs(data)));
    if (this.#format === "jpeg" && this.#parts.length < message.num_frames) return;
    this.#announced = null;
    this.next = message.index + 1;
    this.#events.segment(message, this.#parts);
  }

  #onLost(socket) {
    if (this.#finished || socket === null || socket !== this.#socket) return;
    this.#abandon();
    this.#lostAt ??= performance.now();
    if (performance.now() - this.#lostAt > RECONNECT_TIME) {
      this.#events.gone();
      return;
    }
    this.#events.lost();
    if (this.#finished) return; // the listener has closed it
    this.#timer = setTimeout(() => this.#reconnect(), this.#wait);
    this.#wait = Math.min(2 * this.#wait, LONGEST_WAIT);
  }

  #reconnect() {
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
