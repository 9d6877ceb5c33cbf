// Plays JPEG files on a canvas, for browsers that cannot play the mp4.

import { Segments, pace } from "./pacing.js";

const LONGEST_STEP = 0.25; // seconds; a page that was hidden does not skip ahead at once

export class JpegPlayer {
  #canvas;
  #context;
  #events;
  #queue = []; // { image, time }, not shown yet
  #segments = new Segments();
  #time; // of the playhead
  #end; // of what can be played
  #rate = 1;
  #playing = false; // as `play` and `pause` say
  #closed = false;
  #request = null;
  #before = null; // time of the tick before
  #decoding = Promise.resolve();

  constructor(canvas, events, begin) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    this.#events = events;
    this.#time = this.#end = begin;
  }

  header() {}

  push(segment, parts) {
    this.#decoding = this.#decoding.then(() => this.#decode(segment, parts)).catch((error) => this.#events.failed(error.message));
  }

  play() {
    this.#playing = true;
    this.#run();
  }

  pause() {
    this.#playing = false; // as `play` and `pause` say
    cancelAnimationFrame(this.#request);
    this.#request = null;
  }

  close() {
    this.#closed = true;
    this.pause();
    this.#drop(this.#queue.length);
  }

  async #decode(segment, parts) {
    const images = await Promise.all(parts.map((part) => createImageBitmap(new Blob([part], { type: "image/jpeg" }))));
    if (this.#closed) {
      images.forEach((image) => image.close());
      return;
    }
    const start = this.#end;
    this.#end += segment.seconds;
    images.forEach((image, index) => this.#queue.push({ image, time: start + (index * segment.seconds) / images.length }));
    this.#segments.add(segment, start, this.#end);
    const current = this.#segments.at(this.#time);
    const { jump, rate } = pace(this.#end - Math.max(current?.end ?? 0, this.#time), this.#rate);
    this.#rate = rate;
    if (jump && this.#playing) {
      this.#time = start;
      this.#drop(this.#queue.findIndex(({ time }) => time >= start));
    }
    this.#events.appended(segment, this.#end - this.#time);
    this.#run();
  }

  #run() {
    if (!this.#playing || this.#request !== null || this.#queue.length === 0) return;
    this.#before = performance.now();
    this.#request = requestAnimationFrame(() => this.#tick());
  }

  #tick() {
    this.#request = null;
    const now = performance.now();
    this.#time = Math.min(this.#end, this.#time + this.#rate * Math.min((now - this.#before) / 1000, LONGEST_STEP));
    this.#before = now;
    const due = this.#queue.findLastIndex(({ time }) => time <= this.#time);
    if (due >= 0) {
      const { image, time } = this.#queue[due];
      this.#draw(image);
      this.#drop(due + 1);
      this.#events.shown(this.#segments.at(time).segment, time, now);
    }
    // until the last image has been on screen for its full time
    if (this.#playing && this.#time < this.#end) this.#request = requestAnimationFrame(() => this.#tick());
  }

  #draw(image) {
    if (this.#canvas.width !== image.width || this.#canvas.height !== image.height) {
      this.#canvas.width = image.width;
      this.#canvas.height = image.height;
    }
    this.#context.drawImage(image, 0, 0);
  }

  #drop(count) {
    for (const { image } of this.#queue.splice(0, count)) image.close(); // not left to garbage collection, which does not know its size
  }
}
