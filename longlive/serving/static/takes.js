// The recordings of a session, one for its first video and one for each restart.

import { address } from "./access.js";

/** A link to a file of a session; `take`: null for the newest. */
export function fileAddress(kind, { id, key }, take = null) {
  const url = address(kind === "recording" ? `/recording/${id}.mp4` : `/timeline/${id}`);
  url.searchParams.set("key", key);
  if (take !== null) url.searchParams.set("take", take);
  return url;
}

export class Takes {
  #dialog = document.getElementById("takes-dialog");
  #list = document.getElementById("take-list");

  /** `links`: to the files of the only video; they open the list when there are several. `session()`: gives the session. */
  constructor(links, session) {
    for (const link of links) link.addEventListener("click", (event) => this.#choose(event, link, session()));
    this.#dialog.addEventListener("click", ({ target }) => {
      if (target === this.#dialog) this.#dialog.close(); // the backdrop
    });
  }

  async #choose(event, link, session) {
    if (!session?.videos || link.dataset.only !== undefined) return;
    event.preventDefault();
    if (await this.#open(session)) return;
    link.dataset.only = ""; // nothing of the newest video is recorded yet
    link.click();
    delete link.dataset.only;
  }

  /** Lists them; false when there is only one, or the server does not answer. */
  async #open(session) {
    const url = address(`/takes/${session.id}`);
    url.searchParams.set("key", session.key);
    const answer = await fetch(url).catch(() => null);
    const takes = answer?.ok ? await answer.json() : [];
    if (takes.length < 2) return false;
    this.#list.replaceChildren(...takes.map((take) => this.#row(session, take)));
    this.#dialog.showModal();
    return true;
  }

  #row(session, { take, bytes }) {
    const [row, words] = ["li", "span"].map((tag) => document.createElement(tag));
    words.textContent = `Video ${take + 1}, ${(bytes / 2 ** 20).toFixed(1)} MiB`;
    row.append(words, link("Recording", fileAddress("recording", session, take)), link("Timeline", fileAddress("timeline", session, take)));
    return row;
  }
}

function link(text, url) {
  const element = document.createElement("a");
  element.className = "button";
  element.textContent = text;
  element.href = url;
  element.download = "";
  return element;
}
