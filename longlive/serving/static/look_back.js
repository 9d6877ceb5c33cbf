// The line below the video with which one looks back at what was shown, and returns to the newest images.

import { clock } from "./timeline.js";

const NEAR = 0.3; // seconds before the newest images that count as live

export class LookBack {
  #row = document.getElementById("look");
  #slider = document.getElementById("scrub");
  #live = document.getElementById("live");
  #reuse = document.getElementById("reuse");
  #held = false; // while the slider is moved it must not follow the video

  /** `session()` gives the session, or null; `reused(prompt)`: the prompt on screen is wanted again. */
  constructor(session, reused) {
    this.#slider.addEventListener("input", () => session()?.lookAt(Number(this.#slider.value)));
    this.#slider.addEventListener("pointerdown", () => (this.#held = true));
    addEventListener("pointerup", () => (this.#held = false));
    addEventListener("pointercancel", () => (this.#held = false));
    this.#live.addEventListener("click", () => session()?.goLive());
    this.#reuse.addEventListener("click", () => {
      if (session()?.shown) reused(session().shown.prompt);
    });
  }

  show(session) {
    const span = session?.span ?? null;
    this.#row.classList.toggle("empty", span === null);
    if (span === null) return;
    const { time, start, end } = span;
    const back = session.lookingBack;
    this.#row.classList.toggle("back", back);
    this.#live.disabled = !back;
    this.#reuse.hidden = !back;
    const newest = session.ended === null ? "Live" : "End";
    this.#row.classList.toggle("ended", session.ended !== null);
    this.#live.querySelector("span").textContent = back ? `${newest} (${clock(Math.max(0, end - time))} behind)` : newest;
    this.#slider.disabled = end - start < 2 * NEAR;
    if (this.#held) return;
    this.#slider.min = start;
    this.#slider.max = end;
    this.#slider.value = back ? time : end;
    this.#slider.ariaValueText = clock(time);
  }
}
