// How each layer was captured, what was left out, and the facts of the model.

function layers() {
  const { node } = part("layers", "Capture");
  const body = el("div");
  node.append(body);
  const size = (grid) => (grid ? grid.join(" × ") : "none");
  section(["panes"], () =>
    body.replaceChildren(
      ...shownReadings().flatMap((reading, i) =>
        [
          state.panes.length > 1 ? el("h3", {}, tagged(i)) : null,
          table({
            id: `layer-table-${"ab"[i]}`,
            caption: `Layers of ${tagged(i)}`,
            rows: reading.layers,
            go: (row) => show({ layer: row.layer }),
            columns: [
              { label: "Layer", numeric: true, value: (row) => row.layer },
              { label: "Module", value: (row) => row.name },
              { label: "Kind", value: (row) => row.kind + (row.effective ? ", effective" : "") },
              { label: "Route", value: (row) => row.route },
              { label: "Verified by", value: (row) => row.verified },
              {
                label: "Error",
                numeric: true,
                title: "Relative to the largest value",
                value: (row) => row.error,
                text: (row) =>
                  row.error === null || row.error === undefined
                    ? "–"
                    : row.error === 0
                      ? "0"
                      : row.error.toExponential(1).replace("-", "−"),
              },
              { label: "Heads", numeric: true, value: (row) => row.heads },
              { label: "Queries", numeric: true, value: (row) => row.queries },
              { label: "Keys", numeric: true, value: (row) => row.keys },
              { label: "Windows", numeric: true, value: (row) => row.windows },
              { label: "Grid", value: (row) => size(row.grid) },
              { label: "Note", long: true, value: (row) => row.note || "" },
            ],
          }),
          ...[
            ["refused", "Refused: no map, for a reason"],
            ["skipped", "Skipped images"],
          ].flatMap(([id, title]) =>
            reading[id]?.length
              ? [
                  el("h3", {}, title),
                  table({
                    id: `${id}-${"ab"[i]}`,
                    caption: title,
                    rows: reading[id],
                    columns: [
                      { label: "Name", long: true, value: (row) => row.name },
                      { label: "Reason", long: true, value: (row) => row.reason },
                    ],
                  }),
                ]
              : [],
          ),
        ].filter(Boolean),
      ),
    ),
  );
}

function facts() {
  const { node } = part("facts", "Facts");
  const body = el("div", { class: "side-by-side" });
  node.append(body);
  const text = (value) =>
    value === null || value === undefined || value === ""
      ? null
      : Array.isArray(value)
        ? value.map(text).join(", ") || "none"
        : typeof value === "object"
          ? Object.entries(value)
              .map(([name, one]) => `${name} ${text(one)}`)
              .join(", ")
          : typeof value === "number"
            ? Number.isInteger(value)
              ? value.toLocaleString("en-US")
              : fmt(value)
            : String(value);
  const list = (entries) =>
    el(
      "dl",
      { class: "facts" },
      entries
        .map(([name, value]) => [name, text(value)])
        .filter(([, value]) => value !== null)
        .flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]),
    );
  section(["panes"], () =>
    body.replaceChildren(
      ...state.panes.map((pane, i) => {
        const [reading, run] = [readingOf(pane), DATA.sources[pane.source].run];
        const model = reading.model || {};
        return el(
          "div",
          {},
          state.panes.length > 1 ? el("h3", {}, tagged(i)) : null,
          list([
            ["Model", model.name],
            ["Class", model.class],
            ["Parameters", model.parameters],
            ["Weights", model.weights],
            ["Grafts", model.mechanisms],
            ["Images", reading.count],
            ["Seed", String(reading.seed ?? "")],
            ["Settings", reading.settings],
            ["Versions", reading.versions],
            ...(run
              ? [
                  ["Trained on", run.data?.name],
                  ["Command", run.command],
                  ["Device", run.device],
                  ["Machine", run.machine],
                  ["Remarks", run.remarks?.length ? run.remarks : null],
                ]
              : []),
          ]),
          reading.notes?.length
            ? el(
                "ul",
                { class: "notes" },
                reading.notes.map((note) => el("li", {}, note)),
              )
            : null,
        );
      }),
    ),
  );
}
