"use strict";
// A click on a column's heading sorts the table of books by it; a second click turns the order around.
for (const table of document.querySelectorAll("table.books")) {
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const compare = new Intl.Collator("zh", { numeric: true }).compare;
  headings.forEach((heading, column) => {
    const isNumber = heading.classList.contains("number");
    const key = (row) => row.cells[column].dataset.sort;
    heading.querySelector("button").addEventListener("click", () => {
      // Numbers are wanted from the largest down, words from the first on.
      const before = heading.getAttribute("aria-sort");
      const descending = before ? before === "ascending" : isNumber;
      const rows = [...body.rows].sort((one, other) => (isNumber ? key(one) - key(other) : compare(key(one), key(other))));
      body.append(...(descending ? rows.reverse() : rows));
      for (const each of headings) each.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    });
  });
}
