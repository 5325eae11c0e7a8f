// The spectrum of each head, drawn: the learned one where there is one, else that of the weights.

/** The values of a head, the largest magnitude first. */
function spectrumOf(entry, head) {
  const view = new DataView(bytesOf(entry.values).buffer);
  const values = Array.from({ length: entry.axes }, (_, i) => view.getFloat32(4 * (head * entry.axes + i), true));
  return values.sort((a, b) => Math.abs(b) - Math.abs(a));
}

const spectrumIn = (reading, layer) => reading.spectra.find((entry) => entry.layer === layer);
const largest = (entry) => Math.max(...[...Array(entry.heads).keys()].map((head) => Math.abs(spectrumOf(entry, head)[0])));
const SCALES_OF = [
  ["layer", "each layer"],
  ["head", "each head"],
  ["all", "all alike"],
];

function spectra() {
  const { node, show: showPart } = part("spectra", "Spectra of the heads");
  const box = { scale: "layer", lines: "heads" };
  const scale = choice("Heights compare within", (value) => redraw({ scale: value }));
  const lines = choice("Lines", (value) => redraw({ lines: value }));
  const [about, legend] = [el("p", { class: "about" }), el("div")];
  const [panel, detail] = [el("div", { class: "scroll spectra", tabindex: 0, role: "region", "aria-label": "Spectra of all heads" }), el("div", { class: "grow" })];
  node.append(about, el("div", { class: "row" }, scale.field, lines.field), legend, el("div", { class: "abreast" }, panel, detail));

  /** Readings drawn in each small picture: what is shown, and behind it the first epoch, or A. */
  function drawn() {
    const [first, second] = state.panes;
    const now = { name: tagged(0), reading: readingOf(first), look: "a" };
    if (second) return [now, { name: tagged(1), reading: readingOf(second), look: "b" }];
    const start = DATA.sources[first.source].readings[0];
    const name = epochs ? paneName({ ...first, at: 0 }) : "";
    return start === now.reading ? [now] : [now, { name, reading: start, look: "before" }];
  }

  function redraw(changes) {
    Object.assign(box, changes);
    const shown = drawn();
    const { spectra: entries } = shown[0].reading;
    showPart(entries.length > 0);
    if (!entries.length) return;
    const sources = [...new Set(entries.map((entry) => entry.source))];
    about.textContent = `${sources.map((name) => `${words("sources", name)[0]}: ${words("sources", name)[2]}`).join(" ")} Each picture is a head: one bar for each axis, by magnitude${sources.includes("learned") ? ", orange where the value is negative" : ""}.`;
    scale.show(
      SCALES_OF.map(([value, label]) => ({ value, label })),
      box.scale,
    );
    legend.replaceChildren(
      ...(shown.length > 1 ? [key(shown.map(({ name, look }) => [look === "before" ? "line dashed soft" : `line ${look}`, name]))] : []),
    );
    const all = Math.max(...shown.flatMap(({ reading }) => reading.spectra.map(largest)));
    const heads = Math.max(...entries.map((entry) => entry.heads));
    panel.replaceChildren(
      el(
        "table",
        { class: "matrix" },
        el("caption", { class: "unseen" }, "Spectrum of each head"),
        el("thead", {}, el("tr", {}, el("td"), [...Array(heads).keys()].map((head) => el("th", { scope: "col" }, `head ${head}`)))),
        el(
          "tbody",
          {},
          entries.map((entry) =>
            el(
              "tr",
              {},
              el("th", { scope: "row" }, `layer ${entry.layer}`),
              [...Array(entry.heads).keys()].map((head) => el("td", {}, small(shown, entry, head, all))),
            ),
          ),
        ),
      ),
    );
    drawDetail(shown);
  }

  function small(shown, entry, head, all) {
    const present = shown.map((one) => ({ ...one, entry: spectrumIn(one.reading, entry.layer) })).filter((one) => head < (one.entry?.heads ?? 0));
    const tops = { all: () => all, layer: () => Math.max(...present.map((one) => largest(one.entry))), head: () => Math.max(...present.map((one) => Math.abs(spectrumOf(one.entry, head)[0]))) };
    const top = tops[box.scale]() || 1;
    const values = spectrumOf(entry, head);
    const marks = present.flatMap((one, i) => (i ? [outlined(spectrumOf(one.entry, head), top, one.look)] : bars(values, top)));
    const chosen = state.layer === entry.layer && state.head === head;
    const label = `${where(entry.layer, head)}: ${fmt(Math.abs(values[0]))} down to ${fmt(Math.abs(values[values.length - 1]))}`;
    return el(
      "button",
      { type: "button", class: "spectrum", "aria-label": label, title: label, "aria-pressed": String(chosen), "data-place": `${entry.layer}/${head}`, on: { click: () => choose(entry.layer, head) } },
      draw("svg", { viewBox: "0 0 84 40", "aria-hidden": "true" }, marks),
    );
  }

  /** The choice draws the pictures anew; the keyboard stays on the one that was chosen. */
  function choose(layer, head) {
    set({ layer, head });
    panel.querySelector(`[data-place="${layer}/${head}"]`)?.focus({ preventScroll: true });
  }

  function bars(values, top) {
    const width = 84 / values.length;
    const path = (kept) =>
      values.map((value, i) => (kept(value) ? `M${(i * width).toFixed(2)} 40v${(-39 * Math.abs(value) / top).toFixed(2)}h${(width * 0.86).toFixed(2)}V40z` : "")).join("");
    return [
      draw("path", { class: "bar a", d: path((value) => value >= 0) }),
      draw("path", { class: "bar b", d: path((value) => value < 0) }),
    ];
  }

  function outlined(values, top, look) {
    const width = 84 / values.length;
    const points = values.map((value, i) => `${(i * width).toFixed(2)} ${(40 - (39 * Math.abs(value)) / top).toFixed(2)}h${width.toFixed(2)}`);
    return draw("path", { class: `over ${look}`, d: `M${points.join("L")}` });
  }

  function drawDetail(shown) {
    const [pane] = state.panes;
    const history = DATA.sources[pane.source].readings;
    const head = Math.max(state.head, 0);
    const choices = [["heads", "each head"], ...(history.length > 1 ? [["epochs", "each epoch"]] : [])];
    if (!choices.some(([value]) => value === box.lines)) box.lines = "heads";
    lines.field.hidden = choices.length < 2;
    lines.show(
      choices.map(([value, label]) => ({ value, label })),
      box.lines,
    );
    const points = (entry, one) => spectrumOf(entry, one).map((value, i) => ({ x: i + 1, y: value }));
    const series =
      box.lines === "epochs"
        ? history.map((reading, at) => [paneName({ ...pane, at }), spectrumIn(reading, state.layer), head])
        : shown.filter((one) => one.look !== "before").flatMap(({ reading, name }) => {
            const entry = spectrumIn(reading, state.layer);
            return [...Array(entry?.heads ?? 0).keys()].map((one) => [`${several && state.panes.length > 1 ? `${name}, ` : ""}head ${one}`, entry, one]);
          });
    const present = series.filter(([, entry, one]) => entry && one < entry.heads);
    const drawnLines = colored(
      present.map(([name, entry, one]) => ({ name, points: points(entry, one) })),
      box.lines === "epochs",
    );
    detail.replaceChildren(
      key(drawnLines.map((line) => [line.color, line.name])),
      chart({
        id: "spectrum-chart",
        title: box.lines === "epochs" ? capital(where(state.layer, head)) : `Layer ${state.layer}, all heads`,
        xLabel: "axis, by magnitude",
        series: drawnLines,
      }),
    );
  }
  section(["panes", "layer", "head"], () => redraw({}));
}
