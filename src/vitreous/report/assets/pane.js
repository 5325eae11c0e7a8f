// One large map with its scale, what is under the pointer or the arrow keys, and the facts of its image.

function drawPanes(box) {
  const found = state.panes.map((pane) => {
    const reading = readingOf(pane);
    const image = imageIn(reading, state.image);
    return { reading, image, map: shownMap(reading, state.layer, image, state.head) };
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
  const node = el(
    "figure",
    { class: "pane" },
    el("figcaption", {}),
    el("p", { class: "stamp small", hidden: true }, "Random weights: says nothing about a trained model"),
    el("div", { class: "stage" }, canvas, el("p", { class: "badge", hidden: true })),
    el("div", { class: "legend" }),
    el("output", { class: "readout", "aria-live": "polite" }),
    el("dl", { class: "image-facts" }),
    el("details", { class: "values" }, el("summary", {}, "This layer and head in numbers"), el("div")),
  );
  const look = { row: 0, column: -1 };
  const say = () => {
    const map = node.shown?.map;
    if (!map) return;
    look.row = Math.min(Math.max(look.row, 0), map.height - 1);
    look.column = Math.min(Math.max(look.column, 0), map.width - 1);
    const value = map.values[look.row * map.width + look.column];
    const tokens = tokensOf(node.shown.reading, map.layer, node.shown.image);
    const place = tokens ? `, ${patchText(tokens, (look.row + 0.5) / map.height, (look.column + 0.5) / map.width)}` : "";
    node.querySelector(".readout").textContent =
      `Row ${look.row + 1}, column ${look.column + 1}: ${fmt(Number.isNaN(value) ? null : value)}${place}`;
    node.cursor = look;
    paint(node);
  };
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && state.query) set({ query: null });
    if (event.key === "Enter" && node.cursor && node.shown?.map) {
      event.preventDefault();
      const { reading, map } = node.shown;
      lookFrom(reading, (look.row + 0.5) / map.height, (look.column + 0.5) / map.width);
    }
    const moves = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!moves[event.key]) return;
    event.preventDefault();
    look.row += moves[event.key][0];
    look.column += moves[event.key][1];
    say();
  });
  canvas.addEventListener("blur", () => {
    node.cursor = null;
    if (node.shown) paint(node);
  });
  canvas.addEventListener("pointermove", (event) => {
    const map = node.shown?.map;
    if (!map) return;
    const area = canvas.getBoundingClientRect();
    look.row = Math.floor(((event.clientY - area.top) / area.height) * map.height);
    look.column = Math.floor(((event.clientX - area.left) / area.width) * map.width);
    say();
  });
  canvas.addEventListener("click", (event) => {
    const area = canvas.getBoundingClientRect();
    const [y, x] = [(event.clientY - area.top) / area.height, (event.clientX - area.left) / area.width];
    if (node.shown) lookFrom(node.shown.reading, y, x);
  });
  canvas.addEventListener("pointerleave", () => {
    node.cursor = null;
    if (node.shown) paint(node);
  });
  node.querySelector("details").addEventListener("toggle", () => numbersOf(node, index));
  return node;
}

function showPane(node, index, one, range) {
  const { reading, map } = one;
  const image = reading.images[one.image];
  node.shown = { ...one, range };
  const what = map
    ? `${componentName(map.component)}, ${where(map.layer, map.head)}${map.heads > 1 && map.head < 0 ? ", mean of heads" : ""}${map.query ? `, from ${placeName(map.query)}` : ""}${map.slice === null ? "" : `, slice ${map.slice}`}`
    : "";
  node
    .querySelector("figcaption")
    .replaceChildren(
      ...(state.panes.length > 1 ? [el("span", { class: `letter ${"ab"[index]}` }, LETTERS[index]), " "] : []),
      el("strong", {}, epochs || several ? paneName(state.panes[index]) : image ? image.name : reading.title || ""),
      el("span", { class: "quiet" }, ` ${what || "no such map here"}`),
    );
  node.querySelector(".stamp").hidden = !reading.random;
  const badge = node.querySelector(".badge");
  badge.hidden = !map?.unsure;
  badge.textContent = map?.unsure
    ? `Unsigned: which side is the object is not known (confidence ${fmt(map.confidence)}, below ${SURE})`
    : "";
  node.querySelector("canvas").classList.toggle("askable", Boolean(own(reading.queries.layers, state.layer)));
  node
    .querySelector("canvas")
    .setAttribute(
      "aria-label",
      map
        ? `${what} over ${image.name}. Values from ${fmt(map.low)} to ${fmt(map.high)}. Arrow keys read single places${Object.hasOwn(reading.queries.layers, map.layer) ? `, Enter shows what ${isMixing(reading, map.layer) ? "moves the patch there" : "the patch there looks at"}` : ""}.${map.unsure ? " The sign is not known." : ""}`
        : "No map",
    );
  paint(node);
  node.querySelector(".legend").replaceChildren(...(map ? legend(map, range) : []));
  node.querySelector(".readout").textContent = " ";
  node.querySelector(".image-facts").replaceChildren(...imageFacts(reading, one.image, map));
  numbersOf(node, index);
}

function legend(map, range) {
  if (!map.values.some(Number.isFinite)) return [el("p", { class: "quiet small-text" }, "Not measured for this image.")];
  const bar = el("canvas", { width: 256, height: 1, "aria-hidden": "true" });
  const context = bar.getContext("2d");
  for (let i = 0; i < 256; i++) {
    context.fillStyle = `rgb(${colorOf(map, range.low + (i / 255) * (range.high - range.low), range).join(" ")})`;
    context.fillRect(i, 0, 1, 1);
  }
  const capped = state.clip && !range.signed ? "≥ " : "";
  const ends = map.unsure
    ? ["one side", "0", "other side"]
    : range.signed
      ? [fmt(range.low), "0", fmt(range.high)]
      : [fmt(range.low), "", capped + fmt(range.high)];
  const sign =
    map.confidence === null || map.unsure
      ? ""
      : `The sign is known with confidence ${fmt(map.confidence)}: orange is the object's side.`;
  return [
    bar,
    el(
      "div",
      { class: "legend-ends" },
      ends.map((end) => el("span", {}, end)),
    ),
    sign ? el("p", { class: "quiet small-text" }, sign) : null,
  ].filter(Boolean);
}

function imageFacts(reading, place, map) {
  const image = reading.images[place];
  if (!image) return [];
  const rows = [["Image", `${image.name} (${image.width} × ${image.height})`]];
  if (image.predicted)
    rows.push([
      "Predicted",
      image.predicted + (image.probability === null ? "" : `, probability ${fmt(image.probability)}`),
    ]);
  const answered = map && !map.query && own(image.classes, map.component);
  if (answered) rows.push(["Class of this map", answered]);
  if (image.label) rows.push(["Label", image.label]);
  const module = map && reading.layers.find((one) => one.layer === map.layer);
  if (module) rows.push(["Module", module.name]);
  const tokens = map && tokensOf(reading, map.layer, place);
  if (tokens) rows.push(["Tokens", tokensText(tokens)]);
  const found = map && !map.query && reading.scores?.values[`${map.component}/${map.layer}/${map.head}/${place}`];
  if (found)
    rows.push([
      "Against the mask",
      reading.scores.columns
        .slice(0, 3)
        .map((name, i) => `${scoreWords(name)[0].replace(/^E/, "e")} ${fmt(found[i])}`)
        .join(", "),
    ]);
  return rows.flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]);
}

/** The table under a map: this layer and head on this image, and on average. */
function numbersOf(node, index) {
  const details = node.querySelector("details");
  if (!details.open || !node.shown) return;
  const { reading, image } = node.shown;
  const rows = [];
  for (const [source, kind, layer, head, ...cells] of reading.table.rows) {
    const whole = layer === -1 && formOf(source) === "layers"; // others have a part of their own
    if ((layer !== state.layer && !whole) || (head !== state.head && head !== -1)) continue;
    const single = reading.each.values[[source, kind, layer, head, image].join("/")];
    cells.forEach((cell, i) => {
      const name = reading.table.columns[i];
      if (cell && !name.endsWith("_paper"))
        rows.push({
          name: measureWords(name)[0],
          unit: measureWords(name)[1],
          source: layer < 0 ? `${words("sources", source)[0]}, ${kind}` : source,
          head: layer < 0 ? 0 : head,
          here: single ? single[i] : null,
          mean: cell[0],
        });
    });
  }
  const columns = [
    { label: "Measure", value: (row) => row.name, title: "Measure" },
    { label: "This image", numeric: true, value: (row) => row.here },
    { label: "Mean", numeric: true, value: (row) => row.mean },
    { label: "Unit", value: (row) => row.unit },
    { label: "Of", value: (row) => `${row.source}${row.head < 0 ? ", all heads" : ""}` },
  ];
  details.lastChild.replaceChildren(
    table({ caption: `${tagged(index)}: ${where(state.layer, state.head)}`, columns, rows }),
  );
}
