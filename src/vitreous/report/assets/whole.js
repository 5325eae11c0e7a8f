// Numbers that are of the whole model and of no layer, such as what perturbed patches do to its answers.

function wholeModel() {
  const { node, show } = part("whole", "Of the whole model");
  const box = el("div");
  node.append(box);
  section(["panes"], () => {
    const tables = shownReadings().flatMap(wholeTables);
    show(tables.length > 0);
    box.replaceChildren(...tables);
  });
}

/** A table for each source of a reading that has such numbers, with what they mean. */
function wholeTables(reading, index) {
  const rows = reading.table.rows.filter((row) => row[2] < 0 && formOf(row[0]) === "layers");
  return [...new Set(rows.map((row) => row[0]))].flatMap((source) => {
    const own = rows.filter((row) => row[0] === source).map(([, kind, , , ...cells]) => ({ kind, cells }));
    const names = reading.table.columns.filter((_, i) => own.some((row) => row.cells[i]));
    const at = (row, name) => row.cells[reading.table.columns.indexOf(name)];
    const columns = [
      { label: "At", value: (row) => row.kind },
      ...names.map((name) => ({
        label: measureWords(name)[0],
        title: measureWords(name)[2],
        numeric: true,
        value: (row) => at(row, name)?.[0] ?? null,
      })),
      { label: "Images", numeric: true, value: (row) => Math.max(...names.map((name) => at(row, name)?.[2] ?? 0)) },
    ];
    const [label, , about] = words("sources", source);
    return [
      el("p", { class: "about" }, about),
      table({ id: `whole-${source}-${"ab"[index]}`, caption: `${label}: ${tagged(index)}, mean over images`, columns, rows: own }),
      el(
        "dl",
        { class: "image-facts" },
        names.flatMap((name) => [el("dt", {}, measureWords(name)[0]), el("dd", {}, measureWords(name)[2])]),
      ),
    ];
  });
}
