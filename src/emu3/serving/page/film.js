import { clipFile, film } from "./api.js";
import { byId, button } from "./dom.js";
import { Frame, Picture } from "./picture.js";
import { Player } from "./player.js";
import { download, fileName, save } from "./png.js";

const GUIDANCE = ["guidance_scale", "guidance_floor", "guidance_agreement"];
const MOST_PREVIEWS = 32;

/** Clips: asked for, seen frame by frame as they come, played, saved, gone on with. */
export class Film {
  constructor(app, model, form) {
    this.app = app;
    this.form = form;
    this.model = model;
    if (!model.clips) return;
    this.frame = new Frame("Your clip appears here", { "data-testid": "clip-picture" });
    this.frame.shape(model.width || 1, model.height || 1);
    byId("clip-place").replaceWith(this.frame.element);
    this.player = new Player({
      onframe: (frame) => {
        byId("clip-frame").value = frame;
        byId("clip-frame").setAttribute("aria-valuetext", `${frame + 1} of ${this.player.frames}`);
      },
      onplay: (on) => (byId("clip-play").textContent = on ? "Pause" : "Play"),
    });
    this.frame.stage.append(this.player.canvas);
    form.element.addEventListener("submit", () => this.start());
    byId("kind").addEventListener("change", () => this.refresh());
    byId("cancel").addEventListener("click", () => this.running?.abort());
    byId("clip-play").addEventListener("click", () => this.player.play());
    byId("clip-frame").addEventListener("input", (event) => {
      this.player.play(false);
      this.player.show(Number(event.target.value));
    });
    byId("clip-on").addEventListener("click", () => this.goOn());
    this.saves = model.clips.formats.map((format) =>
      button(`Save as ${{ webp: "WebP" }[format] ?? format.toUpperCase()}`, () => this.save(format), { "data-testid": `save-${format}`, disabled: true }),
    );
    byId("clip-saves").append(...this.saves);
  }

  start() {
    if (this.form.isClip && !this.running) this.run({});
  }

  /** More frames behind those that are there. */
  goOn() {
    const { url, record } = this.clip;
    const frames = Math.min(record.frames + Number(this.form.field("frames").value), this.model.clips.most);
    this.run({ start: url, frames, fps: record.fps, ratio: undefined });
  }

  /** What the form says. Guidance that nobody changed is left to the server, which has another one for clips. */
  body() {
    const { n, ...body } = this.form.read();
    for (const name of GUIDANCE) if (body[name] === this.model.options[name].default) delete body[name];
    const number = (name) => Number(this.form.field(name).value);
    return { ...body, frames: number("frames"), fps: number("fps") };
  }

  async run(changes) {
    let body;
    try {
      body = { ...this.body(), ...changes };
    } catch (error) {
      return this.app.fail(error);
    }
    const running = new AbortController();
    this.running = running;
    const before = this.clip;
    const clip = new Picture(body);
    this.clip = clip;
    this.player.hide();
    this.frame.show(clip);
    this.refresh();
    this.report("Sending");
    this.app.say("Filming.");
    try {
      const options = { signal: running.signal, onbusy: (wait) => this.report(`Busy, trying again in ${wait} s`) };
      const previews = Math.min(body.frames, MOST_PREVIEWS);
      for await (const event of film({ ...body, previews }, options)) this.hear(event);
      if (clip.state !== "done") throw new Error("The clip was not finished.");
      await this.app.keep(clip.url, clip.record);
      await this.player.load(clip);
      byId("clip-frame").max = clip.record.frames - 1;
      const text = `${clip.record.frames} frames in ${clip.seconds.toFixed(2)} s`;
      this.report(text);
      this.app.say(`Done: ${text}.`);
    } catch (error) {
      this.clip = before;
      const cancelled = error.name === "AbortError";
      this.report(cancelled ? "Cancelled" : "Not filmed");
      if (cancelled) this.app.say("Cancelled.");
      else this.app.fail(error);
      if (before) await this.player.load(before);
    } finally {
      this.running = null;
      this.refresh();
    }
  }

  hear(event) {
    const { clip } = this;
    if (event.kind === "queued") return this.report(event.position ? `Waiting, ${event.position} before you` : "Waiting, you are next");
    clip.hear(event);
    if (event.kind === "started") this.rows = event.height;
    if (event.kind === "tokens") {
      byId("clip-progress").value = clip.decided / clip.length;
      return;
    }
    if (event.kind === "preview") {
      const frame = Math.ceil((event.rows / this.rows) * this.model.clips.step);
      this.report(`Frame ${frame} of ${clip.body.frames}`);
    }
    this.frame.show(clip);
  }

  report(text) {
    byId("clip-report").textContent = text;
  }

  refresh() {
    const done = this.clip?.state === "done";
    const busy = Boolean(this.running);
    for (const each of this.form.element.elements.namedItem("kind")) each.disabled = busy;
    if (this.form.isClip) {
      byId("draw").disabled = busy;
      byId("cancel").disabled = !busy;
    }
    byId("clip-controls").hidden = !done;
    byId("clip-seed").textContent = this.clip?.seed ?? "–";
    byId("clip-progress").value = done ? 1 : 0;
    for (const each of this.saves) each.disabled = !done;
    byId("clip-on").disabled = !done || busy || this.clip.record.frames >= this.model.clips.most;
  }

  async save(format) {
    const { id, url, record } = this.clip;
    try {
      if (format === "webp") download(url, fileName(record, format));
      else save(await clipFile(id, format), fileName(record, format));
      this.app.say("Saved.");
    } catch (error) {
      this.app.fail(error);
    }
  }
}
