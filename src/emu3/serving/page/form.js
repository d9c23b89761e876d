import { byId, el } from "./dom.js";

const RATIOS = ["1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16"];
const NUMBERS = ["guidance_scale", "guidance_floor", "guidance_agreement", "temperature", "top_k", "top_p"];

const divisor = (a, b) => (b ? divisor(b, a % b) : a);

function shape(width, height) {
  const common = divisor(width, height);
  return `${width / common}:${height / common}`;
}

/** The settings of the Draw form. */
export class Form {
  constructor(model) {
    const { options } = model;
    this.element = byId("draw-form");
    this.element.noValidate = true; // read() does, and says what is wrong where messages are
    this.decodings = model.decodings;
    this.field("ratio").append(...RATIOS.map((ratio) => el("option", { value: ratio, text: ratio })));
    this.field("decoding").append(...this.decodings.map((name) => el("option", { value: name, text: name })));
    for (const [name, option] of Object.entries(options ?? {})) {
      const field = this.field(name);
      if (!field) continue;
      if (name === "ratio") this.ratio(option.default ?? "1:1");
      else if (option.default !== null && option.default !== undefined) field.value = option.default;
      const help = byId(`${field.id}-help`);
      if (help && option.help) help.textContent = option.help;
    }
    this.field("decoding").addEventListener("change", () => this.window());
    this.window();
    this.clips(model);
  }

  /** The choice of a clip, where the checkpoint makes clips. */
  clips({ clips }) {
    byId("kind").hidden = !clips;
    if (!clips) return;
    const { frames, fps, step, most } = clips;
    Object.assign(this.field("frames"), { min: 2 * step, max: most, step, value: Math.min(frames, most) });
    this.field("fps").value = fps;
    byId("kind").addEventListener("change", () => this.kind());
    this.kind();
  }

  get isClip() {
    return this.field("kind").value === "clip";
  }

  kind() {
    for (const each of document.querySelectorAll(".for-clips")) each.hidden = !this.isClip;
    for (const each of document.querySelectorAll(".for-pictures")) each.hidden = this.isClip;
    byId("draw").textContent = this.isClip ? "Film" : "Draw";
    this.field("prompt").placeholder = this.isClip ? "a clip of a red dog moving left" : "a photo of a red cat";
  }

  field(name) {
    return this.element.elements.namedItem(name);
  }

  ratio(value) {
    const field = this.field("ratio");
    if (![...field.options].some((option) => option.value === value)) field.append(el("option", { value, text: value }));
    field.value = value;
  }

  window() {
    this.field("window").disabled = this.field("decoding").value !== "zipar";
  }

  /** What to ask the server for. Throws an Error that names what is wrong. */
  read() {
    const text = (name) => this.field(name).value.trim();
    const body = { prompt: text("prompt"), ratio: text("ratio"), decoding: text("decoding"), n: Number(text("n") || 1) };
    if (!body.prompt) throw new Error("Write what to draw first.");
    const seed = text("seed");
    const isSeed = !seed || (/^\d+$/.test(seed) && Number.isSafeInteger(Number(seed)));
    this.field("seed").setCustomValidity(isSeed ? "" : "The seed must be a whole number from 0 to 9007199254740991, or empty.");
    const wrong = [...this.element.elements].find((field) => !field.validity.valid && !field.closest("[hidden]"));
    if (wrong) {
      if (wrong.closest("details")) wrong.closest("details").open = true;
      this.element.reportValidity();
      throw new Error(`${wrong.labels?.[0]?.textContent ?? wrong.name}: ${wrong.validationMessage}`);
    }
    if (text("negative_prompt")) body.negative_prompt = text("negative_prompt");
    for (const name of NUMBERS) if (text(name)) body[name] = Number(text(name));
    if (body.decoding === "zipar" && text("window")) body.decoding += `:${text("window")}`;
    if (seed) body.seed = Number(seed);
    return body;
  }

  /** Put the settings of a picture in. */
  write(record) {
    this.field("prompt").value = record.prompt ?? "";
    this.field("negative_prompt").value = record.negative_prompt ?? "";
    // Pictures from before there were limits of guidance were drawn without them.
    const none = { guidance_floor: 0, guidance_agreement: 0 };
    const known = typeof record.guidance_scale === "number" ? { ...none, ...record } : record;
    for (const name of NUMBERS) if (typeof known[name] === "number") this.field(name).value = known[name];
    if (record.seed !== undefined) this.field("seed").value = record.seed;
    if (record.width > 0 && record.height > 0) this.ratio(shape(record.width, record.height));
    else if (record.ratio) this.ratio(record.ratio);
    const [name, window] = String(record.decoding ?? "").split(":");
    if (this.decodings.includes(name)) {
      this.field("decoding").value = name;
      this.field("window").value = window ?? "";
    }
    this.field("n").value = 1;
    const isClip = record.frames > 1 && !byId("kind").hidden;
    if (isClip) for (const name of ["frames", "fps"]) this.field(name).value = record[name];
    this.field("kind").value = isClip ? "clip" : "picture";
    this.kind();
    this.window();
  }
}
