// Puts the page of runs together whose attention cannot be read.

theme();
document
  .getElementById("lead")
  .append(
    el("span", {}, "The attention of these models cannot be read, so that there are no maps; the summary of a run says why."),
  );
if (DATA.study) study();
mistakes();
part("epochs", "Over the epochs").node.append(
  key(DATA.sources.map((one, i) => [lineColor(i, DATA.sources.length), one.name])),
  el("div", { class: "charts" }, trainingCharts()),
);
document.documentElement.dataset.ready = "yes";
