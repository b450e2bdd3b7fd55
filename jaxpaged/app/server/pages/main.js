// Puts the parts of the page together.

import { getJson } from "./api.js";
import { Chat } from "./chat.js";
import { Conversations } from "./conversations.js";
import { byId } from "./dom.js";
import { keyDialog, settingsPanel, themeButton } from "./panels.js";
import { Pool } from "./pool.js";

let defaultMode = "chat";
let known = false; // whether the server has told its model

const askKey = keyDialog(() => {
  pool.start();
  readModel();
});
const pool = new Pool(askKey);
themeButton(() => pool.themeChanged());
const chat = new Chat({ settings: settingsPanel(), askKey, onChange: () => conversations.show() });
const conversations = new Conversations(chat, () => defaultMode);

/** The model's name, and whether it has a chat template: one without is asked to continue text. */
async function readModel() {
  if (known) return;
  try {
    const models = await getJson("v1/models");
    chat.model = models.data?.[0]?.id ?? "";
    byId("model").textContent = chat.model.split(/[\\/]/).pop();
    byId("model").title = chat.model;
    known = true;
    const props = await getJson("props");
    if (!props.chat_template || props.chat_template_is_fallback) defaultMode = "text";
    if (!chat.conversation.messages.length) chat.setMode(defaultMode);
  } catch {
    // The pool asks for the key and tells what is wrong; a message that is sent gets its own answer.
    if (!known) setTimeout(readModel, 3000);
  }
}

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || byId("key-dialog").open) return;
  if (byId("sidebar").classList.contains("open")) {
    conversations.openDrawer(false);
    byId("menu").focus();
  } else if (!chat.cancelEdit()) chat.stop();
});

conversations.openLast();
pool.start();
readModel();
if (matchMedia("(hover: hover)").matches) byId("prompt").focus();
