// The address of what is shown, behind the # of the page's own, and pictures of maps as files.

const VIEW = "#maps?";
const digits = (text) => (/^-?\d{1,6}$/.test(text ?? "") ? Number(text) : null);

/** The address of the present view. */
function viewLink() {
  const parts = { image: state.image, map: state.component, layer: state.layer, head: state.head };
  if (state.slice) parts.slice = state.slice;
  if (state.query) parts.query = state.query.join(".");
  if (DATA.sources.length > 1 || DATA.sources[0].readings.length > 1)
    parts.show = state.panes.map((pane) => `${pane.source}.${pane.at}`).join("_");
  return VIEW + new URLSearchParams(parts);
}

/** What an address chooses; what is not on this page is left out. null: it is of no view. */
function viewOf(address) {
  if (!address.startsWith(VIEW)) return null;
  const parts = new URLSearchParams(address.slice(VIEW.length));
  const view = {};
  const panes = (parts.get("show") || "").split("_").map((text) => text.split(".").map(digits));
  if (panes.length < 3 && panes.every(([source, at]) => DATA.sources[source]?.readings[at]))
    view.panes = panes.map(([source, at]) => ({ source, at }));
  const readings = (view.panes || state.panes).map(readingOf);
  for (const name of ["image", "layer", "head", "slice"]) {
    const value = digits(parts.get(name));
    if (value !== null) view[name] = value;
  }
  if (!(view.image >= 0 && view.image < readings[0].shown)) delete view.image;
  if (!layersOf(readings).includes(view.layer)) delete view.layer;
  if (!(view.head >= -1)) delete view.head;
  if (!(view.slice >= 0)) delete view.slice;
  if (componentsOf(readings).includes(parts.get("map"))) view.component = parts.get("map");
  const query = (parts.get("query") || "").split(".").map(digits);
  view.query = query.length === 2 && query.every((value) => value !== null && value >= 0) ? query : null;
  return view;
}

/** Keeps the address up to date, and follows one that is opened. Called when all sections are there. */
function links() {
  let due = null;
  const link = el("a", { class: "view-link", href: viewLink() }, "Link to this view");
  document.querySelector(".map-actions").append(link);
  section(["panes", "image", "component", "layer", "head", "slice", "query"], () => {
    link.href = viewLink();
    clearTimeout(due);
    // browsers allow few changes of the address in a second
    due = setTimeout(() => history.replaceState(null, "", viewLink()), 250);
  });
  const follow = () => {
    const view = viewOf(location.hash);
    if (!view || location.hash === viewLink()) return;
    set(view);
    document.getElementById("maps").scrollIntoView();
  };
  window.addEventListener("hashchange", follow);
  clearTimeout(due);
}

/** The picture of the first map, with all that is drawn on it, as a PNG file. */
function saveMap() {
  const [node, image] = [document.querySelector(".pane"), shownReadings()[0].images[state.image]];
  node.cursor = null;
  paint(node);
  node.querySelector("canvas").toBlob((blob) => {
    const { map } = node.shown;
    const words = [
      image ? image.name.split("/").pop().replace(/\.[^.]*$/, "") : "map",
      map?.component,
      map && map.layer >= 0 ? `layer-${map.layer}` : null,
      map && map.head >= 0 ? `head-${map.head}` : null,
      map?.query ? `from-${map.query.map((one) => one + 1).join("-")}` : null,
    ];
    const link = el("a", {
      href: URL.createObjectURL(blob),
      download: `${words.filter(Boolean).join("_").replace(/[^\p{L}\p{N}._-]+/gu, "-").slice(0, 120)}.png`,
    });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  });
}
