// Plays JPEG files on a canvas, for browsers that cannot play the mp4.

import { Segments, pace } from "./pacing.js";

const KEPT_BYTES = 96 * 2 ** 20; // of what was shown
const NEAR = 0.3; // seconds; nearer to the newest images than this is not looking back
const LONGEST_STEP = 0.25; // seconds; a page that was hidden does not skip ahead at once

export class JpegPlayer {
  #canvas;
  #context;
  #events;
  #queue = []; // { image, time }, not shown yet
  #segments = new Segments();
  #kept = []; // { segment, parts, start, end, bytes }, to look back at
  #keptBytes = 0;
  #look = null; // while looking back: the time on screen
  #drawn = null; // the part that was drawn last while looking back
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

  get lookingBack() {
    return this.#look !== null;
  }

  get span() {
    return this.#kept.length === 0 ? null : { time: this.#look ?? this.#time, start: this.#kept[0].start, end: this.#time };
  }

  seek(time) {
    if (this.#kept.length === 0 || time > this.#time - NEAR) {
      this.goLive();
      return;
    }
    this.#look = Math.max(time, this.#kept[0].start);
    this.#drawKept();
    this.#run();
  }

  goLive() {
    if (this.#look === null) return;
    this.#look = this.#time;
    this.#drawKept();
    this.#look = null;
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
    this.#keep({ segment, parts, start, end: this.#end, bytes: parts.reduce((sum, part) => sum + part.byteLength, 0) });
    const current = this.#segments.at(this.#time);
    const { jump, rate } = pace(this.#end - Math.max(current?.end ?? 0, this.#time), this.#rate);
    this.#rate = rate;
    if (jump && this.#playing) {
      this.#time = start;
      this.#drop(this.#queue.findIndex(({ time }) => time >= start));
    }
    this.#events.appended(segment, this.#end - this.#time, this.#end);
    this.#run();
  }

  #keep(entry) {
    this.#kept.push(entry);
    this.#keptBytes += entry.bytes;
    while (this.#keptBytes > KEPT_BYTES) this.#keptBytes -= this.#kept.shift().bytes;
  }

  // Draws the image at the time that is looked at, which has to be decoded again.
  async #drawKept() {
    const time = this.#look;
    const found = this.#kept.findLast(({ start }) => start <= time + 1e-6) ?? this.#kept[0];
    const { segment, parts, start, end } = found;
    const index = Math.min(parts.length - 1, Math.floor(((time - start) / (end - start)) * parts.length));
    if (parts[index] === this.#drawn) return;
    this.#drawn = parts[index];
    const image = await createImageBitmap(new Blob([parts[index]], { type: "image/jpeg" }));
    if (!this.#closed && this.#drawn === parts[index]) {
      this.#draw(image);
      this.#events.shown(segment, time, performance.now());
    }
    image.close();
  }

  #run() {
    if (!this.#playing || this.#request !== null || (this.#queue.length === 0 && this.#look === null)) return;
    this.#before = performance.now();
    this.#request = requestAnimationFrame(() => this.#tick());
  }

  #tick() {
    this.#request = null;
    const now = performance.now();
    this.#time = Math.min(this.#end, this.#time + this.#rate * Math.min((now - this.#before) / 1000, LONGEST_STEP));
    if (this.#look !== null) {
      this.#look = Math.min(this.#time, this.#look + Math.min((now - this.#before) / 1000, LONGEST_STEP));
      this.#drawKept();
      if (this.#look === this.#time) this.#look = null; // it has caught up
    }
    this.#before = now;
    const due = this.#queue.findLastIndex(({ time }) => time <= this.#time);
    if (due >= 0) {
      const { image, time } = this.#queue[due];
      if (this.#look === null) {
        this.#drawn = null;
        this.#draw(image);
        this.#events.shown(this.#segments.at(time).segment, time, now);
      }
      this.#drop(due + 1);
    }
    // until the last image has been on screen for its full time
    if (this.#playing && (this.#time < this.#end || this.#look !== null)) this.#request = requestAnimationFrame(() => this.#tick());
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
