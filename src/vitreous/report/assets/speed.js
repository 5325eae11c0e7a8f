// The page of a bench: ratios with their intervals, every number, and where it was measured.

const place = (row) => `${row.mode}, batch ${row.batch}, ${row.image_size} px`;
const three = (value) => value.toFixed(3);

/** Where a ratio stands in a strip of 100 units; one scale for the whole page. */
function scale(ratios) {
  const ends = ratios.flatMap((ratio) => [ratio.low, ratio.high]);
  const [low, high] = [Math.min(1, ...ends), Math.max(1, ...ends)];
  const room = Math.max((high - low) * 0.08, 0.005);
  return (value) => ((value - low + room) / (high - low + 2 * room)) * 100;
}

/** One ratio as a strip: the line at 1, the interval, the median. */
function strip(ratio, x) {
  const line = (name, from, to, y1 = 10, y2 = 10) =>
    draw("line", { class: name, x1: from.toFixed(2), x2: to.toFixed(2), y1, y2, "vector-effect": "non-scaling-stroke" });
  const look = { faster: "a", slower: "b" }[ratio.verdict] || "even";
  return draw(
    "svg",
    { class: "strip", viewBox: "0 0 100 20", preserveAspectRatio: "none", "aria-hidden": "true" },
    line("one", x(1), x(1), 0, 20),
    line(`span ${look}`, x(ratio.low), x(ratio.high)),
    line(`middle ${look}`, x(ratio.median), x(ratio.median)),
  );
}

function ratios() {
  if (!DATA.ratios.length) return;
  const x = scale(DATA.ratios);
  const bases = [...new Set(DATA.ratios.map((ratio) => ratio.base))];
  const { node } = part("ratios", "Ratios of times");
  node.append(
    el(
      "p",
      { class: "about" },
      "Below 1, left of the line, the first is faster. A dot is the median over pairs of rounds, its bar the 95 % interval. Faster and slower are said only where the 99 % interval misses 1 as well.",
    ),
    ...bases.flatMap((base) => [
      el("h3", {}, `${DATA.name} over ${base}`),
      el(
        "ul",
        { class: "forest" },
        DATA.ratios
          .filter((ratio) => ratio.base === base)
          .map((ratio) =>
            el(
              "li",
              {},
              el("span", { class: "cell" }, place(ratio)),
              strip(ratio, x),
              el("span", { class: "number" }, `${three(ratio.median)} [${three(ratio.low)}, ${three(ratio.high)}]`),
              el("span", { class: "verdict" }, ratio.verdict),
            ),
          ),
      ),
    ]),
  );
}

function numbers() {
  const number = (label, value, text = null, title = null) => ({
    label,
    title,
    numeric: true,
    value,
    text: text && ((row) => (value(row) === null ? "–" : text(row))),
  });
  const { node } = part("numbers", "Numbers");
  const timed = (row) => row.latency ?? null;
  const ms = (value) => fmt(1000 * value);
  node.append(
    el(
      "p",
      { class: "about" },
      "Milliseconds of one call: median, and its 95 % interval. Operations count additions and multiplications one each; sums, softmax, norms and other element-wise work are left out. Memory is what the call holds at most, weights included.",
    ),
    table({
      caption: "Every model in every cell",
      rows: DATA.rows,
      columns: [
        { label: "Model", long: true, value: (row) => row.arm },
        { label: "Mode", value: (row) => row.mode },
        number("Batch", (row) => row.batch),
        number("Pixels", (row) => row.image_size),
        number("Milliseconds", (row) => timed(row)?.median ?? null, (row) => ms(row.latency.median)),
        number("95 %", (row) => timed(row)?.low ?? null, (row) => `${ms(row.latency.low)} to ${ms(row.latency.high)}`),
        number("Images/s", (row) => row.images_per_second ?? null),
        number("MiB at most", (row) => (typeof row.peak_mib === "number" ? row.peak_mib : null), (row) => fmt(Math.round(row.peak_mib))),
        number("G operations", (row) => row.operations ?? null, (row) => (row.uncounted.length ? "over " : "") + fmt(row.operations / 1e9)),
        number("Parameters", (row) => row.parameters ?? null, (row) => row.parameters.toLocaleString("en-US")),
        ...(DATA.rows.some(remark) ? [{ label: "Remark", long: true, value: remark }] : []),
      ],
    }),
  );
}

function remark(row) {
  const words = [row.failed, typeof row.peak_mib === "string" ? `memory ${row.peak_mib}` : null];
  if (row.uncounted?.length) words.push(`operations without a formula: ${row.uncounted.join(", ")}`);
  return words.filter(Boolean).join("; ");
}

function facts() {
  const { node } = part("run", "Machine and command");
  const said = (value) =>
    Array.isArray(value) ? value.join(" ") || "–" : value === null || value === "" ? "–" : String(value);
  const rows = [
    ["command", DATA.command],
    ...["machine", "versions", "settings"].flatMap((name) => Object.entries(DATA[name]).map(([key, value]) => [key.replaceAll("_", " "), said(value)])),
  ];
  node.append(
    table({
      caption: "Machine, versions and settings",
      rows,
      columns: [
        { label: "What", value: (row) => row[0] },
        { label: "Value", long: true, value: (row) => row[1] },
      ],
    }),
  );
}

function lead() {
  const count = (verdict) => DATA.ratios.filter((ratio) => ratio.verdict === verdict).length;
  const verdicts = ["faster", "no difference", "slower", "undecided"].filter(count).map((verdict) => `${verdict} in ${count(verdict)}`);
  const failed = DATA.rows.filter((row) => row.failed).length;
  const words = [
    verdicts.length ? `${DATA.name} is, of ${plural(DATA.ratios.length, "comparison")}: ${verdicts.join(", ")}.` : null,
    failed ? `${plural(failed, "row")} could not be measured; the table says why.` : null,
    `${DATA.settings.rounds} rounds, models in turns in one process, ${DATA.settings.dtype}${DATA.settings.compile ? ", compiled" : ""}.`,
  ];
  document.getElementById("lead").append(...words.filter(Boolean).map((line) => el("span", {}, line)));
}

theme();
lead();
ratios();
numbers();
facts();
document.documentElement.dataset.ready = "yes";
