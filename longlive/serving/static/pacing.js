// Where the chunks lie in the video's time, and how fast to play so that what was typed shows soon.

const REMEMBERED = 64; // chunks; more than are ever buffered

export class Chunks {
  #placed = [];

  add(about, start, end) {
    this.#placed.push({ about, start, end });
    if (this.#placed.length > REMEMBERED) this.#placed.shift();
  }

  /** The chunk that is on screen at `time`, with where it lies; undefined before the first. */
  at(time) {
    return this.#placed.findLast(({ about, start, end }) => time >= start - (0.5 * (end - start)) / about.images);
  }
}

/** What to do with `beyond` seconds that wait after the chunk on screen: the playing speed, or to jump. */
export function pace(beyond, rate) {
  if (beyond > 4) return { jump: true, rate: 1 };
  if (beyond > 2.4) return { jump: false, rate: 1.1 };
  if (beyond > 1.2) return { jump: false, rate: Math.max(rate, 1.05) };
  return { jump: false, rate: beyond > 0.8 ? rate : 1 }; // not back at once, or the speed would flutter
}
