import { byId } from "./dom.js";

/** Tabs, of which the address keeps the one that is shown. */
export function startTabs(names) {
  const tabs = { shown: names[0], show };
  const tab = (name) => byId(`tab-${name}`);

  function show(name) {
    tabs.shown = name;
    for (const each of names) {
      const on = each === name;
      tab(each).setAttribute("aria-selected", String(on));
      tab(each).tabIndex = on ? 0 : -1;
      byId(`panel-${each}`).hidden = !on;
    }
    history.replaceState(null, "", `#${name}`);
  }

  for (const [place, name] of names.entries()) {
    tab(name).addEventListener("click", () => show(name));
    tab(name).addEventListener("keydown", (event) => {
      const to = {
        ArrowLeft: names.at(place - 1),
        ArrowRight: names[(place + 1) % names.length],
        Home: names[0],
        End: names.at(-1),
      }[event.key];
      if (!to) return;
      event.preventDefault();
      show(to);
      tab(to).focus();
    });
  }
  const named = () => names.find((name) => location.hash === `#${name}`);
  addEventListener("hashchange", () => named() && show(named()));
  show(named() ?? names[0]);
  return tabs;
}
