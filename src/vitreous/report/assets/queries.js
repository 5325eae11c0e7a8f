// What a patch looks at: attention rows of any query, unpacked when they are first asked for.

const unpacked = new Map(); // {reading: {"layer/image": bytes, null while they are being unpacked}}
let waiting = 0;

/** The bytes of a compressed text in base64. */
async function inflated(text) {
  const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** The rows of a layer and image, or null: they are not there, or will be shortly, and the page is drawn again. */
function queryRows(reading, layer, image) {
  const text = own(reading.queries.rows, `${layer}/${image}`);
  if (!text) return null;
  if (!unpacked.has(reading)) unpacked.set(reading, {});
  const [ours, name] = [unpacked.get(reading), `${layer}/${image}`];
  if (!Object.hasOwn(ours, name)) {
    ours[name] = null;
    waiting += 1;
    inflated(text).then((bytes) => {
      ours[name] = bytes;
      waiting -= 1;
      if (!waiting) set({ unpacked: state.unpacked + 1 });
    });
  }
  return ours[name];
}

/** As `mapOf`: the attention of the chosen patch, head -1 is the mean of all; null where it is not there. */
function queryMap(reading, layer, image, head) {
  const entry = own(reading.queries.layers, layer);
  const bytes = entry && queryRows(reading, layer, image);
  const [row, column] = state.query;
  if (!bytes || row >= entry.height || column >= entry.width || head >= entry.heads) return null;
  const [size, places] = [entry.key_height * entry.key_width, entry.height * entry.width];
  const scales = new DataView(bytes.buffer, 0, 4 * entry.heads * places);
  const values = new Float32Array(size);
  const taken = head >= 0 ? [head] : [...Array(entry.heads).keys()];
  for (const one of taken) {
    const number = one * places + row * entry.width + column;
    const scale = scales.getFloat32(4 * number, true) / taken.length;
    const start = 4 * entry.heads * places + number * size;
    for (let i = 0; i < size; i++) values[i] += scale * bytes[start + i];
  }
  return {
    values,
    slice: null,
    component: patchComponent(reading, layer),
    layer,
    head,
    heads: entry.heads,
    height: entry.key_height,
    width: entry.key_width,
    signed: false,
    confidence: null,
    unsure: false,
    query: state.query,
    ...extent(values),
  };
}

/** Maps of a module without attention: what moves its places. */
const MIXING = ["mixing", "mixing_middle"];
const isMixing = (reading, layer) => reading.layers.find((one) => one.layer === layer)?.kind === "mixing";

/** The map that single patches of a layer have. */
const patchComponent = (reading, layer) => (isMixing(reading, layer) ? MIXING[0] : ATTENTION);

/** Whether a patch was clicked, and the chosen map has rows of patches. */
const asksPatch = (reading, layer) => Boolean(state.query) && state.component === patchComponent(reading, layer);

/** What else changes with another layer or map, so that it is there: layers have attention, or a mixing map. */
function fitting(changes) {
  const [reading] = shownReadings();
  const [component, layer] = [changes.component ?? state.component, changes.layer ?? state.layer];
  if (isMixing(reading, layer) === MIXING.includes(component) || own(reading.maps, `${component}/-1`)) return changes;
  if (changes.component === undefined) return { ...changes, component: patchComponent(reading, layer) };
  const layers = layersOf([reading]).filter((one) => own(reading.maps, `${component}/${one}`));
  return layers.length ? { ...changes, layer: layers[layers.length - 1] } : changes;
}

/** The map that is chosen: that of the chosen patch, where it is there, else that of the class token, or another one. */
const shownMap = (reading, layer, image, head, slice) =>
  (asksPatch(reading, layer) && queryMap(reading, layer, image, head)) ||
  mapOf(reading, state.component, layer, image, head, slice);

const placeName = ([row, column]) => `row ${row + 1}, column ${column + 1}`;

/** Images by their places: "the first 4 images", or their names. */
const imagesAt = (reading, places) =>
  places.every((place, i) => place === i)
    ? `the first ${places.length > 1 ? `${places.length} images` : "image"}`
    : places.map((place) => reading.images[place].name).join(", ");

/** What can be asked of single patches here, or why nothing can. */
function queryNote(reading, layer, image) {
  const { images: all, of, layers, reasons, bytes, budget } = reading.queries;
  // of a mixing map there may be fewer
  const there = Object.hasOwn(layers, layer) ? all.filter((one) => own(reading.queries.rows, `${layer}/${one}`)) : all;
  const have = imagesAt(reading, there) + (there.length === all.length && there.length < of ? ` (the reading has it of ${of})` : "");
  if (!there.length)
    return of
      ? "What each patch looks at is in the reading, and too large for this page."
      : `What each patch looks at is not in this reading${bytes && budget ? `: one image takes ${fmt(bytes / 1e6, 3)} of ${fmt(budget)} MB` : ""} (vitreous look --query-budget).`;
  if (!Object.hasOwn(layers, layer))
    return `What each patch looks at is not there for layer ${layer}: ${own(reasons, layer) || "it has no such map"}.`;
  const what = isMixing(reading, layer) ? "What moves each patch" : "What each patch looks at";
  if (!there.includes(image)) return `${what} is there for ${have}, not for this one.`;
  const [asks, mixes] = [asksPatch(reading, layer), isMixing(reading, layer)];
  const map = asks ? queryMap(reading, layer, image, -1) : null;
  if (map && map.high === 0) return "This patch has no token here: it was dropped before.";
  if (asks) return `Click another patch, or press Escape on the map for ${mixes ? "the mean of all" : "the class token"}.`;
  return `Click a patch, or press Enter on one, to see what ${mixes ? "moves it" : "it looks at"}: there for ${have}.`;
}

/** The choice between the class token, or all queries, and the patch that was clicked. */
function queryChoice() {
  const pick = choice("Looking from", (value) => set({ query: value === "patch" ? state.query : null }));
  const note = el("p", { class: "about small-text", "aria-live": "polite" });
  const box = el("div", { class: "looking-from" }, pick.field, note);
  section(["panes", "image", "component", "layer", "query", "unpacked"], () => {
    const [reading] = shownReadings();
    const attends = reading.layers.length > 0 && state.component === patchComponent(reading, state.layer);
    box.hidden = !reading.shown || !reading.layers.length;
    const record = reading.layers.find((one) => one.layer === state.layer);
    pick.field.hidden = !attends;
    pick.show(
      [
        { value: "all", label: record?.has_class ? "class token" : "mean of all" },
        ...(state.query ? [{ value: "patch", label: placeName(state.query) }] : []),
      ],
      state.query ? "patch" : "all",
    );
    const notes = shownReadings().map((one) => queryNote(one, state.layer, imageIn(one, state.image)));
    note.textContent = new Set(notes).size === 1 ? notes[0] : notes.map((text, i) => `${LETTERS[i]}: ${text}`).join(" ");
  });
  return box;
}

/** Look from the patch at a place of the picture, (0 to 1, 0 to 1), where the reading has its attention. */
function lookFrom(reading, y, x) {
  const entry = own(reading.queries.layers, state.layer);
  if (!entry) return;
  const at = (part, count) => Math.min(Math.max(Math.floor(part * count), 0), count - 1);
  set({ component: patchComponent(reading, state.layer), query: [at(y, entry.height), at(x, entry.width)] });
}
