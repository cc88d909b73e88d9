for (const figure of document.querySelectorAll(".heat")) {
  const told = figure.querySelector("output");
  const tell = (event) => {
    if (event.target.matches(".grid i")) told.textContent = event.target.title;
  };
  figure.addEventListener("click", tell);
  figure.addEventListener("pointerover", tell);
}
for (const table of document.querySelectorAll("table")) {
  table.tHead.addEventListener("click", (event) => {
    const heading = event.target.closest("th");
    if (!heading) return;
    const place = heading.cellIndex, body = table.tBodies[0];
    const largest = heading.classList.contains("number") && heading.dataset.sorted !== "largest";
    for (const other of table.tHead.rows[0].cells) delete other.dataset.sorted;
    heading.dataset.sorted = largest ? "largest" : "smallest";
    const value = (row) => row.cells[place].dataset.value ?? row.cells[place].textContent;
    const order = (a, b) => {
      const [one, other] = [value(a), value(b)];
      const way = one === "" || other === "" ? (one === "") - (other === "") : Number(one) - Number(other);
      return Number.isNaN(way) ? one.localeCompare(other) : one === "" || other === "" || !largest ? way : -way;
    };
    body.append(...[...body.rows].sort(order));
  });
}
