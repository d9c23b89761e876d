import { button, el } from "./dom.js";

const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Plays the frames of a clip from one picture that has all of them in rows. */
export class Player {
  /** `onframe` is called with the number of the frame that is shown, `onplay` where it begins or stops to play. */
  constructor({ onframe, onplay }) {
    this.canvas = el("canvas", { role: "img", hidden: true, "data-testid": "clip" });
    Object.assign(this, { onframe, onplay, frame: 0, playing: false });
  }

  async load({ sheet, columns, record }) {
    const image = new Image();
    image.src = sheet;
    await image.decode();
    Object.assign(this, { image, columns, frames: record.frames, fps: record.fps });
    Object.assign(this.canvas, { width: record.width, height: record.height, hidden: false });
    this.canvas.setAttribute("aria-label", record.prompt);
    this.show(0);
    this.play(!still());
  }

  hide() {
    this.play(false);
    this.canvas.hidden = true;
  }

  show(frame) {
    const { width, height } = this.canvas;
    const [column, row] = [frame % this.columns, Math.floor(frame / this.columns)];
    this.canvas.getContext("2d").drawImage(this.image, column * width, row * height, width, height, 0, 0, width, height);
    this.frame = frame;
    this.canvas.dataset.frame = frame;
    this.onframe(frame);
  }

  play(on = !this.playing) {
    clearInterval(this.timer);
    this.playing = on;
    if (on) this.timer = setInterval(() => this.show((this.frame + 1) % this.frames), 1000 / this.fps);
    this.onplay(on);
  }
}

/** Whether a data URL may hold a clip. */
export const mayMove = (url) => /^data:(image\/(webp|gif)|video\/)/.test(url);

function firstFrame(image, props) {
  const canvas = el("canvas", { class: "small", ...props });
  image.addEventListener("load", () => {
    Object.assign(canvas, { width: image.naturalWidth, height: image.naturalHeight });
    canvas.getContext("2d").drawImage(image, 0, 0);
    for (const each of [image, canvas]) each.classList.toggle("small", image.naturalWidth < 256);
  });
  return canvas;
}

/** The first frame of an animation, beside words that say what it is. */
export const poster = (url) => firstFrame(el("img", { src: url }), { "aria-hidden": "true" });

/** An animation that can be stopped: then its first frame is shown. */
export function animation(url, alt) {
  const image = el("img", { src: url, alt, class: "small" });
  const canvas = firstFrame(image, { role: "img", "aria-label": alt });
  const turn = button("", () => show(image.hidden), { "data-testid": "turn" });
  function show(playing) {
    image.hidden = !playing;
    canvas.hidden = playing;
    turn.textContent = playing ? "Pause" : "Play";
  }
  show(!still());
  return { element: el("div", {}, image, canvas), turn };
}
