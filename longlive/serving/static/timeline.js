// The prompts of a session under its video, as long as they play. Each is a button that puts its prompt into the line again.

export function clock(seconds, digits = 0) {
  const unit = 10 ** digits;
  const whole = Math.floor(seconds * unit) / unit;
  const rest = (whole % 60).toFixed(digits).padStart(digits ? 3 + digits : 2, "0");
  return `${Math.floor(whole / 60)}:${rest}`;
}

export class Timeline {
  segments = []; // { prompt, take, chunk: the first, start, end: seconds of the video }
  #track = document.getElementById("timeline");
  #buttons = [];
  #current = null;
  #coming = document.createElement("span");

  /** `chosen(prompt)`: a segment was clicked. */
  constructor(chosen) {
    this.#coming.className = "segment coming";
    this.#track.addEventListener("click", ({ target }) => {
      const button = target.closest("[data-prompt]");
      if (button !== null) chosen(button.dataset.prompt);
    });
    this.#track.addEventListener("keydown", (event) => this.#walk(event));
  }

  clear() {
    this.segments = [];
    this.#buttons = [];
    this.#current = null;
    this.#track.replaceChildren();
  }

  /** As a page before this one has left it. */
  restore(segments) {
    this.clear();
    for (const segment of segments) this.#begin(segment);
  }

  /** A chunk that ends at `end` seconds of the video. */
  add({ prompt, take, chunk, seconds }, end) {
    const last = this.segments.at(-1);
    if (last !== undefined && last.prompt === prompt && last.take === take) {
      last.end = end;
      this.#label(last, this.#buttons.at(-1));
    } else {
      this.#begin({ prompt, take, chunk, start: end - seconds, end });
    }
  }

  /** Marks the one that is on screen. */
  show({ chunk }) {
    const index = this.segments.findLastIndex((segment) => segment.chunk <= chunk);
    const button = this.#buttons[index];
    if (button === undefined || button === this.#current) return;
    this.#current?.removeAttribute("aria-current");
    button.setAttribute("aria-current", "true");
    this.#current = button;
    this.#reach(button);
  }

  /** The prompt that was asked for and is not on screen yet; null: none. */
  announce(prompt) {
    if (prompt === null) {
      this.#coming.remove();
      return;
    }
    this.#coming.textContent = prompt;
    if (!this.#coming.isConnected) this.#track.append(this.#coming);
    this.#end();
  }

  #begin(segment) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "segment";
    button.dataset.prompt = segment.prompt;
    button.dataset.start = clock(segment.start);
    button.textContent = segment.prompt;
    this.#label(segment, button);
    this.segments.push(segment);
    this.#buttons.push(button);
    this.#coming.remove();
    this.#track.append(button);
    this.#reach(this.#current ?? button);
    this.#end();
  }

  #label({ prompt, start, end }, button) {
    const label = `${prompt} (${clock(start)} to ${clock(end)})`;
    button.title = button.ariaLabel = label;
    button.style.flexGrow = Math.max(1, 100 * (end - start)); // in sum more than 1, so that they fill the line;
  }

  #end() {
    if (!this.#track.matches(":hover, :focus-within")) this.#track.scrollLeft = this.#track.scrollWidth;
  }

  // One stop for the tab key, arrows from there: an hour may have hundreds of prompts.
  #reach(reachable) {
    for (const button of this.#buttons) button.tabIndex = button === reachable ? 0 : -1;
  }

  #walk(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const next = this.#buttons[this.#buttons.indexOf(event.target) + step];
    if (step === undefined || next === undefined) return;
    event.preventDefault();
    this.#reach(next);
    next.focus();
  }
}
