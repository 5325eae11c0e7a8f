// Indicators by layer.

/** How a page draws the rows of a source; readings from before that was said draw them by layer. */
const formOf = (name) => recordOf("sources", name)?.form || "layers";

/** The rows of a table of one source, as objects. kind is told only where a source has several. */
function rowsOf(reading, source) {
  return reading.table.rows
    .filter((row) => row[0] === source[0] && row[1] === source[1])
    .map(([, , layer, head, ...cells]) => ({ layer, head, cells }));
}

/** [source, kind] pairs of layers that the readings have, in a fixed order. */
function sourcesOf(readings) {
  const order = namesOf("sources");
  const found = new Map();
  for (const reading of readings)
    for (const row of reading.table.rows) if (row[2] >= 0 || formOf(row[0]) !== "layers") found.set(`${row[0]}/${row[1]}`, [row[0], row[1]]);
  const place = (name) => (order.includes(name) ? order.indexOf(name) : order.length);
  return [...found.values()].sort((a, b) => place(a[0]) - place(b[0]) || a[1].localeCompare(b[1]));
}

function sourceLabel(pair, pairs) {
  const [name] = words("sources", pair[0]);
  return pairs.filter((other) => other[0] === pair[0]).length > 1 ? `${name}, ${pair[1]}` : name;
}

/** Names of measures with a value somewhere in these rows. */
function measuresOf(readings, source) {
  const names = new Set();
  for (const reading of readings) {
    const rows = rowsOf(reading, source);
    reading.table.columns.forEach((name, i) => {
      if (rows.some((row) => row.cells[i])) names.add(name);
    });
  }
  return [...names];
}

const cellOf = (reading, row, name) => row.cells[reading.table.columns.indexOf(name)] || null;

/** Mean over heads by layer; a value of all heads together stands for itself. [[layer, value]] */
function byLayer(reading, source, name) {
  const found = new Map();
  for (const row of rowsOf(reading, source)) {
    const cell = cellOf(reading, row, name);
    if (!cell) continue;
    const entry = found.get(row.layer) || { heads: [], whole: null };
    if (row.head < 0) entry.whole = cell[0];
    else entry.heads.push(cell[0]);
    found.set(row.layer, entry);
  }
  return [...found]
    .sort((a, b) => a[0] - b[0])
    .map(([layer, entry]) => [layer, entry.heads.length ? mean(entry.heads) : entry.whole]);
}

/** Series of one measure by layer: a dot per head, a line through their mean. */
function layerSeries(reading, source, name, side, tag) {
  const heads = new Map();
  for (const row of rowsOf(reading, source)) {
    const cell = cellOf(reading, row, name);
    if (!cell || row.head < 0) continue;
    if (!heads.has(row.head)) heads.set(row.head, []);
    heads.get(row.head).push({ x: row.layer, y: cell[0], head: row.head });
  }
  const series = [...heads]
    .sort((a, b) => a[0] - b[0])
    .map(([head, points]) => ({ name: `${tag}head ${head}`, look: "dots", side, hot: head === state.head, points }));
  const means = byLayer(reading, source, name).map(([x, y]) => ({ x, y, head: -1 }));
  series.push({ name: `${tag}${heads.size ? "mean of heads" : "all heads"}`, look: "line", side, points: means });
  return series;
}

function indicators() {
  const { node, show } = part("indicators", "Indicators by layer");
  const box = { source: null, paper: false };
  const source = choice("Of", (value) => {
    box.source = value;
    redraw();
  });
  const paper = el(
    "label",
    { class: "check" },
    el("input", {
      type: "checkbox",
      on: {
        change: (event) => {
          box.paper = event.target.checked;
          redraw();
        },
      },
    }),
    el("span", {}, "Also as published in the papers"),
  );
  const about = el("p", { class: "about" });
  const grid = el("div", { class: "charts" });
  const sheet = el("details", { class: "values" }, el("summary", {}, "All of it as one sortable table"));
  sheet.addEventListener("toggle", () => fullTable(sheet, box));
  const legend = el("div");
  node.append(el("div", { class: "row" }, source.field, paper), about, legend, grid, sheet);

  function redraw() {
    const readings = shownReadings();
    const pairs = sourcesOf(readings).filter((pair) => formOf(pair[0]) === "layers");
    show(pairs.length > 0);
    if (!pairs.length) return;
    const keys = pairs.map((pair) => pair.join("/"));
    if (!keys.includes(box.source)) box.source = keys[0];
    const pair = pairs[keys.indexOf(box.source)];
    source.show(
      pairs.map((one, i) => ({ value: keys[i], label: sourceLabel(one, pairs) })),
      box.source,
    );
    about.textContent = words("sources", pair[0])[2];
    const names = measuresOf(readings, pair).filter((name) => box.paper || !name.endsWith("_paper"));
    paper.hidden = !measuresOf(readings, pair).some((name) => name.endsWith("_paper"));
    const two = readings.length > 1;
    legend.replaceChildren(
      key(
        readings
          .flatMap((_, i) => [
            [`line ${"ab"[i]}`, `${two ? `${tagged(i)}: ` : ""}mean of heads`],
            [`dot ${"ab"[i]}`, "one head"],
          ])
          .concat([["dot hot", "the chosen head"]]),
      ),
    );
    grid.replaceChildren(
      ...names.map((name) => {
        const [title, unit, text] = measureWords(name);
        const series = readings.flatMap((reading, i) =>
          layerSeries(reading, pair, name, "ab"[i], two ? `${LETTERS[i]}, ` : ""),
        );
        return chart({
          id: `by-layer-${pair[0]}-${name}`,
          title,
          unit,
          about: text,
          xLabel: "layer",
          series,
          pick: (s, p) => set({ layer: p.x, head: p.head }),
        });
      }),
    );
    if (sheet.open) fullTable(sheet, box);
  }
  section(["panes", "head"], redraw);
}

function fullTable(sheet, box) {
  while (sheet.children.length > 1) sheet.lastChild.remove();
  if (!sheet.open || !box.source) return;
  const pair = box.source.split("/");
  shownReadings().forEach((reading, i) => {
    const names = measuresOf([reading], pair).filter((name) => box.paper || !name.endsWith("_paper"));
    const columns = [
      { label: "Layer", numeric: true, value: (row) => row.layer },
      {
        label: "Head",
        numeric: true,
        value: (row) => row.head,
        text: (row) => (row.head < 0 ? "all" : String(row.head)),
      },
      ...names.map((name) => ({
        label: measureWords(name)[0],
        title: measureWords(name)[1],
        numeric: true,
        value: (row) => cellOf(reading, row, name)?.[0] ?? null,
      })),
    ];
    if (state.panes.length > 1) sheet.append(el("h3", {}, tagged(i)));
    sheet.append(
      table({
        id: `indicator-table-${"ab"[i]}`,
        caption: `Indicators of ${tagged(i)}, mean over images`,
        columns,
        rows: rowsOf(reading, pair),
        go: (row) => set({ layer: row.layer, head: row.head }),
      }),
    );
  });
}
