// Colours of maps. Made in OKLCH, so that equal steps of value look like equal steps of colour.

/** sRGB bytes of lightness, chroma and hue (degrees); chroma is lowered until the colour exists. */
function oklch(lightness, chroma, hue) {
  for (let c = chroma; ; c -= 0.01) {
    const a = Math.max(c, 0) * Math.cos((hue * Math.PI) / 180);
    const b = Math.max(c, 0) * Math.sin((hue * Math.PI) / 180);
    const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
    const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
    const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
    const linear = [
      4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
      -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
      -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
    ];
    if (c <= 0 || linear.every((x) => x > -0.001 && x < 1.001)) {
      return linear.map((x) => {
        const y = Math.min(Math.max(x, 0), 1);
        return Math.round(255 * (y <= 0.0031308 ? 12.92 * y : 1.055 * y ** (1 / 2.4) - 0.055));
      });
    }
  }
}

const ramp = (at) => Array.from({ length: 256 }, (_, index) => at(index / 255));
const SCALES = {
  // From dark violet over red to pale yellow; lightness only rises.
  plain: ramp((t) => oklch(0.2 + 0.77 * t, 0.05 + 0.15 * Math.sin(Math.PI * Math.min(1, t * 1.05)), 290 + 175 * t)),
  // Blue below zero, orange above, near white at zero.
  signed: ramp((t) => oklch(0.97 - 0.46 * Math.abs(2 * t - 1) ** 0.9, 0.19 * Math.abs(2 * t - 1), t < 0.5 ? 255 : 45)),
  // Two sides that claim nothing: teal and violet.
  unsigned: ramp((t) =>
    oklch(0.96 - 0.4 * Math.abs(2 * t - 1) ** 0.9, 0.13 * Math.abs(2 * t - 1), t < 0.5 ? 185 : 305),
  ),
};
const SURE = 0.95; // confidence from which a sign is taken as known

/** Black or white, whichever stands out more. */
function contrasting(color) {
  const [r, g, b] = color.map((byte) =>
    byte / 255 <= 0.03928 ? byte / 255 / 12.92 : ((byte / 255 + 0.055) / 1.055) ** 2.4,
  );
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

const HUES = [255, 40, 150, 310, 90, 205, 355]; // far apart, the first ones farthest

/** A line colour for the i-th of n, readable on light and dark ground. What has an order (layers, many) goes round the hues. */
function lineColor(i, n, ordered = n > HUES.length) {
  const t = n > 1 ? i / (n - 1) : 0;
  const color = ordered ? oklch(0.54 + 0.12 * t, 0.13, 262 - 225 * t) : oklch(0.6, 0.14, HUES[i]);
  return `rgb(${color.join(" ")})`;
}

const decoded = new Map();

/** The bytes of a text in base64. */
function bytesOf(text) {
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  return bytes;
}

/** The bytes of a block of maps: [ranges as float32 pairs, cells]. */
function block(entry) {
  if (!decoded.has(entry)) {
    const bytes = bytesOf(entry.cells);
    const count = bytes.length / (entry.height * entry.width + 8);
    decoded.set(entry, { ranges: new DataView(bytes.buffer, 0, 8 * count), cells: bytes.subarray(8 * count) });
  }
  return decoded.get(entry);
}

/** The stored map of a layer, or of the whole model where layers have none. */
const entryOf = (reading, component, layer) =>
  reading.maps[`${component}/${layer}`] || reading.maps[`${component}/-1`];

/**
 * One map with its values, or null: component, layer (or that of the whole model), image; head -1 is the mean of all.
 * Of a volume or a clip, `values` are those of one slice; its range is that of all slices, so that their colours agree.
 */
function mapOf(reading, component, layer, image, head, slice = state.slice) {
  const entry = entryOf(reading, component, layer);
  if (!entry || image < 0 || image >= reading.shown || (entry.heads && head >= entry.heads)) return null;
  const size = entry.height * entry.width;
  const { ranges, cells } = block(entry);
  const [heads, depth] = [Math.max(entry.heads, 1), Math.max(entry.depth, 1)];
  const all = new Float32Array(depth * size);
  const taken = entry.heads && head >= 0 ? [head] : [...Array(heads).keys()];
  for (const one of taken) {
    for (let plane = 0; plane < depth; plane++) {
      const number = (image * heads + one) * depth + plane;
      const [low, high] = [ranges.getFloat32(8 * number, true), ranges.getFloat32(8 * number + 4, true)];
      for (let i = 0; i < size; i++) {
        const byte = cells[number * size + i];
        all[plane * size + i] += byte === 255 ? NaN : (low + (byte / 254) * (high - low)) / taken.length;
      }
    }
  }
  const shown = Math.min(slice, depth - 1);
  const confidence = entry.confidence ? entry.confidence[image] : null;
  return {
    values: all.subarray(shown * size, (shown + 1) * size),
    slice: entry.depth ? shown : null,
    component,
    layer: entry === reading.maps[`${component}/${layer}`] ? layer : -1,
    head: entry.heads ? head : -1,
    heads: entry.heads,
    height: entry.height,
    width: entry.width,
    signed: entry.signed,
    confidence,
    unsure: entry.signed && confidence !== null && confidence < SURE,
    ...extent(all),
  };
}

/** The least and the largest value, and that below which 98 % are. */
function extent(all) {
  const finite = [...all].filter(Number.isFinite);
  return {
    low: finite.length ? Math.min(...finite) : 0,
    high: finite.length ? Math.max(...finite) : 0,
    top: quantile(finite, 0.98),
  };
}

function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : 0;
}

/** {low, high, scale} for maps that share one range of colours. Signed maps have zero in the middle. */
function rangeOf(maps, clip) {
  const signed = maps.some((map) => map.signed);
  const high = Math.max(...maps.map((map) => (clip && !signed ? map.top : map.high)));
  const low = Math.min(...maps.map((map) => map.low));
  const most = Math.max(Math.abs(low), Math.abs(high)) || 1;
  return signed ? { low: -most, high: most, signed } : { low, high: high > low ? high : low + 1e-9, signed };
}

function colorOf(map, value, range) {
  const scale = SCALES[map.signed ? (map.unsure ? "unsigned" : "signed") : "plain"];
  const t = (value - range.low) / (range.high - range.low);
  return scale[Math.round(255 * Math.min(Math.max(t, 0), 1))];
}
