// The live pool beside the conversation: asks the server twice a second, shows the map, the numbers and the sequences.

import { apiKey, getJson } from "./api.js";
import { byId, element } from "./dom.js";
import { PageCanvas } from "./page_canvas.js";
import { CACHED, cellPixels, colour, FREE, SHARED, USED } from "./palette.js";

const EVERY = 500; // milliseconds
const AFTER_ERROR = 3000;
const MOST_LISTED = 24;
const KINDS = [
  [USED, "used", "one sequence's"],
  [SHARED, "shared", "several sequences'"],
  [CACHED, "cached", "kept for a prefix that comes again"],
  [FREE, "free", ""],
];
const NUMBERS = [
  ["tokens_per_second", "tokens a second", (p) => rate(p.tokens_per_second), "generated"],
  ["prompt_tokens_per_second", "prompt tokens a second", (p) => rate(p.prompt_tokens_per_second), "prefilled"],
  ["running", "running", (p) => whole(p.running), "requests that compute"],
  ["waiting", "waiting", (p) => whole(p.waiting), "requests in the queue"],
  ["pages_used", "pages used", (p) => whole(p.pages_used), "held by a sequence"],
  ["pages_cached", "pages cached", (p) => whole(p.pages_cached), "free as soon as they are needed"],
  ["pages_free", "pages free", (p) => whole(p.pages_free), ""],
  ["waste", "waste", (p) => percent(p.waste), "slots of used pages that hold no token"],
  ["prefix_hit_rate", "prefix hits", (p) => percent(p.prefix_hit_rate), "share of what was looked up that the prefix cache had"],
  ["preemptions", "preemptions", (p) => whole(p.preemptions), "sequences put back for want of pages"],
];

export class Pool {
  #timer = 0;
  #pool = null;
  #page = -1; // the one that is pointed at
  #pinned = -1; // the sequence whose button is pressed
  #busy = false;
  #refused; // the key that the server did not accept
  #numbers = new Map();
  #counts = [];

  constructor(askKey) {
    this.askKey = askKey;
    this.canvas = byId("pages");
    this.map = new PageCanvas(this.canvas);
    for (const [name, words, , title] of NUMBERS) {
      const value = element("dd", {}, "–");
      const term = element("dt", {}, words);
      byId("numbers").append(element("div", { title, className: name }, term, value));
      this.#numbers.set(name, { term, value });
    }
    for (const [state, name, words] of KINDS) {
      const swatch = element("canvas", { width: 14, height: 14, className: "swatch", "aria-hidden": "true" });
      const count = element("b");
      this.#counts[state] = { swatch, count };
      byId("kinds").append(element("li", { title: words }, swatch, `${name} `, count));
    }
    this.#listen();
    this.themeChanged();
    document.addEventListener("visibilitychange", () => this.start());
  }

  /** Asks now, and again and again while the page can be seen. */
  start() {
    clearTimeout(this.#timer);
    if (!document.hidden) this.#ask();
  }

  themeChanged() {
    this.map.readTheme();
    for (const [state] of KINDS) {
      const { swatch } = this.#counts[state];
      const rgb = state === USED || state === SHARED ? colour(0) : this.map.theme.cached;
      const pixels = cellPixels(16, state, rgb, this.map.theme);
      const image = new ImageData(new Uint8ClampedArray(pixels.buffer), 16, 16);
      swatch.getContext("2d").putImageData(image, 0, 0);
    }
  }

  async #ask() {
    if (this.#busy) return;
    this.#busy = true;
    const key = apiKey();
    let next = EVERY;
    try {
      this.#show(await getJson("pool", 5000));
      this.#problem("");
    } catch (error) {
      next = AFTER_ERROR;
      if (error.kind === "key") {
        this.#problem("The pool is shown once the API key is given.");
        if (key !== apiKey()) next = 0; // another one was given meanwhile
        else if (key !== this.#refused) this.askKey(Boolean(key)); // once a key; then the button at the top asks
        this.#refused = key;
      } else if (error.status === 404) {
        this.#problem("This server has no pool of pages to show.");
        return;
      } else this.#problem(this.#pool ? `${error.message} These are the last numbers.` : error.message);
    } finally {
      this.#busy = false;
    }
    clearTimeout(this.#timer);
    if (!document.hidden) this.#timer = setTimeout(() => this.#ask(), next);
  }

  #problem(words) {
    const line = byId("pool-problem");
    if (line.textContent !== words) line.textContent = words;
    line.hidden = !words;
    byId("pool").classList.toggle("stale", Boolean(words));
  }

  #show(pool) {
    this.#pool = pool;
    const bytes = pool.bytes_per_page ? `, ${size(pool.bytes_per_page * pool.num_pages)}` : "";
    const groups = pool.groups?.length > 1 ? ` (${pool.groups.map(groupWords).join(", ")})` : "";
    setText(byId("pool-size"), `${count(pool.num_pages, "page")} of ${pool.page_size} tokens${bytes}${groups}`);
    for (const [name, words, shown] of NUMBERS) {
      const { term, value } = this.#numbers.get(name);
      setText(value, shown(pool));
      if (bytes && name.startsWith("pages_")) setText(term, `${words}, ${size(pool[name] * pool.bytes_per_page)}`);
    }
    const counts = [0, 0, 0, 0];
    for (let page = 0; page < pool.state.length; page++) counts[pool.state.charCodeAt(page) & 3] += 1;
    for (const [state] of KINDS) setText(this.#counts[state].count, counts[state].toLocaleString("en"));
    this.#showSequences(pool);
    this.map.show(pool.state, pool.owner);
    this.#showPage();
  }

  #showSequences({ sequences, owner, state }) {
    const held = new Map();
    for (let page = 0; page < owner.length; page++) {
      if (owner[page] >= 0 && state[page] !== "0") held.set(owner[page], (held.get(owner[page]) ?? 0) + 1);
    }
    const list = byId("sequences");
    const listed = sequences.slice(0, MOST_LISTED);
    const wanted = new Set(listed.map(({ slot }) => String(slot)));
    for (const row of [...list.children]) if (!wanted.has(row.dataset.slot)) row.remove();
    listed.forEach((sequence, i) => {
      const slot = String(sequence.slot);
      let row = [...list.children].find((child) => child.dataset.slot === slot);
      if (!row) row = this.#sequenceRow(sequence.slot);
      if (list.children[i] !== row) list.insertBefore(row, list.children[i] ?? null);
      const pages = count(held.get(sequence.slot) ?? 0, "page");
      const doing = sequence.state === "prefill" ? "reads the prompt" : "writes";
      setText(row.lastChild.lastChild, `slot ${slot}: ${count(sequence.tokens, "token")}, ${pages}, ${doing}`);
    });
    const more = sequences.length - listed.length;
    if (!sequences.length) list.append(element("li", { className: "faint" }, "none: no request is being computed"));
    else if (more) list.append(element("li", { className: "faint" }, `and ${more} more`));
    if (this.#pinned >= 0 && !sequences.some(({ slot }) => slot === this.#pinned)) {
      this.#pinned = -1;
      this.map.emphasise(-1);
    }
  }

  #sequenceRow(slot) {
    const swatch = element("span", { className: "swatch", "aria-hidden": "true" });
    swatch.style.backgroundColor = `rgb(${colour(slot).join(",")})`;
    const press = element("button", { type: "button", title: "Show its pages alone" }, swatch, element("span"));
    press.setAttribute("aria-pressed", "false");
    press.onclick = () => {
      this.#pinned = this.#pinned === slot ? -1 : slot;
      for (const row of byId("sequences").querySelectorAll("li[data-slot]")) {
        row.firstChild.setAttribute("aria-pressed", String(row.dataset.slot === String(this.#pinned)));
      }
      this.map.emphasise(this.#pinned);
    };
    press.onpointerenter = () => this.map.emphasise(slot);
    press.onpointerleave = () => this.map.emphasise(this.#pinned);
    const row = element("li", {}, press);
    row.dataset.slot = slot;
    return row;
  }

  #listen() {
    const { canvas } = this;
    const point = (event) => {
      const page = this.map.pageAt(event.offsetX, event.offsetY);
      if (page >= 0) this.#pointAt(page);
    };
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse" && document.activeElement !== canvas) this.#pointAt(-1);
    });
    canvas.addEventListener("focus", () => this.#page < 0 && this.map.num && this.#pointAt(0));
    canvas.addEventListener("blur", () => this.#pointAt(-1));
    canvas.addEventListener("keydown", (event) => {
      const { columns, num } = this.map;
      const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
      let page = this.#page + (steps[event.key] ?? 0);
      if (event.key === "Home") page = 0;
      else if (event.key === "End") page = num - 1;
      else if (!(event.key in steps)) return;
      event.preventDefault();
      if (page >= 0 && page < num) this.#pointAt(page);
    });
  }

  #pointAt(page) {
    this.#page = page;
    this.#showPage();
  }

  #showPage() {
    const page = this.#pool && this.#page < this.map.num ? this.#page : -1;
    const cursor = byId("cursor");
    cursor.hidden = page < 0;
    if (page >= 0) {
      const [left, top, side] = this.map.boxOf(page);
      Object.assign(cursor.style, { left: `${left}px`, top: `${top}px`, width: `${side}px`, height: `${side}px` });
    }
    setText(byId("page-words"), page < 0 ? "Point at a page to see whose it is." : this.#describe(page));
  }

  /** What a page is for, where layers of several kinds have pools of their own; they follow each other. */
  #groupOf(page) {
    const { groups } = this.#pool;
    if (!(groups?.length > 1)) return "";
    let end = 0;
    const group = groups.find(({ num_pages }) => page < (end += num_pages));
    const layers = count(group.layers, "layer");
    return group.window ? `, of ${layers} that see ${count(group.window, "token")}` : `, of ${layers} that see all`;
  }

  #describe(page) {
    const { state, owner, sequences } = this.#pool;
    const name = `Page ${page.toLocaleString("en")}${this.#groupOf(page)}`;
    const is = Number(state[page]);
    if (is === FREE) return `${name}: free.`;
    if (is === CACHED) return `${name}: cached. No sequence holds it; it is kept for a prefix that comes again.`;
    const slot = owner[page];
    const sequence = sequences.find((one) => one.slot === slot);
    const whose = sequence ? `slot ${slot} (${sequence.request_id}, ${count(sequence.tokens, "token")})` : `slot ${slot}`;
    return is === SHARED ? `${name}: shared by ${whose} and others.` : `${name}: ${whose}.`;
  }
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const count = (n, word) => `${Number(n).toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const groupWords = ({ num_pages, window }) =>
  `${num_pages.toLocaleString("en")} for ${window ? `windows of ${window.toLocaleString("en")}` : "all tokens"}`;
const whole = (value) => (Number.isFinite(value) ? value.toLocaleString("en") : "–");
const rate = (value) => (Number.isFinite(value) ? value.toFixed(value < 100 ? 1 : 0) : "–");
const percent = (value) => (Number.isFinite(value) ? `${(100 * value).toFixed(1)} %` : "–");

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (bytes >= 1024 && i < units.length - 1) {
    bytes /= 1024;
    i += 1;
  }
  return `${bytes.toFixed(i && bytes < 100 ? 1 : 0)} ${units[i]}`;
}
