// The maps: what is chosen, drawn over the image, with its scale, and its neighbours in small.

const images = DATA.pictures.map((address) => {
  const image = new Image();
  image.src = address;
  return image;
});
const CANVAS = 720; // pixels across

function viewer() {
  const { node } = part("maps", "Maps");
  const strip = choice("Image", (image) => set({ image }), "thumbs");
  const component = choice("Map", (value) => set(fitting({ component: value })));
  const layer = choice("Layer", (value) => set(fitting({ layer: value })));
  const head = choice("Head", (value) => set({ head: value }));
  const slice = choice("Slice", (value) => set({ slice: value }));
  const about = el("p", { class: "about", "aria-live": "polite" });
  const opacity = el("input", {
    type: "range",
    min: 0,
    max: 100,
    step: 5,
    value: state.opacity,
    "aria-label": "Opacity of the map, percent",
    on: { input: () => set({ opacity: Number(opacity.value) }) },
  });
  const both = check("Same colours in A and B", "shared");
  const merged = check("Draw merged and dropped tokens", "groups");
  const options = el(
    "fieldset",
    { class: "choice options" },
    el("legend", {}, "Drawing"),
    el("label", { class: "slider" }, el("span", {}, "Image"), opacity, el("span", {}, "Map")),
    check("Mark artifact tokens", "marks"),
    merged,
    check("Outline the object", "outline"),
    check("Clip the highest 2 %", "clip"),
    both,
  );
  const compare = el("div", { class: "pane-choice" });
  const panes = el("div", { class: "panes" });
  const small = el("div", { class: "small-multiples" });
  const limits = el("p", { class: "quiet" });
  node.append(
    limits,
    strip.field,
    compare,
    el(
      "div",
      { class: "viewer" },
      panes,
      el(
        "div",
        { class: "controls" },
        component.field,
        about,
        layer.field,
        head.field,
        slice.field,
        queryChoice(),
        options,
        el("div", { class: "map-actions" }, el("button", { type: "button", class: "plain", on: { click: saveMap } }, "Save this map")),
      ),
    ),
    small,
  );

  section(["panes"], () => {
    choosePanes(compare);
    limits.textContent = limitText();
  });
  section(["panes", "image", "component", "layer", "head", "query", "unpacked"], () => {
    const readings = shownReadings();
    settle(readings);
    strip.field.hidden = !readings[0].shown;
    strip.show(
      readings[0].images.map((image, value) => ({
        value,
        label: image.name,
        key: image.picture,
        title: image.name,
        content: thumb(image),
      })),
      state.image,
    );
    const names = componentsOf(readings);
    component.show(
      names.map((value) => ({ value, label: componentName(value) })),
      state.component,
    );
    const told = readings.map((r) => r.components.find((c) => c.name === state.component)).find(Boolean);
    const moved = isMixing(readings[0], state.layer);
    const ofPatch = readings.some((r) => shownMap(r, state.layer, imageIn(r, state.image), state.head)?.query);
    const perHead = readings.some((r) => r.maps[`${state.component}/${state.layer}`]?.heads);
    const alone = !readings.some((r) => r.maps[`${state.component}/${state.layer}`]);
    about.textContent = told
      ? [
          ofPatch ? (moved ? "What moves the framed patch; no attention" : "What the framed patch looks at, head by head") : told.explains,
          told.rule ? `${told.signed ? "Sign by" : "By"} ${told.rule}` : "",
          alone ? "one map for the whole model" : "",
        ]
          .filter(Boolean)
          .map((text) => `${capital(text).replace(/\.$/, "")}.`)
          .join(" ")
      : "";
    layer.show(
      layersOf(readings).map((value) => ({ value, label: String(value), title: layerTitle(readings, value) })),
      state.layer,
      alone,
    );
    const heads = Math.max(0, ...readings.map((r) => r.layers.find((l) => l.layer === state.layer)?.heads || 0));
    head.show(
      [-1, ...Array(heads).keys()].map((value) => ({ value, label: value < 0 ? "mean" : String(value) })),
      state.head,
      !perHead,
    );
    const slices = slicesOf(readings);
    slice.field.hidden = slices < 2;
    slice.show(
      [...Array(slices).keys()].map((value) => ({ value, label: String(value) })),
      state.slice,
    );
  });
  section(["panes", "image", "component", "layer", "head", "slice", "query", "unpacked", "opacity", "marks", "groups", "outline", "clip", "shared"], () => {
    both.hidden = state.panes.length < 2;
    merged.hidden = !shownReadings().some((reading) => Object.keys(reading.tokens).length);
    drawPanes(panes);
  });
  section(["panes", "image", "component", "layer", "head", "slice", "query", "unpacked"], () => neighbours(small));
  images.forEach((image, number) => {
    image.addEventListener("load", () => [...panes.children].filter((one) => usesPicture(one, number)).forEach(paint), {
      once: true,
    });
  });
}

/** Whether a pane shows the picture or the mask of this number. */
function usesPicture(pane, number) {
  const image = pane.shown?.reading.images[pane.shown.image];
  return Boolean(image) && (pictureOf(image, pane.shown.map) === number || image.mask === number);
}

function limitText() {
  return shownReadings()
    .filter((r) => r.shown < r.count)
    .slice(0, 1)
    .map(
      (r) =>
        `Maps of the first ${r.shown} of ${plural(r.count, "image")}, to keep this page small. Numbers are of all images.`,
    )
    .join("");
}

/** What is chosen must exist in at least one of the readings. */
function settle(readings) {
  const names = componentsOf(readings);
  if (!names.includes(state.component) && names.length) state.component = names[0];
  const layers = layersOf(readings);
  if (!layers.includes(state.layer) && layers.length) state.layer = layers[Math.floor(layers.length / 2)];
  if (state.image >= readings[0].shown) state.image = 0;
  const heads = Math.max(0, ...readings.map((r) => r.layers.find((l) => l.layer === state.layer)?.heads || 0));
  if (state.head >= heads) state.head = -1;
  if (state.slice >= slicesOf(readings)) state.slice = 0;
}

/** Slices of the chosen map, of a volume or a clip; 0 for an image. */
const slicesOf = (readings) => Math.max(0, ...readings.map((r) => entryOf(r, state.component, state.layer)?.depth || 0));

/** Names of the components that there are maps of. */
function componentsOf(readings) {
  const maps = readings.flatMap((r) => Object.keys(r.maps));
  return namesOf("components").filter((name) => maps.some((map) => map.startsWith(`${name}/`)));
}

const layersOf = (readings) =>
  [...new Set(readings.flatMap((r) => r.layers.map((l) => l.layer)))].sort((a, b) => a - b);
const layerTitle = (readings, layer) =>
  readings.map((r) => r.layers.find((l) => l.layer === layer)?.name).find(Boolean);

function thumb(image) {
  const picture =
    image.picture === null ? el("span", { class: "blank" }) : el("img", { src: DATA.pictures[image.picture], alt: "" });
  return el("span", { class: "thumb" }, picture, el("span", { class: "thumb-name" }, image.name));
}

// --- which readings are shown ----------------------------------------------------------------------------------------

function choosePanes(box) {
  const total = DATA.sources.reduce((sum, source) => sum + source.readings.length, 0);
  box.hidden = total < 2;
  if (total < 2) return;
  const two = state.panes.length > 1;
  if (!box.querySelector(".pane-row")) {
    const toggle = el("button", {
      type: "button",
      class: "plain",
      id: "second",
      on: {
        click: () => {
          const [first] = state.panes;
          const other =
            DATA.sources.length > 1
              ? last((first.source + 1) % DATA.sources.length)
              : { source: first.source, at: first.at ? 0 : last(first.source).at };
          set({ panes: state.panes.length > 1 ? [first] : [first, other] });
        },
      },
    });
    box.append(paneRow(0), paneRow(1), toggle);
  }
  const rows = box.querySelectorAll(".pane-row");
  rows[1].hidden = !two;
  state.panes.forEach((pane, index) => showPaneRow(rows[index], pane, two ? LETTERS[index] : ""));
  box.querySelector("#second").textContent = two ? "Show only A" : "Compare side by side";
}

function paneRow(index) {
  const change = (pane) => set({ panes: state.panes.map((old, i) => (i === index ? { ...old, ...pane } : old)) });
  const select = el(
    "select",
    {
      "aria-label": `Reading ${LETTERS[index]}`,
      on: {
        change: () => {
          const source = Number(select.value);
          change({ source, at: Math.min(state.panes[index].at, last(source).at) });
        },
      },
    },
    DATA.sources.map((source, value) => el("option", { value }, source.name)),
  );
  const range = el("input", {
    type: "range",
    min: 0,
    step: 1,
    on: { input: () => change({ at: Number(range.value) }) },
  });
  const step = (by) => () => change({ at: Math.min(Math.max(state.panes[index].at + by, 0), Number(range.max)) });
  return el(
    "div",
    { class: "pane-row", "data-pane": index },
    el("span", { class: `letter ${"ab"[index]}` }),
    select,
    el(
      "span",
      { class: "scrubber" },
      el("button", { type: "button", class: "step", "aria-label": "One epoch back", on: { click: step(-1) } }, "‹"),
      range,
      el("button", { type: "button", class: "step", "aria-label": "One epoch on", on: { click: step(1) } }, "›"),
      playButton(range, (at) => change({ at })),
      el("output", {}),
    ),
  );
}

const PACE = 700; // milliseconds that an epoch is shown

/** Goes through the values of a slider, from the start where it is at its end. */
function playButton(range, go) {
  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    button.textContent = "Play";
  };
  const tick = () => {
    if (Number(range.value) >= Number(range.max)) stop();
    else go(Number(range.value) + 1);
  };
  const start = () => {
    if (Number(range.value) >= Number(range.max)) go(0);
    button.textContent = "Stop";
    timer = setInterval(tick, PACE);
  };
  const button = el("button", { type: "button", class: "step play", on: { click: () => (timer ? stop() : start()) } }, "Play");
  return button;
}

function showPaneRow(row, pane, letter) {
  const source = DATA.sources[pane.source];
  row.querySelector(".letter").textContent = letter;
  const select = row.querySelector("select");
  select.value = String(pane.source);
  select.hidden = DATA.sources.length < 2;
  const range = row.querySelector("input");
  row.querySelector(".scrubber").hidden = !source.epochs || source.epochs.length < 2;
  range.max = String(source.readings.length - 1);
  range.value = String(pane.at);
  if (source.epochs) {
    const text = `Epoch ${source.epochs[pane.at]} of ${source.epochs[source.epochs.length - 1]}`;
    range.setAttribute("aria-label", `Epoch of ${source.name}${letter ? `, ${letter}` : ""}`);
    range.setAttribute("aria-valuetext", text);
    row.querySelector("output").textContent = text;
  }
}

// --- neighbours in small ---------------------------------------------------------------------------------------------

function neighbours(box) {
  const reading = readingOf(state.panes[0]);
  const image = imageIn(reading, state.image);
  const groups = [];
  const from = asksPatch(reading, state.layer) ? `, from ${placeName(state.query)}` : "";
  const heads = reading.maps[`${state.component}/${state.layer}`]?.heads || 0;
  if (heads > 1) {
    groups.push([
      `All heads of layer ${state.layer}${from}`,
      [...Array(heads).keys()].map((head) => ({ label: `head ${head}`, layer: state.layer, head })),
    ]);
  }
  const slices = slicesOf([reading]);
  if (slices > 1) {
    groups.push([
      "All slices",
      [...Array(slices).keys()].map((slice) => ({ label: `slice ${slice}`, layer: state.layer, head: state.head, slice })),
    ]);
  }
  const layers = layersOf([reading]).filter((layer) => reading.maps[`${state.component}/${layer}`]);
  if (layers.length > 1) {
    const of = heads > 1 ? `, ${headName(state.head)}` : "";
    groups.push([`All layers${of}${from}`, layers.map((layer) => ({ label: `layer ${layer}`, layer, head: state.head }))]);
  }
  const rows = groups.map(([title, items]) => [title, items.map((item) => tile(reading, image, item))]);
  const reduced = Object.keys(reading.tokens).filter((layer) => tokensOf(reading, layer, image));
  if (reduced.length) rows.push(["Tokens that layers see, where some were merged or dropped", reduced.map((layer) => tokenTile(reading, image, Number(layer)))]);
  box.replaceChildren(
    ...rows.map(([title, tiles]) =>
      el(
        "div",
        { class: "multiple" },
        el("h3", {}, title, state.panes.length > 1 ? el("span", { class: "quiet" }, " of A") : null),
        el("div", { class: "tiles" }, tiles),
      ),
    ),
  );
}

function tile(reading, image, { label, layer, head, slice = state.slice }) {
  const map = shownMap(reading, layer, image, head, slice);
  if (!map) return null;
  const canvas = el("canvas", { width: map.width, height: map.height, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(map.width, map.height);
  const range = rangeOf([map], true);
  map.values.forEach((value, i) => {
    const color = Number.isNaN(value) ? [128, 128, 128] : colorOf(map, value, range);
    pixels.data.set([...color, Number.isNaN(value) ? 60 : 255], 4 * i);
  });
  context.putImageData(pixels, 0, 0);
  const chosen = layer === state.layer && head === state.head && slice === state.slice;
  return tileButton(canvas, label, chosen, { layer, head, slice });
}

const tileButton = (canvas, label, chosen, changes) =>
  el(
    "button",
    { type: "button", class: "tile", "aria-pressed": String(chosen), on: { click: () => refocus(label, changes) } },
    canvas,
    el("span", {}, label),
  );

/** Choosing a tile draws the tiles anew; the keyboard stays on the one that was chosen. */
function refocus(label, changes) {
  set(changes);
  [...document.querySelectorAll(".tile")].find((tile) => tile.textContent === label)?.focus({ preventScroll: true });
}
