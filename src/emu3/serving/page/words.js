import { el } from "./dom.js";

const MOST = 8;

/** Completion of known words in a text field. */
export function completeWords(input, list, words) {
  const known = new Set(words);
  let matches = [];
  let active = -1;

  function typed() {
    const end = input.selectionStart;
    if (end !== input.selectionEnd || /^[\p{L}\p{N}]/u.test(input.value.slice(end))) return null;
    const word = input.value.slice(0, end).match(/[\p{L}\p{N}]+$/u)?.[0];
    return word ? { word: word.toLowerCase(), start: end - word.length, end } : null;
  }

  function close() {
    matches = [];
    active = -1;
    list.hidden = true;
    list.replaceChildren();
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  }

  function choose(place) {
    active = place;
    [...list.children].forEach((option, at) => option.setAttribute("aria-selected", String(at === place)));
    if (place < 0) input.removeAttribute("aria-activedescendant");
    else {
      input.setAttribute("aria-activedescendant", list.children[place].id);
      list.children[place].scrollIntoView({ block: "nearest" });
    }
  }

  function accept(place) {
    const { start, end } = typed();
    const rest = input.value.slice(end);
    const text = matches[place] + (rest.startsWith(" ") ? "" : " ");
    input.setRangeText(text, start, end, "end");
    close();
  }

  function open() {
    const at = typed();
    const found = at ? words.filter((word) => word.startsWith(at.word) && word !== at.word).slice(0, MOST) : [];
    close();
    if (!found.length) return;
    matches = found;
    list.replaceChildren(
      ...found.map((word, place) =>
        el("li", {
          id: `${list.id}-${place}`,
          role: "option",
          "aria-selected": "false",
          text: word,
          // The field would lose focus before a click.
          onpointerdown: (event) => event.preventDefault(),
          onclick: () => accept(place),
        }),
      ),
    );
    list.classList.toggle("unfinished", !known.has(at.word));
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
  }

  input.addEventListener("input", open);
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (list.hidden) {
      if (event.key === "ArrowDown") open();
      return;
    }
    const count = matches.length;
    if (event.key === "ArrowDown") choose((active + 1) % count);
    else if (event.key === "ArrowUp") choose(active <= 0 ? count - 1 : active - 1);
    else if (event.key === "Escape") close();
    else if ((event.key === "Tab" && !event.shiftKey) || event.key === "Enter") {
      // A whole word stays as it is unless another one was chosen.
      if (active < 0 && known.has(typed()?.word)) return close();
      accept(Math.max(active, 0));
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
}
