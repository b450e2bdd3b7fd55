// A few lines that every part of the page uses.

export const byId = (id) => document.getElementById(id);

/** An element with properties, and children that are elements or text: never markup. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
}

export function button(words, onclick, properties = {}) {
  return element("button", { type: "button", textContent: words, onclick, ...properties });
}

/** Copies without the clipboard API too: browsers have none on http:// but for this machine. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = element("textarea", { value: text, className: "unseen", "aria-hidden": "true" });
    const before = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    before?.focus();
    return done;
  }
}

/** For people who hear the page. */
export function announce(words) {
  byId("announcer").textContent = words;
}

let noticeTimer = 0;
/** A line at the bottom for a few seconds, with Undo where there is something to undo. */
export function notice(words, undo = null) {
  const box = byId("notice");
  const [line, undoButton] = box.children;
  line.textContent = words;
  undoButton.hidden = !undo;
  undoButton.onclick = () => {
    box.hidden = true;
    undo();
  };
  box.hidden = false;
  clearTimeout(noticeTimer);
  noticeTimer = setTimeout(() => (box.hidden = true), undo ? 10_000 : 5_000);
}
