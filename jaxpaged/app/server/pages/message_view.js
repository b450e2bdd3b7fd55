// One message: its text, the model's thoughts, its tool calls and the form for their results.

import { isThinking, wholeCalls } from "./answering.js";
import { button, copyText, element, notice } from "./dom.js";
import { indented } from "./json.js";
import { codeBlock, showText } from "./render.js";

const WHO = { user: "You", assistant: "Model", tool: "Result" };

/** { node, update }. `actions`: edit(message), regenerate(), switchToText(), sendResults(message, texts). */
export function messageView(message, actions) {
  const mine = message.role === "user";
  const who = message.name ? `${WHO[message.role]} of ${message.name}` : WHO[message.role];
  const thoughts = thoughtsView(message);
  const body = element("div", { className: "body" });
  const calls = callsView(message, actions.sendResults);
  const note = element("span", { className: "note faint" });
  const problemText = element("span");
  const asText = button("Switch to Text", actions.switchToText);
  const problem = element("p", { className: "error", hidden: true }, problemText, " ", asText);
  const copy = button("Copy", async () => {
    notice((await copyText(message.content)) ? "Copied." : "The browser did not let this page copy.");
  });
  const edit = button("Edit", () => actions.edit(message));
  const again = button("Regenerate", actions.regenerate);
  const node = element(
    "article",
    { className: `message ${message.role}`, "aria-label": who },
    element("div", { className: "who", "aria-hidden": "true" }, who),
    thoughts.node,
    body,
    calls.node,
    problem,
    element("div", { className: "foot" }, note, copy, mine ? edit : again),
  );
  const update = ({ mode, last, lastOfUser, entry }) => {
    const growing = entry?.answering.message === message ? entry.answering : null;
    showText(body, message.content, mine || mode === "text" ? "plain" : growing ? "growing" : "complete");
    thoughts.update(Boolean(growing));
    calls.update(last && !entry && mode === "chat");
    node.classList.toggle("growing", Boolean(growing));
    note.textContent = growing ? stateWords(growing) : (message.note ?? "");
    problem.hidden = !message.error;
    problemText.textContent = message.error?.text ?? "";
    asText.hidden = message.error?.kind !== "template" || !last || mode === "text" || Boolean(entry);
    copy.hidden = Boolean(growing) || !message.content;
    edit.hidden = !lastOfUser || Boolean(entry);
    again.hidden = !last || Boolean(entry) || message.role !== "assistant";
    again.textContent = message.error ? "Try again" : "Regenerate";
  };
  return { node, update };
}

/** Open until the answer begins, folded from then on; the reader opens it again. */
function thoughtsView(message) {
  const summary = element("summary");
  const text = element("div", { className: "thought" });
  const node = element("details", { className: "thoughts", hidden: true }, summary, text);
  let wasOpen = false;
  const update = (growing) => {
    const open = isThinking(message);
    node.hidden = !message.reasoning_content;
    if (open !== wasOpen) node.open = wasOpen = open;
    const seconds = `${(message.reasoning_seconds ?? 0).toFixed(1)} s`;
    summary.textContent = growing && open ? `Thinking… ${seconds}` : `Thought for ${seconds}`;
    showText(text, message.reasoning_content ?? "", growing ? "growing" : "complete");
  };
  return { node, update };
}

/** Cards with name and arguments; below them a field for the result of each, while it is awaited. */
function callsView(message, sendResults) {
  const cards = element("div");
  const send = element("button", { className: "primary" });
  const fields = element("div");
  const form = element("form", { className: "results", hidden: true }, fields, element("div", { className: "buttons" }, send));
  const shown = []; // the text nodes of the arguments
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    sendResults(message, [...form.querySelectorAll("textarea")].map((field) => field.value));
  });
  const update = (awaited) => {
    (message.tool_calls ?? []).forEach(({ function: { name, arguments: text } }, i) => {
      shown[i] ??= addCard(cards, name);
      const lines = indented(text);
      if (shown[i].data !== lines) shown[i].data = lines;
    });
    const whole = wholeCalls(message);
    form.hidden = !awaited || !whole.length;
    if (!form.hidden && !fields.hasChildNodes()) fields.append(...whole.map((call) => resultField(call, form)));
    send.textContent = whole.length === 1 ? "Send the result" : "Send the results";
  };
  return { node: element("div", { className: "calls" }, cards, form), update };
}

function addCard(cards, name) {
  const { node, leaf } = codeBlock({ language: `Calls ${name}`, text: "" });
  node.classList.add("call");
  cards.append(element("section", { "aria-label": `Call of ${name}` }, node));
  return leaf;
}

function resultField(call, form) {
  const field = element("textarea", { rows: 2, required: true, placeholder: "What the tool returned, as text or JSON" });
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  return element("label", {}, `Result of ${call.function.name}`, field);
}

function stateWords(answering) {
  if (answering.state === "waiting") return `The server is full: next try in ${answering.secondsLeft} s`;
  return answering.message.note || "Waiting for the first token…";
}
