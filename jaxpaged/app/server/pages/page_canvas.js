// The map of the pool: a cell a page. Cells are copied into one buffer of pixels, and only where a page changed.

import { cellPixels, colour, FREE, packed, themeColour } from "./palette.js";

const LARGEST = 36; // CSS pixels of a cell

export class PageCanvas {
  num = 0;
  columns = 1;
  pitch = 1; // device pixels
  emphasised = -1; // a sequence: the others are drawn pale
  #sprites = new Map();
  #drawn = new Int32Array(0); // what stands in each cell: 4 * (owner + 1) + state, -1 nothing
  #image = null;
  #pixels = null;
  #view = null; // what was shown last

  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false, willReadFrequently: true }); // its pixels are made here
    this.readTheme();
    new ResizeObserver(() => this.redraw()).observe(canvas.parentElement);
  }

  /** After another theme was chosen. */
  readTheme() {
    this.theme = Object.fromEntries(["back", "free", "cached", "ink"].map((name) => [name, themeColour(`--${name}`)]));
    this.redraw();
  }

  emphasise(sequence) {
    if (sequence === this.emphasised) return;
    this.emphasised = sequence;
    this.redraw();
  }

  redraw() {
    this.#sprites.clear();
    this.#drawn.fill(-1);
    this.#clear();
    if (this.#view) this.show(...this.#view);
  }

  /** Draws the pages that changed. `state` is a digit a page, `owner` a sequence a page or -1. */
  show(state, owner) {
    this.#view = [state, owner];
    if (!this.#fit(state.length)) return;
    let [first, last, changed] = [-1, -1, 0];
    for (let page = 0; page < this.num; page++) {
      const is = 4 * ((owner[page] ?? -1) + 1) + (state.charCodeAt(page) & 3);
      if (this.#drawn[page] === is) continue;
      this.#drawn[page] = is;
      this.#copy(page, is);
      if (first < 0) first = page;
      last = page;
      changed += 1;
    }
    if (changed) {
      const top = Math.floor(first / this.columns) * this.pitch;
      const bottom = (Math.floor(last / this.columns) + 1) * this.pitch;
      this.context.putImageData(this.#image, 0, 0, 0, top, this.canvas.width, bottom - top);
    }
    Object.assign(this.canvas.dataset, { pages: this.num, columns: this.columns, pitch: this.pitch, changed });
  }

  /** The page at a point in CSS pixels of the canvas, -1 outside. */
  pageAt(x, y) {
    const pitch = this.pitch / devicePixelRatio;
    const [column, row] = [Math.floor(x / pitch), Math.floor(y / pitch)];
    const page = row * this.columns + column;
    return column >= 0 && column < this.columns && row >= 0 && page < this.num ? page : -1;
  }

  /** [left, top, side] of a page in CSS pixels. */
  boxOf(page) {
    const pitch = this.pitch / devicePixelRatio;
    return [(page % this.columns) * pitch, Math.floor(page / this.columns) * pitch, pitch];
  }

  /** The largest cells with which all pages fit; never below two pixels, then the map grows downwards. */
  #fit(num) {
    const ratio = devicePixelRatio;
    const width = Math.floor(this.canvas.parentElement.clientWidth * ratio);
    const height = Math.floor(Math.max(200, Math.min(460, innerHeight * 0.42)) * ratio);
    if (!num || width < 2) return false;
    let pitch = Math.floor(LARGEST * ratio);
    while (pitch > 2 && Math.ceil(num / Math.floor(width / pitch)) * pitch > height) pitch -= 1;
    const columns = Math.min(num, Math.max(1, Math.floor(width / pitch)));
    const rows = Math.ceil(num / columns);
    const [wide, high] = [columns * pitch, rows * pitch];
    if (num === this.num && pitch === this.pitch && columns === this.columns && this.canvas.width === wide) return true;
    Object.assign(this, { num, pitch, columns });
    this.#sprites.clear();
    this.#drawn = new Int32Array(num).fill(-1);
    this.canvas.width = wide;
    this.canvas.height = high;
    this.canvas.style.width = `${wide / ratio}px`;
    this.canvas.style.height = `${high / ratio}px`;
    this.#image = new ImageData(wide, high);
    this.#pixels = new Uint32Array(this.#image.data.buffer);
    this.#clear();
    return true;
  }

  #clear() {
    if (!this.#image) return;
    this.#pixels.fill(packed(this.theme.back));
    this.context.putImageData(this.#image, 0, 0);
  }

  #copy(page, is) {
    const { pitch, columns } = this;
    const sprite = this.#sprite(is);
    const wide = columns * pitch;
    let at = Math.floor(page / columns) * pitch * wide + (page % columns) * pitch;
    for (let row = 0; row < pitch; row++, at += wide) {
      this.#pixels.set(sprite.subarray(row * pitch, (row + 1) * pitch), at);
    }
  }

  #sprite(is) {
    let sprite = this.#sprites.get(is);
    if (!sprite) {
      const [owner, state] = [(is >> 2) - 1, is & 3];
      let rgb = owner < 0 ? this.theme.cached : colour(owner);
      if (this.emphasised >= 0 && owner !== this.emphasised && state !== FREE) {
        rgb = rgb.map((value, i) => Math.round(0.25 * value + 0.75 * this.theme.free[i]));
      }
      sprite = cellPixels(this.pitch, state, rgb, this.theme);
      this.#sprites.set(is, sprite);
    }
    return sprite;
  }
}
