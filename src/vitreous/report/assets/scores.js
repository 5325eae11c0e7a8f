// How well maps lie on the object, where there are masks, and where artifact tokens are.

function objectScores() {
  const { node, show: showPart } = part("object", "Looking at the object");
  const box = { measure: "energy_inside" };
  const measure = choice("Score", (value) => {
    box.measure = value;
    redraw();
  });
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
    measure.show(
      names.map((value) => ({ value, label: scoreWords(value)[0] })),
      box.measure,
    );
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
  const lines = namesOf("baselines")
    .map((name) => [name, baseline(reading, name, measure)])
    .filter(([, row]) => row);
  const said = best
    ? el(
        "p",
        { class: "sentence" },
        `${capital(where(best.layer, best.head))} looks most at the object: `,
        el("strong", {}, fmt(best.mean, 3)),
        `${interval(best)}.`,
      )
    : null;
  const bases = el(
    "p",
    { class: "quiet" },
    lines.map(([name, row]) => `${componentName(name)} ${fmt(row.mean, 3)}${interval(row)}`).join(" · "),
  );
  const others = rows.filter((row) => row.head < 0 && !recordOf("baselines", row.component));
  const names = [...new Set(others.map((row) => row.component))];
  const bars = names.length
    ? chart({
        id: `maps-${"ab"[index]}`,
        title: "Maps by layer",
        unit: scoreWords(measure)[1],
        xLabel: "layer",
        xName: (x) => (x < 0 ? "whole" : String(x)),
        series: names.map((name, i) => ({
          name: componentName(name),
          look: "line",
          knots: true,
          color: lineColor(i, names.length),
          points: others
            .filter((row) => row.component === name)
            .sort((a, b) => a.layer - b.layer)
            .map((row) => ({ x: row.layer, y: row.mean, low: names.length < 4 ? row.low : null, high: row.high })),
        })),
        pick: (s, p) =>
          set({
            component: others.find((row) => componentName(row.component) === s.name).component,
            layer: p.x < 0 ? state.layer : p.x,
            head: -1,
          }),
      })
    : null;
  return el(
    "div",
    {},
    state.panes.length > 1 ? el("h3", {}, tagged(index)) : null,
    said,
    bases,
    el(
      "div",
      { class: "abreast" },
      matrix(
        `Attention: ${scoreWords(measure)[0]} by layer and head, ${tagged(index)}`,
        rows.filter((row) => row.component === ATTENTION && row.head >= 0).map((row) => ({ ...row, value: row.mean })),
        best,
        1,
      ),
      bars &&
        el(
          "div",
          { class: "grow" },
          key(names.map((name, i) => [lineColor(i, names.length), componentName(name)])),
          bars,
        ),
    ),
  );
}

/** A table of layers and heads with coloured cells. rows: {layer, head, value}. */
function matrix(caption, rows, best, full = null, called = "the highest") {
  if (!rows.length) return null;
  const layers = [...new Set(rows.map((row) => row.layer))].sort((a, b) => a - b);
  const heads = [...new Set(rows.map((row) => row.head))].sort((a, b) => a - b);
  const values = rows.map((row) => row.value);
  const [low, high] = [Math.min(0, ...values), full ?? Math.max(...values)]; // from zero, so that alike looks alike
  const short = (value) => (high < 10 ? value.toFixed(high < 0.1 ? 4 : 2) : fmt(value, 3)).replace("-", "−");
  const cell = (layer, head) => {
    const row = rows.find((one) => one.layer === layer && one.head === head);
    if (!row) return el("td", {}, "–");
    const t = high > low ? (row.value - low) / (high - low) : 0.5;
    const top = best && best.layer === layer && best.head === head;
    const button = el(
      "button",
      {
        type: "button",
        class: `heat ${top ? "peak" : ""}`,
        "data-layer": layer,
        "data-head": head,
        "aria-label": `${where(layer, head)}: ${fmt(row.value)}${top ? `, ${called}` : ""}`,
        on: { click: () => show({ component: ATTENTION, layer, head }) },
      },
      short(row.value),
    );
    const color = oklch(0.95 - 0.5 * t, 0.02 + 0.12 * t, 235 - 25 * t);
    button.style.backgroundColor = `rgb(${color.join(" ")})`;
    button.style.color = contrasting(color);
    return el("td", {}, button);
  };
  const sheet = el(
    "table",
    { class: "matrix" },
    el("caption", { class: "unseen" }, caption),
    el(
      "thead",
      {},
      el(
        "tr",
        {},
        el("th", { scope: "col" }, "Layer"),
        heads.map((head) => el("th", { scope: "col" }, head < 0 ? "all heads" : `head ${head}`)),
      ),
    ),
    el(
      "tbody",
      {},
      layers.map((layer) =>
        el(
          "tr",
          {},
          el("th", { scope: "row" }, String(layer)),
          heads.map((head) => cell(layer, head)),
        ),
      ),
    ),
  );
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
      if (!found.has(id))
        found.set(id, { component: row.component, layer: row.layer, head: row.head, count: row.count, by: new Map() });
      found.get(id).by.set(row.measure, row);
    }
    const columns = [
      { label: "Map", value: (row) => componentName(row.component) },
      { label: "Layer", numeric: true, value: (row) => (row.layer < 0 ? null : row.layer) },
      { label: "Head", numeric: true, value: (row) => (row.head < 0 ? null : row.head) },
      ...names.map((name) => ({
        label: scoreWords(name)[0],
        numeric: true,
        value: (row) => row.by.get(name)?.mean ?? null,
        text: (row) => (row.by.has(name) ? fmt(row.by.get(name).mean, 3) + interval(row.by.get(name)) : "–"),
      })),
      { label: "Images", numeric: true, value: (row) => row.count },
    ];
    if (state.panes.length > 1) sheet.append(el("h3", {}, tagged(index)));
    const first = columns.findIndex((column) => column.label === scoreWords("energy_inside")[0]);
    sheet.append(
      table({
        id: `score-table-${"ab"[index]}`,
        caption: `Scores against masks of ${tagged(index)}`,
        columns,
        rows: [...found.values()],
        sort: first > 0 ? { column: first, down: true } : null,
      }),
    );
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
    const [title, , about] = words("components", "artifacts");
    sentence.textContent = readings
      .map((reading, i) => {
        const found = worst(reading);
        return `${readings.length > 1 ? `${LETTERS[i]}: ` : ""}${found ? `most artifact tokens in ${listed(found.layers)}: ${fmt(found.share, 3)} % of the patches.` : "no artifact tokens in any layer."}`;
      })
      .map(capital)
      .join(" ");
    box.replaceChildren(
      chart({
        id: "artifact-chart",
        title,
        unit: "% of patches",
        about,
        xLabel: "layer",
        pick: (s, p) => show({ layer: p.x, marks: true }),
        series: readings.map((reading, i) => ({
          name: tagged(i),
          look: "line",
          knots: true,
          side: "ab"[i],
          points: reading.artifacts.map(([x, y]) => ({ x, y })),
        })),
      }),
    );
  });
}
