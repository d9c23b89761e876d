import { chat, tell } from "./api.js";
import { byId, button, copyText, el } from "./dom.js";
import { animation, mayMove } from "./player.js";
import { toUrl } from "./png.js";
import { Talk, toMessages } from "./talk.js";

const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const CLIPS = ["video/mp4", "video/webm"];
const STORY = "Tell a story about a red dog.";
const TELL = /^\s*(please\s+)?tell\b.{0,40}\bstory\b/i; // as the server has it
const PREVIEWS = 4;
const QUESTIONS = ["What is in the picture?", "What color is the cat?", "How many cats are there?"];

function shown(url, alt) {
  if (url.startsWith("data:video/")) return el("video", { src: url, "aria-label": alt, controls: true });
  const picture = el("img", { src: url, alt, class: "small" });
  picture.addEventListener("load", () => picture.classList.toggle("small", picture.naturalWidth < 256));
  return picture;
}

/** An answer in texts and pictures, as `chat` gives its pieces. */
async function* story(messages, options) {
  for await (const { kind, text, url } of tell({ messages, previews: PREVIEWS }, options)) {
    if (kind === "text") yield { text };
    else if (kind === "picture") yield { images: [url] };
    else if (kind === "preview") yield { preview: url };
  }
}

/** Questions about pictures, and their answers. */
export class Chat {
  constructor(app, model) {
    this.app = app;
    this.canRead = model.abilities.includes("read");
    this.canTell = this.canRead && model.abilities.includes("tell");
    this.canFilm = model.abilities.includes("film");
    this.kinds = this.canFilm ? [...KINDS, ...CLIPS] : KINDS;
    byId("chat-file").accept = this.kinds.join();
    const commands = [...(this.canFilm ? ["“draw” or “film”"] : ["“draw”"])];
    const story = this.canTell ? " You can also ask for a story." : "";
    byId("chat-about").textContent = `Questions are about your newest pictures. Begin with ${commands} to get one.${story}`;
    this.input = byId("chat-input");
    this.log = byId("chat-log");
    this.fresh();
    byId("chat-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    byId("chat-file").addEventListener("change", (event) => {
      this.attachFiles([...event.target.files]);
      event.target.value = "";
    });
    byId("chat-new").addEventListener("click", () => {
      this.fresh();
      this.input.focus();
    });
    byId("chat-stop").addEventListener("click", () => this.running?.abort());
    const questions = this.canTell ? [...QUESTIONS, STORY] : QUESTIONS;
    byId("suggestions").append(...questions.map((text) => button(text, () => this.suggest(text), { class: "chip" })));
  }

  fresh() {
    this.running?.abort();
    this.talk = new Talk();
    this.attached = [];
    this.editing = null;
    this.showAttached();
    this.show();
  }

  suggest(text) {
    this.input.value = text;
    const pictured = this.attached.length || this.talk.path.some((turn) => turn.images.length);
    if (pictured || text === STORY) this.send();
    else {
      this.app.say("Add a picture to ask about.");
      this.input.focus();
    }
  }

  async attachFiles(files) {
    for (const file of files) {
      if (!this.kinds.includes(file.type)) {
        this.app.fail(new Error(`${file.name || "This file"} is no PNG, JPEG, WebP or GIF${this.canFilm ? ", nor an MP4 or WebM" : ""}.`));
        continue;
      }
      try {
        this.attach(await toUrl(file));
      } catch (error) {
        this.app.fail(error);
      }
    }
  }

  attach(url) {
    this.attached.push(url);
    this.showAttached();
  }

  showAttached() {
    const items = this.attached.map((url, place) =>
      el(
        "li",
        {},
        shown(url, `Picture ${place + 1} of the question`),
        button("Remove", () => {
          this.attached.splice(place, 1);
          this.showAttached();
          this.input.focus();
        }, { "aria-label": `Remove picture ${place + 1}` }),
      ),
    );
    byId("attached").replaceChildren(...items);
    byId("attached").hidden = !items.length;
  }

  /** Start a conversation with a picture. */
  open(url) {
    this.fresh();
    this.attach(url);
    this.input.focus();
  }

  /** Go on with a question that was answered elsewhere. */
  adopt(url, question, answer) {
    this.fresh();
    const asked = this.talk.add(this.talk.root, { role: "user", text: question, images: [url] });
    this.talk.add(asked, { role: "assistant", text: answer });
    this.show();
    this.input.focus();
  }

  send() {
    const text = this.input.value.trim();
    if (this.running) return;
    if (!text) {
      this.app.fail(new Error("Write a question first."));
      this.input.focus();
      return;
    }
    const parent = this.talk.end;
    const images = this.attached;
    this.input.value = "";
    this.attached = [];
    this.showAttached();
    this.answer(this.talk.add(parent, { role: "user", text, images }));
  }

  async answer(asked) {
    const messages = toMessages(this.talk.path, this.canFilm);
    const node = this.talk.add(asked, { role: "assistant", pending: true });
    const running = new AbortController();
    this.running = running;
    this.show();
    try {
      const onbusy = (wait) => this.app.say(`Busy, trying again in ${wait} s.`);
      const options = { signal: running.signal, onbusy };
      const isStory = this.canTell && TELL.test(asked.text);
      for await (const event of isStory ? story(messages, options) : chat(messages, options)) {
        this.take(node, event);
        this.showAnswer(node);
      }
      if (!node.text && !node.images.length) node.note = "The answer is empty.";
    } catch (error) {
      node.note = error.name === "AbortError" ? "Stopped." : error.message;
      if (error.name !== "AbortError") this.app.fail(error);
    }
    node.pending = false;
    node.preview = null;
    if (this.running === running) this.running = null;
    this.show();
    if (node.text) this.app.say(`Answer: ${node.text}`);
  }

  /** More of an answer; `parts` has its texts and pictures in turn. */
  take(node, { text = "", images = [], preview = null }) {
    node.parts ??= [];
    node.preview = preview;
    if (text && typeof node.parts.at(-1)?.text === "string") node.parts.at(-1).text += text;
    else if (text) node.parts.push({ text });
    node.parts.push(...images.map((url) => ({ url })));
    node.images.push(...images);
    const texts = node.parts.filter((part) => part.text);
    node.text = texts.map((part) => part.text).join("\n\n");
  }

  show() {
    const { path } = this.talk;
    this.log.replaceChildren(...path.map((turn) => this.turn(turn)));
    byId("chat-empty").hidden = path.length > 0;
    byId("chat-send").disabled = Boolean(this.running);
    byId("chat-stop").disabled = !this.running;
    this.log.lastElementChild?.scrollIntoView({ block: "nearest" });
  }

  showAnswer(node) {
    if (node.element?.isConnected) node.element.replaceWith(this.turn(node));
  }

  turn(node) {
    if (node === this.editing) return this.editor(node);
    const mine = node.role === "user";
    const parts = node.parts ?? [...node.images.map((url) => ({ url })), ...(node.text ? [{ text: node.text }] : [])];
    const body = el("div", { class: "bubble" }, ...parts.map(({ url, text }) => (url ? this.image(url, mine) : el("p", { text }))));
    if (node.preview) body.append(el("img", { src: node.preview, alt: "A picture, unfinished", class: "small" }));
    if (node.pending && !node.text && !node.images.length && !node.preview) body.append(el("p", { class: "muted", text: "Reading" }));
    if (node.note) body.append(el("p", { class: "muted", text: node.note }));
    const tools = el("div", { class: "tools" });
    const siblings = node.parent.children;
    if (siblings.length > 1) tools.append(this.switcher(node, siblings));
    if (mine) tools.append(button("Edit", () => this.edit(node), { disabled: Boolean(this.running) }));
    if (node.text) tools.append(button("Copy", () => this.copy(node.text)));
    node.element = el(
      "li",
      { class: `turn ${mine ? "mine" : "theirs"}`, "data-testid": mine ? "chat-question" : "chat-answer", "aria-busy": node.pending },
      el("span", { class: "hidden", text: mine ? "You:" : "Answer:" }),
      body,
      node.pending ? null : tools,
    );
    return node.element;
  }

  image(url, mine) {
    const alt = mine ? "Picture of the question" : "Picture of the answer";
    const clip = !mine && mayMove(url) ? animation(url, "Clip of the answer") : null;
    const picture = clip?.element ?? shown(url, alt);
    if (mine) return picture;
    return el(
      "figure",
      {},
      picture,
      el(
        "div",
        { class: "tools" },
        clip?.turn,
        button("Ask about it", () => {
          this.attach(url);
          this.input.focus();
        }),
        this.app.canEdit && !clip && button("Edit it", () => this.app.edit(url)),
        button("Add to gallery", () => this.app.keepFile(url)),
      ),
    );
  }

  switcher(node, siblings) {
    const at = siblings.indexOf(node);
    const go = (to) => {
      node.parent.pick = to;
      this.show();
      siblings[to].element.querySelector(".switcher button:not(:disabled)")?.focus();
    };
    const stop = Boolean(this.running);
    return el(
      "span",
      { class: "switcher", role: "group", "aria-label": "Branches", "data-testid": "branches" },
      button("‹", () => go(at - 1), { "aria-label": "Branch before", disabled: stop || at === 0 }),
      el("span", { text: `${at + 1} of ${siblings.length}` }),
      button("›", () => go(at + 1), { "aria-label": "Next branch", disabled: stop || at === siblings.length - 1 }),
    );
  }

  edit(node) {
    this.editing = node;
    this.show();
    const area = node.element.querySelector("textarea");
    area.focus();
    area.select();
  }

  editor(node) {
    const area = el("textarea", { "aria-label": "Your turn", rows: 2, "data-testid": "chat-edit" });
    area.value = node.text;
    const leave = () => {
      this.editing = null;
      this.show();
    };
    const save = () => {
      const text = area.value.trim();
      this.editing = null;
      if (text) this.answer(this.talk.add(node.parent, { role: "user", text, images: node.images }));
      else this.show();
      this.input.focus();
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        save();
      } else if (event.key === "Escape") leave();
    });
    node.element = el(
      "li",
      { class: "turn mine editing" },
      ...node.images.map((url) => shown(url, "Picture of the question")),
      area,
      el("div", { class: "tools" }, button("Ask", save, { class: "primary" }), button("Leave as it was", leave)),
    );
    return node.element;
  }

  async copy(text) {
    try {
      await copyText(text);
      this.app.say("Copied.");
    } catch (error) {
      this.app.fail(error);
    }
  }
}
