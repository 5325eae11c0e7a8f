// Runs: training, indicators by epoch, the last epochs side by side.

function overEpochs() {
  const { node } = part("epochs", "Over the epochs");
  const box = { source: null, lines: several ? "runs" : "layers" };
  const source = choice("Of", (value) => {
    box.source = value;
    redraw();
  });
  const lines = choice("Lines", (value) => {
    box.lines = value;
    redraw();
  });
  const [training, legend, grid] = [el("div", { class: "charts" }), el("div"), el("div", { class: "charts" })];
  if (several)
    node.append(
      el("h3", {}, "After the last epoch"),
      runsTable(),
      key(DATA.sources.map((one, i) => [lineColor(i, DATA.sources.length), one.name])),
    );
  node.append(training, el("div", { class: "row" }, source.field, lines.field), legend, grid);
  training.replaceChildren(...trainingCharts(), ...lookerChart());
  training.hidden = !training.children.length;

  function redraw() {
    const run = DATA.sources[state.panes[0].source];
    const readings = DATA.sources.flatMap((one) => one.readings);
    const pairs = sourcesOf(readings);
    if (!pairs.length) return;
    const keys = pairs.map((pair) => pair.join("/"));
    if (!keys.includes(box.source)) box.source = keys[0];
    const pair = pairs[keys.indexOf(box.source)];
    source.show(
      pairs.map((one, i) => ({ value: keys[i], label: sourceLabel(one, pairs) })),
      box.source,
    );
    lines.show(
      [
        ...(several ? [["runs", "each run, mean of its layers"]] : []),
        ["layers", several ? `each layer of ${run.name}` : "each layer, mean of heads"],
        ["heads", `heads of layer ${state.layer}`],
      ].map(([value, label]) => ({ value, label })),
      box.lines,
    );
    const names = measuresOf(readings, pair).filter((name) => !name.endsWith("_paper"));
    const charts = names.map((name) => [name, epochSeries(box.lines, run, pair, name)]);
    const longest = charts.map(([, series]) => series).sort((a, b) => b.length - a.length)[0] || [];
    legend.replaceChildren(key(longest.map((s) => [s.color, s.name])));
    grid.replaceChildren(
      ...charts.map(([name, series]) => {
        const [title, unit] = measureWords(name);
        return chart({
          id: `by-epoch-${pair[0]}-${name}`,
          title,
          unit,
          xLabel: "epoch",
          series,
          pick: (s, p) => set(p.go),
        });
      }),
    );
  }
  section(["panes", "layer"], redraw);
}

function epochSeries(lines, run, pair, name) {
  const number = DATA.sources.indexOf(run);
  const go = (source, at, more = {}) => ({ panes: [{ source, at }, ...state.panes.slice(1)], ...more });
  if (lines === "runs") {
    return colored(
      DATA.sources.map((source, i) => ({
        name: source.name,
        points: source.readings.map((reading, at) => {
          const values = byLayer(reading, pair, name).map((entry) => entry[1]);
          return { x: source.epochs[at], y: values.length ? mean(values) : null, go: go(i, at) };
        }),
      })),
    );
  }
  const found = new Map();
  run.readings.forEach((reading, at) => {
    const values =
      lines === "layers"
        ? byLayer(reading, pair, name)
        : rowsOf(reading, pair)
            .filter((row) => row.layer === state.layer)
            .map((row) => [row.head, cellOf(reading, row, name)?.[0] ?? null]);
    for (const [item, y] of values) {
      if (!found.has(item)) found.set(item, []);
      found
        .get(item)
        .push({ x: run.epochs[at], y, go: go(number, at, lines === "layers" ? { layer: item } : { head: item }) });
    }
  });
  const called = (item) => (lines === "layers" ? `layer ${item}` : item < 0 ? "all heads" : `head ${item}`);
  const series = [...found].sort((a, b) => a[0] - b[0]).map(([item, points]) => ({ name: called(item), points }));
  return colored(series, lines === "layers");
}

/** Energy inside of the head that looks most at the object, by epoch. */
function lookerChart() {
  const series = DATA.sources.map((source, i) => ({
    name: source.name,
    points: source.readings.map((reading, at) => {
      const best = looker(reading);
      return {
        x: source.epochs[at],
        y: best?.mean ?? null,
        low: best?.low,
        high: best?.high,
        go: {
          panes: [{ source: i, at }, ...state.panes.slice(1)],
          ...(best ? { layer: best.layer, head: best.head } : {}),
        },
      };
    }),
  }));
  if (!series.some((s) => s.points.some((p) => p.y !== null))) return [];
  return [
    chart({
      id: "looker-by-epoch",
      title: "Energy inside, best head",
      unit: "0 to 1",
      xLabel: "epoch",
      series: colored(series),
      pick: (s, p) => set(p.go),
    }),
  ];
}

/** The runs at their last epoch, in one table. */
function runsTable() {
  const ends = DATA.sources.map((source, i) => ({
    source: i,
    run: source,
    reading: source.readings[last(i).at],
    metrics: source.metrics[source.metrics.length - 1],
  }));
  const scores = scoresOf(
    DATA.sources.filter((source) => source.metrics.length),
    true,
  );
  const average =
    (name) =>
    ({ reading }) => {
      const values = sourcesOf([reading])
        .filter((pair) => pair[0] === "attention")
        .flatMap((pair) => byLayer(reading, pair, name).map((entry) => entry[1]));
      return values.length ? mean(values) : null;
    };
  const inside =
    (component) =>
    ({ reading }) =>
      highest(
        summaryOf(reading).filter((row) => row.component === component && row.measure === "energy_inside"),
        (row) => row.mean,
      );
  const best = ({ reading }) => looker(reading);
  const scored = ends.some(best);
  return table({
    id: "runs-table",
    caption: "The runs after their last epoch",
    rows: ends,
    go: ({ source }) => set({ panes: [last(source), ...state.panes.slice(1)] }),
    columns: [
      { label: "Run", value: ({ run }) => run.name },
      { label: "Epoch", numeric: true, value: ({ run }) => run.epochs[run.epochs.length - 1] },
      ...scores.map(({ metric, test }) => ({
        label: `${capital(metric.label)}, ${test}`,
        numeric: true,
        value: ({ metrics }) => score(metric, metrics, test),
        text: ({ metrics }) => {
          const value = score(metric, metrics, test);
          return value === null ? "–" : `${value.toFixed(metric.unit === "%" ? 1 : 4)} ${metric.unit}`;
        },
      })),
      ...(scored
        ? [
            {
              label: "Looks most at the object",
              value: (end) => (best(end) ? capital(where(best(end).layer, best(end).head)) : null),
            },
            {
              label: "Energy inside",
              numeric: true,
              value: (end) => best(end)?.mean ?? null,
              text: (end) => (best(end) ? fmt(best(end).mean, 3) + interval(best(end)) : "–"),
            },
            {
              label: "Foreground map",
              title: "Energy inside of the foreground map",
              numeric: true,
              value: (end) => inside("foreground")(end)?.mean ?? null,
            },
          ]
        : []),
      { label: "Effective tokens", numeric: true, value: average("effective_tokens") },
    ],
  });
}
