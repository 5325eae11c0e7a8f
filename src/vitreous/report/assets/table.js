// Tables that sort by their heads.

/** columns: [{label, title, numeric, long, value(row), text(row)}]; go(row) makes the first column's cells buttons. */
function table({ caption, columns, rows, sort = null, limit = 60, go = null, id = null }) {
  let order = sort; // {column, down}
  let all = rows.length <= limit;
  const heads = columns.map((column, index) => {
    const button = el(
      "button",
      {
        type: "button",
        class: "sort",
        title: column.title,
        on: {
          click: () => {
            order = { column: index, down: order && order.column === index ? !order.down : Boolean(column.numeric) };
            fillIn();
          },
        },
      },
      column.label,
    );
    return el("th", { scope: "col", class: column.numeric ? "number" : null }, button);
  });
  const body = el("tbody");
  const more = el("button", {
    type: "button",
    class: "plain",
    on: {
      click: () => {
        all = true;
        fillIn();
      },
    },
  });
  const text = (column, row) =>
    column.text ? column.text(row) : column.numeric ? fmt(column.value(row)) : String(column.value(row) ?? "–");

  function cell(column, row, index) {
    let content = text(column, row);
    if (index === 0 && go)
      content = el("button", { type: "button", class: "plain", on: { click: () => go(row) } }, content);
    const tag = index === 0 ? "th" : "td";
    return el(
      tag,
      {
        scope: index === 0 ? "row" : null,
        class: [column.numeric ? "number" : null, column.long ? "long" : null].filter(Boolean).join(" ") || null,
      },
      content,
    );
  }

  function fillIn() {
    const sorted = order
      ? [...rows].sort((a, b) => compare(columns[order.column].value(a), columns[order.column].value(b), order.down))
      : rows;
    heads.forEach((head, index) => {
      if (order && order.column === index) head.setAttribute("aria-sort", order.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    body.replaceChildren(
      ...(all ? sorted : sorted.slice(0, limit)).map((row) =>
        el(
          "tr",
          {},
          columns.map((c, i) => cell(c, row, i)),
        ),
      ),
    );
    more.hidden = all;
    more.textContent = `Show all ${rows.length.toLocaleString("en-US")} rows`;
  }

  fillIn();
  const sheet = el(
    "table",
    {},
    el("caption", { class: "unseen" }, caption),
    el("thead", {}, el("tr", {}, heads)),
    body,
  );
  return el(
    "div",
    { class: "table", id },
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${caption}, table` }, sheet),
    more,
  );
}

/** Missing values come last either way. */
function compare(a, b, down) {
  if (a === null || a === undefined) return b === null || b === undefined ? 0 : 1;
  if (b === null || b === undefined) return -1;
  const found =
    typeof a === "number" && typeof b === "number"
      ? a - b
      : String(a).localeCompare(String(b), "en", { numeric: true });
  return down ? -found : found;
}
