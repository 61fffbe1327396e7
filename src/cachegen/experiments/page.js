"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 600px)");

function layoutOf(figure) {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink"), line = style.getPropertyValue("--line");
  const axis = (given) => ({
    title: { text: given.title }, type: given.type, gridcolor: line, linecolor: line, zerolinecolor: line,
    automargin: true, exponentformat: "power",
  });
  return {
    xaxis: axis(figure.x), yaxis: axis(figure.y), barmode: "stack", hovermode: "closest", showlegend: figure.has_legend,
    legend: { orientation: "h", y: narrow.matches ? -0.3 : -0.2, font: { size: narrow.matches ? 10 : 12 } },
    margin: { l: narrow.matches ? 45 : 60, r: 10, t: 10, b: 50 }, font: { color: ink, family: "system-ui, sans-serif" },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
  };
}

function drawAll() {
  for (const place of document.querySelectorAll("[data-figure]")) {
    const figure = data[place.dataset.figure];
    Plotly.react(place, figure.traces, layoutOf(figure), { responsive: true, displaylogo: false, displayModeBar: false });
  }
}

function compare(first, second) {
  if (first === null || second === null) return (first === null) - (second === null);
  return typeof first === "number" && typeof second === "number" ? first - second : String(first).localeCompare(String(second));
}

function sortBy(table, column, head) {
  const descends = head.getAttribute("aria-sort") === "ascending";
  const rows = data[table.dataset.table].rows, body = table.tBodies[0];
  const ordered = [...body.rows].sort((a, b) => compare(rows[a.dataset.row][column], rows[b.dataset.row][column]));
  if (descends) ordered.reverse();
  for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descends ? "descending" : "ascending");
  body.append(...ordered);
}

function download(name) {
  const quote = (value) => value === null ? "" : /[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value);
  const lines = [data[name].columns, ...data[name].rows].map((row) => row.map(quote).join(",") + "\n");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines, { type: "text/csv" }));
  link.download = `${name}.csv`;
  link.click();
  URL.revokeObjectURL(link.href);
}

for (const table of document.querySelectorAll("[data-table]")) {
  table.tHead.querySelectorAll("th").forEach((head, column) =>
    head.firstElementChild.addEventListener("click", () => sortBy(table, column, head)));
}
for (const button of document.querySelectorAll("[data-csv]")) {
  button.addEventListener("click", () => download(button.dataset.csv));
}
dark.addEventListener("change", drawAll);
narrow.addEventListener("change", drawAll);
drawAll();
