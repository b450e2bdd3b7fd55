// One answer on its way: asks, waits as Retry-After says, reads the stream. Knows no element of the page.

import { ApiError, apiKey, stream } from "./api.js";
import { isObject, parsed } from "./json.js";

const MOST_TRIES = 10;
const LONGEST_WAIT = 60;

/** True while there are thoughts and no answer yet. */
export function isThinking({ reasoning_content, content, tool_calls }) {
  return Boolean(reasoning_content && !content && !tool_calls);
}

/** A message's tool calls with whole arguments: one that was cut off cannot be sent back. */
export function wholeCalls({ tool_calls = [] }) {
  return tool_calls.filter((call) => isObject(parsed(call.function.arguments)));
}

/** What is sent for a conversation whose last message is the answer to come: [path, body]. */
export function requestOf(conversation, settings, model) {
  const before = conversation.messages.slice(0, -1);
  const body = model ? { model } : {};
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if (settings[name] !== "") body[name] = Number(settings[name]);
  }
  if (conversation.mode === "text") {
    const prompt = before.map((message) => message.content).join("");
    return ["v1/completions", { ...body, prompt }];
  }
  const messages = [];
  for (const message of before) {
    const { role, content, reasoning_content, tool_call_id } = message;
    const calls = wholeCalls(message);
    if (!content && !calls.length && role !== "tool") continue; // an answer that failed
    const last = messages.at(-1);
    // Many templates want the roles to take turns.
    if (last?.role === role && role !== "tool" && !last.tool_calls && !calls.length) last.content += `\n\n${content}`;
    else {
      messages.push({ role, content });
      if (reasoning_content) messages.at(-1).reasoning_content = reasoning_content;
      if (calls.length) messages.at(-1).tool_calls = calls;
      if (tool_call_id) messages.at(-1).tool_call_id = tool_call_id;
    }
  }
  if (settings.system.trim()) messages.unshift({ role: "system", content: settings.system });
  return ["v1/chat/completions", { ...body, messages, ...formats(settings) }];
}

/** Tools and the schema of the answer; the settings hold them as texts that are JSON. */
function formats({ tools, tool_choice, schema }) {
  const sent = {};
  if (tools.trim()) {
    sent.tools = JSON.parse(tools);
    const named = sent.tools.some((tool) => tool.function.name === tool_choice);
    sent.tool_choice = named ? { type: "function", function: { name: tool_choice } } : tool_choice;
  }
  if (schema.trim()) {
    sent.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(schema) } };
  }
  return sent;
}

/** Fills `message.content`, `.reasoning_content`, `.tool_calls`, `.note` and `.error`; `onProgress` is called after each change. */
export class Answering {
  state = "asking"; // "asking", "waiting" (for a busy server), "reading", "done"
  secondsLeft = 0;
  #pieces = 0; // of the answer that have come
  #controller = new AbortController();

  constructor(message, [path, body], { onProgress, askKey }) {
    this.message = message;
    this.path = path;
    this.body = body;
    this.onProgress = onProgress;
    this.askKey = askKey;
  }

  /** Ends it at once. The fetch is aborted, the server notices and frees the pages. */
  stop() {
    this.#controller.abort();
  }

  async run() {
    const { signal } = this.#controller;
    try {
      for (let tries = 1; ; tries++) {
        try {
          await this.#read();
          return;
        } catch (error) {
          if (signal.aborted || this.#pieces || tries === MOST_TRIES) throw error;
          if (error.kind === "busy") await this.#wait(error, tries);
          else if (error.kind !== "key" || !(await this.askKey(Boolean(apiKey())))) throw error;
        }
      }
    } catch (error) {
      if (signal.aborted) this.message.note = [this.message.note, "stopped"].filter(Boolean).join(" · ");
      else if (error instanceof ApiError) this.message.error = explain(error, this.body);
      else throw error;
    } finally {
      this.state = "done";
      this.onProgress();
    }
  }

  async #read() {
    this.state = "asking";
    this.onProgress();
    let first = 0;
    let usage = null;
    let reason = null;
    const note = () => {
      const seconds = (performance.now() - first) / 1000;
      this.message.note = words(usage, this.#pieces, seconds, reason);
    };
    for await (const event of stream(this.path, this.body, this.#controller.signal)) {
      usage = event.usage ?? usage;
      const choice = event.choices?.[0];
      reason = choice?.finish_reason ?? reason;
      const thought = isThinking(this.message);
      if (choice && this.#add(choice)) {
        first ||= performance.now();
        if (thought) this.message.reasoning_seconds = (performance.now() - first) / 1000;
        this.#pieces += 1;
        this.state = "reading";
        note();
        this.onProgress();
      }
    }
    if (this.#pieces) note();
    else this.message.note = "the model ended at once, without a word";
  }

  /** Adds a piece to the message; false if there is nothing in it. */
  #add({ delta, text }) {
    const { message } = this;
    const thought = delta?.reasoning_content ?? "";
    const said = delta?.content ?? text ?? "";
    const calls = delta?.tool_calls ?? [];
    if (thought) message.reasoning_content = (message.reasoning_content ?? "") + thought;
    message.content += said;
    for (const { index, id, function: part } of calls) {
      message.tool_calls ??= [];
      const call = (message.tool_calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } });
      call.function.name += part?.name ?? "";
      call.function.arguments += part?.arguments ?? "";
    }
    return Boolean(thought || said || calls.length);
  }

  /** Counts down to the next try. */
  async #wait({ retryAfter }, tries) {
    const seconds = Math.min(LONGEST_WAIT, retryAfter ?? 2 ** (tries - 1));
    const end = performance.now() + 1000 * seconds;
    const { signal } = this.#controller;
    this.state = "waiting";
    for (;;) {
      const left = end - performance.now();
      if (left <= 0) return;
      this.secondsLeft = Math.ceil(left / 1000);
      this.onProgress();
      await new Promise((resolve, reject) => {
        const stopped = () => {
          clearTimeout(timer);
          reject(signal.reason);
        };
        const timer = setTimeout(() => {
          signal.removeEventListener("abort", stopped);
          resolve();
        }, Math.min(left, 250));
        signal.addEventListener("abort", stopped, { once: true });
      });
    }
  }
}

function words(usage, pieces, seconds, reason) {
  const tokens = usage?.completion_tokens ?? pieces;
  const parts = [`${tokens} ${tokens === 1 ? "token" : "tokens"}`];
  if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} a second`);
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (usage) parts.push(`prompt ${usage.prompt_tokens}${cached ? `, ${cached} of them cached` : ""}`);
  if (reason === "length") parts.push("ended at max tokens or the end of the context");
  return parts.join(" · ");
}

/** What is shown and kept: { kind, text }. */
function explain(error, body) {
  const { kind, message } = error;
  if (kind === "busy") return { kind, text: `${message} It was asked ${MOST_TRIES} times. Try again in a while.` };
  if (kind === "server") return { kind, text: `The server failed: ${message}` };
  const isPlainChat = body.messages && !body.tools && !body.response_format;
  if (kind === "request" && isPlainChat && /template/i.test(message)) {
    const text = `${message} This model may be no chat model: as Text, it continues what you write.`;
    return { kind: "template", text };
  }
  if (kind === "request" && /context/i.test(message)) {
    return { kind, text: `${message}. Shorten your message, or begin a new conversation.`.replace("..", ".") };
  }
  return { kind, text: message };
}
