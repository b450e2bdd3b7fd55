// One message: its text, the model's thoughts, its tool calls and their results.

import { isThinking, wholeCalls } from "./answering.js";
import { button, copyText, element, notice } from "./dom.js";
import { indented, isJson } from "./json.js";
import { codeBlock, showText } from "./render.js";

/** { node, update }. `actions`: edit(message), regenerate(), switchToText(), sendResults(message, texts). */
export function messageView(message, actions) {
  const mine = message.role === "user";
  const who = mine ? "You" : "Model";
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
  const update = ({ mode, last, lastOfUser, entry, results }) => {
    const growing = entry?.answering.message === message ? entry.answering : null;
    showText(body, message.content, mine || mode === "text" ? "plain" : growing ? "growing" : "complete");
    thoughts.update(Boolean(growing));
    calls.update(last && !entry && mode === "chat", results);
    node.classList.toggle("growing", Boolean(growing));
    note.textContent = growing ? stateWords(growing) : (message.note ?? "");
    problem.hidden = !message.error;
    problemText.textContent = message.error?.text ?? "";
    asText.hidden = message.error?.kind !== "template" || !last || mode === "text" || Boolean(entry);
    copy.hidden = Boolean(growing) || !message.content;
    edit.hidden = !lastOfUser || Boolean(entry);
    again.hidden = !last || Boolean(entry);
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

/** A card for each call; its arguments, and below them what the tool returned, or the field for it while it is awaited. */
function callsView(message, sendResults) {
  const send = element("button", { className: "primary" });
  const buttons = element("div", { className: "buttons", hidden: true }, send);
  const form = element("form", { className: "calls" }, buttons);
  const cards = [];
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    sendResults(message, [...form.querySelectorAll("textarea:enabled")].map((field) => field.value));
  });
  const update = (awaited, results) => {
    const whole = awaited ? wholeCalls(message) : [];
    (message.tool_calls ?? []).forEach((call, i) => {
      if (!cards[i]) {
        cards[i] = callCard(call, form);
        buttons.before(cards[i].node);
      }
      cards[i].update(whole.includes(call), results.find((result) => result.tool_call_id === call.id));
    });
    buttons.hidden = !whole.length;
    send.textContent = whole.length === 1 ? "Send the result" : "Send the results";
  };
  return { node: form, update };
}

function callCard(call, form) {
  const { name } = call.function;
  const asked = codeBlock({ language: `Calls ${name}`, text: "" });
  const returned = codeBlock({ language: "Returned", text: "" });
  const field = element("textarea", { rows: 2, required: true, placeholder: "What the tool returned, as text or JSON" });
  const label = element("label", {}, `Result of ${name}`, field);
  const node = element("section", { className: "call", "aria-label": `Call of ${name}` }, asked.node, returned.node, label);
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  const update = (awaited, result) => {
    setData(asked.leaf, indented(call.function.arguments));
    returned.node.hidden = !result;
    if (result) setData(returned.leaf, isJson(result.content) ? indented(result.content) : result.content);
    label.hidden = field.disabled = !awaited; // a disabled field does not keep the form from being sent
  };
  return { node, update };
}

function setData(leaf, text) {
  if (leaf.data !== text) leaf.data = text;
}

function stateWords(answering) {
  if (answering.state === "waiting") return `The server is full: next try in ${answering.secondsLeft} s`;
  return answering.message.note || "Waiting for the first token…";
}
