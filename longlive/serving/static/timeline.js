// The prompts of a session, below its video, with the times at which they begin: in a line, in which each is the wider the longer it
// plays, or as a list. Each is a button that jumps to where its prompt begins.

export function clock(seconds, digits = 0) {
  const unit = 10 ** digits;
  const whole = Math.floor(seconds * unit) / unit;
  const rest = (whole % 60).toFixed(digits).padStart(digits ? 3 + digits : 2, "0");
  return `${Math.floor(whole / 60)}:${rest}`;
}

function textIn(tag, text) {
  const element = document.createElement(tag);
  element.textContent = text;
  return element;
}

export class Timeline {
  entries = []; // { prompt, videoIndex, firstSegment: index, start, end: seconds of the video }
  #track = document.getElementById("timeline");
  #buttons = [];
  #current = null;
  #upcoming = document.createElement("span");

  /** `chosen(entry)`: an entry was clicked. */
  constructor(chosen) {
    this.#upcoming.className = "entry upcoming";
    this.#track.addEventListener("click", ({ target }) => {
      const index = this.#buttons.indexOf(target.closest("[data-prompt]"));
      if (index >= 0) chosen(this.entries[index]);
    });
    this.#track.addEventListener("keydown", (event) => this.#walk(event));
    const list = document.getElementById("as-list");
    list.addEventListener("click", () => {
      list.ariaPressed = String(this.#track.classList.toggle("list"));
      this.#current?.scrollIntoView({ block: "nearest", inline: "nearest" });
    });
  }

  clear() {
    this.entries = [];
    this.#buttons = [];
    this.#current = null;
    this.#track.replaceChildren();
  }

  /** Entries as the page had them before it was reloaded. */
  restore(entries) {
    this.clear();
    for (const entry of entries) this.#begin(entry);
  }

  /** A segment of the video, which ends at `end` seconds. */
  add({ prompt, video_index: videoIndex, index, seconds }, end) {
    const last = this.entries.at(-1);
    if (last !== undefined && last.prompt === prompt && last.videoIndex === videoIndex) {
      last.end = end;
      this.#label(last, this.#buttons.at(-1));
    } else {
      this.#begin({ prompt, videoIndex, firstSegment: index, start: end - seconds, end });
    }
  }

  /** Marks the prompt of the segment that is on screen. */
  show({ index }) {
    const button = this.#buttons[this.entries.findLastIndex((entry) => entry.firstSegment <= index)];
    if (button === undefined || button === this.#current) return;
    this.#current?.removeAttribute("aria-current");
    button.setAttribute("aria-current", "true");
    this.#current = button;
    this.#reach(button);
    if (!this.#track.matches(":hover, :focus-within")) button.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** Shows the prompt that was sent and is not on screen yet; null: none. */
  announce(prompt) {
    if (prompt === null) {
      this.#upcoming.remove();
      return;
    }
    this.#upcoming.replaceChildren(textIn("small", "next"), textIn("span", prompt));
    if (!this.#upcoming.isConnected) this.#track.append(this.#upcoming);
    this.#end();
  }

  #begin(entry) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "entry";
    button.dataset.prompt = entry.prompt;
    button.append(textIn("small", clock(entry.start)), textIn("span", entry.prompt));
    this.#label(entry, button);
    this.entries.push(entry);
    this.#buttons.push(button);
    this.#upcoming.remove();
    this.#track.append(button);
    this.#reach(this.#current ?? button);
    this.#end();
  }

  #label({ prompt, start, end }, button) {
    const label = `${prompt} (${clock(start)} to ${clock(end)})`;
    button.title = button.ariaLabel = label;
    button.style.flexGrow = Math.max(1, 100 * (end - start)); // above 1, so that together they fill the line
  }

  #end() {
    if (this.#track.matches(":hover, :focus-within")) return;
    this.#track.scrollLeft = this.#track.scrollWidth;
    this.#track.scrollTop = this.#track.scrollHeight;
  }

  // Only one button is reached with the tab key, the others with the arrow keys: an hour may have hundreds of prompts.
  #reach(reachable) {
    for (const button of this.#buttons) button.tabIndex = button === reachable ? 0 : -1;
  }

  #walk(event) {
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    const next = this.#buttons[this.#buttons.indexOf(event.target) + step];
    if (step === undefined || next === undefined) return;
    event.preventDefault();
    this.#reach(next);
    next.focus();
  }
}
