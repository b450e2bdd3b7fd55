// Colours of sequences: those of jaxpaged/page_map.py, so that a picture and this page agree.

const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#b8a800"]; // Okabe and Ito
export const FREE = 0, USED = 1, SHARED = 2, CACHED = 3; // states of a page

/** [red, green, blue] of a sequence: seven that are easy to tell apart, then hues as far from each other as may be. */
export function colour(sequence) {
  const named = COLOURS[sequence];
  if (named) return [1, 3, 5].map((i) => parseInt(named.slice(i, i + 2), 16));
  const hue = (sequence * 0.618034) % 1;
  const part = (shift) => {
    const h = (hue + shift + 1) % 1;
    const [low, high] = [0.25, 0.75]; // lightness and saturation one half
    if (h < 1 / 6) return low + (high - low) * 6 * h;
    if (h < 1 / 2) return high;
    return h < 2 / 3 ? low + (high - low) * (2 / 3 - h) * 6 : low;
  };
  return [part(1 / 3), part(0), part(-1 / 3)].map((value) => Math.round(255 * value));
}

/** [red, green, blue] of a custom property of the page that is a colour. */
export function themeColour(name) {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
}

/**
 * The pixels of a cell, `pitch` wide and high with its gap: a Uint32Array.
 *
 * A page of one sequence is plain; a shared one has an edge, and where there is no room for it one corner; a cached one is
 * hatched; a free one is the faint ground. So they differ without colour as well.
 */
export function cellPixels(pitch, state, rgb, theme) {
  const gap = pitch < 4 ? 0 : pitch < 14 ? 1 : Math.round(pitch / 14) + 1;
  const side = pitch - gap;
  const edge = side < 5 ? 0 : Math.max(1, Math.round(side / 10));
  const [back, free, cached, ink] = [theme.back, theme.free, theme.cached, theme.ink].map(packed);
  const own = packed(rgb);
  const stripe = Math.max(1, Math.round(side / 8));
  const pixels = new Uint32Array(pitch * pitch).fill(back);
  for (let y = 0; y < side; y++) {
    for (let x = 0; x < side; x++) {
      let pixel = state === FREE ? free : own;
      if (state === CACHED) pixel = Math.floor((x + y) / stripe) % 2 ? free : cached;
      if (state === SHARED) {
        const onEdge = x < edge || y < edge || x >= side - edge || y >= side - edge;
        if (edge ? onEdge : x + y === 0) pixel = ink;
      }
      pixels[y * pitch + x] = pixel;
    }
  }
  return pixels;
}

/** A pixel as ImageData keeps it; every machine that runs browsers is little-endian. */
export function packed([red, green, blue]) {
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}
