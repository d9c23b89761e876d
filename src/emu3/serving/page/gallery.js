import { byId, button, el } from "./dom.js";
import { animation, mayMove, poster } from "./player.js";
import { download, fileName } from "./png.js";
import { list, remove } from "./store.js";

const NAMES = {
  prompt: "Prompt",
  negative_prompt: "Negative prompt",
  seed: "Seed",
  width: "Width",
  height: "Height",
  frames: "Frames",
  fps: "Frames a second",
  guidance_scale: "Guidance",
  guidance_floor: "Guidance floor",
  guidance_agreement: "Guidance agreement",
  temperature: "Temperature",
  top_k: "Top k",
  top_p: "Top p",
  decoding: "Decoding",
  from_pictures: "Pictures that it was made from",
  kept_tokens: "Tokens kept from another picture",
  model: "Model",
  version: "Version",
};

function details(record, differs = new Set()) {
  const rows = Object.entries(record).filter(([, value]) => value !== null && typeof value !== "object");
  rows.sort(([a], [b]) => order(a) - order(b));
  return el(
    "dl",
    { class: "settings" },
    ...rows.map(([name, value]) => el("div", { class: differs.has(name) && "differs" }, el("dt", { text: NAMES[name] ?? name }), el("dd", { text: value }))),
  );
}

function order(name) {
  const place = Object.keys(NAMES).indexOf(name);
  return place < 0 ? 99 : place;
}

const picture = (item, alt) => {
  const image = el("img", { src: item.url, alt, class: "small" });
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < 256));
  return image;
};

const nameOf = ({ url, record }) => record.prompt ?? (mayMove(url) ? "A clip" : "A picture");

/** A picture; or a clip that plays, and the button that stops it. */
function shown(item) {
  const name = nameOf(item);
  return mayMove(item.url) ? animation(item.url, name) : { element: picture(item, name) };
}

/** The pictures and clips that this browser keeps. */
export class Gallery {
  constructor(app) {
    this.app = app;
    this.chosen = new Set();
    this.dialog = byId("viewer");
    byId("viewer-close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
    byId("compare").addEventListener("click", () => this.compare());
    byId("choose-none").addEventListener("click", () => {
      this.chosen.clear();
      this.refresh();
    });
    this.refresh();
  }

  async refresh() {
    try {
      this.items = await list();
    } catch {
      this.items = [];
      byId("gallery-empty").textContent = "This browser does not let the page keep anything.";
    }
    for (const id of this.chosen) if (!this.items.some((item) => item.id === id)) this.chosen.delete(id);
    byId("gallery-empty").hidden = this.items.length > 0;
    byId("gallery-tools").hidden = this.items.length === 0;
    byId("gallery-items").replaceChildren(...this.items.map((item) => this.item(item)));
    this.chosenChanged();
  }

  item(item) {
    const { seed } = item.record;
    const name = nameOf(item);
    const clip = mayMove(item.url);
    const note = seed === undefined ? "No seed" : `Seed ${seed}`;
    const box = el("input", { type: "checkbox", "data-testid": "gallery-choose", "aria-label": `Compare: ${name}, seed ${seed ?? "unknown"}` });
    box.checked = this.chosen.has(item.id);
    box.addEventListener("change", () => {
      if (box.checked) this.chosen.add(item.id);
      else this.chosen.delete(item.id);
      this.chosenChanged();
    });
    const open = button("", () => this.open(item), { class: "open", "data-testid": "gallery-item" });
    const still = clip ? poster(item.url) : picture(item, "");
    open.append(still, el("span", { class: "name", text: name }), el("span", { class: "muted", text: clip ? `Clip. ${note}` : note }));
    return el("li", {}, open, el("label", { class: "choose check" }, box, "Compare"));
  }

  chosenChanged() {
    const count = this.chosen.size;
    byId("compare").disabled = count < 2;
    byId("choose-none").disabled = !count;
    byId("chosen-count").textContent = count ? `${count} chosen` : "Choose two or more to compare.";
  }

  view(title, wide, ...content) {
    byId("viewer-title").textContent = title;
    byId("viewer-body").replaceChildren(...content);
    this.dialog.classList.toggle("wide", wide);
    this.dialog.showModal();
    this.dialog.scrollTop = 0;
  }

  open(item) {
    const { record } = item;
    const leave = (action) => () => {
      this.dialog.close();
      action();
    };
    const { element, turn } = shown(item);
    const actions = el("div", { class: "tools" }, turn);
    if (record.prompt !== undefined) {
      actions.append(button("Use these settings again", leave(() => this.app.use(record)), { class: "primary", "data-testid": "use-settings" }));
    }
    const more = [
      !turn && this.app.canEdit && button("Edit it", leave(() => this.app.edit(item.url))),
      button("Ask about it", leave(() => this.app.ask(item.url)), { "data-testid": "gallery-ask" }),
      button("Download", () => download(item.url, fileName(record, turn ? "webp" : "png")), { "data-testid": "gallery-download" }),
      button("Delete", leave(() => this.delete(item)), { class: "danger", "data-testid": "gallery-delete" }),
    ];
    actions.append(...more.filter(Boolean));
    this.view(nameOf(item), false, el("div", { class: "view" }, element, el("div", {}, details(record), actions)));
  }

  async delete(item) {
    try {
      await remove(item.id);
      this.app.say("Deleted.");
    } catch (error) {
      this.app.fail(error);
    }
    await this.refresh();
    byId("tab-gallery").focus();
  }

  compare() {
    const items = this.items.filter((item) => this.chosen.has(item.id)).reverse();
    const names = new Set(items.flatMap((item) => Object.keys(item.record)));
    const differs = new Set([...names].filter((name) => new Set(items.map((item) => item.record[name])).size > 1));
    const figures = items.map((item) => {
      const { element, turn } = shown(item);
      return el("figure", { "data-testid": "compare-item" }, element, el("figcaption", {}, details(item.record, differs), turn));
    });
    this.view(`${items.length} side by side`, true, el("div", { class: "compared" }, ...figures));
  }
}
