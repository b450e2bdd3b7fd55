// Settings, theme and the API key.

import { setApiKey } from "./api.js";
import { byId } from "./dom.js";
import * as store from "./store.js";

/** Shows and keeps the settings. Returns a function that gives them, or null and shows the panel if one is wrong. */
export function settingsPanel() {
  const [form, opener] = [byId("settings"), byId("settings-button")];
  const open = (shown) => {
    form.hidden = !shown;
    opener.setAttribute("aria-expanded", String(shown));
  };
  opener.onclick = () => open(form.hidden);
  const stored = store.settings();
  for (const name of Object.keys(store.DEFAULTS)) form.elements[name].value = stored[name];
  const values = () => Object.fromEntries(Object.keys(store.DEFAULTS).map((name) => [name, form.elements[name].value]));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", ({ target }) => {
    target.setAttribute("aria-invalid", String(!target.checkValidity()));
    if (form.checkValidity()) store.saveSettings(values());
  });
  return () => {
    if (form.checkValidity()) return values();
    open(true);
    form.reportValidity();
    return null;
  };
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
