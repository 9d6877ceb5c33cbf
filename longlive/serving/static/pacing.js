// Where the segments lie in the video's time, and how fast to play so that a new prompt is soon on screen.

const MAX_SEGMENTS = 4096; // more than are ever buffered

export class Segments {
  #placed = [];

  add(segment, start, end) {
    this.#placed.push({ segment, start, end });
    if (this.#placed.length > MAX_SEGMENTS) this.#placed.shift();
  }

  /** The segment that is on screen at `time`, with its start and end; undefined before the first. */
  at(time) {
    return this.#placed.findLast(({ segment, start, end }) => time >= start - (0.5 * (end - start)) / segment.num_frames);
  }
}

/** How to play when `beyond` seconds are buffered after the segment on screen: the playback rate, and whether to jump. */
export function pace(beyond, rate) {
  if (beyond > 4) return { jump: true, rate: 1 };
  if (beyond > 2.4) return { jump: false, rate: 1.1 };
  if (beyond > 1.2) return { jump: false, rate: Math.max(rate, 1.05) };
  return { jump: false, rate: beyond > 0.8 ? rate : 1 }; // hysteresis, so that the rate does not alternate
}
