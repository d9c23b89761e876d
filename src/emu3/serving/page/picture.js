import { el } from "./dom.js";

/** One picture that is being drawn or is finished: what is known of it. */
export class Picture {
  constructor(body, place = 0) {
    this.body = body;
    this.place = place;
    this.state = "waiting";
    this.decided = 0;
    this.steps = 0;
    this.length = 0;
    this.previews = 0;
    this.url = null;
    this.record = null;
  }

  /** Take one event of the server in. */
  hear(event) {
    if (event.kind === "started") {
      this.state = "drawing";
      this.began = performance.now();
      ({ width: this.width, height: this.height, seed: this.seed, length: this.length } = event);
    } else if (event.kind === "tokens") {
      this.decided = event.decided;
      this.steps = event.steps;
    } else if (event.kind === "preview") {
      this.url = event.url;
      this.previews += 1;
    } else if (event.kind === "done") {
      this.state = "done";
      this.decided = this.length;
      ({ url: this.url, seed: this.seed, codes: this.codes, steps: this.steps, seconds: this.seconds } = event);
      ({ id: this.id, sheet: this.sheet, columns: this.columns } = event);
      this.record = { ...event.record, prompt: event.record?.prompt ?? this.body.prompt, seed: event.seed };
    }
  }

  get elapsed() {
    return this.seconds ?? (performance.now() - this.began) / 1000;
  }
}

/** The box of a picture. It keeps its place whatever it shows. */
export class Frame {
  constructor(label, props = {}) {
    this.image = el("img", { alt: "", hidden: true });
    this.empty = el("span", { class: "empty", text: label });
    this.stage = el("div", { class: "stage" }, this.image, this.empty);
    this.element = el("div", { class: "frame", "data-previews": "0", ...props }, this.stage);
  }

  shape(width, height) {
    this.stage.style.setProperty("--wide", width);
    this.stage.style.setProperty("--high", height);
  }

  show(picture) {
    if (picture.width) this.shape(picture.width, picture.height);
    this.element.dataset.previews = picture.previews;
    this.element.dataset.state = picture.state;
    this.image.hidden = !picture.url;
    this.empty.hidden = Boolean(picture.url);
    if (!picture.url) return this.image.removeAttribute("src");
    if (this.image.getAttribute("src") !== picture.url) this.image.src = picture.url;
    this.image.alt = picture.state === "done" ? picture.record.prompt : `${picture.body.prompt}, unfinished`;
  }
}
