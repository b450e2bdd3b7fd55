// One answer on its way: asks, waits as Retry-After says, reads the stream. Knows no element of the page.

import { ApiError, apiKey, stream } from "./api.js";

const MOST_TRIES = 10;
const LONGEST_WAIT = 60;

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
  for (const { role, content } of before) {
    if (!content) continue; // an answer that failed
    // Many templates want the roles to take turns.
    if (messages.at(-1)?.role === role) messages.at(-1).content += `\n\n${content}`;
    else messages.push({ role, content });
  }
  if (settings.system.trim()) messages.unshift({ role: "system", content: settings.system });
  return ["v1/chat/completions", { ...body, messages }];
}

/** Fills `message.content`, `.note` and `.error`; `onProgress` is called after each change. */
export class Answering {
  state = "asking"; // "asking", "waiting" (for a busy server), "reading", "done"
  secondsLeft = 0;
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
          if (signal.aborted || this.message.content || tries === MOST_TRIES) throw error;
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
    let pieces = 0;
    let usage = null;
    let reason = null;
    const note = () => {
      const seconds = (performance.now() - first) / 1000;
      this.message.note = words(usage, pieces, seconds, reason);
    };
    for await (const event of stream(this.path, this.body, this.#controller.signal)) {
      usage = event.usage ?? usage;
      const choice = event.choices?.[0];
      const text = choice?.delta?.content ?? choice?.text ?? "";
      reason = choice?.finish_reason ?? reason;
      if (text) {
        first ||= performance.now();
        pieces += 1;
        this.state = "reading";
        this.message.content += text;
        note();
        this.onProgress();
      }
    }
    if (pieces) note();
    else this.message.note = "the model ended at once, without a word";
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
  if (kind === "request" && body.messages && /template/i.test(message)) {
    const text = `${message} This model may be no chat model: as Text, it continues what you write.`;
    return { kind: "template", text };
  }
  if (kind === "request" && /context/i.test(message)) {
    return { kind, text: `${message}. Shorten your message, or begin a new conversation.`.replace("..", ".") };
  }
  return { kind, text: message };
}
