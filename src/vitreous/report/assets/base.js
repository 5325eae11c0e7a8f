// Data, elements, numbers, choices. All text reaches the page as text nodes or attributes, never as markup.

const DATA = JSON.parse(document.getElementById("data").textContent);

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
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const plural = (count, word) => `${count.toLocaleString("en-US")} ${word}${count === 1 ? "" : "s"}`;
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

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

/** The choice of light or dark, at the top. */
function theme() {
  const pick = choice("Colours", (value) => {
    if (value === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = value;
    pick.show(options, value);
  });
  const options = ["auto", "light", "dark"].map((value) => ({ value, label: value }));
  pick.show(options, "auto");
  document.getElementById("theme").append(pick.field);
}
