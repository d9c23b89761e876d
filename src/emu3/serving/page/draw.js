import { draw, chat } from "./api.js";
import { byId, button, el } from "./dom.js";
import { Frame, Picture } from "./picture.js";
import { download, fileName } from "./png.js";
import { Tokens } from "./tokens.js";

const PREVIEWS = 6;
const DESCRIBE = "Describe the picture.";

export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;

function speed(tokens, seconds, each) {
  // The first moments say nothing about the speed.
  const rate = seconds > 0.02 ? `, ${Math.round(tokens / seconds)} tokens/s` : "";
  return Number.isFinite(each) ? `${rate}, ${each.toFixed(1)} tokens a forward` : rate;
}

/** Drawing, and what can be done with the picture. */
export class Draw {
  constructor(app, model, form) {
    this.app = app;
    this.form = form;
    this.canRead = model.abilities.includes("read");
    this.canEdit = model.abilities.includes("edit");
    this.canDraw = model.abilities.includes("draw");
    this.words = new Set((model.words ?? []).map((word) => word.toLowerCase()));
    this.name = model.name;
    this.pictures = [];
    this.frame = new Frame("Your picture appears here", { "data-testid": "picture", id: "picture" });
    this.frame.shape(model.width || 1, model.height || 1);
    byId("picture-place").replaceWith(this.frame.element);
    this.tokens = new Tokens({
      stage: this.frame.stage,
      info: byId("token-info"),
      onchange: () => this.pinsChanged(),
      onerror: (error) => app.fail(error),
    });
    form.element.addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    const actions = {
      cancel: () => this.cancel(),
      "seed-again": () => this.useSeed(),
      "tokens-toggle": () => this.toggleTokens(),
      redraw: () => this.redraw(),
      unpin: () => this.tokens.unpin(),
      sees: () => this.see(),
      "sees-chat": () => app.adopt(this.current.url, DESCRIBE, this.current.seen),
      "ask-about": () => app.ask(this.current.url),
      "edit-this": () => app.edit(this.current.url),
      save: () => download(this.current.url, fileName(this.current.record)),
    };
    for (const [name, action] of Object.entries(actions)) byId(name).addEventListener("click", action);
    byId("shade").addEventListener("change", () => this.shade());
    byId("kind").addEventListener("change", () => this.refresh());
    this.refresh();
  }

  get busy() {
    return Boolean(this.running);
  }

  start() {
    if (this.busy || !this.canDraw || this.form.isClip) return;
    const body = this.settings();
    if (!body) return;
    this.tokens.pins.clear();
    this.run(body, false);
  }

  /** The pinned tokens stay; the rest is drawn as the form says now, with another seed. */
  redraw() {
    const body = this.settings();
    if (body) this.run({ ...body, seed: randomSeed(), n: 1, pinned: this.tokens.pinned }, true);
  }

  settings() {
    try {
      return this.form.read();
    } catch (error) {
      this.app.fail(error);
      return null;
    }
  }

  cancel() {
    this.running?.abort();
  }

  async run(body, keepTokens) {
    const running = new AbortController();
    this.running = running;
    this.keepTokens = keepTokens;
    const before = { pictures: this.pictures, current: this.current };
    this.tokens.hide();
    this.pictures = Array.from({ length: body.n }, (_, place) => new Picture(body, place));
    this.current = this.pictures[0];
    this.strip();
    this.refresh();
    this.frame.element.scrollIntoView({ block: "nearest" });
    this.report("Sending");
    this.position = null;
    this.app.say("Drawing.");
    const focused = document.activeElement;
    try {
      const options = { signal: running.signal, onbusy: (wait) => this.report(`Busy, trying again in ${wait} s`) };
      for await (const event of draw({ ...body, previews: PREVIEWS }, options)) this.hear(event);
      if (this.pictures.some((picture) => picture.state !== "done")) throw new Error("The picture was not finished.");
      const seconds = Math.max(...this.pictures.map((picture) => picture.seconds));
      this.report(this.finished(seconds));
      this.app.say(`Done in ${seconds.toFixed(2)} s. ${this.unknown(body.prompt)}`.trim());
    } catch (error) {
      this.report(error.name === "AbortError" ? "Cancelled" : "Not drawn");
      if (error.name === "AbortError") this.app.say("Cancelled.");
      else this.app.fail(error);
      if (this.current.state !== "done") {
        const done = this.pictures.find((picture) => picture.state === "done");
        if (done) this.current = done;
        else if (before.current?.state === "done") Object.assign(this, before);
        this.strip();
      }
    } finally {
      this.running = null;
      this.keepTokens = false;
      this.refresh();
    }
    if (keepTokens && this.current.state === "done") this.toggleTokens(true);
    // A button that vanishes must not take the focus of the keyboard with it.
    if (focused?.isConnected && document.activeElement === document.body) focused.focus({ preventScroll: true });
  }

  unknown(prompt) {
    if (!this.words.size) return "";
    const words = prompt.toLowerCase().match(/\p{L}{3,}/gu) ?? [];
    const unknown = [...new Set(words.filter((word) => !this.words.has(word)))];
    return unknown.length ? `${this.name} has not learned: ${unknown.join(", ")}.` : "";
  }

  finished(seconds) {
    const decided = this.pictures.reduce((sum, picture) => sum + picture.length, 0);
    const steps = Math.max(...this.pictures.map((picture) => picture.steps));
    const each = this.pictures.length > 1 ? NaN : decided / steps;
    return `${seconds.toFixed(2)} s${speed(decided, seconds, each)}`;
  }

  hear(event) {
    if (event.kind === "queued") {
      const text = event.position ? `Waiting, ${event.position} before you` : "Waiting, you are next";
      this.report(text);
      if (event.position !== this.position) this.app.say(`${text}.`);
      this.position = event.position;
      return;
    }
    const picture = this.pictures[event.picture];
    if (!picture) return;
    picture.hear(event);
    if (event.kind === "tokens") {
      this.progress();
      return;
    }
    this.refreshThumb(picture);
    if (event.kind === "started" && this.position !== null) {
      this.position = null;
      this.app.say("Drawing.");
    }
    if (picture === this.current) {
      this.frame.show(picture);
      byId("seed-used").textContent = picture.seed;
    }
    if (event.kind === "done") {
      this.app.keep(picture.url, picture.record);
      if (picture === this.current) this.refresh();
    }
  }

  progress() {
    const started = this.pictures.filter((picture) => picture.length);
    const length = started.reduce((sum, picture) => sum + picture.length, 0);
    const decided = started.reduce((sum, picture) => sum + picture.decided, 0);
    byId("progress").value = length ? decided / (length * (this.pictures.length / started.length)) : 0;
    const each = this.pictures.length > 1 ? NaN : decided / this.current.steps;
    this.report(`${decided} of ${length} tokens${speed(decided, started[0].elapsed, each)}`);
  }

  report(text) {
    byId("report").textContent = text;
  }

  strip() {
    const many = this.pictures.length > 1;
    byId("strip").hidden = !many;
    this.thumbs = this.pictures.map((picture, place) => {
      const image = el("img", { alt: "" });
      const thumb = button("", () => this.select(picture), { class: "thumb", "aria-label": `Picture ${place + 1}` });
      thumb.append(image);
      return thumb;
    });
    byId("strip").replaceChildren(...(many ? this.thumbs : []));
    this.pictures.forEach((picture) => this.refreshThumb(picture));
  }

  refreshThumb(picture) {
    const thumb = this.thumbs[this.pictures.indexOf(picture)];
    if (picture.url) thumb.firstChild.src = picture.url;
    thumb.setAttribute("aria-pressed", String(picture === this.current));
  }

  select(picture) {
    const tokens = this.tokens.shown;
    this.tokens.pins.clear();
    this.tokens.hide();
    this.current = picture;
    this.pictures.forEach((each) => this.refreshThumb(each));
    this.refresh();
    if (tokens && picture.state === "done") this.toggleTokens(true);
  }

  refresh() {
    const picture = this.current;
    const done = picture?.state === "done";
    if (picture) this.frame.show(picture);
    if (!this.form.isClip) {
      byId("draw").disabled = this.busy || !this.canDraw;
      byId("cancel").disabled = !this.busy;
    }
    byId("race-start").disabled = this.busy || !this.canDraw;
    for (const id of ["seed-again", "tokens-toggle", "save", "sees", "ask-about", "edit-this"]) byId(id).disabled = !done;
    byId("sees").hidden = byId("ask-about").hidden = !this.canRead;
    byId("edit-this").hidden = !this.canEdit;
    byId("seed-used").textContent = picture?.seed ?? "–";
    if (!this.busy) byId("progress").value = done ? 1 : 0;
    this.refreshTokens();
    this.refreshSees();
  }

  refreshTokens() {
    const { shown } = this.tokens;
    byId("token-tools").hidden = !shown && !this.keepTokens;
    byId("tokens-toggle").setAttribute("aria-pressed", String(shown));
    this.pinsChanged();
  }

  pinsChanged() {
    const count = this.tokens.pins.size;
    byId("redraw").disabled = this.busy || !count;
    byId("unpin").disabled = this.busy || !count;
    byId("pin-count").textContent = count ? `${count} pinned` : "None pinned";
  }

  shade() {
    this.tokens.grid?.classList.toggle("shaded", byId("shade").checked);
  }

  toggleTokens(shown = !this.tokens.shown) {
    if (shown) this.tokens.show(this.current);
    else this.tokens.hide();
    this.shade();
    this.refreshTokens();
  }

  useSeed() {
    this.form.field("seed").value = this.current.seed;
    this.app.say(`The next picture has seed ${this.current.seed}.`);
  }

  async see() {
    const picture = this.current;
    const content = [
      { type: "image_url", image_url: { url: picture.url } },
      { type: "text", text: DESCRIBE },
    ];
    picture.seen = "";
    picture.seeing = true;
    this.refreshSees();
    try {
      const onbusy = (wait) => this.app.say(`Busy, trying again in ${wait} s.`);
      for await (const { text } of chat([{ role: "user", content }], { onbusy })) {
        picture.seen += text;
        if (picture === this.current) this.refreshSees();
      }
      this.app.say(`It sees: ${picture.seen}`);
    } catch (error) {
      picture.seen = undefined;
      this.app.fail(error);
    }
    picture.seeing = false;
    this.refreshSees();
  }

  refreshSees() {
    const picture = this.current;
    const seen = picture?.seen;
    byId("sees-answer").hidden = seen === undefined;
    if (seen === undefined) return;
    byId("sees-asked").textContent = picture.record.prompt;
    byId("sees-text").textContent = seen || "Looking";
    byId("sees-chat").disabled = picture.seeing;
  }
}
