// Charts as plain SVG, each with a readout that follows pointer and arrow keys, and a table of the same values.

/** About `count` round values that span low to high, each with its text: [[value, text]]. */
function ticks(low, high, count = 5) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const decimals = String(Number(step.toPrecision(2))).match(/e-(\d+)$|\.(\d+)$/);
  const places = Math.min(decimals ? Number(decimals[1] ?? decimals[2].length) : 0, 8);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    const value = Number((i * step).toPrecision(12));
    found.push([value, Math.abs(value) < 1000 ? value.toFixed(places).replace("-", "−") : fmt(value)]);
  }
  return found;
}

function bounds(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (low === 0 && high === 0) return [0, 1];
  const room = Math.max((high - low) * 0.08, Math.max(Math.abs(low), Math.abs(high)) * (high > low ? 0.001 : 0.08));
  return [low >= 0 && low < 0.25 * high ? 0 : low - room, high + room];
}

const W = 330,
  H = 214,
  LEFT = 54,
  RIGHT = 10,
  TOP = 10,
  BOTTOM = 38;

/** A figure. series: [{name, look ("line" | "dots" | "bars"), side ("a" | "b"), color, dashed, hot, points: [{x, y, low, high}]}];
 *  spread: what reaches from low to high. pick(series, point) is called by a click or Enter. width: 330, or more over the page.
 *  Bars are `slot` of a step of x wide; their points have a `shift` in such steps. */
function chart({ title, unit = "", about = "", xLabel, series, xName = String, range = null, pick = null, id = null, spread = "95 %", width = W }) {
  series = series
    .map((s) => ({ ...s, points: s.points.filter((p) => p.y !== null && p.y !== undefined) }))
    .filter((s) => s.points.length);
  const label = unit ? `${title} (${unit})` : title;
  const head = el(
    "figcaption",
    {},
    el("span", { class: "chart-title" }, title),
    unit ? el("span", { class: "unit" }, unit) : null,
  );
  if (!series.length)
    return el("figure", { class: "chart", id }, head, el("p", { class: "quiet" }, "Nothing was measured."));
  const all = series.flatMap((s) => s.points);
  const xs = [...new Set(all.map((p) => p.x))].sort((a, b) => a - b);
  const bars = series.some((s) => s.look === "bars");
  const [low, high] = range || bounds([...(bars ? [0] : []), ...all.flatMap((p) => [p.y, p.low ?? p.y, p.high ?? p.y])]);
  const room = bars || xs.length === 1 ? 0.5 : 0;
  const [first, final] = [xs[0] - room, xs[xs.length - 1] + room];
  const px = (x) => LEFT + 8 + ((x - first) / (final - first)) * (width - LEFT - RIGHT - 16);
  const py = (y) => H - BOTTOM - ((y - low) / (high - low || 1)) * (H - TOP - BOTTOM);

  const svg = draw("svg", {
    viewBox: `0 0 ${width} ${H}`,
    tabindex: 0,
    role: "group",
    "aria-roledescription": "chart",
    "aria-label": `${label} by ${xLabel}. Arrow keys read the values.`,
  });
  for (const [y, text] of ticks(low, high, 4)) {
    svg.append(draw("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: py(y), y2: py(y) }));
    svg.append(
      draw("text", { class: "tick", x: LEFT - 6, y: py(y) + 3.5, "text-anchor": "end", "aria-hidden": "true" }, text),
    );
  }
  const each = Math.ceil((xs.length * W) / (12 * width));
  const whole = xs.length <= 200 && xs.every(Number.isInteger) && xs.every((x, i) => !i || x - xs[i - 1] === 1);
  for (const x of whole ? xs.filter((_, i) => i % each === 0) : ticks(first, final, 5).map(([value]) => value)) {
    svg.append(
      draw(
        "text",
        { class: "tick", x: px(x), y: H - BOTTOM + 16, "text-anchor": "middle", "aria-hidden": "true" },
        xName(x),
      ),
    );
  }
  svg.append(draw("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: H - BOTTOM, y2: H - BOTTOM }));
  svg.append(
    draw(
      "text",
      { class: "axis-label", x: (LEFT + width - RIGHT) / 2, y: H - 5, "text-anchor": "middle", "aria-hidden": "true" },
      xLabel,
    ),
  );
  const marks = draw("g", { "aria-hidden": "true" });
  if (bars) marks.append(draw("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: py(0), y2: py(0) }));
  for (const s of series) marks.append(...drawn(s, px, py));
  const ring = draw("circle", { class: "ring", r: 6.5, cx: -20, cy: -20 });
  svg.append(marks, ring);

  const readout = el("output", { class: "readout", "aria-live": "polite" }, " ");
  const say = (s, p) => {
    ring.setAttribute("cx", px(p.x + (p.shift ?? 0)));
    ring.setAttribute("cy", py(p.y));
    const between = p.low !== undefined && p.low !== null ? `, ${spread} from ${fmt(p.low)} to ${fmt(p.high)}` : "";
    readout.textContent = `${capital(xLabel)} ${xName(p.x)}, ${s.name}: ${fmt(p.y)}${between}${unit && !unit.includes(" to ") ? ` ${unit}` : ""}`;
  };
  let at = { s: series.length - 1, p: -1 };
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowUp: [1, 0], ArrowDown: [-1, 0] };
    if (event.key === "Enter" && pick && at.p >= 0) pick(series[at.s], series[at.s].points[at.p]);
    if (!moves[event.key]) return;
    event.preventDefault();
    const s = Math.min(Math.max(at.s + moves[event.key][0], 0), series.length - 1);
    const p = Math.min(Math.max(at.p + moves[event.key][1], 0), series[s].points.length - 1);
    at = { s, p };
    say(series[s], series[s].points[p]);
  });
  const nearest = (event) => {
    const box = svg.getBoundingClientRect();
    const [x, y] = [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * H];
    let found = null;
    series.forEach((s, i) =>
      s.points.forEach((p, j) => {
        // anywhere above or below a bar means it
        const distance = (px(p.x + (p.shift ?? 0)) - x) ** 2 + (bars ? 0 : (py(p.y) - y) ** 2);
        if (!found || distance < found.distance) found = { distance, s: i, p: j };
      }),
    );
    return found;
  };
  svg.addEventListener("pointermove", (event) => {
    at = nearest(event);
    say(series[at.s], series[at.s].points[at.p]);
  });
  if (pick) {
    svg.classList.add("pickable");
    svg.addEventListener("click", (event) => {
      const f = nearest(event);
      pick(series[f.s], series[f.s].points[f.p]);
    });
  }
  const more = el("details", { class: "values" }, el("summary", {}, "Values as a table"));
  more.addEventListener("toggle", () => {
    if (more.open && more.children.length === 1) more.append(valuesTable(label, xLabel, xName, xs, series));
  });
  return el(
    "figure",
    { class: width > W ? "chart wide" : "chart", id },
    head,
    about ? el("p", { class: "about" }, about) : null,
    svg,
    readout,
    more,
  );
}

function drawn(s, px, py) {
  const side = s.color ? "own" : s.side || "a";
  const style = s.color ? { stroke: s.color, fill: s.color } : {};
  const nodes = s.points
    .filter((p) => p.low !== undefined && p.low !== null)
    .map((p) =>
      draw("line", {
        class: `${s.look === "bars" ? "over-bar " : ""}whisker ${side}`,
        x1: px(p.x + (p.shift ?? 0)),
        x2: px(p.x + (p.shift ?? 0)),
        y1: py(p.low),
        y2: py(p.high),
        stroke: s.look === "bars" ? null : s.color,
      }),
    );
  if (s.look === "bars") {
    const wide = (px(1) - px(0)) * s.slot;
    nodes.unshift(
      ...s.points.map((p) =>
        draw("rect", {
          class: "column",
          x: (px(p.x + p.shift) - wide / 2).toFixed(1),
          y: Math.min(py(p.y), py(0)).toFixed(1),
          width: wide.toFixed(1),
          height: Math.abs(py(p.y) - py(0)).toFixed(1),
          fill: s.color,
        }),
      ),
    );
  }
  if (s.look === "line" && s.points.length > 1) {
    const points = s.points.map((p) => `${px(p.x).toFixed(1)},${py(p.y).toFixed(1)}`).join(" ");
    nodes.push(draw("polyline", { class: `line ${side}${s.dashed ? " dashed" : ""}`, points, stroke: s.color }));
  }
  const lonely = s.look === "line" && s.points.length === 1;
  if (s.look === "dots" || lonely || s.knots) {
    nodes.push(
      ...s.points.map((p) =>
        draw("circle", {
          class: `dot ${side}${s.hot ? " hot" : ""}${s.look === "line" ? " knot" : ""}`,
          cx: px(p.x).toFixed(1),
          cy: py(p.y).toFixed(1),
          r: s.hot ? 4.2 : 3,
          ...style,
        }),
      ),
    );
  }
  return nodes;
}

function valuesTable(label, xLabel, xName, xs, series) {
  const columns = [{ label: capital(xLabel), numeric: true, value: (x) => x, text: (x) => xName(x) }];
  for (const s of series) {
    const by = new Map(s.points.map((p) => [p.x, p.y]));
    columns.push({ label: s.name, numeric: true, value: (x) => by.get(x) ?? null });
  }
  return table({ caption: label, columns, rows: xs });
}

/** What the marks mean: [[class or color, text]]. */
function key(entries) {
  return el(
    "ul",
    { class: "key" },
    entries.map(([look, text]) => {
      const mark = draw(
        "svg",
        { viewBox: "0 0 26 10", class: "key-mark", "aria-hidden": "true" },
        look.includes("dot")
          ? draw("circle", { class: look, cx: 13, cy: 5, r: 3.4 })
          : draw("line", {
              class: look.startsWith("rgb") ? "line own" : look,
              x1: 1,
              x2: 25,
              y1: 5,
              y2: 5,
              stroke: look.startsWith("rgb") ? look : null,
            }),
      );
      return el("li", {}, mark, text);
    }),
  );
}
