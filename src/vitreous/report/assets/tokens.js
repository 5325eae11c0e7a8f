// Which patches share a token, and which have none, where tokens were merged or dropped.

const NO_TOKEN = 65535;

/** {height, width, ids, sizes}: the token of each patch of an image, and how many patches each stands for; or null. */
function tokensOf(reading, layer, image) {
  const entry = own(reading.tokens, layer);
  if (!entry || image < 0 || image >= reading.shown) return null;
  const { cells } = entry.as === undefined ? entry : reading.tokens[entry.as];
  if (!decoded.has(cells)) decoded.set(cells, new Uint16Array(bytesOf(cells).buffer));
  const size = entry.height * entry.width;
  const ids = decoded.get(cells).subarray(image * size, (image + 1) * size);
  const sizes = new Map();
  for (const id of ids) sizes.set(id, (sizes.get(id) || 0) + 1);
  return { height: entry.height, width: entry.width, ids, sizes };
}

const groupColor = (id) => oklch(0.74, 0.15, (id * 137.5) % 360);

/** Darkens patches without a token, and frames each group of patches that share one, in a colour of its own. */
function drawTokens(context, { height, width, ids, sizes }, across, down) {
  const edge = (i, n, size) => Math.round((i * size) / n);
  const other = (row, column, id) => row < 0 || column < 0 || row >= height || column >= width || ids[row * width + column] !== id;
  ids.forEach((id, i) => {
    const [row, column] = [Math.floor(i / width), i % width];
    const [x, y] = [edge(column, width, across), edge(row, height, down)];
    const [right, low] = [edge(column + 1, width, across), edge(row + 1, height, down)];
    if (id === NO_TOKEN) {
      context.fillStyle = "rgb(12 16 20 / 82%)";
      context.fillRect(x, y, right - x, low - y);
      return;
    }
    if (sizes.get(id) < 2) return;
    const color = groupColor(id).join(" ");
    context.fillStyle = `rgb(${color} / 16%)`;
    context.fillRect(x, y, right - x, low - y);
    const inset = across > 200 ? 2.5 : 1;
    const sides = [
      [row - 1, column, x + inset, y + inset, right - inset, y + inset],
      [row + 1, column, x + inset, low - inset, right - inset, low - inset],
      [row, column - 1, x + inset, y + inset, x + inset, low - inset],
      [row, column + 1, right - inset, y + inset, right - inset, low - inset],
    ];
    for (const [ink, line] of across > 200 ? [["#000", 5], [`rgb(${color})`, 3]] : [[`rgb(${color})`, 2]]) {
      context.strokeStyle = ink;
      context.lineWidth = line;
      context.beginPath();
      for (const [r, c, x1, y1, x2, y2] of sides)
        if (other(r, c, id)) {
          context.moveTo(x1, y1);
          context.lineTo(x2, y2);
        }
      context.stroke();
    }
  });
}

/** How many tokens there are for the patches of an image, in words. */
function tokensText({ ids, sizes }) {
  const dropped = sizes.get(NO_TOKEN) || 0;
  const groups = [...sizes].filter(([id, size]) => id !== NO_TOKEN && size > 1).map(([, size]) => size);
  const count = sizes.size - (dropped ? 1 : 0);
  return [
    `${plural(count, "token")} for ${ids.length} patches`,
    groups.length > 1 ? `${groups.length} of several patches, at most ${Math.max(...groups)}` : "",
    groups.length === 1 ? `one of ${groups[0]} patches` : "",
    dropped ? `${dropped} dropped` : "",
  ]
    .filter(Boolean)
    .join(", ");
}

/** What became of the patch at a place (0 to 1, 0 to 1), in words. */
function patchText({ height, width, ids, sizes }, y, x) {
  const id = ids[Math.floor(y * height) * width + Math.floor(x * width)];
  const others = sizes.get(id) - 1;
  return id === NO_TOKEN ? "dropped" : others ? `one token with ${plural(others, "other patch").replace(/patchs$/, "patches")}` : "a token of its own";
}

/** A small picture of the tokens of a layer. */
function tokenTile(reading, image, layer) {
  const tokens = tokensOf(reading, layer, image);
  const canvas = el("canvas", { width: 84, height: Math.round((84 * tokens.height) / tokens.width), "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  context.fillStyle = "rgb(150 160 168)";
  context.fillRect(0, 0, canvas.width, canvas.height);
  drawTokens(context, tokens, canvas.width, canvas.height);
  const label = `layer ${layer}: ${tokens.sizes.size - (tokens.sizes.has(NO_TOKEN) ? 1 : 0)}`;
  return tileButton(canvas, label, layer === state.layer, { layer, groups: true });
}
