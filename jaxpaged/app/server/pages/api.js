// Talks to the server: JSON, streams of events, and errors in plain words. Knows no element of the page.

const KEY = "jaxpaged.key";
let keyOfThisPage = null; // where the browser has no storage

/** What went wrong. `kind`: "key", "busy", "network", "cut", "request" (a 4xx) or "server". */
export class ApiError extends Error {
  constructor(kind, message, { status = 0, retryAfter = null } = {}) {
    super(message);
    this.kind = kind;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export function apiKey() {
  try {
    return sessionStorage.getItem(KEY) ?? keyOfThisPage;
  } catch {
    return keyOfThisPage;
  }
}

export function setApiKey(key) {
  keyOfThisPage = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // Kept in memory.
  }
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  const key = apiKey();
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const words = error.name === "TimeoutError" ? "The server does not answer." : "The server cannot be reached.";
    throw new ApiError("network", `${words} Is it still running, and is the network there?`);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const { status } = response;
  let said = "";
  try {
    const text = await response.text();
    said = text.slice(0, 500);
    const body = JSON.parse(text);
    const words = body.error?.message ?? body.error ?? body.detail ?? body.message;
    if (typeof words === "string") said = words;
  } catch {
    // No JSON: what stands in said is what there is.
  }
  if (status === 401 || status === 403) return new ApiError("key", "The server asks for an API key.", { status });
  if (status === 429 || status === 503) {
    return new ApiError("busy", said || "The server is busy.", { status, retryAfter: retryAfter(response) });
  }
  const kind = status < 500 ? "request" : "server";
  return new ApiError(kind, said || `The server answered with status ${status}.`, { status });
}

/** Seconds that a Retry-After header names, as a number or as a date; null without one. */
function retryAfter(response) {
  const value = response.headers.get("Retry-After");
  if (!value) return null;
  const seconds = /^\d+$/.test(value.trim()) ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, seconds) : null;
}

export async function getJson(path, timeout = 10_000) {
  const response = await request(path, { signal: AbortSignal.timeout(timeout) });
  try {
    return await response.json();
  } catch (error) {
    if (error instanceof SyntaxError) throw new ApiError("server", "The server's answer was no JSON.");
    throw new ApiError("network", "The server stopped answering.");
  }
}

/** Posts a body with `stream: true` and yields each event until `[DONE]`; ending before it is an error. */
export async function* stream(path, body, signal) {
  const response = await request(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    let event;
    try {
      event = JSON.parse(data);
    } catch {
      throw new ApiError("server", "The server sent something that is no JSON.");
    }
    if (event.error) throw new ApiError("server", event.error.message ?? String(event.error));
    yield event;
  }
  throw new ApiError("cut", "The connection ended before the answer did.");
}

/** The `data` of each server-sent event. */
async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError("cut", "The connection ended before the answer did.");
      }
      if (part.done) return;
      const lines = (rest + decoder.decode(part.value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the server sees it, and frees the pages
  }
}
