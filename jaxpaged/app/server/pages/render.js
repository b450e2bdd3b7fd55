// Shows a model's text: as text, with ``` fences and whole answers of JSON as <pre>. Markup in it stays visible characters.

import { button, copyText, element } from "./dom.js";
import { indented, isJson } from "./json.js";

/** Pieces of a text: { code: boolean, language, text }. A fence that is still open reaches to the end. */
export function pieces(text) {
  const found = [];
  let lines = [];
  let fence = null; // { mark, language } while inside
  const flush = () => {
    if (fence || lines.some((line) => line.trim())) {
      found.push({ code: Boolean(fence), language: fence?.language ?? "", text: lines.join("\n") });
    }
    lines = [];
  };
  for (const line of text.split("\n")) {
    const mark = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/.exec(line);
    if (!fence && mark) {
      flush();
      fence = { mark: mark[1], language: mark[2].trim().split(/\s/)[0] };
    } else if (fence && mark && mark[1].startsWith(fence.mark) && !mark[2].trim()) {
      flush();
      fence = null;
    } else lines.push(line);
  }
  flush();
  return found;
}

function complete(text) {
  return isJson(text) ? [{ code: true, language: "json", text: indented(text) }] : pieces(text);
}

const AS = { plain: (text) => (text ? [{ code: false, language: "", text }] : []), growing: pieces, complete };

/** Makes `container` show a text, `as` "plain", "growing" or "complete"; while it grows, only its last piece is touched. */
export function showText(container, text, as) {
  if (container.shownText === text && container.shownAs === as) return;
  container.shownText = text;
  container.shownAs = as;
  const plain = as === "plain";
  const wanted = AS[as](text);
  const shown = (container.shown ??= []);
  while (shown.length > wanted.length) shown.pop().node.remove();
  wanted.forEach((piece, i) => {
    const old = shown[i];
    const same = old && old.code === piece.code && old.language === piece.language;
    if (same && old.text === piece.text) return;
    if (same) {
      if (piece.text.startsWith(old.text)) old.leaf.appendData(piece.text.slice(old.text.length));
      else old.leaf.data = piece.text;
      old.text = piece.text;
      return;
    }
    const made = piece.code ? codeBlock(piece) : plainBlock(piece, plain);
    if (old) old.node.replaceWith(made.node);
    else container.append(made.node);
    shown[i] = made;
  });
}

function plainBlock(piece, plain) {
  const leaf = document.createTextNode(piece.text);
  return { ...piece, leaf, node: element("div", { className: plain ? "plain" : "words" }, leaf) };
}

/** A <pre> with a head: { node, leaf }, whose leaf is the text. */
export function codeBlock(piece) {
  const leaf = document.createTextNode(piece.text);
  const copy = button("Copy", async () => {
    copy.textContent = (await copyText(leaf.data)) ? "Copied" : "Not copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  }, { "aria-label": "Copy this code" });
  const head = element("div", { className: "code-head" }, element("span", {}, piece.language || "code"), copy);
  const pre = element("pre", { tabIndex: 0 }, element("code", {}, leaf));
  return { ...piece, leaf, node: element("div", { className: "code" }, head, pre) };
}
