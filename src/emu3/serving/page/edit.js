import { edit } from "./api.js";
import { byId } from "./dom.js";
import { Frame, Picture } from "./picture.js";
import { download, fileName, toUrl } from "./png.js";

const PREVIEWS = 6;

/** A picture, changed by words. */
export class Edit {
  constructor(app) {
    this.app = app;
    this.before = new Frame("Drop or choose a picture", { "data-testid": "before" });
    this.after = new Frame("What comes of it", { "data-testid": "after" });
    byId("before-place").replaceWith(this.before.element);
    byId("after-place").replaceWith(this.after.element);
    byId("edit-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    byId("edit-file").addEventListener("change", (event) => {
      this.take([...event.target.files]);
      event.target.value = "";
    });
    byId("edit-cancel").addEventListener("click", () => this.running?.abort());
    byId("edit-on").addEventListener("click", () => {
      this.open(this.result.url);
      byId("edit-words").focus();
    });
    byId("edit-save").addEventListener("click", () => download(this.result.url, fileName(this.result.record)));
  }

  async take(files) {
    const file = files.find((each) => each.type.startsWith("image/"));
    try {
      if (!file) throw new Error("This file is no picture.");
      this.open(await toUrl(file));
    } catch (error) {
      this.app.fail(error);
    }
  }

  /** Begin with a picture. */
  open(url) {
    this.running?.abort();
    this.url = url;
    this.result = null;
    const { image } = this.before;
    image.onload = () => this.before.shape(image.naturalWidth, image.naturalHeight);
    this.before.show({ url, previews: 0, state: "done", record: { prompt: "The picture to change" } });
    this.after.show({ previews: 0, state: "waiting" });
    byId("edit-words").value = "";
    this.refresh();
  }

  async start() {
    const prompt = byId("edit-words").value.trim();
    if (this.running || !this.url) return;
    if (!prompt) {
      this.app.fail(new Error("Write what to change first."));
      byId("edit-words").focus();
      return;
    }
    const running = new AbortController();
    const picture = new Picture({ prompt });
    Object.assign(this, { running, result: null });
    this.after.show(picture);
    this.refresh();
    this.app.say("Drawing.");
    try {
      const onbusy = (wait) => this.app.say(`Busy, trying again in ${wait} s.`);
      const body = { prompt, picture: this.url, previews: PREVIEWS };
      for await (const event of edit(body, { signal: running.signal, onbusy })) {
        if (event.kind === "queued") continue;
        picture.hear(event);
        if (event.kind === "tokens") byId("edit-progress").value = picture.decided / picture.length;
        else this.after.show(picture);
      }
      if (picture.state !== "done") throw new Error("The picture was not finished.");
      this.result = picture;
      this.app.keep(picture.url, picture.record);
      this.app.say(`Done in ${picture.seconds.toFixed(2)} s.`);
    } catch (error) {
      if (error.name === "AbortError") this.app.say("Cancelled.");
      else this.app.fail(error);
    } finally {
      if (this.running === running) this.running = null;
      this.refresh();
    }
  }

  refresh() {
    const busy = Boolean(this.running);
    byId("edit-start").disabled = busy || !this.url;
    byId("edit-cancel").disabled = !busy;
    byId("edit-on").disabled = byId("edit-save").disabled = !this.result;
    if (!busy) byId("edit-progress").value = this.result ? 1 : 0;
  }
}
