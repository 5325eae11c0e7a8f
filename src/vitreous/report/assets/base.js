// Data, elements, numbers, state. All text reaches the page as text nodes or attributes, never as markup.

const DATA = JSON.parse(document.getElementById("data").textContent);
const WORDS = DATA.words;
const LETTERS = ["A", "B"];

/** What an object itself holds under a name, which comes from outside and may be "constructor". */
const own = (object, name) => (object && Object.hasOwn(object, name) ? object[name] : undefined);

/** An element. attrs: attributes, `on` listeners, `class`; children: nodes or texts, null is left out. */
function el(tag, attrs = {}, ...children) {
  return fill(document.createElement(tag), attrs, children);
}

/** An SVG element, as `el`. */
function draw(tag, attrs = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attrs, children);
}

function fill(node, attrs, children) {
  for (const [name, value] of Object.entries(attrs)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, call] of Object.entries(value)) node.addEventListener(event, call);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
  return node;
}

/** A number for people: a few digits, no exponent where it can be helped. */
function fmt(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e6 || size < 1e-4) return value.toExponential(2).replace("-", "−");
  if (size >= 1000) return Math.round(value).toLocaleString("en-US").replace("-", "−");
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}

const signedFmt = (value) => (value > 0 ? "+" : "") + fmt(value);
const plural = (count, word) => `${count.toLocaleString("en-US")} ${word}${count === 1 ? "" : "s"}`;

/** [label, unit, explanation] of a measure; one that has a paper form of its own says so. */
function measureWords(name) {
  const plain = name.replace(/_paper$/, "");
  const found = own(WORDS.measures, plain) || [readable(plain), "", ""];
  return name === plain
    ? found
    : [`${found[0]}, paper's form`, found[1], "As published; not comparable between token counts."];
}

const readable = (name) => name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " ");
const scoreWords = (name) => own(WORDS.scores, name) || [readable(name), "", ""];
const componentName = (name) => own(WORDS.components, name) || own(WORDS.baselines, name) || name;
const layerName = (layer) => (layer < 0 ? "whole model" : `layer ${layer}`);
const headName = (head) => (head < 0 ? "mean of heads" : `head ${head}`);
const where = (layer, head) =>
  layer < 0 ? "whole model" : head < 0 ? `layer ${layer}` : `layer ${layer}, head ${head}`;
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

// --- state: what is chosen; sections draw themselves again when something that they need changes ---------------------

const several = DATA.sources.length > 1;
const epochs = DATA.sources.some((source) => source.epochs);
const last = (source) => ({ source, at: DATA.sources[source].readings.length - 1 });
const state = {
  panes: DATA.sources.length === 2 || (several && !epochs) ? [last(0), last(1)] : [last(0)],
  image: 0,
  layer: 0,
  head: -1,
  component: "attention",
  opacity: 65,
  marks: true,
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

// --- choices ---------------------------------------------------------------------------------------------------------

let counter = 0;
const unique = (word) => `${word}-${++counter}`;

/** A row of radio buttons. `show(options, value)` with options [{value, label, title, content}] keeps focus where it can. */
function choice(label, pick, kind = "pills") {
  const name = unique("choice");
  const box = el("div", { class: kind });
  const field = el("fieldset", { class: "choice" }, el("legend", {}, label), box);
  let written = "";
  return {
    field,
    show(options, value, disabled = false) {
      const now = JSON.stringify(options.map((option) => [option.value, option.label, option.key]));
      if (now !== written) {
        written = now;
        box.replaceChildren(
          ...options.map((option) => {
            const input = el("input", {
              type: "radio",
              name,
              value: option.value,
              on: { change: () => pick(option.value) },
            });
            return el("label", { title: option.title }, input, el("span", {}, option.content || option.label));
          }),
        );
      }
      const inputs = [...box.querySelectorAll("input")];
      inputs.forEach((input, index) => {
        input.checked = options[index].value === value;
      });
      field.disabled = disabled;
    },
  };
}

function check(label, key) {
  const input = el("input", { type: "checkbox", on: { change: () => set({ [key]: input.checked }) } });
  input.checked = state[key];
  return el("label", { class: "check" }, input, el("span", {}, label));
}

/** A part of the page with a heading and an entry in the navigation. */
function part(id, title, ...children) {
  const node = el(
    "section",
    { id, "aria-labelledby": `${id}-title` },
    el("h2", { id: `${id}-title` }, title),
    ...children,
  );
  document.getElementById("main").append(node);
  const entry = el("li", {}, el("a", { href: `#${id}` }, title));
  document.getElementById("nav").append(entry);
  return {
    node,
    show(visible) {
      node.hidden = !visible;
      entry.hidden = !visible;
    },
  };
}
