"use strict";
// The table of all measurements: a click on a head sorts, a select or a word filters.
(() => {
  const table = document.getElementById("all");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const text = (row, column) => row.cells[column].textContent;

  const filters = document.getElementById("filters");
  const chosen = new Map();
  const labelled = (name, control) => {
    const label = document.createElement("label");
    label.append(name, control);
    filters.append(label);
  };
  const count = document.createElement("output");
  count.id = "count";
  const search = document.createElement("input");
  search.type = "search";
  search.placeholder = "words, such as 64x56x56";

  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const fits = [...chosen].every(([column, value]) => !value || text(row, column) === value);
      const whole = row.textContent.toLowerCase();
      row.hidden = !(fits && words.every((word) => whole.includes(word)));
      shown += !row.hidden;
    }
    count.value = `${shown} of ${rows.length} rows`;
  };

  for (const name of ["machine", "layer", "dtype", "memory format", "mode", "operation",
                      "provider", "suite"]) {
    const column = heads.findIndex((head) => head.textContent === name);
    if (column < 0) continue;
    const values = [...new Set(rows.map((row) => text(row, column)))];
    if (values.length < 2) continue;
    const select = document.createElement("select");
    select.append(new Option("all", ""));
    for (const value of values) select.append(new Option(value, value));
    select.addEventListener("change", () => { chosen.set(column, select.value); apply(); });
    labelled(name, select);
  }
  search.addEventListener("input", apply);
  labelled("contains", search);
  filters.append(count);
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.hidden = false;

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    const numeric = head.classList.contains("n");
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => (numeric ? parseFloat(text(row, column)) : text(row, column));
      const missing = (value) => numeric && Number.isNaN(value);
      // Rows without a number stay at the end, whichever way.
      body.append(...rows.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (missing(x) || missing(y)) return missing(x) - missing(y);
        const order = numeric ? x - y : x.localeCompare(y, "en", { numeric: true });
        return down ? -order : order;
      }));
    });
  });
  apply();
})();
