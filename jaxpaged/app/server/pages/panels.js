// Settings, theme and the API key.

import { setApiKey } from "./api.js";
import { byId, element } from "./dom.js";
import { isObject } from "./json.js";
import * as store from "./store.js";

const CHOICES = ["auto", "none", "required"];
const FORMS = {
  tools: {
    holds: (value) => Array.isArray(value) && value.every((tool) => typeof tool?.function?.name === "string"),
    words: 'This must be an array: [{"type": "function", "function": {"name": …, "parameters": …}}, …]',
  },
  schema: { holds: isObject, words: 'This must be a JSON schema: {"type": "object", "properties": …}' },
};

/** What is wrong with the text of a field of JSON; empty if nothing is. */
function jsonProblem({ name, value }) {
  if (!value.trim()) return "";
  try {
    return FORMS[name].holds(JSON.parse(value)) ? "" : FORMS[name].words;
  } catch (error) {
    return `This is not JSON: ${error.message}`;
  }
}

/** Shows and keeps the settings. Returns a function that gives them, or null and shows the panel if one is wrong. */
export function settingsPanel() {
  const [form, opener] = [byId("settings"), byId("settings-button")];
  const open = (shown) => {
    form.hidden = !shown;
    opener.setAttribute("aria-expanded", String(shown));
  };
  opener.onclick = () => open(form.hidden);
  const stored = store.settings();
  const check = (field) => {
    if (field.name in FORMS) field.setCustomValidity(jsonProblem(field));
    if (field.name === "tools" && field.checkValidity()) offerChoices(form);
  };
  const showProblem = (field) => {
    field.setAttribute("aria-invalid", String(!field.checkValidity()));
    if (field.name in FORMS) byId(`${field.name}-problem`).textContent = field.validationMessage;
  };
  for (const name of Object.keys(store.DEFAULTS)) {
    form.elements[name].value = stored[name];
    check(form.elements[name]);
  }
  const values = () => Object.fromEntries(Object.keys(store.DEFAULTS).map((name) => [name, form.elements[name].value]));
  form.addEventListener("submit", (event) => event.preventDefault());
  const showUse = () => {
    const used = Object.keys(FORMS).filter((name) => form.elements[name].value.trim());
    opener.textContent = used.length ? `Settings (${used.join(", ")})` : "Settings";
  };
  showUse();
  const changed = ({ type, target }) => {
    check(target);
    // JSON that is being typed is wrong until its last bracket.
    if (type === "change" || !(target.name in FORMS) || target.checkValidity()) showProblem(target);
    showUse();
    if (form.checkValidity()) store.saveSettings(values());
  };
  form.addEventListener("input", changed);
  form.addEventListener("change", changed);
  return () => {
    if (form.checkValidity()) return values();
    open(true);
    for (const field of form.elements) if (field.name) showProblem(field);
    const wrong = form.querySelector(":invalid");
    if (wrong.name in FORMS) {
      wrong.focus();
      byId(`${wrong.name}-problem`).scrollIntoView({ block: "nearest" });
    } else wrong.reportValidity();
    return null;
  };
}

/** The choices of a tool: OpenAI's words and the names of the tools. */
function offerChoices({ elements: { tools, tool_choice: choice } }) {
  const names = tools.value.trim() ? JSON.parse(tools.value).map((tool) => tool.function.name) : [];
  const before = choice.value;
  choice.replaceChildren(...[...CHOICES, ...names].map((name) => element("option", { value: name }, name)));
  choice.value = [...CHOICES, ...names].includes(before) ? before : "auto";
  choice.disabled = !names.length;
}

export function themeButton(onChange) {
  const root = document.documentElement;
  const button = byId("theme");
  const themes = ["auto", "light", "dark"];
  const show = () => {
    const theme = root.dataset.theme ?? "auto";
    button.textContent = `◐ ${theme}`;
    button.setAttribute("aria-label", `Theme: ${theme}`);
  };
  button.onclick = () => {
    const theme = themes[(themes.indexOf(root.dataset.theme ?? "auto") + 1) % themes.length];
    if (theme === "auto") delete root.dataset.theme;
    else root.dataset.theme = theme;
    store.saveTheme(theme);
    show();
    onChange();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", onChange);
  show();
}

/** Returns a function that asks for the key: true if one was given. All who ask at once share one answer. */
export function keyDialog(onKey) {
  const [dialog, input] = [byId("key-dialog"), byId("key-input")];
  let asking = null;
  let end = null;
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setApiKey(input.value.trim());
    end(true);
    onKey();
  });
  byId("key-cancel").onclick = () => end(false);
  dialog.addEventListener("close", () => end(false));
  const ask = (wrong = false) => {
    byId("key").hidden = false;
    if (asking) return asking;
    byId("key-wrong").hidden = !wrong;
    input.value = "";
    asking = new Promise((resolve) => {
      end = (given) => {
        asking = null;
        dialog.close();
        resolve(given);
      };
    });
    const answer = asking;
    dialog.showModal();
    return answer;
  };
  byId("key").onclick = () => ask();
  return ask;
}
