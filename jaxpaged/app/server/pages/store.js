// Conversations and settings in localStorage. A conversation is a key of its own, so two tabs do not undo each other.

const PREFIX = "jaxpaged.conversation.";
const SETTINGS = "jaxpaged.settings";
export const MAX_CONVERSATIONS = 100;
export const DEFAULTS = { system: "", temperature: "", top_p: "", max_tokens: "512", seed: "", tools: "", tool_choice: "auto", schema: "" };

const memory = new Map(); // what storage refuses, and every conversation that was read
let storage = null;
try {
  storage = window.localStorage;
} catch {
  // Blocked by the browser: all is kept in memory, and lost with the page.
}

/** A conversation: { id, title, named, mode, updated, messages }. A message is OpenAI's, an assistant's
 * with reasoning_content and tool_calls where it has them; and { reasoning_seconds?, note?, error? }. */
export function create(mode) {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "New conversation", named: false, mode, updated: Date.now(), messages: [] };
}

/** All conversations, the one last changed first. */
export function all() {
  if (storage) {
    for (const key of Object.keys(storage)) {
      const id = key.slice(PREFIX.length);
      if (!key.startsWith(PREFIX) || memory.has(id)) continue;
      const conversation = read(key);
      if (conversation) memory.set(id, conversation);
    }
  }
  return [...memory.values()].sort((a, b) => b.updated - a.updated);
}

function read(key) {
  try {
    const { id, title, named, mode, updated, messages } = JSON.parse(storage.getItem(key));
    if (PREFIX + id !== key || !Array.isArray(messages)) return null;
    return {
      id,
      title: String(title),
      named: Boolean(named),
      mode: mode === "text" ? "text" : "chat",
      updated: Number(updated) || 0,
      messages: messages.filter(isMessage),
    };
  } catch {
    return null; // another program's, or damaged
  }
}

function isMessage(message) {
  const { role, content, reasoning_content = "", tool_calls = [] } = message ?? {};
  const areTexts = [content, reasoning_content].every((text) => typeof text === "string");
  const isCall = (call) => [call?.function?.name, call?.function?.arguments].every((text) => typeof text === "string");
  return ["user", "assistant", "tool"].includes(role) && areTexts && Array.isArray(tool_calls) && tool_calls.every(isCall);
}

/** Writes a conversation; the oldest ones go where there are too many, or too large ones. False: no room for it. */
export function save(conversation) {
  memory.set(conversation.id, conversation);
  const others = all().filter((other) => other !== conversation);
  while (others.length >= MAX_CONVERSATIONS) remove(others.pop());
  if (!storage) return false;
  for (;;) {
    try {
      storage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
      return true;
    } catch {
      if (!others.length) return false;
      remove(others.pop());
    }
  }
}

/** Whether it is still kept: not one that was deleted. */
export function has(conversation) {
  return memory.get(conversation.id) === conversation;
}

export function remove(conversation) {
  memory.delete(conversation.id);
  storage?.removeItem(PREFIX + conversation.id);
}

/** Calls back with the id of each conversation that another tab changed or removed. */
export function onChangeElsewhere(callback, isBusy) {
  window.addEventListener("storage", ({ key }) => {
    if (!key?.startsWith(PREFIX)) return;
    const id = key.slice(PREFIX.length);
    if (isBusy(id)) return; // this tab is writing an answer into it, and will save that
    memory.delete(id);
    callback(id);
  });
}

export function settings() {
  try {
    return { ...DEFAULTS, ...JSON.parse(storage.getItem(SETTINGS)) };
  } catch {
    return { ...DEFAULTS };
  }
}

export function saveSettings(values) {
  try {
    storage?.setItem(SETTINGS, JSON.stringify(values));
  } catch {
    // Full: they hold until the page is closed.
  }
}

/** "auto", "light" or "dark"; theme.js reads it before the page is painted. */
export function saveTheme(theme) {
  try {
    if (theme === "auto") storage?.removeItem("jaxpaged.theme");
    else storage?.setItem("jaxpaged.theme", theme);
  } catch {
    // It holds until the page is closed.
  }
}
