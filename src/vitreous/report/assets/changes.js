// What differs between two readings.

/** Differences of B to A per source, layer, head and measure; largest first, in units of the spread over both readings. */
function changes(a, b) {
  const found = [];
  for (const pair of sourcesOf([a, b])) {
    for (const measure of measuresOf([a], pair).filter((name) => !name.endsWith("_paper"))) {
      const mine = new Map(rowsOf(a, pair).map((row) => [`${row.layer}/${row.head}`, cellOf(a, row, measure)]));
      const both = rowsOf(b, pair)
        .map((row) => ({ ...row, left: mine.get(`${row.layer}/${row.head}`), right: cellOf(b, row, measure) }))
        .filter((row) => row.left && row.right);
      const all = both.flatMap((row) => [row.left[0], row.right[0]]);
      const middle = all.length ? mean(all) : 0;
      const spread = Math.sqrt(mean(all.map((value) => (value - middle) ** 2)));
      for (const row of both) {
        const difference = row.right[0] - row.left[0];
        if (difference)
          found.push({
            source: pair[0],
            layer: row.layer,
            head: row.head,
            measure,
            a: row.left[0],
            b: row.right[0],
            difference,
            size: Math.abs(difference) / spread,
          });
      }
    }
  }
  return found.sort(
    (x, y) => y.size - x.size || x.layer - y.layer || x.head - y.head || x.measure.localeCompare(y.measure),
  );
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
    const cells = [...heads[0]]
      .filter((id) => heads[1].has(id))
      .map((id) => id.split("/").map(Number))
      .filter(([, head]) => head >= 0)
      .map(([layer, head]) => ({
        layer,
        head,
        value: Math.max(0, ...rows.filter((row) => row.layer === layer && row.head === head).map((row) => row.size)),
      }));
    const columns = [
      { label: "Where", value: (row) => capital(where(row.layer, row.head)) },
      { label: "Measure", value: (row) => measureWords(row.measure)[0] },
      { label: "Of", value: (row) => row.source },
      { label: "A", numeric: true, value: (row) => row.a },
      { label: "B", numeric: true, value: (row) => row.b },
      { label: "B − A", numeric: true, value: (row) => row.difference, text: (row) => signedFmt(row.difference) },
      {
        label: "In spreads",
        numeric: true,
        title: "Against the standard deviation over all layers and heads of both",
        value: (row) => row.size,
      },
    ];
    const unlike = shownReadings().map((reading) => reading.layers.map((layer) => layer.name).join());
    body.replaceChildren(
      el(
        "p",
        { class: "about" },
        "Mean over images, B against A, per layer and head. A spread is the standard deviation of that measure over all layers and heads of both. " +
          (unlike[0] === unlike[1] ? "" : "The two models name their layers differently: they are matched by number."),
      ),
      ...(rows.length
        ? [
            cells.length ? el("h3", {}, "The largest difference of each head, in spreads") : null,
            matrix(
              "Differences by layer and head",
              cells,
              highest(cells, (cell) => cell.value),
              true,
            ),
            el("h3", {}, "Largest first"),
            table({
              id: "changes-table",
              caption: "Differences between A and B",
              columns,
              rows,
              limit: 20,
              go: (row) => show({ layer: row.layer, head: row.head }),
            }),
          ].filter(Boolean)
        : [el("p", { class: "sentence" }, "No measure differs.")]),
    );
  });
}
