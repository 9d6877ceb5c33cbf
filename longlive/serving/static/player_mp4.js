// Plays H.264 in fragmented mp4 through a media source.

import { Chunks, pace } from "./pacing.js";

const CODECS = ["avc1.64001E", "avc1.42E01E"]; // high and baseline profile
const BEHIND = 30; // seconds kept behind the playhead
const SLACK = 0.05; // seconds; times of buffers are not exact
const REBUILDS = 3; // within a minute; then the stream itself is at fault

const Source = () => globalThis.MediaSource ?? globalThis.ManagedMediaSource; // phones from Apple have only the latter

export function canPlayMp4() {
  return CODECS.some((codec) => Source()?.isTypeSupported(`video/mp4; codecs="${codec}"`));
}

export class Mp4Player {
  #video;
  #events;
  #source = null;
  #buffer = null;
  #init = null; // { mime, bytes } of the header
  #tasks = []; // what the source buffer has still to do; the first is under way while it is updating
  #chunks = new Chunks();
  #wanted = false; // to play
  #rebuilt = [];
  #gone = new AbortController();

  constructor(video, events) {
    this.#video = video;
    this.#events = events;
    const listen = (name, react, target = video) => target.addEventListener(name, react, { signal: this.#gone.signal });
    listen("waiting", () => this.#place());
    listen("error", () => this.#rebuild(video.error?.message || "the video cannot be decoded"));
    // some browsers pause a video that nobody sees
    listen("visibilitychange", () => !document.hidden && this.#wanted && this.play(), document);
    const exact = "requestVideoFrameCallback" in video;
    listen("timeupdate", () => {
      if (!exact || document.hidden) this.#shown(video.currentTime, performance.now());
    });
    if (exact) this.#watch();
  }

  header({ mime }, bytes) {
    const known = this.#init?.mime === mime;
    this.#init = { mime, bytes };
    if (known && this.#source !== null) this.#do({ append: bytes });
    else this.#open();
  }

  push(about, [bytes]) {
    this.#do({ append: bytes, about });
  }

  play() {
    this.#wanted = true;
    this.#place();
    this.#video.play().catch((error) => {
      if (error.name === "NotAllowedError") this.#events.blocked();
    });
  }

  pause() {
    this.#wanted = false;
    this.#video.pause();
  }

  close() {
    this.#gone.abort();
    this.#detach();
    this.#tasks = [];
    this.#video.removeAttribute("src");
    this.#video.load();
  }

  #open() {
    this.#detach();
    const source = new (Source())();
    this.#source = source;
    this.#video.disableRemotePlayback = true; // a managed source is not opened without
    const url = URL.createObjectURL(source);
    source.addEventListener(
      "sourceopen",
      () => {
        URL.revokeObjectURL(url);
        if (source === this.#source) this.#opened();
      },
      { once: true },
    );
    this.#video.src = url;
  }

  #opened() {
    let buffer;
    try {
      buffer = this.#source.addSourceBuffer(this.#init.mime);
    } catch (error) {
      this.#events.failed(error.message);
      return;
    }
    buffer.mode = "segments";
    buffer.addEventListener("updateend", () => buffer === this.#buffer && this.#done());
    this.#buffer = buffer;
    this.#tasks.unshift({ append: this.#init.bytes });
    this.#work();
    if (this.#wanted) this.play();
  }

  #detach() {
    this.#source = this.#buffer = null;
  }

  // A decoder that broke stays broken; every chunk begins with a key frame, so a new one can go on with the next.
  #rebuild(reason) {
    const now = performance.now();
    this.#rebuilt = [...this.#rebuilt.filter((time) => now - time < 60_000), now];
    if (this.#init === null) return;
    if (this.#rebuilt.length > REBUILDS) {
      this.#events.failed(reason);
      return;
    }
    this.#tasks = this.#tasks.filter((task, index) => task.about !== undefined && index > 0);
    this.#open();
  }

  #do(task) {
    this.#tasks.push(task);
    this.#work();
  }

  #work() {
    const [task] = this.#tasks;
    const buffer = this.#buffer;
    if (task === undefined || buffer === null || buffer.updating) return;
    try {
      if (task.remove === undefined) buffer.appendBuffer(task.append);
      else buffer.remove(0, task.remove);
    } catch (error) {
      if (error.name === "QuotaExceededError") this.#makeRoom();
      else this.#rebuild(error.message);
    }
  }

  #done() {
    const task = this.#tasks.shift();
    const buffered = this.#buffer.buffered;
    if (task?.about !== undefined && buffered.length > 0) {
      const end = buffered.end(buffered.length - 1);
      this.#chunks.add(task.about, end - task.about.seconds, end);
      this.#place();
      if (this.#video.currentTime - buffered.start(0) > 1.5 * BEHIND) {
        this.#tasks.unshift({ remove: this.#video.currentTime - BEHIND });
      }
      this.#events.appended(task.about, Math.max(0, end - this.#video.currentTime));
    }
    this.#work();
  }

  // The browser's limit is reached although old media is removed: less of it, and if there is none, the picture jumps.
  #makeRoom() {
    const buffered = this.#buffer.buffered;
    if (buffered.length === 0) {
      this.#rebuild("a chunk is larger than the browser's buffer");
      return;
    }
    if (this.#video.currentTime - buffered.start(0) < 3) this.#video.currentTime = buffered.end(buffered.length - 1) - SLACK;
    this.#tasks.unshift({ remove: Math.max(this.#video.currentTime - 2, buffered.start(0) + SLACK) });
    this.#work();
  }

  // Keeps the playhead inside of what is buffered and near its end.
  #place() {
    const video = this.#video;
    const ranges = this.#buffer?.buffered;
    if (ranges === undefined || ranges.length === 0) return;
    const index = [...Array(ranges.length).keys()].find((each) => ranges.end(each) > video.currentTime + SLACK);
    if (index === undefined) return;
    if (ranges.start(index) > video.currentTime) {
      video.currentTime = ranges.start(index); // after a gap, or where a page that was reloaded comes in
    }
    if (!this.#wanted) return;
    const end = ranges.end(ranges.length - 1);
    const current = this.#chunks.at(video.currentTime);
    const { jump, rate } = pace(end - Math.max(current?.end ?? 0, video.currentTime), video.playbackRate);
    if (jump) video.currentTime = this.#chunks.at(end).start;
    if (video.playbackRate !== rate) video.playbackRate = rate;
  }

  #watch() {
    this.#video.requestVideoFrameCallback((now, { mediaTime, expectedDisplayTime }) => {
      if (this.#gone.signal.aborted) return;
      this.#shown(mediaTime, expectedDisplayTime);
      this.#watch();
    });
  }

  #shown(time, at) {
    const current = this.#chunks.at(time);
    if (current !== undefined) this.#events.shown(current.about, time, at);
  }
}
