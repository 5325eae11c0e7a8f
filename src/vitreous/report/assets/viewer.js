// The maps: what is chosen, drawn over the image, with its scale, and its neighbours in small.

const images = DATA.pictures.map((address) => {
  const image = new Image();
  image.src = address;
  return image;
});
const CANVAS = 720; // pixels across

function viewer() {
  const { node } = part("maps", "Maps");
  const strip = choice("Image", (image) => set({ image }), "thumbs");
  const component = choice("Map", (value) => set({ component: value }));
  const layer = choice("Layer", (value) => set({ layer: value }));
  const head = choice("Head", (value) => set({ head: value }));
  const about = el("p", { class: "about", "aria-live": "polite" });
  const opacity = el("input", { type: "range", min: 0, max: 100, step: 5, value: state.opacity, "aria-label": "Opacity of the map, percent",
    on: { input: () => set({ opacity: Number(opacity.value) }) } });
  const both = check("Same colours in A and B", "shared");
  const options = el("fieldset", { class: "choice options" }, el("legend", {}, "Drawing"),
    el("label", { class: "slider" }, el("span", {}, "Image"), opacity, el("span", {}, "Map")),
    check("Mark artifact tokens", "marks"), check("Outline the object", "outline"), check("Clip the highest 2 %", "clip"), both);
  const compare = el("div", { class: "pane-choice" });
  const panes = el("div", { class: "panes" });
  const small = el("div", { class: "small-multiples" });
  const limits = el("p", { class: "quiet" });
  node.append(limits, strip.field, compare,
    el("div", { class: "viewer" }, panes, el("div", { class: "controls" }, component.field, about, layer.field, head.field, options)), small);

  section(["panes"], () => { choosePanes(compare); limits.textContent = limitText(); });
  section(["panes", "image", "component", "layer", "head"], () => {
    const readings = shownReadings();
    settle(readings);
    strip.field.hidden = !readings[0].shown;
    strip.show(readings[0].images.map((image, value) => ({ value, label: image.name, key: image.picture, title: image.name, content: thumb(image) })), state.image);
    const names = componentsOf(readings);
    component.show(names.map((value) => ({ value, label: componentName(value) })), state.component);
    const told = readings.map((r) => r.components.find((c) => c.name === state.component)).find(Boolean);
    const perHead = readings.some((r) => r.maps[`${state.component}/${state.layer}`]?.heads);
    const alone = !readings.some((r) => r.maps[`${state.component}/${state.layer}`]);
    about.textContent = told ? [told.about, told.rule ? `${told.signed ? "Sign by" : "By"} ${told.rule}` : "", alone ? "one map for the whole model" : ""].filter(Boolean)
      .map((text) => `${capital(text).replace(/\.$/, "")}.`).join(" ") : "";
    layer.show(layersOf(readings).map((value) => ({ value, label: String(value), title: layerTitle(readings, value) })), state.layer, alone);
    const heads = Math.max(0, ...readings.map((r) => r.layers.find((l) => l.layer === state.layer)?.heads || 0));
    head.show([-1, ...Array(heads).keys()].map((value) => ({ value, label: value < 0 ? "mean" : String(value) })), state.head, !perHead);
  });
  section(["panes", "image", "component", "layer", "head", "opacity", "marks", "outline", "clip", "shared"], () => {
    both.hidden = state.panes.length < 2;
    drawPanes(panes);
  });
  section(["panes", "image", "component", "layer", "head"], () => neighbours(small));
  for (const image of images) image.addEventListener("load", () => drawPanes(panes), { once: true });
}

function limitText() {
  return shownReadings().filter((r) => r.shown < r.count).slice(0, 1).map((r) =>
    `Maps of the first ${r.shown} of ${plural(r.count, "image")}, to keep this page small. Numbers are of all images.`).join("");
}

/** What is chosen must exist in at least one of the readings. */
function settle(readings) {
  const names = componentsOf(readings);
  if (!names.includes(state.component) && names.length) state.component = names[0];
  const layers = layersOf(readings);
  if (!layers.includes(state.layer) && layers.length) state.layer = layers[Math.floor(layers.length / 2)];
  if (state.image >= readings[0].shown) state.image = 0;
  const heads = Math.max(0, ...readings.map((r) => r.layers.find((l) => l.layer === state.layer)?.heads || 0));
  if (state.head >= heads) state.head = -1;
}

/** Names of the components that there are maps of, the best known first. */
function componentsOf(readings) {
  const order = ["attention", "rollout", "foreground", "u1", "u2", "u3", "k1", "artifacts"];
  const place = (name) => (order.includes(name) ? order.indexOf(name) : order.length);
  const found = new Set(readings.flatMap((r) => r.components.map((c) => c.name).filter((name) => Object.keys(r.maps).some((map) => map.startsWith(`${name}/`)))));
  return [...found].sort((a, b) => place(a) - place(b));
}

const layersOf = (readings) => [...new Set(readings.flatMap((r) => r.layers.map((l) => l.layer)))].sort((a, b) => a - b);
const layerTitle = (readings, layer) => readings.map((r) => r.layers.find((l) => l.layer === layer)?.name).find(Boolean);

function thumb(image) {
  const picture = image.picture === null ? el("span", { class: "blank" }) : el("img", { src: DATA.pictures[image.picture], alt: "" });
  return el("span", { class: "thumb" }, picture, el("span", { class: "thumb-name" }, image.name));
}

// --- which readings are shown ----------------------------------------------------------------------------------------

function choosePanes(box) {
  const total = DATA.sources.reduce((sum, source) => sum + source.readings.length, 0);
  box.hidden = total < 2;
  if (total < 2) return;
  const two = state.panes.length > 1;
  if (!box.querySelector(".pane-row")) {
    const toggle = el("button", { type: "button", class: "plain", id: "second", on: { click: () => {
      const [first] = state.panes;
      const other = DATA.sources.length > 1 ? last((first.source + 1) % DATA.sources.length) : { source: first.source, at: first.at ? 0 : last(first.source).at };
      set({ panes: state.panes.length > 1 ? [first] : [first, other] });
    } } });
    box.append(paneRow(0), paneRow(1), toggle);
  }
  const rows = box.querySelectorAll(".pane-row");
  rows[1].hidden = !two;
  state.panes.forEach((pane, index) => showPaneRow(rows[index], pane, two ? LETTERS[index] : ""));
  box.querySelector("#second").textContent = two ? "Show only A" : "Compare side by side";
}

function paneRow(index) {
  const change = (pane) => set({ panes: state.panes.map((old, i) => (i === index ? { ...old, ...pane } : old)) });
  const select = el("select", { "aria-label": `Reading ${LETTERS[index]}`, on: { change: () => {
    const source = Number(select.value);
    change({ source, at: Math.min(state.panes[index].at, last(source).at) });
  } } }, DATA.sources.map((source, value) => el("option", { value }, source.name)));
  const range = el("input", { type: "range", min: 0, step: 1, on: { input: () => change({ at: Number(range.value) }) } });
  const step = (by) => () => change({ at: Math.min(Math.max(state.panes[index].at + by, 0), Number(range.max)) });
  return el("div", { class: "pane-row", "data-pane": index }, el("span", { class: `letter ${"ab"[index]}` }), select,
    el("span", { class: "scrubber" }, el("button", { type: "button", class: "step", "aria-label": "One epoch back", on: { click: step(-1) } }, "‹"), range,
      el("button", { type: "button", class: "step", "aria-label": "One epoch on", on: { click: step(1) } }, "›"), el("output", {})));
}

function showPaneRow(row, pane, letter) {
  const source = DATA.sources[pane.source];
  row.querySelector(".letter").textContent = letter;
  const select = row.querySelector("select");
  select.value = String(pane.source);
  select.hidden = DATA.sources.length < 2;
  const range = row.querySelector("input");
  row.querySelector(".scrubber").hidden = !source.epochs || source.epochs.length < 2;
  range.max = String(source.readings.length - 1);
  range.value = String(pane.at);
  if (source.epochs) {
    const text = `Epoch ${source.epochs[pane.at]} of ${source.epochs[source.epochs.length - 1]}`;
    range.setAttribute("aria-label", `Epoch of ${source.name}${letter ? `, ${letter}` : ""}`);
    range.setAttribute("aria-valuetext", text);
    row.querySelector("output").textContent = text;
  }
}

// --- the large maps --------------------------------------------------------------------------------------------------

function drawPanes(box) {
  const found = state.panes.map((pane) => {
    const reading = readingOf(pane);
    return { reading, image: imageIn(reading, state.image), map: mapOf(reading, state.component, state.layer, imageIn(reading, state.image), state.head) };
  });
  const there = found.map((f) => f.map).filter(Boolean);
  const alike = state.shared && new Set(there.map((m) => m.signed)).size === 1;
  while (box.children.length > found.length) box.lastChild.remove();
  found.forEach((one, index) => {
    if (!box.children[index]) box.append(pane(index));
    const range = one.map && rangeOf(alike ? there : [one.map], state.clip);
    showPane(box.children[index], index, one, range);
  });
  box.classList.toggle("two", found.length > 1);
}

function pane(index) {
  const canvas = el("canvas", { width: CANVAS, height: CANVAS, tabindex: 0, role: "img", "data-pane": index });
  const node = el("figure", { class: "pane" }, el("figcaption", {}), el("p", { class: "stamp small", hidden: true }, "Random weights: says nothing about a trained model"),
    el("div", { class: "stage" }, canvas, el("p", { class: "badge", hidden: true })), el("div", { class: "legend" }),
    el("output", { class: "readout", "aria-live": "polite" }), el("dl", { class: "image-facts" }),
    el("details", { class: "values" }, el("summary", {}, "This layer and head in numbers"), el("div")));
  const look = { row: 0, column: -1 };
  const say = () => {
    const map = node.shown?.map;
    if (!map) return;
    look.row = Math.min(Math.max(look.row, 0), map.height - 1);
    look.column = Math.min(Math.max(look.column, 0), map.width - 1);
    const value = map.values[look.row * map.width + look.column];
    node.querySelector(".readout").textContent = `Row ${look.row + 1}, column ${look.column + 1}: ${fmt(Number.isNaN(value) ? null : value)}`;
    node.cursor = look;
    paint(node);
  };
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!moves[event.key]) return;
    event.preventDefault();
    look.row += moves[event.key][0];
    look.column += moves[event.key][1];
    say();
  });
  canvas.addEventListener("blur", () => { node.cursor = null; if (node.shown) paint(node); });
  canvas.addEventListener("pointermove", (event) => {
    const map = node.shown?.map;
    if (!map) return;
    const area = canvas.getBoundingClientRect();
    look.row = Math.floor(((event.clientY - area.top) / area.height) * map.height);
    look.column = Math.floor(((event.clientX - area.left) / area.width) * map.width);
    say();
  });
  canvas.addEventListener("pointerleave", () => { node.cursor = null; if (node.shown) paint(node); });
  node.querySelector("details").addEventListener("toggle", () => numbersOf(node, index));
  return node;
}

function showPane(node, index, one, range) {
  const { reading, map } = one;
  const image = reading.images[one.image];
  node.shown = { ...one, range };
  const what = map ? `${componentName(map.component)}, ${where(map.layer, map.head)}${map.heads && map.head < 0 ? ", mean of heads" : ""}` : "";
  node.querySelector("figcaption").replaceChildren(
    ...(state.panes.length > 1 ? [el("span", { class: `letter ${"ab"[index]}` }, LETTERS[index]), " "] : []),
    el("strong", {}, epochs || several ? paneName(state.panes[index]) : image ? image.name : reading.title || ""),
    el("span", { class: "quiet" }, ` ${what || "no such map here"}`));
  node.querySelector(".stamp").hidden = !reading.random;
  const badge = node.querySelector(".badge");
  badge.hidden = !map?.unsure;
  badge.textContent = map?.unsure ? `Unsigned: which side is the object is not known (confidence ${fmt(map.confidence)}, below ${SURE})` : "";
  node.querySelector("canvas").setAttribute("aria-label",
    map ? `${what} over ${image.name}. Values from ${fmt(map.low)} to ${fmt(map.high)}. Arrow keys read single places.${map.unsure ? " The sign is not known." : ""}` : "No map");
  paint(node);
  node.querySelector(".legend").replaceChildren(...(map ? legend(map, range) : []));
  node.querySelector(".readout").textContent = " ";
  node.querySelector(".image-facts").replaceChildren(...imageFacts(reading, one.image, map));
  numbersOf(node, index);
}

function paint(node) {
  const { reading, map, range } = node.shown;
  const image = reading.images[node.shown.image];
  const canvas = node.querySelector("canvas");
  const photo = image && image.picture !== null ? images[image.picture] : null;
  const [w, h] = photo?.naturalWidth ? [photo.naturalWidth, photo.naturalHeight] : map ? [map.width, map.height] : [1, 1];
  const height = Math.round((CANVAS * h) / w);
  if (canvas.height !== height) canvas.height = height;
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, CANVAS, height);
  if (photo?.naturalWidth) context.drawImage(photo, 0, 0, CANVAS, height);
  if (map) {
    eachCell(map, canvas, (value, x, y, width, tall) => {
      if (Number.isNaN(value)) return;
      context.globalAlpha = photo?.naturalWidth ? cover(strength(value, range)) : 1;
      context.fillStyle = `rgb(${colorOf(map, value, range).join(" ")})`;
      context.fillRect(x, y, width, tall);
    });
    context.globalAlpha = 1;
  }
  const marks = state.marks && state.component !== "artifacts" && mapOf(reading, "artifacts", map ? map.layer : state.layer, node.shown.image, -1);
  if (marks) eachCell(marks, canvas, (value, x, y, width, tall) => value > 0 && cross(context, x, y, width, tall));
  if (state.outline && image && image.mask !== null) outline(context, images[image.mask], CANVAS, height);
  if (node.cursor && map) {
    const [width, tall] = [CANVAS / map.width, height / map.height];
    for (const [color, line] of [["#000", 6], ["#fff", 3]]) {
      context.strokeStyle = color;
      context.lineWidth = line;
      context.strokeRect(node.cursor.column * width, node.cursor.row * tall, width, tall);
    }
  }
}

/** How much a value says, 0 to 1: its place in the range, or its distance from zero if it is signed. */
function strength(value, range) {
  const t = Math.min(Math.max((value - range.low) / (range.high - range.low), 0), 1);
  return range.signed ? Math.abs(2 * t - 1) : t;
}

/** Opacity of a cell: what says little lets more of the image through. 0 and 1 are none and all. */
const cover = (much) => (state.opacity / 100) ** (1 + 1.6 * (1 - much));

/** Calls with value and whole-pixel box of every cell, so that cells meet without seams. */
function eachCell(map, canvas, call) {
  const edge = (i, n, size) => Math.round((i * size) / n);
  for (let row = 0; row < map.height; row++) {
    for (let column = 0; column < map.width; column++) {
      const [x, y] = [edge(column, map.width, canvas.width), edge(row, map.height, canvas.height)];
      call(map.values[row * map.width + column], x, y, edge(column + 1, map.width, canvas.width) - x, edge(row + 1, map.height, canvas.height) - y);
    }
  }
}

function cross(context, x, y, width, height) {
  const r = Math.min(width, height) * 0.26;
  const [cx, cy] = [x + width / 2, y + height / 2];
  for (const [color, line] of [["#111", Math.max(4, r * 0.7)], ["#fff", Math.max(2, r * 0.3)]]) {
    context.strokeStyle = color;
    context.lineWidth = line;
    context.beginPath();
    context.moveTo(cx - r, cy - r); context.lineTo(cx + r, cy + r);
    context.moveTo(cx + r, cy - r); context.lineTo(cx - r, cy + r);
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
    for (let y = 0; y <= h; y++) for (let x = 0; x <= w; x++) {
      if (inside(x, y) !== inside(x - 1, y)) { path.moveTo(x, y); path.lineTo(x, y + 1); }
      if (inside(x, y) !== inside(x, y - 1)) { path.moveTo(x, y); path.lineTo(x + 1, y); }
    }
    outlines.set(mask, path);
  }
  context.save();
  context.scale(width / mask.naturalWidth, height / mask.naturalHeight);
  for (const [color, line] of [["#000", 5], ["#fff", 2.5]]) {
    context.strokeStyle = color;
    context.lineWidth = (line * mask.naturalWidth) / width;
    context.lineCap = "square";
    context.stroke(outlines.get(mask));
  }
  context.restore();
}

function legend(map, range) {
  const bar = el("canvas", { width: 256, height: 1, "aria-hidden": "true" });
  const context = bar.getContext("2d");
  for (let i = 0; i < 256; i++) {
    context.fillStyle = `rgb(${colorOf(map, range.low + (i / 255) * (range.high - range.low), range).join(" ")})`;
    context.fillRect(i, 0, 1, 1);
  }
  const capped = state.clip && !range.signed ? "≥ " : "";
  const ends = map.unsure ? ["one side", "0", "other side"] : range.signed ? [fmt(range.low), "0", fmt(range.high)] : [fmt(range.low), "", capped + fmt(range.high)];
  const sign = map.confidence === null || map.unsure ? "" : `The sign is known with confidence ${fmt(map.confidence)}: orange is the object's side.`;
  return [bar, el("div", { class: "legend-ends" }, ends.map((end) => el("span", {}, end))), sign ? el("p", { class: "quiet small-text" }, sign) : null].filter(Boolean);
}

function imageFacts(reading, place, map) {
  const image = reading.images[place];
  if (!image) return [];
  const rows = [["Image", `${image.name} (${image.width} × ${image.height})`]];
  if (image.predicted) rows.push(["Predicted", image.predicted + (image.probability === null ? "" : `, probability ${fmt(image.probability)}`)]);
  if (image.label) rows.push(["Label", image.label]);
  const found = map && reading.scores?.values[`${map.component}/${map.layer}/${map.head}/${place}`];
  if (found) rows.push(["Against the mask", reading.scores.columns.slice(0, 3).map((name, i) => `${scoreWords(name)[0].replace(/^E/, "e")} ${fmt(found[i])}`).join(", ")]);
  return rows.flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]);
}

/** The table under a map: this layer and head on this image, and on average. */
function numbersOf(node, index) {
  const details = node.querySelector("details");
  if (!details.open || !node.shown) return;
  const { reading, image } = node.shown;
  const rows = [];
  for (const [source, kind, layer, head, ...cells] of reading.table.rows) {
    if (layer !== state.layer || (head !== state.head && head !== -1)) continue;
    const single = reading.each.values[[source, kind, layer, head, image].join("/")];
    cells.forEach((cell, i) => {
      const name = reading.table.columns[i];
      if (cell && !name.endsWith("_paper")) rows.push({ name: measureWords(name)[0], unit: measureWords(name)[1], source, head, here: single ? single[i] : null, mean: cell[0] });
    });
  }
  const columns = [
    { label: "Measure", value: (row) => row.name, title: "Measure" },
    { label: "This image", numeric: true, value: (row) => row.here },
    { label: "Mean", numeric: true, value: (row) => row.mean },
    { label: "Unit", value: (row) => row.unit },
    { label: "Of", value: (row) => `${row.source}${row.head < 0 ? ", all heads" : ""}` },
  ];
  details.lastChild.replaceChildren(table({ caption: `${tagged(index)}: ${where(state.layer, state.head)}`, columns, rows }));
}

// --- neighbours in small ---------------------------------------------------------------------------------------------

function neighbours(box) {
  const reading = readingOf(state.panes[0]);
  const image = imageIn(reading, state.image);
  const groups = [];
  const heads = reading.maps[`${state.component}/${state.layer}`]?.heads || 0;
  if (heads > 1) {
    groups.push([`All heads of layer ${state.layer}`, [...Array(heads).keys()].map((head) => ({ label: `head ${head}`, layer: state.layer, head }))]);
  }
  const layers = layersOf([reading]).filter((layer) => reading.maps[`${state.component}/${layer}`]);
  if (layers.length > 1) {
    const of = heads > 1 ? `, ${headName(state.head)}` : "";
    groups.push([`All layers${of}`, layers.map((layer) => ({ label: `layer ${layer}`, layer, head: state.head }))]);
  }
  box.replaceChildren(...groups.map(([title, items]) => el("div", { class: "multiple" }, el("h3", {}, title, state.panes.length > 1 ? el("span", { class: "quiet" }, " of A") : null),
    el("div", { class: "tiles" }, items.map((item) => tile(reading, image, item))))));
}

function tile(reading, image, { label, layer, head }) {
  const map = mapOf(reading, state.component, layer, image, head);
  if (!map) return null;
  const canvas = el("canvas", { width: map.width, height: map.height, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(map.width, map.height);
  const range = rangeOf([map], true);
  map.values.forEach((value, i) => {
    const color = Number.isNaN(value) ? [128, 128, 128] : colorOf(map, value, range);
    pixels.data.set([...color, Number.isNaN(value) ? 60 : 255], 4 * i);
  });
  context.putImageData(pixels, 0, 0);
  const chosen = layer === state.layer && head === state.head;
  return el("button", { type: "button", class: "tile", "aria-pressed": String(chosen), on: { click: () => refocus(label, { layer, head }) } }, canvas, el("span", {}, label));
}

/** Choosing a tile draws the tiles anew; the keyboard stays on the one that was chosen. */
function refocus(label, changes) {
  set(changes);
  [...document.querySelectorAll(".tile")].find((tile) => tile.textContent === label)?.focus({ preventScroll: true });
}
