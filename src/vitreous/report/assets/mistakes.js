// Which photographs of a test set are wrong, and how well each class goes.

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const FIRST = 16; // pictures before "Show all"
const between = ([low, high]) => `[${(100 * low).toFixed(1)}, ${(100 * high).toFixed(1)}]`;

function mistakes() {
  const runs = DATA.sources.filter((source) => source.answers && Object.keys(source.answers).length);
  if (!runs.length) return;
  const lists = runs.some(({ answers }) => Object.values(answers).some((found) => found.mistakes));
  const { node } = part("mistakes", lists ? "Mistakes" : "Classes");
  const box = { run: 0, test: "test", pair: null };
  const ofRun = choice("Run", (value) => redraw({ run: value, pair: null }));
  const ofTest = choice("Test set", (value) => redraw({ test: value, pair: null }));
  const body = el("div");
  node.append(el("div", { class: "row" }, runs.length > 1 ? ofRun.field : null, ofTest.field), body);

  function redraw(changes) {
    Object.assign(box, changes);
    const all = runs[box.run].answers;
    const tests = Object.keys(all);
    if (!tests.includes(box.test)) box.test = tests[0];
    const options = (names) => names.map((label, i) => ({ label, value: i, key: label }));
    ofRun.show(options(runs.map((run) => run.name)), box.run);
    ofTest.show(
      tests.map((value) => ({ value, label: value })),
      box.test,
    );
    const found = own(all, box.test);
    body.replaceChildren(
      ...(found.parts ? partsOf(found, runs[box.run].run?.task?.text) : answersOf(found, box.pair, (pair) => redraw({ pair }))).filter(Boolean),
    );
  }
  redraw({});
}

/** An image has one class: sentence, confusions, classes, pictures, list. */
function answersOf(found, pair, pick) {
  const { names } = found;
  const shown = found.mistakes.filter(([, label, predicted]) => !pair || (label === pair[0] && predicted === pair[1]));
  const of = pair ? `${names[pair[0]]} taken for ${names[pair[1]]}` : "all classes";
  const chosen = el(
    "p",
    { class: "quiet", id: "chosen-mistakes", "aria-live": "polite" },
    `Mistakes shown: ${of}. `,
    pair ? el("button", { type: "button", class: "plain", on: { click: () => pick(null) } }, "Show those of all classes") : null,
  );
  return [
    resultOf(found),
    el(
      "div",
      { class: "side-by-side" },
      el("div", {}, el("h3", {}, "By class"), classTable(found)),
      found.count
        ? el("div", {}, el("h3", {}, "What is taken for what"), found.whole ? confusion(found, pair, pick) : pairTable(found, pick))
        : null,
    ),
    ...(found.count ? [el("h3", {}, "The mistakes, the surest first"), chosen, ...gallery(shown.map(mistaken(found))), list(found, shown, pair)] : []),
  ];
}

/** How many are right, and the worst class: of the lowest share, of those the one with the most images. */
function resultOf(found) {
  const share = ([, images, right]) => right / images;
  const [worst] = [...found.classes].sort((a, b) => share(a) - share(b) || b[1] - a[1]);
  const words = [
    `${percent(found.right / found.images)} of ${plural(found.images, "image")} are right ${between(found.interval)}, ${found.count.toLocaleString("en-US")} wrong.`,
    found.count
      ? `Worst class: ${found.names[worst[0]]}, ${worst[2]} of ${worst[1]} right ${between(worst.slice(3))}.`
      : "",
  ];
  return el("p", { class: "sentence" }, words.join(" "));
}

function classTable(found) {
  return table({
    id: "class-table",
    caption: "Share of each class that is right, with 95 % intervals",
    rows: found.classes,
    sort: { column: 1, down: false },
    limit: 12,
    columns: [
      { label: "Class", long: true, value: ([k]) => found.names[k] },
      {
        label: "Share right",
        title: "With Wilson's 95 % interval over these images",
        numeric: true,
        value: ([, images, right]) => right / images,
        text: ([, images, right, ...ends]) => `${percent(right / images)} ${between(ends)}`,
      },
      {
        label: "Right",
        numeric: true,
        value: ([, , right]) => right,
        text: ([, images, right]) => `${right} of ${images}`,
      },
    ],
  });
}

/** The confusion matrix: a row for each class, shares of it as colours; a click chooses mistakes. */
function confusion(found, pair, pick) {
  const counts = new Map(found.pairs.map(([label, predicted, count]) => [`${label}/${predicted}`, count]));
  const images = new Map(found.classes.map(([k, n]) => [k, n]));
  const all = found.names.map((name, k) => ({ name, k }));
  const cell = (label, predicted) => {
    const count = counts.get(`${label}/${predicted}`) || 0;
    const share = count / (images.get(label) || 1);
    const right = label === predicted;
    const text = `${found.names[label]} taken for ${found.names[predicted]}: ${count}`;
    const tone = share > 0 ? (right ? "right" : "wrong") + (share > 0.5 ? " strong" : share > 0.15 ? " middling" : "") : "none";
    if (right || !count) return el("td", { class: `count ${tone}`, title: text }, count || "");
    const chosen = pair && pair[0] === label && pair[1] === predicted;
    const attrs = { type: "button", class: "count", title: text, "aria-label": text, "aria-pressed": String(Boolean(chosen)) };
    return el(
      "td",
      { class: `count ${tone}` },
      el("button", { ...attrs, on: { click: () => pick(chosen ? null : [label, predicted]) } }, count),
    );
  };
  return el(
    "div",
    {},
    el("p", { class: "about" }, "A row is what images are, a column what they are taken for. A number shows its mistakes below."),
    el(
      "div",
      { class: "scroll", tabindex: 0, role: "region", "aria-label": "Confusion matrix" },
      el(
        "table",
        { class: "confusion", id: "confusion" },
        el("caption", { class: "unseen" }, "Confusion matrix: rows are classes, columns what is predicted"),
        el("thead", {}, el("tr", {}, el("td"), all.map(({ name }) => el("th", { scope: "col", title: name }, el("span", {}, name))))),
        el(
          "tbody",
          {},
          all
            .filter(({ k }) => images.has(k))
            .map(({ name, k }) => el("tr", {}, el("th", { scope: "row", title: name }, el("span", {}, name)), all.map((other) => cell(k, other.k)))),
        ),
      ),
    ),
  );
}

/** Of many classes, the pairs that are confused most often. */
function pairTable(found, pick) {
  const images = new Map(found.classes.map(([k, n]) => [k, n]));
  return table({
    id: "pair-table",
    caption: "The most frequent confusions",
    rows: found.pairs,
    limit: 12,
    go: ([label, predicted]) => pick([label, predicted]),
    columns: [
      { label: "Class", long: true, value: ([label]) => found.names[label] },
      { label: "Taken for", long: true, value: ([, predicted]) => found.names[predicted] },
      { label: "Images", numeric: true, value: ([, , count]) => count },
      { label: "Of the class", numeric: true, value: ([label, , count]) => count / images.get(label), text: ([label, , count]) => percent(count / images.get(label)) },
    ],
  });
}

/** A mistake of one class as the gallery takes it: {file, picture, caption}. */
const mistaken =
  ({ names }) =>
  ([file, label, predicted, probability, picture]) => ({
    file,
    picture,
    caption: [el("b", {}, names[predicted]), ` ${percent(probability)}`, el("span", {}, `is ${names[label]}`)],
  });

/** Pictures of mistakes: [{file, picture, caption}], those without a picture are counted alone. */
function gallery(shown) {
  const pictured = shown.filter(({ picture }) => picture !== null);
  if (!pictured.length) return [];
  const figure = ({ file, picture, caption }) =>
    el(
      "figure",
      { title: file },
      el("img", { src: DATA.pictures[picture], alt: file }),
      el("figcaption", {}, caption, el("span", { class: "file" }, file.split("/").pop())),
    );
  const rest = shown.length - pictured.length;
  const box = el("div", { class: "gallery", id: "gallery" }, pictured.slice(0, FIRST).map(figure));
  const more = el(
    "button",
    {
      type: "button",
      class: "plain",
      on: {
        click: () => {
          box.append(...pictured.slice(FIRST).map(figure));
          more.remove();
        },
      },
    },
    `Show all ${pictured.length} pictures`,
  );
  return [
    box,
    pictured.length > FIRST ? more : null,
    rest
      ? el("p", { class: "quiet" }, `${plural(pictured.length, "picture")}; ${rest.toLocaleString("en-US")} more of these mistakes are in the table alone.`)
      : null,
  ];
}

function list(found, shown, pair) {
  const left = found.count - found.mistakes.length;
  const where = "in predictions.csv in the folder of the run";
  return el(
    "div",
    {},
    table({
      id: "mistake-table",
      caption: "The mistakes",
      rows: shown,
      limit: 10,
      columns: [
        { label: "File", long: true, value: ([file]) => file },
        { label: "Class", long: true, value: ([, label]) => found.names[label] },
        { label: "Taken for", long: true, value: ([, , predicted]) => found.names[predicted] },
        { label: "Probability", numeric: true, value: (row) => row[3], text: (row) => percent(row[3]) },
      ],
    }),
    left > 0 ? el("p", { class: "quiet" }, `${left.toLocaleString("en-US")} mistakes of lower probability are not on this page${pair ? ", maybe some of these" : ""}: all are ${where}.`) : null,
  );
}

/** Images with a wrong label among several: how many, pictures, list. */
function wrongOf(found, task) {
  const threshold = /threshold=([\d.]+)/.exec(task || "")?.[1] ?? "0.5";
  const named = (classes) => classes.map((k) => found.names[k] ?? String(k)).join(", ") || "none";
  const sides = ([, present, , wrong]) => [wrong.filter((k) => present.includes(k)), wrong.filter((k) => !present.includes(k))];
  const pictures = found.mistakes.map((row) => {
    const [missed, extra] = sides(row);
    const caption = [
      missed.length ? el("span", {}, "misses ", el("b", {}, named(missed))) : null,
      extra.length ? el("span", {}, "sees ", el("b", {}, named(extra))) : null,
      el("span", {}, `loss ${fmt(row[4], 3)}`),
    ];
    return { file: row[0], picture: row[5], caption };
  });
  const left = found.count - found.mistakes.length;
  return [
    el("h3", {}, "The mistakes, the highest loss first"),
    el(
      "p",
      { class: "about", id: "wrong-rule" },
      `${found.count.toLocaleString("en-US")} of ${plural(found.images, "image")} are wrong: at least one labelled class is on the wrong side of probability ${threshold}.`,
    ),
    ...gallery(pictures),
    table({
      id: "mistake-table",
      caption: "Images with a wrong label",
      rows: found.mistakes,
      limit: 10,
      columns: [
        { label: "File", long: true, value: ([file]) => file },
        { label: "Shows", long: true, value: ([, present]) => named(present) },
        { label: "Misses", long: true, value: (row) => named(sides(row)[0]) },
        { label: "Sees, and is not there", long: true, value: (row) => named(sides(row)[1]) },
        { label: "Loss", title: "Mean over the labelled classes, nats", numeric: true, value: (row) => row[4] },
      ],
    }),
    left > 0 ? el("p", { class: "quiet" }, `${left.toLocaleString("en-US")} more, of lower loss, are in predictions.csv in the folder of the run.`) : null,
  ];
}

/** An image may show several classes: average precision of each, and the images with a wrong label. */
function partsOf(found, task) {
  const scored = found.parts.filter((one) => one[3] !== null);
  const [worst] = [...scored].sort((a, b) => a[3] - b[3]);
  return [
    worst
      ? el("p", { class: "sentence" }, `Mean average precision: ${percent(mean(scored.map((one) => one[3])))}. Worst class: ${found.names[worst[0]]}, ${percent(worst[3])}.`)
      : null,
    table({
      id: "class-table",
      caption: "Average precision by class",
      rows: found.parts,
      sort: { column: 3, down: false },
      limit: 20,
      columns: [
        { label: "Class", long: true, value: ([k]) => found.names[k] },
        { label: "Images", title: "Where it is labelled", numeric: true, value: (one) => one[1] },
        { label: "Show it", numeric: true, value: (one) => one[2] },
        { label: "Average precision", title: "Mean precision over the steps of recall", numeric: true, value: (one) => one[3], text: (one) => (one[3] === null ? "–" : percent(one[3])) },
      ],
    }),
    ...(found.mistakes?.length ? wrongOf(found, task) : []),
  ];
}
