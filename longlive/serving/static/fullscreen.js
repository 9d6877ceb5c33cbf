// The video and the prompt line on the whole screen. Where a browser has no full screen for elements (iPhones), they fill the page.

export class Fullscreen {
  #main = document.querySelector("main");
  #button = document.getElementById("fullscreen");

  constructor() {
    this.#button.addEventListener("click", () => this.toggle());
    document.getElementById("stage").addEventListener("dblclick", ({ target }) => {
      if (!target.closest("button, a")) this.toggle();
    });
    document.addEventListener("fullscreenchange", () => this.#show(document.fullscreenElement === this.#main));
  }

  toggle() {
    const filled = this.#main.classList.contains("filled");
    if (document.fullscreenElement !== null && document.fullscreenElement !== undefined) document.exitFullscreen();
    else if (!filled && this.#main.requestFullscreen !== undefined) this.#main.requestFullscreen().catch(() => this.#show(true));
    else this.#show(!filled);
  }

  #show(filled) {
    this.#main.classList.toggle("filled", filled);
    document.body.classList.toggle("filled", filled);
    this.#button.ariaLabel = this.#button.title = filled ? "Leave full screen (Alt+F)" : "Full screen (Alt+F)";
  }
}
