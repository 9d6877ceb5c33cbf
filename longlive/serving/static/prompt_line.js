// The line into which prompts are typed: where typing goes, and the prompts from before on the arrow keys.

// On a phone focus opens the keyboard, so there only a tap on the line does that.
const KEYBOARD = matchMedia("(hover: hover) and (pointer: fine)");

export class PromptLine {
  #input = document.getElementById("prompt");
  #history = [];
  #at = 0; // which of the history is in the line; its length: none of it
  #draft = "";

  /** `sent(text)`: Enter, or the button. */
  constructor(sent) {
    document.getElementById("prompt-form").addEventListener("submit", (event) => {
      event.preventDefault();
      sent(this.#input.value.trim());
    });
    this.#input.addEventListener("input", () => (this.#at = this.#history.length));
    this.#input.addEventListener("keydown", (event) => this.#walk(event));
    document.addEventListener("keydown", (event) => this.#catch(event));
    document.addEventListener("click", (event) => this.#comeBack(event));
    this.focus();
  }

  get text() {
    return this.#input.value.trim();
  }

  set text(text) {
    this.#input.value = text;
  }

  get example() {
    return this.#input.placeholder;
  }

  set example(text) {
    this.#input.placeholder = text;
  }

  set longest(characters) {
    this.#input.maxLength = characters;
  }

  focus() {
    if (KEYBOARD.matches) this.#input.focus({ preventScroll: true });
  }

  /** Stays in the line, selected: the next prompt is often the same but for a word. */
  sent(text) {
    this.remember([text]);
    this.#input.value = text;
    if (KEYBOARD.matches) this.#input.select();
  }

  remember(texts) {
    for (const text of texts) if (text !== this.#history.at(-1)) this.#history.push(text);
    this.#at = this.#history.length - 1;
    this.#draft = "";
  }

  #walk(event) {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (step === undefined || event.isComposing) return;
    event.preventDefault();
    const next = this.#at + step;
    if (next < 0 || next > this.#history.length) return;
    if (this.#at === this.#history.length) this.#draft = this.#input.value;
    this.#at = next;
    this.#input.value = next === this.#history.length ? this.#draft : this.#history[next];
    this.#input.setSelectionRange(this.#input.value.length, this.#input.value.length);
  }

  // A character typed anywhere else goes here; the browser enters it where the focus is after this event.
  #catch({ key, ctrlKey, metaKey, altKey, target }) {
    if (key.length !== 1 || ctrlKey || metaKey || altKey || target.closest("input, dialog")) return;
    if (key === " " && target.closest("button, a")) return; // presses it
    this.#input.focus();
  }

  // A click leaves the focus on what was clicked. `detail` is 0 for a press by keyboard, whose focus must stay.
  #comeBack({ detail, target }) {
    if (detail === 0 || target.closest("input:not([type=checkbox]), dialog, #help")) return;
    if (getSelection().isCollapsed) this.focus();
  }
}
