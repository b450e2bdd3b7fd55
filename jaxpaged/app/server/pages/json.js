// JSON as text: what the user pasted and what the model writes.

const TOKENS = /"[^"\\]*(?:\\.[^"\\]*)*"?|[{}[\],:]|[^\s{}[\],:"]+/gs;
const DEEPEST = 40; // levels with an indentation of their own: a text of brackets must not become a huge one

/** True if a text is a whole object or array of JSON. */
export function isJson(text) {
  return /^\s*[{[]/.test(text) && parsed(text) !== undefined;
}

/** The value of a text; undefined if it is no JSON. */
export function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

export const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/** A text of JSON, or its beginning, in lines. Numbers, names and escapes stay as they are written. */
export function indented(text) {
  const tokens = text.match(TOKENS) ?? [];
  const line = () => `\n${"  ".repeat(Math.min(Math.max(depth, 0), DEEPEST))}`;
  let depth = 0;
  let lines = "";
  tokens.forEach((token, i) => {
    const isEmpty = /^[{[]$/.test(tokens[i - 1]);
    if (/^[}\]]$/.test(token)) {
      depth -= 1;
      if (!isEmpty) lines += line();
    } else if (isEmpty) lines += line();
    if (/^[{[]$/.test(token)) depth += 1;
    lines += token;
    if (token === ",") lines += line();
    else if (token === ":") lines += " ";
  });
  return lines;
}
