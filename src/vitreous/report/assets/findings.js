// Findings: what the numbers come to, in one line each.

const ATTENTION = "attention";

/** Rows of the summary as objects. */
const summaryOf = (reading) =>
  reading.summary.map(([component, layer, head, measure, mean_, low, high, count]) => ({
    component,
    layer,
    head,
    measure,
    mean: mean_,
    low,
    high,
    count,
  }));
const highest = (rows, value) =>
  rows.reduce((best, row) => (value(row) !== null && (!best || value(row) > value(best)) ? row : best), null);
const interval = (row) => (row.low === null ? "" : ` [${fmt(row.low, 3)}, ${fmt(row.high, 3)}]`);

/** The head that looks most at the object: most of its attention inside the masks. */
function looker(reading, measure = "energy_inside") {
  return highest(
    summaryOf(reading).filter((row) => row.component === ATTENTION && row.head >= 0 && row.measure === measure),
    (row) => row.mean,
  );
}

/** A map that looks at no image, on the grid of the whole model's maps. */
const baseline = (reading, name, measure) =>
  summaryOf(reading).find((row) => row.component === name && row.measure === measure && row.layer < 0) || null;

/** {share, layers}: the layers with the most artifact tokens, or null if there are none. */
function worst(reading) {
  const share = Math.max(0, ...reading.artifacts.map((row) => row[1]));
  return share > 0
    ? { share, layers: reading.artifacts.filter((row) => row[1] >= 0.999 * share).map((row) => row[0]) }
    : null;
}

/** "layer 3", "layers 3 and 5", "layers 7 to 11". */
function listed(layers) {
  if (layers.length === 1) return `layer ${layers[0]}`;
  const row = layers.every((layer, i) => layer === layers[0] + i) && layers.length > 2;
  return `layers ${row ? `${layers[0]} to ${layers[layers.length - 1]}` : `${layers.slice(0, -1).join(", ")} and ${layers[layers.length - 1]}`}`;
}

function extreme(reading, measure, down) {
  const found = [];
  for (const pair of sourcesOf([reading]).filter((one) => one[0] === ATTENTION)) {
    for (const row of rowsOf(reading, pair)) {
      const cell = cellOf(reading, row, measure);
      if (cell && row.head >= 0) found.push({ ...row, value: cell[0] });
    }
  }
  return highest(found, (row) => (down ? -row.value : row.value));
}

// --- at a glance -----------------------------------------------------------------------------------------------------

function glance() {
  const { node, show: showPart } = part("glance", "At a glance");
  const cards = el("div", { class: "cards" });
  node.append(cards);
  section(["panes"], () => {
    showPart(shownReadings().some((reading) => reading.layers.some((layer) => layer.kind !== "mixing") || !reading.layers.length));
    const two = state.panes.length > 1;
    const findings = [
      [
        "object",
        "Looks most at the object",
        (reading) => {
          const found = looker(reading);
          if (!found) return { text: "Not scored: no masks were given." };
          const centre = baseline(reading, "centre", "energy_inside");
          return {
            big: where(found.layer, found.head),
            text: `energy inside ${fmt(found.mean, 3)}${interval(found)}${centre ? `; ${against(found, centre)}` : ""}`,
            go: { component: ATTENTION, layer: found.layer, head: found.head, outline: true },
          };
        },
      ],
      [
        "artifacts",
        "Artifact tokens",
        (reading) => {
          const found = worst(reading);
          if (!reading.artifacts.length) return { text: "Not looked for." };
          if (!found) return { big: "none", text: "No layer has tokens of outstanding norm." };
          return {
            big: listed(found.layers),
            text: `${fmt(found.share, 3)} % of the patches, the most of all layers`,
            go: { layer: found.layers[0], marks: true },
          };
        },
      ],
      [
        "focused",
        "Looks at the fewest places",
        (reading) => {
          const found = extreme(reading, "effective_tokens", true);
          return found
            ? {
                big: where(found.layer, found.head),
                text: `${fmt(found.value, 3)} effective tokens on average`,
                go: { component: ATTENTION, layer: found.layer, head: found.head },
              }
            : { text: "Not measured." };
        },
      ],
      [
        "local",
        "Looks closest by",
        (reading) => {
          const found = extreme(reading, "mean_distance", true);
          return found
            ? {
                big: where(found.layer, found.head),
                text: `${fmt(found.value, 3)} pixels away on average`,
                go: { component: ATTENTION, layer: found.layer, head: found.head },
              }
            : { text: "Not measured." };
        },
      ],
    ];
    const made = findings.map(([id, title, find]) =>
      card(
        id,
        title,
        shownReadings().map((reading, i) => ({ ...find(reading), letter: two ? LETTERS[i] : "" })),
      ),
    );
    if (DATA.sources.some((source) => source.metrics.some((m) => m.alarms?.length))) {
      made.unshift(
        card(
          "alarms",
          "Alarms while it trained",
          state.panes.map((pane, i) => ({ ...latestAlarm(pane), letter: two ? LETTERS[i] : "" })),
        ),
      );
    }
    if (two) {
      const top = changes(...shownReadings())[0];
      made.unshift(
        card("change", "Differs most between A and B", [
          top
            ? {
                big: where(top.layer, top.head),
                text: `${measureWords(top.measure)[0].toLowerCase()} ${fmt(top.a)} → ${fmt(top.b)} (${signedFmt(top.difference)})`,
                go: { layer: top.layer, head: top.head },
              }
            : { text: "Nothing differs." },
        ]),
      );
    }
    cards.replaceChildren(...made);
  });
}

/** The latest alarm of a run by the epoch that is shown, and how many there were. */
function latestAlarm(pane) {
  const source = DATA.sources[pane.source];
  const epoch = source.epochs?.[pane.at] ?? 0;
  const found = source.metrics
    .filter((m) => m.epoch <= epoch)
    .flatMap((m) => (m.alarms || []).map((one) => ({ ...one, epoch: m.epoch })));
  const last = found[found.length - 1];
  if (!last) return { text: "None by this epoch." };
  return {
    big: `${last.alarm}, layer ${last.layer}`,
    text: `${last.text}, after epoch ${last.epoch}${found.length > 1 ? `; ${found.length} alarms by now` : ""}`,
    go: { layer: last.layer },
  };
}

/** What a score is worth beside a spot in the middle of every image. */
const against = (found, centre) =>
  `${found.low > centre.mean ? "" : "not above the "}centre prior ${fmt(centre.mean, 3)}`;

function card(id, title, lines) {
  return el(
    "div",
    { class: "card", "data-finding": id },
    el("h3", {}, title),
    lines.map((line) =>
      el(
        "div",
        { class: "finding" },
        line.letter ? el("span", { class: `letter ${line.letter.toLowerCase()}` }, line.letter) : null,
        line.big
          ? el(
              "button",
              {
                type: "button",
                class: "plain big",
                title: "Show it above",
                on: { click: () => line.go && show(line.go) },
              },
              capital(line.big),
            )
          : null,
        el("p", {}, line.text),
      ),
    ),
  );
}

/** Choose something and go to the maps. */
function show(changes_) {
  set(fitting(changes_));
  document.getElementById("maps").scrollIntoView();
}
