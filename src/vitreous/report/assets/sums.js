// Sources whose rows are parts of a sum: a bar for each, layer by layer, the kinds of a layer side by side.

const WIDE = 690;

function sums() {
  for (const record of WORDS.sources) if (record.form === "bars") sumPart(record);
}

function sumPart(record) {
  const { node, show } = part(`sum-${record.name}`, record.label);
  const box = { measure: "", of: "mean" };
  const measure = choice("Measure", (value) => redraw({ measure: value }));
  const of = choice("Of", (value) => redraw({ of: value }));
  const [legend, body, about] = [el("div"), el("div"), el("p", { class: "about" }, record.explains)];
  node.append(about, el("div", { class: "row" }, measure.field, of.field), legend, body);

  function redraw(changes) {
    Object.assign(box, changes);
    const readings = shownReadings();
    const pairs = sourcesOf(readings).filter((pair) => pair[0] === record.name);
    show(pairs.length > 0);
    if (!pairs.length) return;
    const names = namesOf("measures").filter((name) => pairs.some((pair) => measuresOf(readings, pair).includes(name)));
    if (!names.includes(box.measure)) box.measure = names[0];
    measure.show(
      names.map((value) => ({ value, label: measureWords(value)[0] })),
      box.measure,
    );
    of.show(
      [
        { value: "mean", label: `mean of ${plural(readings[0].count, "image")}` },
        { value: "one", label: "the chosen image" },
      ],
      box.of,
    );
    const every = readings.map((reading) => seriesOf(reading, pairs));
    const ends = every.flat().flatMap((one) => one.points.flatMap((p) => [p.y, p.low ?? p.y, p.high ?? p.y]));
    legend.replaceChildren(colourKey(every.flat()));
    body.replaceChildren(...readings.map((reading, i) => sumChart(reading, i, every[i], bounds([0, ...ends]))));
  }

  /** {x: value, low, high} of the rows of a kind; what is of no layer stands left of the first one. */
  function pointsOf(reading, pair, alone) {
    return rowsOf(reading, pair).flatMap((row) => {
      const x = row.layer < 0 ? alone : row.layer;
      const mean = cellOf(reading, row, box.measure);
      if (box.of === "mean") {
        const spread = mean && mean[2] > 1 ? { low: mean[0] - mean[1], high: mean[0] + mean[1] } : {};
        return mean ? [{ x, y: mean[0], ...spread }] : [];
      }
      const values = reading.each.values[[...pair, row.layer, row.head, state.image].join("/")];
      const y = values?.[reading.each.columns.indexOf(box.measure)] ?? null;
      return y === null ? [] : [{ x, y }];
    });
  }

  /** A series for each kind, its bars side by side with those of the others. */
  function seriesOf(reading, pairs) {
    const lonely = pairs.filter((pair) => rowsOf(reading, pair).every((row) => row.layer < 0));
    const found = pairs
      .map((pair, i) => ({
        name: pair[1],
        look: "bars",
        color: lineColor(i, pairs.length, false),
        points: pointsOf(reading, pair, lonely.indexOf(pair) - lonely.length),
      }))
      .filter((one) => one.points.length);
    const at = (x) => found.filter((one) => one.points.some((p) => p.x === x));
    const most = Math.max(1, ...found.flatMap((one) => one.points.map((p) => at(p.x).length)));
    for (const one of found) {
      one.slot = 0.8 / most;
      for (const p of one.points) p.shift = (at(p.x).indexOf(one) - (at(p.x).length - 1) / 2) * one.slot;
    }
    return found;
  }

  function sumChart(reading, side, series, range) {
    const [title, unit, text] = measureWords(box.measure);
    const image = reading.images[state.image];
    const named = own(image?.classes, record.name);
    const whose = box.of === "one" && image ? `${image.name}${named ? `, class ${named}` : ""}: ` : "";
    const tag = state.panes.length > 1 ? `${tagged(side)}. ` : "";
    return chart({
      id: `sum-${record.name}-${"ab"[side]}`,
      title: `${tag}${whose}${title}`,
      unit,
      about: `${text}${box.of === "mean" && reading.count > 1 ? " Lines: one standard deviation over images." : ""}`,
      xLabel: "layer",
      xName: (x) => (x < 0 ? "–" : String(x)),
      series,
      range, // one for all readings, so that equal bars look equal
      spread: "one standard deviation",
      width: WIDE,
      pick: (_, p) => p.x >= 0 && set({ layer: p.x }),
    });
  }
  section(["panes", "image"], () => redraw({}));
}

/** What colours of bars mean, each once. */
function colourKey(series) {
  return key([...new Map(series.map((one) => [one.name, [one.color, one.name]])).values()]);
}
