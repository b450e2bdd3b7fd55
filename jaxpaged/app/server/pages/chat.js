// The conversation in the middle: its messages, the box below them, and what is being answered.

import { Answering, requestOf, wholeCalls } from "./answering.js";
import { announce, byId, notice } from "./dom.js";
import { messageView } from "./message_view.js";
import * as store from "./store.js";

const MODE_WORDS = { chat: "The model answers you.", text: "The model continues the text." };
const SAVE_EVERY = 1000; // milliseconds, while an answer grows

export class Chat {
  conversation = null;
  model = ""; // its id, once the server has told it
  #answering = new Map(); // id of a conversation -> Answering
  #shown = new Map(); // message -> its view
  #editing = -1; // index of the message that is being edited
  #frame = 0;
  #actions = {
    edit: (message) => this.edit(message),
    regenerate: () => this.regenerate(),
    switchToText: () => {
      this.setMode("text");
      this.regenerate();
    },
    sendResults: (message, texts) => this.sendResults(message, texts),
  };

  /** `settings()` gives the sampling settings; `onChange` is called when titles or states of conversations change. */
  constructor({ settings, askKey, onChange }) {
    this.settings = settings;
    this.askKey = askKey;
    this.onChange = onChange;
    this.list = byId("messages");
    this.prompt = byId("prompt");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    this.prompt.addEventListener("input", () => this.#fitPrompt());
    byId("stop").onclick = () => this.stop();
    byId("cancel-edit").onclick = () => this.cancelEdit();
    for (const input of document.querySelectorAll("#mode input")) {
      input.onchange = () => this.setMode(input.value);
    }
    window.addEventListener("pagehide", () => {
      for (const { conversation } of this.#answering.values()) if (store.has(conversation)) store.save(conversation);
    });
  }

  isAnswering(id = this.conversation.id) {
    return this.#answering.has(id);
  }

  show(conversation) {
    if (this.conversation !== conversation) {
      this.cancelEdit();
      this.conversation = conversation;
      for (const view of this.#shown.values()) view.node.remove();
      this.#shown.clear();
    }
    this.#showAll();
    this.list.scrollTop = this.list.scrollHeight;
  }

  setMode(mode) {
    this.conversation.mode = mode;
    if (this.conversation.messages.length) store.save(this.conversation);
    this.#showAll();
  }

  send() {
    const { conversation } = this;
    if (this.isAnswering()) return;
    const text = conversation.mode === "text" ? this.prompt.value : this.prompt.value.trim();
    const continues = !text && conversation.mode === "text" && conversation.messages.length && this.#editing < 0;
    if (!text && !continues) return;
    if (!this.settings()) return; // one of them is wrong; the panel says which
    if (this.#editing >= 0) conversation.messages.length = this.#editing;
    if (text) conversation.messages.push({ role: "user", content: text });
    if (!conversation.named && conversation.messages.length === 1) conversation.title = titleOf(text);
    this.prompt.value = "";
    this.cancelEdit();
    this.#answer();
  }

  /** Sends what the tools returned that `message`, the last one, calls. */
  sendResults(message, texts) {
    if (this.isAnswering() || !this.settings()) return;
    wholeCalls(message).forEach((call, i) => {
      const result = { role: "tool", tool_call_id: call.id, content: texts[i] };
      this.conversation.messages.push(result);
    });
    this.cancelEdit();
    this.#answer();
    this.prompt.focus();
  }

  /** Answers the last message again. */
  regenerate() {
    const { messages } = this.conversation;
    if (this.isAnswering() || !this.settings()) return;
    if (messages.at(-1)?.role === "assistant") messages.pop();
    this.cancelEdit();
    this.#answer();
    this.prompt.focus();
  }

  stop() {
    this.forget(this.conversation.id);
  }

  /** Stops the answer to a conversation that is being deleted. */
  forget(id) {
    this.#answering.get(id)?.answering.stop();
  }

  edit(message) {
    this.#editing = this.conversation.messages.indexOf(message);
    this.prompt.value = message.content;
    byId("editing").hidden = false;
    this.#fitPrompt();
    this.prompt.focus();
  }

  /** False if nothing was being edited. */
  cancelEdit() {
    const was = this.#editing >= 0;
    if (was) this.prompt.value = "";
    this.#editing = -1;
    byId("editing").hidden = true;
    this.#fitPrompt();
    return was;
  }

  async #answer() {
    const { conversation } = this;
    const message = { role: "assistant", content: "", note: "" };
    conversation.messages.push(message);
    conversation.updated = Date.now();
    let saved = performance.now();
    const answering = new Answering(message, requestOf(conversation, this.settings(), this.model), {
      askKey: this.askKey,
      onProgress: () => {
        if (performance.now() - saved > SAVE_EVERY && store.has(conversation)) {
          saved = performance.now();
          store.save(conversation);
        }
        this.#showSoon(conversation);
      },
    });
    this.#answering.set(conversation.id, { conversation, answering });
    if (!store.save(conversation)) notice("This browser has no room for the conversation: it ends with this page.");
    this.#showAll();
    this.list.scrollTop = this.list.scrollHeight;
    this.onChange();
    announce("The model answers.");
    try {
      await answering.run();
    } finally {
      this.#answering.delete(conversation.id);
      conversation.updated = Date.now();
      if (store.has(conversation)) store.save(conversation); // it may have been deleted meanwhile
      if (conversation === this.conversation) {
        announce(message.error?.text ?? ([message.content, ...callWords(message)].join(" ").trim() || message.note));
        this.#showAll();
      }
      this.onChange();
    }
  }

  /** At most once a frame: tokens may come faster. */
  #showSoon(conversation) {
    if (conversation !== this.conversation || this.#frame) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      this.#showAll();
    });
  }

  #showAll() {
    const { conversation, list } = this;
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
    const { messages } = conversation;
    const entry = this.#answering.get(conversation.id);
    for (const [message, view] of this.#shown) {
      if (messages.includes(message)) continue;
      view.node.remove();
      this.#shown.delete(message);
    }
    messages.forEach((message, i) => {
      if (message.role === "tool") return; // is shown at its call
      let view = this.#shown.get(message);
      if (!view) {
        view = messageView(message, this.#actions);
        this.#shown.set(message, view);
        list.append(view.node);
      }
      const last = i === messages.length - 1;
      const after = messages.slice(i + 1);
      const lastOfUser = !after.some((m) => m.role === "user");
      const next = after.findIndex((m) => m.role !== "tool");
      view.update({ mode: conversation.mode, last, lastOfUser, entry, results: next < 0 ? after : after.slice(0, next) });
    });
    list.dataset.empty = messages.length ? "" : MODE_WORDS[conversation.mode];
    list.classList.toggle("text-mode", conversation.mode === "text");
    if (atEnd) list.scrollTop = list.scrollHeight;
    byId("mode-words").textContent = MODE_WORDS[conversation.mode];
    for (const input of document.querySelectorAll("#mode input")) input.checked = input.value === conversation.mode;
    this.prompt.placeholder = conversation.mode === "text" ? "Text to continue" : "Ask the model";
    this.#showButtons(Boolean(entry), messages.length > 0);
  }

  #showButtons(answering, any) {
    const [send, stop] = [byId("send"), byId("stop")];
    const focused = [send, stop].includes(document.activeElement);
    send.hidden = answering;
    stop.hidden = !answering;
    send.textContent = this.conversation.mode === "text" && any ? "Continue" : "Send";
    if (focused && [send, stop].find((b) => b === document.activeElement)?.hidden !== false) {
      (answering ? stop : this.prompt).focus();
    }
  }

  #fitPrompt() {
    const { style } = this.prompt;
    style.height = "auto";
    style.height = `${Math.min(this.prompt.scrollHeight + 2, 240)}px`;
  }
}

function callWords(message) {
  return wholeCalls(message).map((call) => `The model calls ${call.function.name}.`);
}

function titleOf(text) {
  const line = text.trim().split("\n")[0].trim();
  return line.length > 40 ? `${line.slice(0, 39)}…` : line || "Untitled";
}
