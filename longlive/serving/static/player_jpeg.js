// Shows JPEG files on a canvas, in time: for browsers that cannot play the mp4.

import { Chunks, pace } from "./pacing.js";

const LONGEST_STEP = 0.25; // seconds; a page that was hidden does not catch up in one leap

export class JpegPlayer {
  #canvas;
  #context;
  #events;
  #queue = []; // { image, time }, not shown yet
  #chunks = new Chunks();
  #time; // of the playhead
  #end; // of what can be played
  #rate = 1;
  #wanted = false;
  #closed = false;
  #request = null;
  #before = null; // when the clock was last looked at
  #decoding = Promise.resolve();

  constructor(canvas, events, begin) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    this.#events = events;
    this.#time = this.#end = begin;
  }

  header() {}

  push(about, parts) {
    this.#decoding = this.#decoding.then(() => this.#decode(about, parts)).catch((error) => this.#events.failed(error.message));
  }

  play() {
    this.#wanted = true;
    this.#run();
  }

  pause() {
    this.#wanted = false;
    cancelAnimationFrame(this.#request);
    this.#request = null;
  }

  close() {
    this.#closed = true;
    this.pause();
    this.#drop(this.#queue.length);
  }

  async #decode(about, parts) {
    const images = await Promise.all(parts.map((part) => createImageBitmap(new Blob([part], { type: "image/jpeg" }))));
    if (this.#closed) {
      images.forEach((image) => image.close());
      return;
    }
    const start = this.#end;
    this.#end += about.seconds;
    images.forEach((image, index) => this.#queue.push({ image, time: start + (index * about.seconds) / images.length }));
    this.#chunks.add(about, start, this.#end);
    const current = this.#chunks.at(this.#time);
    const { jump, rate } = pace(this.#end - Math.max(current?.end ?? 0, this.#time), this.#rate);
    this.#rate = rate;
    if (jump && this.#wanted) {
      this.#time = start;
      this.#drop(this.#queue.findIndex(({ time }) => time >= start));
    }
    this.#events.appended(about, this.#end - this.#time);
    this.#run();
  }

  #run() {
    if (!this.#wanted || this.#request !== null || this.#queue.length === 0) return;
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
      this.#events.shown(this.#chunks.at(time).about, time, now);
    }
    // the clock runs until the last image has been seen for its time
    if (this.#wanted && this.#time < this.#end) this.#request = requestAnimationFrame(() => this.#tick());
  }

  #draw(image) {
    if (this.#canvas.width !== image.width || this.#canvas.height !== image.height) {
      this.#canvas.width = image.width;
      this.#canvas.height = image.height;
    }
    this.#context.drawImage(image, 0, 0);
  }

  #drop(count) {
    for (const { image } of this.#queue.splice(0, count)) image.close(); // at once: garbage collection does not see its size
  }
}
