import { chat } from "./api.js";
import { byId, button, copyText, el } from "./dom.js";
import { toUrl } from "./png.js";
import { Talk, toMessages } from "./talk.js";

const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const QUESTIONS = ["What is in the picture?", "What color is the cat?", "How many cats are there?"];

/** Questions about pictures, and their answers. */
export class Chat {
  constructor(app, model) {
    this.app = app;
    this.canRead = model.abilities.includes("read");
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
    byId("suggestions").append(...QUESTIONS.map((text) => button(text, () => this.suggest(text), { class: "chip" })));
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
    if (pictured) this.send();
    else {
      this.app.say("Add a picture to ask about.");
      this.input.focus();
    }
  }

  async attachFiles(files) {
    for (const file of files) {
      if (!KINDS.includes(file.type)) {
        this.app.fail(new Error(`${file.name || "This file"} is no PNG, JPEG, WebP or GIF.`));
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
    const shown = this.attached.map((url, place) =>
      el(
        "li",
        {},
        el("img", { src: url, alt: `Picture ${place + 1} of the question` }),
        button("Remove", () => {
          this.attached.splice(place, 1);
          this.showAttached();
          this.input.focus();
        }, { "aria-label": `Remove picture ${place + 1}` }),
      ),
    );
    byId("attached").replaceChildren(...shown);
    byId("attached").hidden = !shown.length;
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
    const messages = toMessages(this.talk.path);
    const node = this.talk.add(asked, { role: "assistant", pending: true });
    const running = new AbortController();
    this.running = running;
    this.show();
    try {
      const onbusy = (wait) => this.app.say(`Busy, trying again in ${wait} s.`);
      for await (const { text, images } of chat(messages, { signal: running.signal, onbusy })) {
        node.text += text;
        node.images.push(...images);
        this.showAnswer(node);
      }
      if (!node.text && !node.images.length) node.note = "The answer is empty.";
    } catch (error) {
      node.note = error.name === "AbortError" ? "Stopped." : error.message;
      if (error.name !== "AbortError") this.app.fail(error);
    }
    node.pending = false;
    if (this.running === running) this.running = null;
    this.show();
    if (node.text) this.app.say(`Answer: ${node.text}`);
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
    const body = el("div", { class: "bubble" }, ...node.images.map((url) => this.image(url, mine)));
    if (node.text) body.append(el("p", { text: node.text }));
    if (node.pending && !node.text && !node.images.length) body.append(el("p", { class: "muted", text: "Reading" }));
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
    const picture = el("img", { src: url, alt: mine ? "Picture of the question" : "Picture of the answer", class: "small" });
    picture.addEventListener("load", () => picture.classList.toggle("small", picture.naturalWidth < 256));
    if (mine) return picture;
    return el(
      "figure",
      {},
      picture,
      el(
        "div",
        { class: "tools" },
        button("Ask about it", () => {
          this.attach(url);
          this.input.focus();
        }),
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
      ...node.images.map((url) => el("img", { src: url, alt: "Picture of the question", class: "small" })),
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
