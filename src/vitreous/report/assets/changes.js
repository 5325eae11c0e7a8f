// What differs between two readings.

/** Differences of B to A per source, layer, head and measure; largest first, in units of the spread over both readings. */
function changes(a, b) {
  const found = [];
  const pairs = sourcesOf([a, b]);
  for (const pair of pairs) {
    for (const measure of measuresOf([a], pair).filter((name) => !name.endsWith("_paper"))) {
      const mine = new Map(rowsOf(a, pair).map((row) => [`${row.layer}/${row.head}`, cellOf(a, row, measure)]));
      const both = rowsOf(b, pair)
        .map((row) => ({ ...row, left: mine.get(`${row.layer}/${row.head}`), right: cellOf(b, row, measure) }))
        .filter((row) => row.left && row.right);
      if (both.length < 2) continue; // there is no spread that a difference could be measured by
      const all = both.flatMap((row) => [row.left[0], row.right[0]]);
      const middle = all.length ? mean(all) : 0;
      const spread = Math.sqrt(mean(all.map((value) => (value - middle) ** 2)));
      for (const row of both) {
        const difference = row.right[0] - row.left[0];
        if (difference)
          found.push({
            source: pairs.filter((other) => other[0] === pair[0]).length > 1 ? pair.join(", ") : pair[0],
            layer: row.layer,
            head: row.head,
            measure,
            a: row.left[0],
            b: row.right[0],
            difference,
            up: pairedShare(a, b, [...pair, row.layer, row.head].join("/"), measure),
            size: Math.abs(difference) / spread,
          });
      }
    }
  }
  return found.sort(
    (x, y) => y.size - x.size || x.layer - y.layer || x.head - y.head || x.measure.localeCompare(y.measure),
  );
}

/** [images in which the measure is higher in B, images that both have], or null where it is not of single images. */
function pairedShare(a, b, id, measure) {
  const [left, right] = [a.each.columns.indexOf(measure), b.each.columns.indexOf(measure)];
  let [up, count] = [0, 0];
  b.images.forEach((image, place) => {
    const other = a.images[place]?.name === image.name ? place : a.images.findIndex((one) => one.name === image.name);
    const [x, y] = [
      own(a.each.values, `${id}/${other}`)?.[left] ?? null,
      own(b.each.values, `${id}/${place}`)?.[right] ?? null,
    ];
    if (x === null || y === null) return;
    count += 1;
    up += y > x ? 1 : 0;
  });
  return count ? [up, count] : null;
}

/** Mean correlation of the attention maps of A and B, image by image, per layer and head: {layer, head, value}. */
function likeness(a, b) {
  const found = [];
  for (const layer of layersOf([a, b])) {
    const [mine, theirs] = [a.maps[`attention/${layer}`], b.maps[`attention/${layer}`]];
    if (!mine || !theirs || mine.height !== theirs.height || mine.width !== theirs.width) continue;
    if (mine.depth || theirs.depth) continue; // slices have ranges of their own
    const size = mine.height * mine.width;
    // A map's own range does not change a correlation, so the bytes will do.
    const cells = (entry, image, head) =>
      block(entry)
        .cells.subarray((image * Math.max(entry.heads, 1) + head) * size)
        .subarray(0, size);
    for (let head = 0; head < Math.min(mine.heads, theirs.heads); head++) {
      const values = b.images
        .map((image, place) => {
          const other =
            a.images[place]?.name === image.name ? place : a.images.findIndex((one) => one.name === image.name);
          return other < 0 ? null : correlation(cells(mine, other, head), cells(theirs, place, head));
        })
        .filter((value) => value !== null);
      if (values.length) found.push({ layer, head, value: mean(values) });
    }
  }
  return found;
}

/** Pearson's correlation; null if either is constant. */
function correlation(x, y) {
  let [sx, sy, xx, yy, xy] = [0, 0, 0, 0, 0];
  for (let i = 0; i < x.length; i++) {
    sx += x[i];
    sy += y[i];
    xx += x[i] * x[i];
    yy += y[i] * y[i];
    xy += x[i] * y[i];
  }
  const n = x.length;
  const spread = (xx - (sx * sx) / n) * (yy - (sy * sy) / n);
  return spread > 0 ? (xy - (sx * sy) / n) / Math.sqrt(spread) : null;
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
      {
        label: "Higher in B",
        numeric: true,
        title: "In how many of the images that both have on this page",
        value: (row) => (row.up ? row.up[0] / row.up[1] : null),
        text: (row) => (row.up ? `${row.up[0]} of ${row.up[1]}` : "–"),
      },
    ];
    const alike = likeness(...shownReadings());
    const unlike = shownReadings().map((reading) => reading.layers.map((layer) => layer.name).join());
    body.replaceChildren(
      el(
        "p",
        { class: "about" },
        "Mean over images, B against A, per layer and head. A spread is the standard deviation of that measure over all layers and heads of both. " +
          (unlike[0] === unlike[1] ? "" : "The two models name their layers differently: they are matched by number."),
      ),
      el(
        "div",
        { class: "abreast" },
        cells.length && rows.length
          ? el(
              "div",
              {},
              el("h3", {}, "Largest difference of each head, in spreads"),
              matrix(
                "Differences by layer and head",
                cells,
                highest(cells, (cell) => cell.value),
              ),
            )
          : null,
        alike.length
          ? el(
              "div",
              { id: "alike" },
              el("h3", {}, "Likeness of the attention maps, correlation"),
              matrix(
                "Correlation of attention maps by layer and head",
                alike,
                highest(alike, (cell) => -cell.value),
                1,
                "the least alike",
              ),
            )
          : null,
      ),
      rows.length ? el("h3", {}, "Largest first") : el("p", { class: "sentence" }, "No measure differs."),
      ...(rows.length
        ? [
            table({
              id: "changes-table",
              caption: "Differences between A and B",
              columns,
              rows,
              limit: 20,
              go: (row) => show({ layer: row.layer, head: row.head }),
            }),
          ]
        : []),
    );
  });
}
