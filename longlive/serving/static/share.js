// The link with which others watch a session: they see the video, and can neither type nor end it.

import { watchAddress } from "./access.js";

const LOCAL = ["localhost", "127.0.0.1", "[::1]"];

export class Share {
  #dialog = document.getElementById("share-dialog");
  #link = document.getElementById("share-link");
  #said = document.getElementById("share-said");

  constructor() {
    document.getElementById("copy").addEventListener("click", () => this.#copy());
    this.#dialog.addEventListener("click", ({ target }) => {
      if (target === this.#dialog) this.#dialog.close(); // the backdrop
    });
  }

  open({ id: session, watchKey: key }) {
    this.#link.value = watchAddress({ session, key });
    this.#said.textContent = LOCAL.includes(location.hostname) ? "This server can be reached from this computer only." : "";
    this.#dialog.showModal();
    this.#link.setSelectionRange(0, this.#link.value.length, "backward"); // shows its beginning
  }

  async #copy() {
    this.#link.select();
    try {
      await navigator.clipboard.writeText(this.#link.value);
      this.#said.textContent = "Copied.";
    } catch {
      // without https a page must not write to the clipboard
      this.#said.textContent = document.execCommand("copy") ? "Copied." : "Copy the selected text.";
    }
  }
}
