// What a page of readings says in words, and what is chosen on it.

/** Records by kind ("measures", "sources", "scores", "baselines", "components"), in the order of the readings. */
const WORDS = DATA.words;
const recordOf = (kind, name) => WORDS[kind].find((record) => record.name === name);
const namesOf = (kind) => WORDS[kind].map((record) => record.name);
const LETTERS = ["A", "B"];

/** [label, unit or range, explanation] of a record; one that no reading explains has its own name. */
function words(kind, name) {
  const record = recordOf(kind, name);
  if (!record) return [readable(name), "", ""];
  const bounded = Number.isFinite(record.low) && Number.isFinite(record.high);
  return [record.label, record.unit || (bounded ? `${fmt(record.low)} to ${fmt(record.high)}` : ""), record.explains];
}

const measureWords = (name) => words("measures", name);

const readable = (name) => name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " ");
const scoreWords = (name) => words("scores", name);
const componentName = (name) => (recordOf("components", name) || recordOf("baselines", name))?.label || name;
const layerName = (layer) => (layer < 0 ? "whole model" : `layer ${layer}`);
const headName = (head) => (head < 0 ? "mean of heads" : `head ${head}`);
const where = (layer, head) =>
  layer < 0 ? "whole model" : head < 0 ? `layer ${layer}` : `layer ${layer}, head ${head}`;

// --- state: what is chosen; sections draw themselves again when something that they need changes ---------------------

const several = DATA.sources.length > 1;
const epochs = DATA.sources.some((source) => source.epochs);
const last = (source) => ({ source, at: DATA.sources[source].readings.length - 1 });
const state = {
  panes: DATA.sources.length === 2 || (several && !epochs) ? [last(0), last(1)] : [last(0)],
  image: 0,
  layer: 0,
  head: -1,
  slice: 0,
  query: null, // [row, column] of the patch whose attention is shown; null: of the class token, or of all
  unpacked: 0, // how often rows of queries became ready
  component: "attention",
  opacity: 65,
  marks: true,
  groups: true, // merged and dropped tokens are drawn
  outline: false,
  clip: true,
  shared: true,
};
const sections = [];

function section(needs, redraw) {
  sections.push({ needs, redraw });
}

function set(changes) {
  const changed = Object.keys(changes).filter((key) => state[key] !== changes[key]);
  Object.assign(state, changes);
  for (const part of sections) if (part.needs.some((key) => changed.includes(key))) part.redraw();
}

const readingOf = (pane) => DATA.sources[pane.source].readings[pane.at];
const shownReadings = () => state.panes.map(readingOf);

/** The name of a pane's reading: its source, and the epoch of a run. */
function paneName(pane) {
  const source = DATA.sources[pane.source];
  return source.epochs ? `${source.name}, epoch ${source.epochs[pane.at]}` : source.name;
}

/** "A · name" where two are shown, else the name. */
const tagged = (index) => (state.panes.length > 1 ? `${LETTERS[index]} · ` : "") + paneName(state.panes[index]);

/** The same image in another reading: by name, else by place. */
function imageIn(reading, place) {
  const name = readingOf(state.panes[0]).images[place]?.name;
  if (reading.images[place]?.name === name) return place;
  const found = reading.images.findIndex((image) => image.name === name);
  return found >= 0 ? found : Math.min(place, reading.images.length - 1);
}

function check(label, key) {
  const input = el("input", { type: "checkbox", on: { change: () => set({ [key]: input.checked }) } });
  input.checked = state[key];
  return el("label", { class: "check" }, input, el("span", {}, label));
}
