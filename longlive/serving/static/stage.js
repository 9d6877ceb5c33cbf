// The area of the video: how large the video is shown, and the text in its place while there is none.

const PIXELATED_FROM = 3; // enlargement from which pixels are shown as squares instead of being smoothed
const NOTICE_TIME = 6000; // milliseconds

export class Stage {
  #stage = document.getElementById("stage");
  #video = document.getElementById("video");
  #canvas = document.getElementById("canvas");
  #panel = document.getElementById("panel");
  #title = document.getElementById("panel-title");
  #text = document.getElementById("panel-text");
  #actions = document.getElementById("panel-actions");
  #notice = document.getElementById("notice");
  #held = document.getElementById("held");
  #model = null; // size of the model's images; those that are sent may be enlarged
  #timer = null;

  constructor() {
    new ResizeObserver(() => this.#fit()).observe(this.#stage);
    this.#video.addEventListener("resize", () => this.#fit());
  }

  get screen() {
    return { video: this.#video, canvas: this.#canvas };
  }

  /** The size of the model's images. */
  set size(size) {
    this.#model = size;
    this.#fit();
  }

  set description(text) {
    this.#video.ariaLabel = this.#canvas.ariaLabel = text;
  }

  /** Shows text over the video. `content`: `{ title, text, actions }`, where actions are ids of buttons; null: only the video. */
  panel(content) {
    this.#panel.hidden = content === null;
    if (content === null) return;
    this.#title.textContent = content.title;
    this.#text.textContent = content.text;
    for (const action of this.#actions.children) action.hidden = !content.actions.includes(action.id);
  }

  /** Shows over the video that it stands still, and why; null: it does not. */
  hold(words) {
    this.#held.hidden = words === null;
    this.#held.querySelector("span").textContent = words ?? "";
  }

  /** Shows a text over the video for some seconds. */
  notice(text) {
    this.#notice.textContent = text;
    this.#notice.hidden = false;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => (this.#notice.hidden = true), NOTICE_TIME);
  }

  #fit() {
    const { clientWidth, clientHeight } = this.#stage;
    const width = this.#model?.width ?? this.#video.videoWidth;
    const height = this.#model?.height ?? this.#video.videoHeight;
    if (!width || !height) return;
    let scale = Math.min(clientWidth / width, clientHeight / height);
    const pixelated = scale > PIXELATED_FROM;
    if (pixelated) scale = Math.floor(scale * devicePixelRatio) / devicePixelRatio; // all pixels equally large
    for (const element of [this.#video, this.#canvas]) {
      element.classList.toggle("pixelated", pixelated);
      element.style.width = `${width * scale}px`;
      element.style.height = `${height * scale}px`;
    }
  }
}
