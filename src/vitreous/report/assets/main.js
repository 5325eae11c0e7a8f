// Puts the page together.

/** The stamp speaks of what is shown, and stands over every view. */
function stamp() {
  const node = document.querySelector("body > .stamp");
  if (!node) return;
  const text = node.textContent;
  section(["panes"], () => {
    const random = shownReadings().map((reading) => reading.random);
    node.hidden = !random.some(Boolean);
    node.textContent = random.every(Boolean)
      ? text
      : `${random
          .map((yes, i) => (yes ? LETTERS[i] : ""))
          .filter(Boolean)
          .join()}: ${text.charAt(0).toLowerCase()}${text.slice(1)}`;
  });
}

function lead() {
  const node = document.getElementById("lead");
  section(["panes"], () => {
    node.replaceChildren(
      ...state.panes
        .map((pane, i) => {
          const reading = readingOf(pane);
          const model = reading.model || {};
          const grafts = model.mechanisms?.length ? `, grafts: ${model.mechanisms.join(", ")}` : "";
          return `${several || epochs ? `${tagged(i)}: ` : ""}${model.class || model.name || "model"}, ${plural(model.parameters || 0, "parameter")}, weights: ${model.weights || "unknown"}${grafts}. ${plural(reading.layers.length, "layer")}, ${plural(reading.count, "image")}.`;
        })
        .map((line) => el("span", {}, line)),
    );
  });
  const left = DATA.sources.filter((source) => source.leftOut);
  if (left.length)
    node.after(
      el(
        "p",
        { class: "quiet" },
        left
          .map((source) => `${source.name}: ${source.leftOut} epochs are left out, to keep this page small.`)
          .join(" "),
      ),
    );
}

/** The map that a look opens with: where the subject is, if that is known, else what speaks for a class, else attention. */
function bestMap(reading) {
  const known = reading.components.filter((one) => one.sign_known !== false).map((one) => one.name);
  const there = Object.keys(reading.maps).map((name) => name.split("/")[0]);
  const found = ["foreground", "relevance"].find((name) => known.includes(name) && there.includes(name));
  return found || (there.includes(MIXING[1]) && !there.includes(ATTENTION) ? MIXING[1] : ATTENTION);
}

theme();
stamp();
lead();
if (DATA.study) study();
mistakes();
// of a look the map comes first, of runs and comparisons what they come to
for (const one of epochs || several ? [glance, viewer] : [viewer, glance]) one();
differences();
if (epochs) overEpochs();
wholeModel();
objectScores();
artifacts();
indicators();
sums();
matrices();
figures();
spectra();
exact();
faithfulness();
layers();
facts();
const start = looker(readingOf(state.panes[0]));
const allLayers = layersOf(shownReadings());
const attending = allLayers.filter((layer) => !isMixing(readingOf(state.panes[0]), layer));
const layersShown = attending.length ? attending : allLayers;
state.layer = start ? start.layer : (layersShown[layersShown.length - 1] ?? 0);
state.head = start ? start.head : -1;
if (!epochs && !several) state.component = bestMap(readingOf(state.panes[0]));
links();
Object.assign(state, viewOf(location.hash));
for (const one of sections) one.redraw();
if (location.hash.startsWith(VIEW)) document.getElementById("maps").scrollIntoView({ behavior: "instant" });
document.documentElement.dataset.ready = "yes";
