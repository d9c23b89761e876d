import { el } from "./dom.js";
import { score } from "./api.js";

const KEYS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const SCORED = ["negative_prompt", "guidance_scale", "guidance_floor", "guidance_agreement", "temperature", "top_k", "top_p"];

/** The grid of a picture's tokens, of which some are pinned. */
export class Tokens {
  constructor({ stage, info, onchange, onerror }) {
    this.stage = stage;
    this.info = info;
    this.onchange = onchange;
    this.onerror = onerror;
    this.pins = new Set();
    this.grid = null;
  }

  get shown() {
    return this.grid !== null;
  }

  hide() {
    this.asking?.abort();
    this.grid?.remove();
    this.grid = null;
    this.info.textContent = "";
  }

  show(picture) {
    this.hide();
    this.picture = picture;
    this.height = picture.codes.length;
    this.width = picture.codes[0].length;
    this.probabilities = null;
    this.cells = picture.codes.map((row, y) => row.map((_, x) => this.cell(y, x)));
    this.grid = el(
      "div",
      { class: "tokens", role: "grid", "aria-label": "Tokens of the picture", "aria-multiselectable": "true" },
      ...this.cells.map((row) => el("div", { role: "row" }, ...row)),
    );
    this.grid.style.setProperty("--columns", this.width);
    this.grid.style.setProperty("--rows", this.height);
    this.cells[0][0].tabIndex = 0;
    this.grid.addEventListener("keydown", (event) => this.key(event));
    this.grid.addEventListener("focusin", (event) => this.tell(event.target));
    this.grid.addEventListener("pointerover", (event) => event.target.dataset.row && this.tell(event.target));
    this.grid.addEventListener("pointerdown", (event) => this.press(event));
    this.grid.addEventListener("pointermove", (event) => this.drag(event));
    this.stage.append(this.grid);
    this.info.textContent = "Click or drag to pin. Arrow keys move, Space pins.";
    this.ask();
  }

  cell(y, x) {
    const pinned = this.pins.has(`${y},${x}`);
    const props = { role: "gridcell", tabindex: -1, "data-testid": "cell", "data-row": y, "data-column": x };
    const cell = el("div", { ...props, "data-code": this.picture.codes[y][x], "aria-selected": String(pinned) });
    cell.setAttribute("aria-label", this.words(y, x));
    return cell;
  }

  words(y, x) {
    const chance = this.probabilities?.[y][x];
    const probability = chance === undefined ? "" : `, probability ${chance < 0.001 ? "under 0.001" : chance.toFixed(3)}`;
    const pinned = this.pins.has(`${y},${x}`) ? ", pinned" : "";
    return `Row ${y + 1}, column ${x + 1}: code ${this.picture.codes[y][x]}${probability}${pinned}`;
  }

  async ask() {
    const { picture } = this;
    this.asking = new AbortController();
    try {
      if (!picture.probabilities) {
        const body = { prompt: picture.record.prompt, codes: picture.codes };
        for (const name of SCORED) {
          const value = picture.record[name] ?? picture.body[name];
          if (value !== undefined && value !== null) body[name] = value;
        }
        picture.probabilities = await score(body, { signal: this.asking.signal });
      }
    } catch (error) {
      if (error.name !== "AbortError") this.onerror(error);
      return;
    }
    if (this.picture !== picture || !this.shown) return;
    this.probabilities = picture.probabilities;
    this.cells.forEach((row, y) =>
      row.forEach((cell, x) => {
        cell.dataset.probability = this.probabilities[y][x];
        cell.style.setProperty("--unlikely", (1 - this.probabilities[y][x]).toFixed(2));
        cell.setAttribute("aria-label", this.words(y, x));
      }),
    );
    if (this.told) this.tell(this.told);
  }

  tell(cell) {
    this.told = cell;
    this.info.textContent = this.words(Number(cell.dataset.row), Number(cell.dataset.column));
  }

  pin(cell, pinned) {
    const y = Number(cell.dataset.row);
    const x = Number(cell.dataset.column);
    if (pinned) this.pins.add(`${y},${x}`);
    else this.pins.delete(`${y},${x}`);
    cell.setAttribute("aria-selected", String(pinned));
    cell.setAttribute("aria-label", this.words(y, x));
    this.tell(cell);
    this.onchange();
  }

  key(event) {
    const cell = event.target;
    let y = Number(cell.dataset.row);
    let x = Number(cell.dataset.column);
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in KEYS) {
      y = Math.min(Math.max(y + KEYS[event.key][0], 0), this.height - 1);
      x = Math.min(Math.max(x + KEYS[event.key][1], 0), this.width - 1);
    } else if (event.key === "Home") x = 0;
    else if (event.key === "End") x = this.width - 1;
    else if (event.key === " " || event.key === "Enter") this.pin(cell, cell.getAttribute("aria-selected") !== "true");
    else return;
    event.preventDefault();
    this.focus(this.cells[y][x]);
  }

  focus(cell) {
    for (const other of this.grid.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
    cell.tabIndex = 0;
    cell.focus();
  }

  press(event) {
    const cell = event.target;
    if (event.button !== 0 || !cell.dataset.row) return;
    event.preventDefault();
    // A touch would keep all its events at the first cell.
    if (cell.hasPointerCapture?.(event.pointerId)) cell.releasePointerCapture(event.pointerId);
    this.painting = cell.getAttribute("aria-selected") !== "true";
    this.focus(cell);
    this.pin(cell, this.painting);
  }

  drag(event) {
    if (!(event.buttons & 1) || this.painting === undefined) return;
    const steps = event.getCoalescedEvents?.() ?? [];
    for (const { clientX, clientY } of [...steps, event]) {
      const cell = document.elementFromPoint(clientX, clientY);
      if (!cell?.dataset?.row || !this.grid.contains(cell)) continue;
      if ((cell.getAttribute("aria-selected") === "true") !== this.painting) this.pin(cell, this.painting);
    }
  }

  unpin() {
    this.pins.clear();
    for (const cell of this.grid?.querySelectorAll('[aria-selected="true"]') ?? []) {
      cell.setAttribute("aria-selected", "false");
      cell.setAttribute("aria-label", this.words(Number(cell.dataset.row), Number(cell.dataset.column)));
    }
    this.onchange();
  }

  /** The pinned codes, with null where a token is free. */
  get pinned() {
    return this.picture.codes.map((row, y) => row.map((code, x) => (this.pins.has(`${y},${x}`) ? code : null)));
  }
}
