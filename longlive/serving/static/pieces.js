// How many pieces of the prompt in the line the model reads, beside the line: asked for while it is typed.

import { address } from "./access.js";

const PAUSE = 200; // milliseconds without typing before the server is asked

export class Pieces {
  #element = document.getElementById("pieces");
  #timer = null;
  #asked = null; // the text that was asked for last

  /** The prompt in the line is `text` now. */
  typed(text) {
    clearTimeout(this.#timer);
    if (text === this.#asked) return;
    this.#asked = null;
    if (text === "") this.#show(null);
    else this.#timer = setTimeout(() => this.#ask(text), PAUSE);
  }

  async #ask(text) {
    this.#asked = text;
    try {
      const answer = await fetch(address("/pieces"), { method: "POST", body: text });
      const { pieces } = answer.ok ? await answer.json() : { pieces: null };
      if (text === this.#asked) this.#show(pieces);
    } catch {
      this.#show(null); // the page says elsewhere that there is no connection
    }
  }

  #show(pieces) {
    const element = this.#element;
    element.hidden = pieces === null;
    if (pieces === null) return;
    const { given, read, limit, cut } = pieces;
    element.textContent = `${given}/${limit}`;
    element.classList.toggle("cut", cut);
    const words = cut ? `The model reads ${read} of ${given} pieces; it does not read: “${pieces.first_unread} …”` : `${given} of at most ${limit} pieces`;
    element.title = element.ariaLabel = words;
  }
}
