// Sources whose rows are drawn as a table of layers and heads: a colour for each, the kinds of rows one at a time.

function matrices() {
  for (const record of WORDS.sources) if (record.form === "matrix") matrixPart(record);
}

function matrixPart(record) {
  const { node, show: showPart } = part(`matrix-${record.name}`, record.label);
  const box = { measure: "", kind: "", of: "mean" };
  const measure = choice("Measure", (value) => redraw({ measure: value }));
  const kind = choice("Rows", (value) => redraw({ kind: value }));
  const of = choice("Of", (value) => redraw({ of: value }));
  const [about, body] = [el("p", { class: "about" }), el("div", { class: "abreast" })];
  node.append(el("p", { class: "about" }, record.explains), el("div", { class: "row" }, measure.field, kind.field, of.field), about, body);

  function redraw(changes) {
    Object.assign(box, changes);
    const readings = shownReadings();
    const pairs = sourcesOf(readings).filter((pair) => pair[0] === record.name);
    showPart(pairs.length > 0);
    if (!pairs.length) return;
    const kinds = pairs.map((pair) => pair[1]);
    if (!kinds.includes(box.kind)) [box.kind] = kinds;
    kind.field.hidden = kinds.length < 2;
    kind.show(
      kinds.map((value) => ({ value, label: value })),
      box.kind,
    );
    const pair = [record.name, box.kind];
    const found = measuresOf(readings, pair);
    const names = namesOf("measures").filter((name) => found.includes(name));
    if (!names.includes(box.measure)) [box.measure] = names;
    measure.show(
      names.map((value) => ({ value, label: measureWords(value)[0] })),
      box.measure,
    );
    of.show(
      [
        { value: "mean", label: "mean of images" },
        { value: "one", label: "the chosen image" },
      ],
      box.of,
    );
    const [label, unit, text] = measureWords(box.measure);
    about.textContent = `${text}${unit ? ` Unit or range: ${unit}.` : ""} The highest has a frame.`;
    const every = readings.map((reading) => valuesOf(reading, pair));
    const full = Math.max(...every.flat().map((row) => row.value)); // one for all readings, so that equal values look equal
    body.replaceChildren(...readings.map((reading, i) => sheet(reading, i, every[i], full, label)));
  }

  /** [{layer, head, value}] of the mean over images, or of the chosen one. */
  function valuesOf(reading, pair) {
    return rowsOf(reading, pair).flatMap((row) => {
      if (row.head < 0) return [];
      const values = reading.each.values[[...pair, row.layer, row.head, state.image].join("/")];
      const value = box.of === "mean" ? cellOf(reading, row, box.measure)?.[0] : values?.[reading.each.columns.indexOf(box.measure)];
      return value === null || value === undefined ? [] : [{ layer: row.layer, head: row.head, value }];
    });
  }

  function sheet(reading, side, rows, full, label) {
    const image = reading.images[state.image];
    const named = own(image?.classes, record.name);
    const whose = box.of === "one" && image ? `${image.name}${named ? `, class ${named}` : ""}` : "";
    const heading = [state.panes.length > 1 ? tagged(side) : "", whose].filter(Boolean).join(". ");
    if (!rows.length) return el("p", { class: "quiet" }, "Not measured for this image.");
    const best = rows.reduce((a, b) => (b.value > a.value ? b : a));
    return el("div", {}, heading ? el("h3", {}, heading) : null, matrix(`${label} by layer and head, ${tagged(side)}`, rows, best, full));
  }
  section(["panes", "image"], () => redraw({}));
}
