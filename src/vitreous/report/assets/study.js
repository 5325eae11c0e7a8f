// A study: does an arm beat the first? Verdicts, a forest plot of the differences by seed and by image, scores, cost.

function study() {
  const { results, seeds, data, command, arms, tests } = DATA.study;
  const { metric, first } = results;
  const scale = metric.unit === "%" ? 100 : 1;
  const digits = metric.unit === "%" ? 2 : 4;
  const unit = metric.unit === "%" ? "points" : metric.unit;
  const plain = (value) => (scale * value).toFixed(digits).replace("-", "−");
  const signed = (value) => (value > 0 ? "+" : "") + plain(value);
  const span = (ends, show = signed) => (ends ? `${show(ends[0])} to ${show(ends[1])}` : "–");
  const all = tests.flatMap((test) =>
    arms
      .filter((arm) => own(results.tests[test].differences, arm))
      .map((arm) => ({ test, arm, ...results.tests[test].differences[arm] })),
  );

  const { node } = part("study", `Does an arm beat ${first}?`);
  node.append(
    el("div", { class: "cards", id: "verdicts" }, all.map(verdict)),
    el("h3", {}, `Differences to ${first}, in ${unit}`),
    el(
      "p",
      { class: "about" },
      `Dots are seeds, the thick mark their mean, bars intervals at ${(100 * results.level).toFixed(1)} %${all.length > tests.length ? ", so that all comparisons of a test set hold together at 95 %" : ""}. ` +
        "By seed: would other seeds show it on these images? By image: would other images show it with these weights? " +
        (metric.better === "higher" ? "Right of the line is better." : "Left of the line is better."),
    ),
    forest(),
    el("h3", {}, capital(metric.label)),
    scores(),
    ...courses(),
    el("p", { class: "quiet" }, `${plural(seeds.length, "seed")}, data ${data}. ${command}`),
    el("p", { class: "quiet" }, "Below, the first run of each arm."),
  );

  /** Better, worse, no difference or undecided, and what would decide it. */
  function verdict({ test, arm, verdict: word, mean: middle, takes, interval_by_seed: bySeed, interval_by_image: byImage }) {
    return el(
      "div",
      { class: "card", "data-verdict": `${arm}/${test}` },
      el("h3", {}, `${arm}, ${test}`),
      el("p", { class: `verdict-word ${word === "better" ? "a" : word === "worse" ? "b" : ""}` }, capital(word || "not judged")),
      el("p", {}, `${signed(middle)} ${unit} to ${first}; by seed ${span(bySeed)}, by image ${span(byImage)}.`),
      takes ? el("p", { class: "quiet" }, takes) : null,
    );
  }

  function forest() {
    const values = all.flatMap((one) => [0, ...one.by_seed, ...(one.interval_by_seed || []), ...(one.interval_by_image || [])]);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const room = (high - low) * 0.06 || 0.01;
    const x = (value) => ((value - low + room) / (high - low + 2 * room)) * 100;
    const line = (name, from, to, y1 = 10, y2 = 10) =>
      draw("line", { class: name, x1: x(from).toFixed(2), x2: x(to).toFixed(2), y1, y2, "vector-effect": "non-scaling-stroke" });
    const row = (one, name, ends, dots) =>
      el(
        "li",
        { "data-row": `${one.arm}/${one.test}/${name}` },
        el("span", { class: "cell" }, `${one.arm}, ${one.test}`),
        draw(
          "svg",
          { class: "strip", viewBox: "0 0 100 20", preserveAspectRatio: "none", "aria-hidden": "true" },
          line("one", 0, 0, 0, 20),
          ends ? line(`span ${look(one)}`, ends[0], ends[1]) : null,
          dots.map((value) => line(`seed ${look(one)}`, value, value)),
          line(`middle ${look(one)}`, one.mean, one.mean, 5, 15),
        ),
        el("span", { class: "number" }, `${signed(one.mean)} [${span(ends)}]`),
        el("span", { class: "verdict" }, name),
      );
    const look = ({ verdict: word }) => ({ better: "a", worse: "b" })[word] || "even";
    const marks = ticks(scale * (low - room), scale * (high + room), 5).map(([value, text]) =>
      el("span", { class: "mark-at", "data-at": x(value / scale).toFixed(2) }, text),
    );
    const axis = el("li", { class: "axis-row", "aria-hidden": "true" }, el("span", { class: "cell" }), el("span", { class: "marks" }, marks), el("span"), el("span"));
    for (const one of marks) one.style.left = `${one.dataset.at}%`;
    return el(
      "ul",
      { class: "forest study-forest", id: "forest" },
      all.flatMap((one) => [
        row(one, "by seed", one.interval_by_seed, one.by_seed),
        one.interval_by_image ? row(one, "by image", one.interval_by_image, []) : null,
      ]),
      axis,
    );
  }

  /** Scores, seconds and indicators over epochs and layers, a line for each arm; none in studies of older versions. */
  function courses() {
    if (!results.courses) return [];
    const of = (arm) => own(results.courses, arm) || [];
    const same = (a) => (b) => a.quantity === b.quantity && a.over === b.over;
    const every = arms.flatMap(of);
    const panels = every.filter((one, i) => every.findIndex(same(one)) === i);
    const look = (one) => {
      const lines = arms.map((arm) => ({
        name: arm,
        points: (of(arm).find(same(one))?.points || []).map(([x, y, low, high]) => ({ x, y, ...(high > low ? { low, high } : {}) })),
      }));
      const lacking = lines.filter((line) => !line.points.length).map((line) => line.name);
      return chart({
        title: capital(one.quantity),
        about: lacking.length ? `None in ${lacking.join(", ")}.` : "",
        xLabel: one.over === "layer" ? "layer, last epoch" : one.over,
        spread: "seeds",
        series: colored(lines),
      });
    };
    return [
      el("h3", {}, "Over epochs and layers"),
      el("p", { class: "about" }, "Lines are means over the seeds, bars reach from the lowest to the highest seed."),
      key(arms.map((arm, i) => [lineColor(i, arms.length), arm])),
      el("div", { class: "charts", id: "courses" }, panels.map(look)),
    ];
  }

  function scores() {
    const rows = tests.flatMap((test) => arms.map((arm) => ({ test, arm, ...results.tests[test].arms[arm] })));
    return table({
      id: "arm-table",
      caption: "Scores of the arms",
      rows,
      columns: [
        { label: "Arm", long: true, value: (row) => row.arm },
        { label: "Test set", value: (row) => row.test },
        { label: metric.unit ? `Mean, ${metric.unit}` : "Mean", numeric: true, value: (row) => row.mean, text: (row) => plain(row.mean) },
        { label: "95 % interval", numeric: true, value: (row) => row.interval?.[0] ?? null, text: (row) => span(row.interval, plain) },
        ...seeds.map((seed, i) => ({ label: `Seed ${seed}`, numeric: true, value: (row) => own(row, metric.name)?.[i] ?? null, text: (row) => plain(row[metric.name][i]) })),
        { label: "Cost", title: `Seconds of training per image over those of ${first}`, numeric: true, value: (row) => results.cost[row.arm].mean, text: (row) => results.cost[row.arm].mean.toFixed(2) },
        { label: "Parameters", numeric: true, value: (row) => results.cost[row.arm].parameters ?? null, text: (row) => results.cost[row.arm].parameters?.toLocaleString("en") ?? "" },
      ],
    });
  }
}
