// Drawing on the canvas: image, map, marks, outline, cursor.

function paint(node) {
  const { reading, map, range } = node.shown;
  const image = reading.images[node.shown.image];
  const canvas = node.querySelector("canvas");
  const number = image ? pictureOf(image, map) : null;
  const photo = number !== null ? images[number] : null;
  const [w, h] = photo?.naturalWidth
    ? [photo.naturalWidth, photo.naturalHeight]
    : map
      ? [map.width, map.height]
      : [1, 1];
  const height = Math.round((CANVAS * h) / w);
  if (canvas.height !== height) canvas.height = height;
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, CANVAS, height);
  if (photo?.naturalWidth) context.drawImage(photo, 0, 0, CANVAS, height);
  if (map) {
    eachCell(map, canvas, (value, x, y, width, tall) => {
      if (Number.isNaN(value)) return;
      context.globalAlpha = photo?.naturalWidth ? cover(strength(value, range), range.signed) : 1;
      context.fillStyle = `rgb(${colorOf(map, value, range).join(" ")})`;
      context.fillRect(x, y, width, tall);
    });
    context.globalAlpha = 1;
  }
  const tokens = state.groups && map && map.layer >= 0 && tokensOf(reading, map.layer, node.shown.image);
  if (tokens) drawTokens(context, tokens, CANVAS, height);
  const marks =
    state.marks &&
    state.component !== "artifacts" &&
    mapOf(reading, "artifacts", map ? map.layer : state.layer, node.shown.image, -1);
  if (marks) eachCell(marks, canvas, (value, x, y, width, tall) => value > 0 && cross(context, x, y, width, tall));
  if (state.outline && image && image.mask !== null) outline(context, images[image.mask], CANVAS, height);
  if (map?.query) {
    const { height: rows, width: columns } = reading.queries.layers[map.layer];
    frame(context, map.query, [rows, columns], [CANVAS, height], ["#000", "#fff", QUERY_COLOR], [11, 8, 4]);
  }
  if (node.cursor && map)
    frame(context, [node.cursor.row, node.cursor.column], [map.height, map.width], [CANVAS, height], ["#000", "#fff"], [6, 3]);
}

/** The number of the picture that a map is of: of a changed image, where it is one. */
const pictureOf = (image, map) => (map && !map.query ? own(image.changed, map.component) : undefined) ?? image.picture;

const QUERY_COLOR = "#1fb6ff"; // on no scale of ours

/** A frame around one cell of a grid (rows, columns), in lines over one another. */
function frame(context, [row, column], [rows, columns], [width, height], colors, lines) {
  colors.forEach((color, i) => {
    context.strokeStyle = color;
    context.lineWidth = lines[i];
    context.strokeRect((column * width) / columns, (row * height) / rows, width / columns, height / rows);
  });
}

/** How much a value says, 0 to 1: its place in the range, or its distance from zero if it is signed. */
function strength(value, range) {
  const t = Math.min(Math.max((value - range.low) / (range.high - range.low), 0), 1);
  return range.signed ? Math.abs(2 * t - 1) : t;
}

/** Opacity of a cell: what says little lets more of the image through. 0 and 1 are none and all. */
const cover = (much, signed) => (state.opacity / 100) ** (1 + (signed ? 0.8 : 1.6) * (1 - much));

/** Calls with value and whole-pixel box of every cell, so that cells meet without seams. */
function eachCell(map, canvas, call) {
  const edge = (i, n, size) => Math.round((i * size) / n);
  for (let row = 0; row < map.height; row++) {
    for (let column = 0; column < map.width; column++) {
      const [x, y] = [edge(column, map.width, canvas.width), edge(row, map.height, canvas.height)];
      call(
        map.values[row * map.width + column],
        x,
        y,
        edge(column + 1, map.width, canvas.width) - x,
        edge(row + 1, map.height, canvas.height) - y,
      );
    }
  }
}

function cross(context, x, y, width, height) {
  const r = Math.min(width, height) * 0.26;
  const [cx, cy] = [x + width / 2, y + height / 2];
  for (const [color, line] of [
    ["#111", Math.max(4, r * 0.7)],
    ["#fff", Math.max(2, r * 0.3)],
  ]) {
    context.strokeStyle = color;
    context.lineWidth = line;
    context.beginPath();
    context.moveTo(cx - r, cy - r);
    context.lineTo(cx + r, cy + r);
    context.moveTo(cx + r, cy - r);
    context.lineTo(cx - r, cy + r);
    context.stroke();
  }
}

const outlines = new Map();

/** The border of a mask, as a path in the mask's own pixels. */
function outline(context, mask, width, height) {
  if (!mask.naturalWidth) return;
  if (!outlines.has(mask)) {
    const sheet = el("canvas", { width: mask.naturalWidth, height: mask.naturalHeight });
    const [w, h] = [sheet.width, sheet.height];
    const pen = sheet.getContext("2d", { willReadFrequently: true });
    pen.drawImage(mask, 0, 0);
    const data = pen.getImageData(0, 0, w, h).data;
    const inside = (x, y) => x >= 0 && y >= 0 && x < w && y < h && data[4 * (y * w + x)] > 127;
    const path = new Path2D();
    for (let y = 0; y <= h; y++)
      for (let x = 0; x <= w; x++) {
        if (inside(x, y) !== inside(x - 1, y)) {
          path.moveTo(x, y);
          path.lineTo(x, y + 1);
        }
        if (inside(x, y) !== inside(x, y - 1)) {
          path.moveTo(x, y);
          path.lineTo(x + 1, y);
        }
      }
    outlines.set(mask, path);
  }
  context.save();
  context.scale(width / mask.naturalWidth, height / mask.naturalHeight);
  for (const [color, line] of [
    ["#000", 5],
    ["#fff", 2.5],
  ]) {
    context.strokeStyle = color;
    context.lineWidth = (line * mask.naturalWidth) / width;
    context.lineCap = "square";
    context.stroke(outlines.get(mask));
  }
  context.restore();
}
