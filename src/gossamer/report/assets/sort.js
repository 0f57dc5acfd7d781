// Sort the table by the column whose header is pressed: best first, then worst first, then as it was.
"use strict";
(() => {
  const table = document.getElementById("rows");
  const body = table.tBodies[0];
  const original = [...body.rows];
  const headers = [...table.querySelectorAll("tr.columns th")];
  const opposite = { ascending: "descending", descending: "ascending" };

  // A number, a text, or null for "not measured", which stays last whichever way the column is sorted.
  function key(row, column) {
    const cell = row.cells[column];
    const value = cell.dataset.value;
    if (value === "") return null;
    return headers[column].matches(".name, .text") ? value.toLocaleLowerCase() : Number(value);
  }

  function compare(a, b, sign) {
    if (a === null || b === null) return (a === null) - (b === null);
    return typeof a === "string" ? sign * a.localeCompare(b, undefined, { numeric: true }) : sign * (a - b);
  }

  function sort(column) {
    const header = headers[column];
    const first = header.firstElementChild.dataset.first;
    const now = header.getAttribute("aria-sort");
    const next = now === "none" ? first : now === first ? opposite[first] : "none";
    for (const other of headers) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", next);
    const sign = next === "ascending" ? 1 : -1;
    const rows = [...original];
    if (next !== "none") rows.sort((a, b) => compare(key(a, column), key(b, column), sign));
    body.append(...rows);
  }

  headers.forEach((header, column) => header.firstElementChild.addEventListener("click", () => sort(column)));
})();
