// What the numbers come to: findings, scores against masks, artifacts, curves, changes, layers, facts.

const ATTENTION = "attention";

/** Rows of the summary as objects. */
const summaryOf = (reading) => reading.summary.map(([component, layer, head, measure, mean_, low, high, count]) =>
  ({ component, layer, head, measure, mean: mean_, low, high, count }));
const highest = (rows, value) => rows.reduce((best, row) => (value(row) !== null && (!best || value(row) > value(best)) ? row : best), null);
const interval = (row) => (row.low === null ? "" : ` [${fmt(row.low, 3)}, ${fmt(row.high, 3)}]`);

/** The head that looks most at the object: most of its attention inside the masks. */
function looker(reading, measure = "energy_inside") {
  return highest(summaryOf(reading).filter((row) => row.component === ATTENTION && row.head >= 0 && row.measure === measure), (row) => row.mean);
}

/** A map that looks at no image, on the grid of the whole model's maps. */
const baseline = (reading, name, measure) => summaryOf(reading).find((row) => row.component === name && row.measure === measure && row.layer < 0) || null;

/** {share, layers}: the layers with the most artifact tokens, or null if there are none. */
function worst(reading) {
  const share = Math.max(0, ...reading.artifacts.map((row) => row[1]));
  return share > 0 ? { share, layers: reading.artifacts.filter((row) => row[1] >= 0.999 * share).map((row) => row[0]) } : null;
}

/** "layer 3", "layers 3 and 5", "layers 7 to 11". */
function listed(layers) {
  if (layers.length === 1) return `layer ${layers[0]}`;
  const row = layers.every((layer, i) => layer === layers[0] + i) && layers.length > 2;
  return `layers ${row ? `${layers[0]} to ${layers[layers.length - 1]}` : `${layers.slice(0, -1).join(", ")} and ${layers[layers.length - 1]}`}`;
}

function extreme(reading, measure, down) {
  const found = [];
  for (const pair of sourcesOf([reading]).filter((one) => one[0] === ATTENTION)) {
    for (const row of rowsOf(reading, pair)) {
      const cell = cellOf(reading, row, measure);
      if (cell && row.head >= 0) found.push({ ...row, value: cell[0] });
    }
  }
  return highest(found, (row) => (down ? -row.value : row.value));
}

// --- at a glance -----------------------------------------------------------------------------------------------------

function glance() {
  const { node } = part("glance", "At a glance");
  const cards = el("div", { class: "cards" });
  node.append(cards);
  section(["panes"], () => {
    const two = state.panes.length > 1;
    const findings = [
      ["object", "Looks most at the object", (reading) => {
        const found = looker(reading);
        if (!found) return { text: "Not scored: no masks were given." };
        const centre = baseline(reading, "centre", "energy_inside");
        return { big: where(found.layer, found.head), text: `energy inside ${fmt(found.mean, 3)}${interval(found)}${centre ? `; centre prior ${fmt(centre.mean, 3)}` : ""}`,
          go: { component: ATTENTION, layer: found.layer, head: found.head, outline: true } };
      }],
      ["artifacts", "Artifact tokens", (reading) => {
        const found = worst(reading);
        if (!reading.artifacts.length) return { text: "Not looked for." };
        if (!found) return { big: "none", text: "No layer has tokens of outstanding norm." };
        return { big: listed(found.layers), text: `${fmt(found.share, 3)} % of the patches, the most of all layers`, go: { layer: found.layers[0], marks: true } };
      }],
      ["focused", "Looks at the fewest places", (reading) => {
        const found = extreme(reading, "effective_tokens", true);
        return found ? { big: where(found.layer, found.head), text: `${fmt(found.value, 3)} effective tokens on average`, go: { component: ATTENTION, layer: found.layer, head: found.head } } : { text: "Not measured." };
      }],
      ["local", "Looks closest by", (reading) => {
        const found = extreme(reading, "mean_distance", true);
        return found ? { big: where(found.layer, found.head), text: `${fmt(found.value, 3)} pixels away on average`, go: { component: ATTENTION, layer: found.layer, head: found.head } } : { text: "Not measured." };
      }],
    ];
    const made = findings.map(([id, title, find]) => card(id, title, shownReadings().map((reading, i) => ({ ...find(reading), letter: two ? LETTERS[i] : "" }))));
    if (two) {
      const top = changes(...shownReadings())[0];
      made.unshift(card("change", "Differs most between A and B", [top ? { big: where(top.layer, top.head),
        text: `${measureWords(top.measure)[0].toLowerCase()} ${fmt(top.a)} → ${fmt(top.b)} (${signedFmt(top.difference)})`, go: { layer: top.layer, head: top.head } } : { text: "Nothing differs." }]));
    }
    cards.replaceChildren(...made);
  });
}

function card(id, title, lines) {
  return el("div", { class: "card", "data-finding": id }, el("h3", {}, title), lines.map((line) => el("div", { class: "finding" },
    line.letter ? el("span", { class: `letter ${line.letter.toLowerCase()}` }, line.letter) : null,
    line.big ? el("button", { type: "button", class: "plain big", title: "Show it above", on: { click: () => line.go && show(line.go) } }, capital(line.big)) : null,
    el("p", {}, line.text))));
}

/** Choose something and go to the maps. */
function show(changes_) {
  set(changes_);
  document.getElementById("maps").scrollIntoView();
}

// --- against masks ---------------------------------------------------------------------------------------------------

function objectScores() {
  const { node, show: showPart } = part("object", "Looking at the object");
  const box = { measure: "energy_inside" };
  const measure = choice("Score", (value) => { box.measure = value; redraw(); });
  const about = el("p", { class: "about" });
  const body = el("div", { class: "side-by-side" });
  const sheet = el("details", { class: "values" }, el("summary", {}, "All scores with intervals as a sortable table"));
  sheet.addEventListener("toggle", () => scoreTables(sheet));
  node.append(measure.field, about, body, sheet);

  function redraw() {
    const readings = shownReadings();
    const names = [...new Set(readings.flatMap((r) => r.summary.map((row) => row[3])))];
    showPart(names.length > 0);
    if (!names.length) return;
    if (!names.includes(box.measure)) box.measure = names[0];
    measure.show(names.map((value) => ({ value, label: scoreWords(value)[0] })), box.measure);
    about.textContent = scoreWords(box.measure)[2];
    body.replaceChildren(...readings.map((reading, i) => scored(reading, i, box.measure)));
    scoreTables(sheet);
  }
  section(["panes"], redraw);
}

function scored(reading, index, measure) {
  const rows = summaryOf(reading).filter((row) => row.measure === measure);
  if (!rows.length) return el("p", { class: "quiet" }, `${tagged(index)}: no masks were given.`);
  const best = looker(reading, measure);
  const lines = Object.keys(WORDS.baselines).map((name) => [name, baseline(reading, name, measure)]).filter(([, row]) => row);
  const said = best ? el("p", { class: "sentence" }, `${capital(where(best.layer, best.head))} looks most at the object: `, el("strong", {}, fmt(best.mean, 3)), `${interval(best)}.`) : null;
  const bases = el("p", { class: "quiet" }, lines.map(([name, row]) => `${WORDS.baselines[name]} ${fmt(row.mean, 3)}${interval(row)}`).join(" · "));
  const others = rows.filter((row) => row.head < 0 && !own(WORDS.baselines, row.component));
  const names = [...new Set(others.map((row) => row.component))];
  const bars = names.length ? chart({ id: `maps-${"ab"[index]}`, title: "Other maps", unit: scoreWords(measure)[1], xLabel: "layer", xName: (x) => (x < 0 ? "whole" : String(x)),
    series: names.map((name, i) => ({ name: componentName(name), look: "line", knots: true, color: lineColor(i, names.length),
      points: others.filter((row) => row.component === name).sort((a, b) => a.layer - b.layer).map((row) => ({ x: row.layer, y: row.mean, low: names.length < 4 ? row.low : null, high: row.high })) })),
    pick: (s, p) => set({ component: others.find((row) => componentName(row.component) === s.name).component, layer: p.x < 0 ? state.layer : p.x, head: -1 }) }) : null;
  return el("div", {}, state.panes.length > 1 ? el("h3", {}, tagged(index)) : null, said, bases, el("div", { class: "abreast" },
    matrix(`Attention: ${scoreWords(measure)[0]} by layer and head, ${tagged(index)}`, rows.filter((row) => row.component === ATTENTION && row.head >= 0).map((row) => ({ ...row, value: row.mean })), best),
    bars && el("div", { class: "grow" }, key(names.map((name, i) => [lineColor(i, names.length), componentName(name)])), bars)));
}

/** A table of layers and heads with coloured cells. rows: {layer, head, value}. */
function matrix(caption, rows, best, signed = false) {
  if (!rows.length) return null;
  const layers = [...new Set(rows.map((row) => row.layer))].sort((a, b) => a - b);
  const heads = [...new Set(rows.map((row) => row.head))].sort((a, b) => a - b);
  const values = rows.map((row) => row.value);
  const [low, high] = signed ? [0, Math.max(...values)] : [Math.min(...values), Math.max(...values)];
  const short = (value) => (high < 10 ? value.toFixed(2) : fmt(value, 3)).replace("-", "−");
  const cell = (layer, head) => {
    const row = rows.find((one) => one.layer === layer && one.head === head);
    if (!row) return el("td", {}, "–");
    const t = high > low ? (row.value - low) / (high - low) : 0.5;
    const top = best && best.layer === layer && best.head === head;
    const button = el("button", { type: "button", class: `heat ${top ? "peak" : ""}`, "data-layer": layer, "data-head": head, "aria-label": `${where(layer, head)}: ${fmt(row.value)}${top ? ", the highest" : ""}`,
      on: { click: () => show({ component: ATTENTION, layer, head }) } }, short(row.value));
    const color = oklch(0.95 - 0.5 * t, 0.02 + 0.12 * t, 235 - 25 * t);
    button.style.backgroundColor = `rgb(${color.join(" ")})`;
    button.style.color = contrasting(color);
    return el("td", {}, button);
  };
  const sheet = el("table", { class: "matrix" }, el("caption", { class: "unseen" }, caption),
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Layer"), heads.map((head) => el("th", { scope: "col" }, head < 0 ? "all heads" : `head ${head}`)))),
    el("tbody", {}, layers.map((layer) => el("tr", {}, el("th", { scope: "row" }, String(layer)), heads.map((head) => cell(layer, head))))));
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${caption}, table` }, sheet);
}

function scoreTables(sheet) {
  while (sheet.children.length > 1) sheet.lastChild.remove();
  if (!sheet.open) return;
  shownReadings().forEach((reading, index) => {
    const names = [...new Set(reading.summary.map((row) => row[3]))];
    const found = new Map();
    for (const row of summaryOf(reading)) {
      const id = `${row.component}/${row.layer}/${row.head}`;
      if (!found.has(id)) found.set(id, { component: row.component, layer: row.layer, head: row.head, count: row.count, by: new Map() });
      found.get(id).by.set(row.measure, row);
    }
    const columns = [
      { label: "Map", value: (row) => componentName(row.component) },
      { label: "Layer", numeric: true, value: (row) => (row.layer < 0 ? null : row.layer) },
      { label: "Head", numeric: true, value: (row) => (row.head < 0 ? null : row.head) },
      ...names.map((name) => ({ label: scoreWords(name)[0], numeric: true, value: (row) => row.by.get(name)?.mean ?? null, text: (row) => (row.by.has(name) ? fmt(row.by.get(name).mean, 3) + interval(row.by.get(name)) : "–") })),
      { label: "Images", numeric: true, value: (row) => row.count },
    ];
    if (state.panes.length > 1) sheet.append(el("h3", {}, tagged(index)));
    const first = columns.findIndex((column) => column.label === scoreWords("energy_inside")[0]);
    sheet.append(table({ id: `score-table-${"ab"[index]}`, caption: `Scores against masks of ${tagged(index)}`, columns, rows: [...found.values()], sort: first > 0 ? { column: first, down: true } : null }));
  });
}

// --- artifacts -------------------------------------------------------------------------------------------------------

function artifacts() {
  const { node, show: showPart } = part("artifacts", "Artifact tokens");
  const [sentence, box] = [el("p", { class: "sentence" }), el("div", { class: "charts" })];
  node.append(sentence, box);
  section(["panes"], () => {
    const readings = shownReadings();
    showPart(readings.some((reading) => reading.artifacts.length));
    const [title, unit, about] = measureWords("artifact_share");
    sentence.textContent = readings.map((reading, i) => {
      const found = worst(reading);
      return `${readings.length > 1 ? `${LETTERS[i]}: ` : ""}${found ? `most artifact tokens in ${listed(found.layers)}: ${fmt(found.share, 3)} % of the patches.` : "no artifact tokens in any layer."}`;
    }).map(capital).join(" ");
    box.replaceChildren(chart({ id: "artifact-chart", title, unit, about, xLabel: "layer", pick: (s, p) => show({ layer: p.x, marks: true }),
      series: readings.map((reading, i) => ({ name: tagged(i), look: "line", knots: true, side: "ab"[i], points: reading.artifacts.map(([x, y]) => ({ x, y })) })) }));
  });
}

// --- faithfulness ----------------------------------------------------------------------------------------------------

function faithfulness() {
  const { node, show: showPart } = part("faithfulness", "Faithfulness");
  const box = { component: null, layer: null };
  const pick = choice("Map", (value) => { box.component = value; redraw(); });
  const depth = choice("Layer", (value) => { box.layer = value; redraw(); });
  const about = el("p", { class: "about" }, "Patches are put in, or taken away, from the highest of the map down, and the model's probability is followed. "
    + "A faithful map raises it faster, and lowers it faster, than a random order. With randomised weights the map should become another one: a correlation near 0.");
  const [told, body, sheet] = [el("p", { class: "quiet" }), el("div", { class: "charts" }), el("div")];
  node.append(about, el("div", { class: "row" }, pick.field, depth.field), told, key([["line a", "the map"], ["line a dashed", "random order"]]), body, sheet);
  const name = (curve) => `${componentName(curve.component)}${curve.layer < 0 ? "" : `, layer ${curve.layer}`}`;
  const series = (curve, what) => [[what, false], [`random_${what}`, true]].filter(([id]) => curve[id]).map(([id, dashed]) =>
    ({ name: dashed ? "random order" : "the map", look: "line", side: "a", dashed, points: curve.fractions.map((x, i) => ({ x, y: curve[id][i] })) }));

  function redraw() {
    const readings = shownReadings();
    const found = readings.flatMap((reading, i) => reading.curves.map((curve) => ({ curve, i })));
    showPart(found.length > 0);
    if (!found.length) return;
    const best = highest(found, ({ curve }) => curve.difference?.[0] ?? null) || found[0];
    const names = [...new Set(found.map(({ curve }) => curve.component))];
    if (!names.includes(box.component)) Object.assign(box, { component: best.curve.component, layer: best.curve.layer });
    const depths = [...new Set(found.filter(({ curve }) => curve.component === box.component).map(({ curve }) => curve.layer))].sort((a, b) => a - b);
    if (!depths.includes(box.layer)) box.layer = depths[depths.length - 1];
    pick.show(names.map((value) => ({ value, label: componentName(value) })), box.component);
    depth.show(depths.map((value) => ({ value, label: value < 0 ? "whole model" : String(value) })), box.layer);
    const shown = found.filter(({ curve }) => curve.component === box.component && curve.layer === box.layer);
    const { followed, fill: filled, images: count } = shown[0].curve;
    told.textContent = [followed && `Followed: ${followed}`, filled && `missing patches: ${filled}`, count && plural(count, "image")].filter(Boolean).join("; ");
    const tag = (i) => (readings.length > 1 ? ` of ${LETTERS[i]}` : "");
    body.replaceChildren(...shown.flatMap(({ curve, i }) => [
      chart({ title: `Insertion${tag(i)}`, unit: "probability", xLabel: "share of patches put in", xName: fmt, series: series(curve, "insertion") }),
      chart({ title: `Deletion${tag(i)}`, unit: "probability", xLabel: "share of patches taken away", xName: fmt, series: series(curve, "deletion") })]));
    const columns = [
      { label: "Map", value: ({ curve, i }) => name(curve) + tag(i) },
      { label: "Area, insertion", numeric: true, value: ({ curve }) => curve.insertion_area ?? null },
      { label: "Area, deletion", numeric: true, value: ({ curve }) => curve.deletion_area ?? null },
      { label: "Difference to random order", numeric: true, value: ({ curve }) => curve.difference?.[0] ?? null,
        text: ({ curve }) => (curve.difference ? `${fmt(curve.difference[0], 3)} [${fmt(curve.difference[1], 3)}, ${fmt(curve.difference[2], 3)}]` : "–") },
      { label: "Correlation, weights randomised", numeric: true, value: ({ curve }) => curve.randomised ?? null },
    ];
    sheet.replaceChildren(table({ id: "curve-table", caption: "Faithfulness of the maps", columns, rows: found, sort: { column: 3, down: true }, limit: 12 }));
  }
  section(["panes"], redraw);
}

// --- what differs ----------------------------------------------------------------------------------------------------

/** Differences of B to A per source, layer, head and measure; largest first, in units of the spread over both readings. */
function changes(a, b) {
  const found = [];
  for (const pair of sourcesOf([a, b])) {
    for (const measure of measuresOf([a], pair).filter((name) => !name.endsWith("_paper"))) {
      const mine = new Map(rowsOf(a, pair).map((row) => [`${row.layer}/${row.head}`, cellOf(a, row, measure)]));
      const both = rowsOf(b, pair).map((row) => ({ ...row, left: mine.get(`${row.layer}/${row.head}`), right: cellOf(b, row, measure) })).filter((row) => row.left && row.right);
      const all = both.flatMap((row) => [row.left[0], row.right[0]]);
      const middle = all.length ? mean(all) : 0;
      const spread = Math.sqrt(mean(all.map((value) => (value - middle) ** 2)));
      for (const row of both) {
        const difference = row.right[0] - row.left[0];
        if (difference) found.push({ source: pair[0], layer: row.layer, head: row.head, measure, a: row.left[0], b: row.right[0], difference, size: Math.abs(difference) / spread });
      }
    }
  }
  return found.sort((x, y) => y.size - x.size || x.layer - y.layer || x.head - y.head || x.measure.localeCompare(y.measure));
}

function differences() {
  const { node, show: showPart } = part("changes", "What differs");
  const body = el("div");
  node.append(body);
  section(["panes"], () => {
    showPart(state.panes.length > 1);
    if (state.panes.length < 2) return;
    const rows = changes(...shownReadings());
    const heads = shownReadings().map((reading) => new Set(reading.table.rows.map((row) => `${row[2]}/${row[3]}`)));
    const cells = [...heads[0]].filter((id) => heads[1].has(id)).map((id) => id.split("/").map(Number)).filter(([, head]) => head >= 0)
      .map(([layer, head]) => ({ layer, head, value: Math.max(0, ...rows.filter((row) => row.layer === layer && row.head === head).map((row) => row.size)) }));
    const columns = [
      { label: "Where", value: (row) => capital(where(row.layer, row.head)) },
      { label: "Measure", value: (row) => measureWords(row.measure)[0] },
      { label: "Of", value: (row) => row.source },
      { label: "A", numeric: true, value: (row) => row.a },
      { label: "B", numeric: true, value: (row) => row.b },
      { label: "B − A", numeric: true, value: (row) => row.difference, text: (row) => signedFmt(row.difference) },
      { label: "In spreads", numeric: true, title: "Against the standard deviation over all layers and heads of both", value: (row) => row.size },
    ];
    const unlike = shownReadings().map((reading) => reading.layers.map((layer) => layer.name).join());
    body.replaceChildren(
      el("p", { class: "about" }, "Mean over images, B against A, per layer and head. A spread is the standard deviation of that measure over all layers and heads of both. "
        + (unlike[0] === unlike[1] ? "" : "The two models name their layers differently: they are matched by number.")),
      ...(rows.length ? [cells.length ? el("h3", {}, "The largest difference of each head, in spreads") : null,
        matrix("Differences by layer and head", cells, highest(cells, (cell) => cell.value), true),
        el("h3", {}, "Largest first"), table({ id: "changes-table", caption: "Differences between A and B", columns, rows, limit: 20, go: (row) => show({ layer: row.layer, head: row.head }) })].filter(Boolean)
        : [el("p", { class: "sentence" }, "No measure differs.")]));
  });
}

// --- layers, what was left out, facts --------------------------------------------------------------------------------

function layers() {
  const { node } = part("layers", "Capture");
  const body = el("div");
  node.append(body);
  const size = (pair) => (pair ? `${pair[0]} × ${pair[1]}` : "none");
  section(["panes"], () => body.replaceChildren(...shownReadings().flatMap((reading, i) => [
    state.panes.length > 1 ? el("h3", {}, tagged(i)) : null,
    table({ id: `layer-table-${"ab"[i]}`, caption: `Layers of ${tagged(i)}`, rows: reading.layers, go: (row) => show({ layer: row.layer }), columns: [
      { label: "Layer", numeric: true, value: (row) => row.layer },
      { label: "Module", value: (row) => row.name },
      { label: "Kind", value: (row) => row.kind + (row.effective ? ", effective" : "") },
      { label: "Route", value: (row) => row.route },
      { label: "Verified by", value: (row) => row.verified },
      { label: "Error", numeric: true, title: "Relative to the largest value", value: (row) => row.error, text: (row) => (row.error === null || row.error === undefined ? "–" : row.error === 0 ? "0" : row.error.toExponential(1).replace("-", "−")) },
      { label: "Heads", numeric: true, value: (row) => row.heads },
      { label: "Queries", numeric: true, value: (row) => row.queries },
      { label: "Keys", numeric: true, value: (row) => row.keys },
      { label: "Windows", numeric: true, value: (row) => row.windows },
      { label: "Grid", value: (row) => size(row.grid) },
      { label: "Note", long: true, value: (row) => row.note || "" },
    ] }),
    ...[["refused", "Refused: no map, for a reason"], ["skipped", "Skipped images"]].flatMap(([id, title]) => (reading[id]?.length ? [el("h3", {}, title),
      table({ id: `${id}-${"ab"[i]}`, caption: title, rows: reading[id], columns: [{ label: "Name", long: true, value: (row) => row.name }, { label: "Reason", long: true, value: (row) => row.reason }] })] : [])),
  ].filter(Boolean))));
}

function facts() {
  const { node } = part("facts", "Facts");
  const body = el("div", { class: "side-by-side" });
  node.append(body);
  const text = (value) => (value === null || value === undefined || value === "" ? null : Array.isArray(value) ? value.map(text).join(", ") || "none"
    : typeof value === "object" ? Object.entries(value).map(([name, one]) => `${name} ${text(one)}`).join(", ") : typeof value === "number" ? (Number.isInteger(value) ? value.toLocaleString("en-US") : fmt(value)) : String(value));
  const list = (entries) => el("dl", { class: "facts" }, entries.map(([name, value]) => [name, text(value)]).filter(([, value]) => value !== null)
    .flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  section(["panes"], () => body.replaceChildren(...state.panes.map((pane, i) => {
    const [reading, run] = [readingOf(pane), DATA.sources[pane.source].run];
    const model = reading.model || {};
    return el("div", {}, state.panes.length > 1 ? el("h3", {}, tagged(i)) : null, list([
      ["Model", model.name], ["Class", model.class], ["Parameters", model.parameters], ["Weights", model.weights], ["Grafts", model.mechanisms],
      ["Images", reading.count], ["Seed", String(reading.seed ?? "")], ["Settings", reading.settings], ["Versions", reading.versions],
      ...(run ? [["Trained on", run.data?.name], ["Command", run.command], ["Device", run.device], ["Machine", run.machine], ["Remarks", run.remarks?.length ? run.remarks : null]] : [])]),
    reading.notes?.length ? el("ul", { class: "notes" }, reading.notes.map((note) => el("li", {}, note))) : null);
  })));
}
