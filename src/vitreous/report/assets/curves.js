// Faithfulness: insertion and deletion curves, and the check with randomised weights.

function faithfulness() {
  const { node, show: showPart } = part("faithfulness", "Faithfulness");
  const box = { component: null, layer: null };
  const pick = choice("Map", (value) => {
    box.component = value;
    redraw();
  });
  const depth = choice("Layer", (value) => {
    box.layer = value;
    redraw();
  });
  const about = el(
    "p",
    { class: "about" },
    "Patches are put in, or taken away, from the highest of the map down, and the model's probability is followed. " +
      "A faithful map raises it faster, and lowers it faster, than a random order. With randomised weights the map should become another one: a correlation near 0.",
  );
  const [told, body, sheet] = [el("p", { class: "quiet" }), el("div", { class: "charts" }), el("div")];
  node.append(
    about,
    el("div", { class: "row" }, pick.field, depth.field),
    told,
    key([
      ["line a", "the map"],
      ["line a dashed", "random order"],
    ]),
    body,
    sheet,
  );
  const name = (curve) => `${componentName(curve.component)}${curve.layer < 0 ? "" : `, layer ${curve.layer}`}`;
  const series = (curve, what) =>
    [
      [what, false],
      [`random_${what}`, true],
    ]
      .filter(([id]) => curve[id])
      .map(([id, dashed]) => ({
        name: dashed ? "random order" : "the map",
        look: "line",
        side: "a",
        dashed,
        points: curve.fractions.map((x, i) => ({ x, y: curve[id][i] })),
      }));

  function redraw() {
    const readings = shownReadings();
    const found = readings.flatMap((reading, i) => reading.curves.map((curve) => ({ curve, i })));
    showPart(found.length > 0);
    if (!found.length) return;
    const best = highest(found, ({ curve }) => curve.difference?.[0] ?? null) || found[0];
    const names = [...new Set(found.map(({ curve }) => curve.component))];
    if (!names.includes(box.component))
      Object.assign(box, { component: best.curve.component, layer: best.curve.layer });
    const depths = [
      ...new Set(found.filter(({ curve }) => curve.component === box.component).map(({ curve }) => curve.layer)),
    ].sort((a, b) => a - b);
    if (!depths.includes(box.layer)) box.layer = depths[depths.length - 1];
    pick.show(
      names.map((value) => ({ value, label: componentName(value) })),
      box.component,
    );
    depth.show(
      depths.map((value) => ({ value, label: value < 0 ? "whole model" : String(value) })),
      box.layer,
    );
    const shown = found.filter(({ curve }) => curve.component === box.component && curve.layer === box.layer);
    const { followed, fill: filled, images: count, passes } = shown[0].curve;
    told.textContent = [
      followed && `Followed: ${followed}`,
      filled && `missing patches: ${filled}`,
      count && plural(count, "image"),
      passes && `${fmt(passes)} passes for each map of an image`,
    ]
      .filter(Boolean)
      .join("; ");
    const tag = (i) => (readings.length > 1 ? ` of ${LETTERS[i]}` : "");
    body.replaceChildren(
      ...shown.flatMap(({ curve, i }) => [
        chart({
          title: `Insertion${tag(i)}`,
          unit: "probability",
          xLabel: "share of patches put in",
          xName: fmt,
          series: series(curve, "insertion"),
        }),
        chart({
          title: `Deletion${tag(i)}`,
          unit: "probability",
          xLabel: "share of patches taken away",
          xName: fmt,
          series: series(curve, "deletion"),
        }),
      ]),
    );
    const columns = [
      { label: "Map", value: ({ curve, i }) => name(curve) + tag(i) },
      { label: "Area, insertion", numeric: true, value: ({ curve }) => curve.insertion_area ?? null },
      { label: "Area, deletion", numeric: true, value: ({ curve }) => curve.deletion_area ?? null },
      {
        label: "Difference to random order",
        numeric: true,
        value: ({ curve }) => curve.difference?.[0] ?? null,
        text: ({ curve }) =>
          curve.difference
            ? curve.difference[1] === null
              ? `${fmt(curve.difference[0], 3)} (too few images for an interval)`
              : `${fmt(curve.difference[0], 3)} [${fmt(curve.difference[1], 3)}, ${fmt(curve.difference[2], 3)}]`
            : "–",
      },
      { label: "Correlation, weights randomised", numeric: true, value: ({ curve }) => curve.randomised ?? null },
    ];
    sheet.replaceChildren(
      table({
        id: "curve-table",
        caption: "Faithfulness of the maps",
        columns,
        rows: found,
        sort: { column: 3, down: true },
        limit: 12,
      }),
    );
  }
  section(["panes"], redraw);
}
