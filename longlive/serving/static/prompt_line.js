// The input line for prompts: it receives all typing, and the arrow keys recall earlier prompts.

// On a phone, focus opens the keyboard, so only a tap on the line sets it there.
const KEYBOARD = matchMedia("(hover: hover) and (pointer: fine)");

export class PromptLine {
  #input = document.getElementById("prompt");
  #history = [];
  #at = 0; // index of the history's prompt that is in the line; the history's length: none
  #draft = "";

  #changed;

  /** `sent(text)`: Enter or the button was pressed; `changed(text)`: the text is another one. */
  constructor(sent, changed) {
    this.#changed = changed;
    document.getElementById("prompt-form").addEventListener("submit", (event) => {
      event.preventDefault();
      sent(this.#input.value.trim());
    });
    this.#input.addEventListener("input", () => {
      this.#at = this.#history.length;
      changed(this.text);
    });
    this.#input.addEventListener("keydown", (event) => this.#walk(event));
    document.addEventListener("keydown", (event) => this.#catch(event));
    document.addEventListener("click", (event) => this.#restoreFocus(event));
    this.focus();
  }

  get text() {
    return this.#input.value.trim();
  }

  set text(text) {
    this.#input.value = text;
    this.#changed(this.text);
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

  /** A prompt was sent. It stays in the line, selected: the next prompt often differs in a word only. */
  sent(text) {
    this.remember([text]);
    this.text = text;
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
    this.text = next === this.#history.length ? this.#draft : this.#history[next];
    this.#input.setSelectionRange(this.#input.value.length, this.#input.value.length);
  }

  // A character typed anywhere else goes into the line: the browser enters it where the focus is after this event.
  #catch({ key, ctrlKey, metaKey, altKey, target }) {
    if (key.length !== 1 || ctrlKey || metaKey || altKey || target.closest("input:not([type=range]), dialog")) return;
    if (key === " " && target.closest("button, a")) return; // a space presses it
    this.#input.focus();
  }

  // A click moves the focus to what was clicked; move it back. `detail` is 0 for a press by keyboard, which must keep the focus.
  #restoreFocus({ detail, target }) {
    if (detail === 0 || target.closest("input:not([type=checkbox]), dialog, #help, #share")) return;
    if (getSelection().isCollapsed) this.focus();
  }
}
