// Plays H.264 in fragmented mp4 through Media Source Extensions.

import { Segments, pace } from "./pacing.js";

const CODECS = ["avc1.64001E", "avc1.42E01E"]; // high and baseline profile
const KEPT_BEHIND = 600; // seconds kept behind the playhead, unless the browser has no room for them
const NEAR = 0.3; // seconds; nearer to the newest images than this is not looking back
const TOLERANCE = 0.05; // seconds; the times of buffers are not exact
const MAX_REBUILDS = 3; // per minute; after more of them the stream itself must be at fault

const Source = () => globalThis.MediaSource ?? globalThis.ManagedMediaSource; // iPhones have only the latter

export function canPlayMp4() {
  return CODECS.some((codec) => Source()?.isTypeSupported(`video/mp4; codecs="${codec}"`));
}

export class Mp4Player {
  #video;
  #events;
  #source = null;
  #buffer = null;
  #initialization = null; // { mime, bytes } of the header
  #tasks = []; // for the source buffer; while it is updating it works on the first
  #segments = new Segments();
  #playing = false; // as `play` and `pause` say
  #live = null; // while looking back: { time, at }, the time that would be on screen and when that was
  #rebuiltAt = [];
  #closed = new AbortController();

  constructor(video, events) {
    this.#video = video;
    this.#events = events;
    const listen = (name, react, target = video) => target.addEventListener(name, react, { signal: this.#closed.signal });
    listen("waiting", () => this.#adjust());
    listen("error", () => this.#rebuild(video.error?.message || "the video cannot be decoded"));
    // some browsers pause a video in a hidden page
    listen("visibilitychange", () => !document.hidden && this.#playing && this.play(), document);
    const exact = "requestVideoFrameCallback" in video;
    listen("timeupdate", () => {
      if (!exact || document.hidden) this.#shown(video.currentTime, performance.now());
    });
    if (exact) this.#watch();
  }

  header({ mime }, bytes) {
    const known = this.#initialization?.mime === mime;
    this.#initialization = { mime, bytes };
    if (known && this.#source !== null) this.#do({ append: bytes });
    else this.#open();
  }

  push(segment, [bytes]) {
    this.#do({ append: bytes, segment });
  }

  get lookingBack() {
    return this.#live !== null;
  }

  get span() {
    const ranges = this.#buffer?.buffered;
    if (ranges === undefined || ranges.length === 0) return null;
    return { time: this.#video.currentTime, start: ranges.start(0), end: this.#liveTime() };
  }

  seek(time) {
    const { start, end } = this.span ?? { start: 0, end: 0 };
    if (time > end - NEAR) {
      this.goLive();
      return;
    }
    this.#live ??= { time: end, at: performance.now() };
    this.#video.playbackRate = 1;
    this.#video.currentTime = Math.max(time, start + TOLERANCE);
  }

  goLive() {
    if (this.#live === null) return;
    const time = this.#liveTime();
    this.#live = null;
    this.#video.currentTime = Math.max(0, time - TOLERANCE);
    this.#adjust();
  }

  #liveTime() {
    if (this.#live === null) return this.#video.currentTime;
    const { time, at } = this.#live;
    const ranges = this.#buffer?.buffered;
    const end = ranges?.length > 0 ? ranges.end(ranges.length - 1) : time;
    return Math.min(end, this.#playing ? time + (performance.now() - at) / 1000 : time);
  }

  play() {
    if (this.#live !== null && !this.#playing) this.#live.at = performance.now();
    this.#playing = true;
    this.#adjust();
    this.#video.play().catch((error) => {
      if (error.name === "NotAllowedError") this.#events.blocked();
    });
  }

  pause() {
    if (this.#live !== null) this.#live = { time: this.#liveTime(), at: performance.now() };
    this.#playing = false;
    this.#video.pause();
  }

  close() {
    this.#closed.abort();
    this.#detach();
    this.#tasks = [];
    this.#video.removeAttribute("src");
    this.#video.load();
  }

  #open() {
    this.#detach();
    const source = new (Source())();
    this.#source = source;
    this.#video.disableRemotePlayback = true; // otherwise a managed media source is not opened
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
      buffer = this.#source.addSourceBuffer(this.#initialization.mime);
    } catch (error) {
      this.#events.failed(error.message);
      return;
    }
    buffer.mode = "segments";
    buffer.addEventListener("updateend", () => buffer === this.#buffer && this.#done());
    this.#buffer = buffer;
    this.#tasks.unshift({ append: this.#initialization.bytes });
    this.#work();
    if (this.#playing) this.play();
  }

  #detach() {
    this.#source = this.#buffer = this.#live = null;
  }

  // A decoder that has failed cannot be used again. Every segment begins with a key frame, so a new decoder can go on with the next one.
  #rebuild(reason) {
    const now = performance.now();
    this.#rebuiltAt = [...this.#rebuiltAt.filter((time) => now - time < 60_000), now];
    if (this.#initialization === null) return;
    if (this.#rebuiltAt.length > MAX_REBUILDS) {
      this.#events.failed(reason);
      return;
    }
    this.#tasks = this.#tasks.filter((task, index) => task.segment !== undefined && index > 0);
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
    if (task?.segment !== undefined && buffered.length > 0) {
      const end = buffered.end(buffered.length - 1);
      this.#segments.add(task.segment, end - task.segment.seconds, end);
      this.#adjust();
      if (this.#video.currentTime - buffered.start(0) > 1.1 * KEPT_BEHIND) {
        this.#tasks.unshift({ remove: this.#video.currentTime - KEPT_BEHIND });
      }
      this.#events.appended(task.segment, Math.max(0, end - this.#liveTime()), end);
    }
    this.#work();
  }

  // The browser's limit is reached: keep half of what was shown; when there is none left to remove, skip ahead.
  #makeRoom() {
    const buffered = this.#buffer.buffered;
    if (buffered.length === 0) {
      this.#rebuild("a segment is larger than the browser's buffer");
      return;
    }
    const shown = () => this.#video.currentTime - buffered.start(0);
    if (shown() < 3) this.goLive();
    if (shown() < 3) this.#video.currentTime = buffered.end(buffered.length - 1) - TOLERANCE;
    this.#tasks.unshift({ remove: buffered.start(0) + Math.max(TOLERANCE, Math.min(0.5 * shown(), shown() - 2)) });
    this.#work();
  }

  // Keeps the playhead inside the buffered ranges and near their end.
  #adjust() {
    const video = this.#video;
    const ranges = this.#buffer?.buffered;
    if (ranges === undefined || ranges.length === 0) return;
    const index = [...Array(ranges.length).keys()].find((each) => ranges.end(each) > video.currentTime + TOLERANCE);
    if (index === undefined) return;
    if (ranges.start(index) > video.currentTime) {
      video.currentTime = ranges.start(index); // after a gap, or when the page was reloaded
    }
    if (!this.#playing || this.lookingBack) return;
    const end = ranges.end(ranges.length - 1);
    const current = this.#segments.at(video.currentTime);
    const { jump, rate } = pace(end - Math.max(current?.end ?? 0, video.currentTime), video.playbackRate);
    if (jump) video.currentTime = this.#segments.at(end).start;
    if (video.playbackRate !== rate) video.playbackRate = rate;
  }

  #watch() {
    this.#video.requestVideoFrameCallback((now, { mediaTime, expectedDisplayTime }) => {
      if (this.#closed.signal.aborted) return;
      this.#shown(mediaTime, expectedDisplayTime);
      this.#watch();
    });
  }

  #shown(time, at) {
    if (this.#live !== null && this.#playing && time > this.#liveTime() - TOLERANCE) this.#live = null; // it has caught up
    const current = this.#segments.at(time);
    if (current !== undefined) this.#events.shown(current.segment, time, at);
  }
}
