import { mayMove } from "./player.js";

/** A conversation that branches where a turn is edited. */
export class Talk {
  constructor() {
    this.root = { children: [], pick: -1 };
  }

  /** Add a turn as the newest child of another one. */
  add(parent, turn) {
    const node = { text: "", images: [], ...turn, parent, children: [], pick: -1 };
    parent.pick = parent.children.push(node) - 1;
    return node;
  }

  /** The turns of the branches that are picked, from the first to the last. */
  get path() {
    const path = [];
    for (let node = this.root; node.pick >= 0; path.push(node)) node = node.children[node.pick];
    return path;
  }

  get end() {
    return this.path.at(-1) ?? this.root;
  }
}

const part = (url, clips) =>
  clips && mayMove(url) ? { type: "video_url", video_url: { url } } : { type: "image_url", image_url: { url } };

/** Turns as messages for the server, from the one with the newest pictures: models read one question's pictures best.
    A picture that was drawn as an answer goes with the question that follows it, unless that has its own. With `clips`, the model reads clips, too. */
export function toMessages(turns, clips) {
  const given = turns.map(({ role, text, images }, place) => {
    const drawn = turns[place - 1]?.role === "assistant" ? turns[place - 1].images : [];
    return { role, text, images: role === "user" && !images.length ? drawn : images };
  });
  const first = given.findLastIndex(({ role, images }) => role === "user" && images.length);
  return given.slice(Math.max(first, 0)).map(({ role, text, images }) => ({
    role,
    content:
      role === "assistant"
        ? text
        : [...images.map((url) => part(url, clips)), { type: "text", text }],
  }));
}
