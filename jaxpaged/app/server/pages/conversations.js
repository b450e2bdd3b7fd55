// The list of conversations: open, begin, rename, delete.

import { button, byId, element, notice } from "./dom.js";
import * as store from "./store.js";

export class Conversations {
  /** `defaultMode()` is what new ones begin with. */
  constructor(chat, defaultMode) {
    this.chat = chat;
    this.defaultMode = defaultMode;
    this.list = byId("conversations");
    byId("new").onclick = () => this.begin();
    byId("menu").onclick = () => this.openDrawer(byId("menu").getAttribute("aria-expanded") === "false");
    store.onChangeElsewhere((id) => this.#changedElsewhere(id), (id) => chat.isAnswering(id));
  }

  begin() {
    this.#open(store.create(this.defaultMode()));
  }

  openLast() {
    const last = store.all()[0];
    if (last) this.chat.show(last);
    else this.chat.show(store.create(this.defaultMode()));
    this.show();
  }

  /** The drawer of narrow windows. */
  openDrawer(open) {
    byId("sidebar").classList.toggle("open", open);
    byId("menu").setAttribute("aria-expanded", String(open));
    if (open) byId("new").focus();
  }

  show() {
    const current = this.chat.conversation;
    const items = store.all();
    const focused = document.activeElement?.closest?.("#conversations li")?.dataset.id;
    const which = document.activeElement?.className;
    if (document.activeElement?.className === "rename-input") return; // it ends by itself
    this.list.replaceChildren(...items.map((item) => this.#row(item, item === current)));
    if (focused) this.list.querySelector(`li[data-id="${focused}"] .${which || "open"}`)?.focus();
    const title = current.messages.length ? `${current.title} · jaxpaged` : "jaxpaged";
    if (document.title !== title) document.title = title;
  }

  #open(conversation) {
    this.chat.show(conversation);
    this.openDrawer(false);
    this.show();
    byId("prompt").focus();
  }

  #row(item, isCurrent) {
    const open = button(item.title, () => this.#open(item), { className: "open" });
    if (isCurrent) open.setAttribute("aria-current", "true");
    if (this.chat.isAnswering(item.id)) open.append(element("span", { className: "busy" }, " answering"));
    const row = element(
      "li",
      {},
      open,
      button("✎", () => this.#rename(row, item), { className: "rename", "aria-label": `Rename ${item.title}`, title: "Rename" }),
      button("✕", () => this.#delete(item), { className: "delete", "aria-label": `Delete ${item.title}`, title: "Delete" }),
    );
    row.dataset.id = item.id;
    return row;
  }

  #rename(row, item) {
    const input = element("input", { className: "rename-input", value: item.title, maxLength: 80, "aria-label": "New name" });
    let ended = false;
    const end = (keep) => {
      if (ended) return;
      ended = true;
      const name = input.value.trim();
      if (keep && name && name !== item.title) {
        item.title = name;
        item.named = true;
        store.save(item);
      }
      const hadFocus = document.activeElement === input;
      input.remove();
      this.show();
      if (hadFocus) this.list.querySelector(`li[data-id="${item.id}"] .rename`)?.focus();
    };
    input.onkeydown = (event) => {
      if (event.key === "Enter" && !event.isComposing) {
        event.preventDefault(); // or the button that gets the focus is pressed by it
        end(true);
      } else if (event.key === "Escape") {
        event.stopPropagation();
        end(false);
      }
    };
    input.onblur = () => end(true);
    row.replaceChildren(input);
    input.select();
    input.focus();
  }

  #delete(item) {
    this.chat.forget(item.id);
    store.remove(item);
    if (item === this.chat.conversation) this.openLast();
    else this.show();
    byId("new").focus();
    notice(`Deleted “${item.title}”.`, () => {
      store.save(item);
      this.#open(item);
    });
  }

  #changedElsewhere(id) {
    const fresh = store.all().find((item) => item.id === id);
    if (this.chat.conversation.id !== id) this.show();
    else if (fresh) {
      this.chat.show(fresh);
      this.show();
    } else this.openLast();
  }
}
