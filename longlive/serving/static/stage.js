// The place of the video: how large it is shown, and what is said there while there is none.

const ENLARGED = 3; // from here on pixels stay squares instead of being smoothed
const NOTICE = 6000; // milliseconds

export class Stage {
  #stage = document.getElementById("stage");
  #video = document.getElementById("video");
  #canvas = document.getElementById("canvas");
  #panel = document.getElementById("panel");
  #title = document.getElementById("panel-title");
  #text = document.getElementById("panel-text");
  #actions = document.getElementById("panel-actions");
  #notice = document.getElementById("notice");
  #model = null; // size of the model's images; what is sent may already be enlarged
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

  /** `content`: `{ title, text, actions }`, the ids of the buttons that go with it; null: nothing but the video. */
  panel(content) {
    this.#panel.hidden = content === null;
    if (content === null) return;
    this.#title.textContent = content.title;
    this.#text.textContent = content.text;
    for (const action of this.#actions.children) action.hidden = !content.actions.includes(action.id);
  }

  /** For some seconds, over the picture. */
  notice(text) {
    this.#notice.textContent = text;
    this.#notice.hidden = false;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => (this.#notice.hidden = true), NOTICE);
  }

  #fit() {
    const { clientWidth, clientHeight } = this.#stage;
    const width = this.#model?.width ?? this.#video.videoWidth;
    const height = this.#model?.height ?? this.#video.videoHeight;
    if (!width || !height) return;
    let scale = Math.min(clientWidth / width, clientHeight / height);
    const pixelated = scale > ENLARGED;
    if (pixelated) scale = Math.floor(scale * devicePixelRatio) / devicePixelRatio; // every pixel equally large
    for (const element of [this.#video, this.#canvas]) {
      element.classList.toggle("pixelated", pixelated);
      element.style.width = `${width * scale}px`;
      element.style.height = `${height * scale}px`;
    }
  }
}
