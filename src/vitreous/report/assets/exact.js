// What mixers tell of themselves and probes have drawn: kernels as pictures, decays and profiles as bars or curves.

const CURVES = 7; // of a layer that share a chart
const PICTURES = 8; // of a layer
const MOST_CURVES = 16; // of heads

/** The values of one entry as float32. */
function exactValues(entry) {
  const bytes = bytesOf(entry.values);
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

/** "channel 7", or what stands for all of them. */
const exactName = (entry, place) =>
  entry.names ? entry.names[place] : entry.channels[place] < 0 ? `all ${entry.count} ${entry.of}s` : `${entry.of} ${entry.channels[place]}`;

const exact = () => drawnPart("exact", "Exact readings", CURVES, "The same for every image.");
const figures = () => drawnPart("figures", "Profiles and kinds of heads", MOST_CURVES, "Mean over images.");

/** A part of the entries that a reading has under a name. */
function drawnPart(id, title, most, tail) {
  const { node, show: showPart } = part(id, title);
  const box = { quantity: "" };
  const quantity = choice("Quantity", (value) => redraw({ quantity: value }));
  const [about, body] = [el("p", { class: "about" }), el("div")];
  node.append(quantity.field, about, body);

  function redraw(changes) {
    Object.assign(box, changes);
    const readings = shownReadings();
    const entries = readings.flatMap((reading, i) => reading[id].map((entry) => ({ ...entry, side: i })));
    showPart(entries.length > 0);
    if (!entries.length) return;
    const names = [...new Set(entries.map((entry) => entry.quantity))];
    if (!names.includes(box.quantity)) box.quantity = names[0];
    const labelOf = (name) => entries.find((entry) => entry.quantity === name).label;
    quantity.show(
      names.map((value) => ({ value, label: labelOf(value) })),
      box.quantity,
    );
    const chosen = entries.filter((entry) => entry.quantity === box.quantity);
    const more = chosen.some((entry) => entry.channels[0] < 0);
    about.textContent = `${chosen[0].explains}${more ? ` First the root mean square of all ${chosen[0].of}s, then the largest ones.` : ""}${chosen[0].names ? "" : ` ${tail}`}`;
    const pictures = chosen.filter((entry) => entry.shape.length === 3);
    const bars = chosen.filter((entry) => entry.shape.length === 1);
    const curves = chosen.filter((entry) => entry.shape.length === 2);
    body.replaceChildren(
      ...pictures.map(pictureRow),
      el("div", { class: "charts" }, bars.length ? barChart(bars) : null, curves.map(curveChart)),
    );
  }

  const sideOf = (entry) => (state.panes.length > 1 ? `${LETTERS[entry.side]}, ` : "");

  function pictureRow(entry) {
    const [count, height, width] = entry.shape;
    const values = exactValues(entry);
    const size = height * width;
    return el(
      "div",
      { class: "multiple" },
      el("h3", {}, `${sideOf(entry)}${layerName(entry.layer)}`, el("span", { class: "quiet" }, ` ${entry.name}`)),
      el(
        "div",
        { class: "tiles" },
        [...Array(Math.min(count, PICTURES)).keys()].map((place) => exactPicture(entry, place, values.subarray(place * size, (place + 1) * size))),
      ),
    );
  }

  function exactPicture(entry, place, values) {
    const [, height, width] = entry.shape;
    const map = { values, signed: values.some((value) => value < 0), unsure: false, ...extent(values) };
    const range = rangeOf([map], false);
    const canvas = el("canvas", { width, height, "aria-hidden": "true" });
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(width, height);
    values.forEach((value, i) => pixels.data.set([...colorOf(map, value, range), 255], 4 * i));
    context.putImageData(pixels, 0, 0);
    const name = exactName(entry, place);
    const ends = `${fmt(map.low, 2)} to ${fmt(map.high, 2)}`;
    return el(
      "figure",
      { class: entry.names ? "tile exact-picture named" : "tile exact-picture", role: "img", "aria-label": `${entry.label}, ${layerName(entry.layer)}, ${name}: ${ends}` },
      canvas,
      el("figcaption", {}, el("span", {}, name), el("span", { class: "quiet" }, ends)),
    );
  }

  function barChart(entries) {
    const lines = colored(
      entries.map((entry) => ({
        name: `${sideOf(entry)}layer ${entry.layer}`,
        points: [...exactValues(entry)].map((y, x) => ({ x, y })),
        knots: true,
      })),
      false,
    );
    const [first] = entries;
    return el(
      "div",
      {},
      chart({ id: `${id}-${first.quantity}`, title: first.label, unit: first.unit, xLabel: first.of, series: lines }),
      key(lines.map((line) => [line.color, line.name])),
    );
  }

  function curveChart(entry) {
    const [count, length] = entry.shape;
    const values = exactValues(entry);
    const at = (i) => (entry.span && length > 1 ? entry.span[0] + (i / (length - 1)) * (entry.span[1] - entry.span[0]) : i);
    const lines = colored(
      [...Array(Math.min(count, most)).keys()].map((place) => ({
        name: exactName(entry, place),
        points: [...values.subarray(place * length, (place + 1) * length)].map((y, i) => ({ x: Number(at(i).toPrecision(4)), y })),
      })),
      false,
    );
    return el(
      "div",
      {},
      chart({
        id: `${id}-${entry.quantity}-${entry.layer}-${"ab"[entry.side]}`,
        title: `${sideOf(entry)}layer ${entry.layer}`,
        unit: entry.unit,
        xLabel: entry.axis || "place",
        series: lines,
      }),
      key(lines.map((line) => [line.color, line.name])),
    );
  }
  section(["panes"], () => redraw({}));
}
