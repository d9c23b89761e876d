import { draw } from "./api.js";
import { byId, button, el, number } from "./dom.js";
import { randomSeed } from "./draw.js";
import { Frame, Picture } from "./picture.js";

const PREVIEWS = 6;
const PLACES = ["first", "second", "third", "fourth"];
const FACTS = { seconds: "Seconds", steps: "Forwards", each: "Tokens a forward", same: "Same as raster" };

class Lane {
  constructor(name, body, onkeep) {
    this.name = name;
    this.picture = new Picture(body);
    this.frame = new Frame("Waiting");
    this.bar = el("progress", { max: 1, value: 0, "aria-label": `Progress of ${name}` });
    this.facts = Object.fromEntries(Object.keys(FACTS).map((key) => [key, el("dd", { text: "–" })]));
    this.place = el("span", { class: "place" });
    this.keep = button("Add to gallery", () => onkeep(this.picture), { disabled: true });
    this.element = el(
      "li",
      { class: "lane", "data-testid": "race-lane", "data-decoding": name },
      el("h3", { text: name }, this.place),
      this.frame.element,
      this.bar,
      el("dl", {}, ...Object.entries(FACTS).map(([key, text]) => el("div", {}, el("dt", { text }), this.facts[key]))),
      this.keep,
    );
  }

  show() {
    const { picture, facts } = this;
    this.frame.show(picture);
    this.bar.value = picture.length ? picture.decided / picture.length : 0;
    if (picture.state === "waiting") return;
    facts.seconds.textContent = picture.elapsed.toFixed(2);
    facts.steps.textContent = picture.steps;
    facts.each.textContent = picture.steps ? number(picture.decided / picture.steps) : "–";
    this.keep.disabled = picture.state !== "done";
  }

  finish(place) {
    this.element.dataset.place = place;
    this.place.textContent = ` ${PLACES[place - 1] ?? place}`;
  }
}

/** The same picture by every decoding at once. */
export class Race {
  constructor(app, model, form) {
    this.app = app;
    this.form = form;
    this.decodings = model.decodings;
    byId("race-start").addEventListener("click", () => this.start());
    byId("race-cancel").addEventListener("click", () => this.running?.abort());
    byId("race-close").addEventListener("click", () => this.close());
  }

  close() {
    this.running?.abort();
    byId("race").hidden = true;
    byId("race-start").focus();
  }

  async start() {
    let body;
    try {
      body = this.form.read();
    } catch (error) {
      this.app.fail(error);
      return;
    }
    this.running?.abort();
    const running = new AbortController();
    this.running = running;
    body = { ...body, n: 1, seed: body.seed ?? randomSeed() };
    const keep = (picture) => this.app.keep(picture.url, picture.record, true);
    const windowed = body.decoding.startsWith("zipar") ? body.decoding : "zipar";
    const lanes = this.decodings.map((name) => new Lane(name, { ...body, decoding: name === "zipar" ? windowed : name }, keep));
    byId("race-lanes").replaceChildren(...lanes.map((lane) => lane.element));
    byId("race").hidden = false;
    byId("race-cancel").disabled = false;
    byId("race-about").textContent = `${body.prompt}, seed ${body.seed}`;
    byId("race-verdict").textContent = "Drawing";
    byId("race").scrollIntoView({ block: "nearest" });
    const finished = [];
    await Promise.all(lanes.map((lane) => this.lane(lane, running, finished)));
    if (this.running !== running) return;
    byId("race-cancel").disabled = true;
    this.compare(lanes);
    this.judge(finished, running);
  }

  async lane(lane, running, finished) {
    const { picture, frame } = lane;
    try {
      const onbusy = (wait) => (frame.empty.textContent = `Busy, trying again in ${wait} s`);
      for await (const event of draw({ ...picture.body, previews: PREVIEWS }, { signal: running.signal, onbusy })) {
        if (event.kind === "queued") frame.empty.textContent = event.position ? `${event.position} before` : "Next";
        else picture.hear(event);
        if (event.kind === "started") frame.empty.textContent = "Drawing";
        lane.show();
        if (event.kind === "done") lane.finish(finished.push(lane));
      }
    } catch (error) {
      if (picture.state !== "done") {
        frame.empty.textContent = error.name === "AbortError" ? "Cancelled" : error.message;
        lane.place.textContent = " not finished";
      }
      if (error.name !== "AbortError") this.app.fail(error);
    }
  }

  compare(lanes) {
    const raster = lanes.find((lane) => lane.name === "raster")?.picture.codes?.flat();
    if (!raster) return;
    for (const { picture, facts } of lanes) {
      const same = picture.codes?.flat().filter((code, place) => code === raster[place]).length;
      if (same !== undefined) facts.same.textContent = `${same} of ${raster.length}`;
    }
  }

  judge(finished, running) {
    const [first] = finished;
    const text = first
      ? `${first.name} finished first, in ${first.picture.seconds.toFixed(2)} s with ${first.picture.steps} forwards.`
      : running.signal.aborted
        ? "Cancelled."
        : "None finished.";
    byId("race-verdict").textContent = text;
    this.app.say(text);
  }
}
