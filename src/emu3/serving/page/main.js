import { getModel } from "./api.js";
import { Chat } from "./chat.js";
import { byId } from "./dom.js";
import { Draw } from "./draw.js";
import { Edit } from "./edit.js";
import { Film } from "./film.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { readSettings, toBlob } from "./png.js";
import { Race } from "./race.js";
import { keep } from "./store.js";
import { startTabs } from "./tabs.js";
import { completeWords } from "./words.js";

function say(text, failed = false) {
  const line = byId("status");
  line.textContent = text;
  line.classList.toggle("failed", failed);
}

const fail = (error) => say(error.message || "Something went wrong.", true);

/** What settings do not hold: the tokens that were pinned, and the picture that was edited. */
const kept = ({ kept_tokens: count, from_pictures: edited }) =>
  (count ? ` It kept ${count} tokens of another picture, which the form cannot.` : "") +
  (edited ? " It was made from another picture, which the form cannot." : "");

function start(model) {
  const canEdit = model.abilities.includes("edit");
  byId("tab-edit").hidden = !canEdit;
  const tabs = startTabs(["draw", ...(canEdit ? ["edit"] : []), "chat", "gallery"]);
  const form = new Form(model);
  const app = {
    say,
    fail,
    canEdit,
    edit(url) {
      tabs.show("edit");
      edit.open(url);
      byId("edit-words").focus();
    },
    ask(url) {
      tabs.show("chat");
      chat.open(url);
    },
    adopt(url, question, answer) {
      tabs.show("chat");
      chat.adopt(url, question, answer);
    },
    use(record, name) {
      form.write(record);
      tabs.show("draw");
      say(`The settings${name ? ` of ${name}` : ""} are in the form.${kept(record)}`);
      form.field("prompt").focus();
    },
    async keep(url, record, told = false) {
      try {
        await keep(url, record);
        await gallery.refresh();
        if (told) say("Added to the gallery.");
      } catch {
        say("This browser did not keep it.", true);
      }
    },
    async keepFile(url) {
      await app.keep(url, (await readSettings(toBlob(url))) ?? {}, true);
    },
  };
  const draw = new Draw(app, model, form);
  const film = new Film(app, model, form);
  const edit = new Edit(app);
  const chat = new Chat(app, model);
  const gallery = new Gallery(app);
  new Race(app, model, form);
  completeWords(form.field("prompt"), byId("prompt-words"), model.words ?? []);
  completeWords(form.field("negative_prompt"), byId("negative-words"), model.words ?? []);
  byId("model-name").textContent = model.name;
  if (!model.abilities.includes("draw")) fail(new Error("This checkpoint does not draw."));
  else if (!draw.canRead) say("This checkpoint draws, but does not read pictures.");

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || tabs.shown !== "draw") return;
    event.preventDefault();
    draw.start();
    film.start();
  });

  async function load(files, inChat) {
    if (tabs.shown === "edit") return edit.take(files);
    let told = false;
    for (const file of files) {
      const settings = await readSettings(file).catch(() => null);
      if (!settings) continue;
      if (inChat) form.write(settings);
      else app.use(settings, file.name || "the picture");
      say(`The settings of ${file.name || "the picture"} are in the Draw form.${kept(settings)}`);
      told = true;
      break;
    }
    if (inChat || !told) {
      if (!inChat && !files.some((file) => file.type.startsWith("image/"))) return fail(new Error("This file is no picture."));
      if (!inChat) {
        tabs.show("chat");
        say("The picture holds no settings, so you can ask about it here.");
      }
      await chat.attachFiles(files);
    }
  }

  const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
  const over = (shown) => document.body.classList.toggle("dropping", shown);
  document.addEventListener("dragover", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    over(true);
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget === null && over(false));
  document.addEventListener("drop", (event) => {
    over(false);
    const files = [...(event.dataTransfer?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    load(files, byId("panel-chat").contains(event.target));
  });
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    if (tabs.shown === "chat") chat.attachFiles(files);
    else load(files, false);
  });
  byId("load-settings").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    const settings = file && (await readSettings(file).catch(() => null));
    event.target.value = "";
    if (settings) app.use(settings, file.name);
    else if (file) fail(new Error(`${file.name} holds no settings.`));
  });
  document.body.dataset.ready = "";
}

try {
  start(await getModel());
} catch (error) {
  fail(error);
}
