"use strict";
const body = document.querySelector("#rows tbody");
const rows = [...body.rows];
const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
const order = new Map(rows.map((row, index) => [row, index]));
const input = document.querySelector("#filter");
const count = document.querySelector("#count");
const more = document.querySelector("#more");

// A browser takes seconds to lay out ten thousand rows, so what is not asked for is not in the document.
const step = 500;
let most = step;
let sorted = rows;

function update() {
  const wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  const fitting = sorted.filter((row) => wanted.every((word) => texts.get(row).includes(word)));
  body.replaceChildren(...fitting.slice(0, most));
  more.hidden = fitting.length <= most;
  const shown = more.hidden ? "" : `, the first ${most} shown`;
  count.textContent = `${fitting.length} of ${rows.length} rows${shown}`;
}

input.addEventListener("input", update);
more.addEventListener("click", () => {
  most += step;
  update();
});

const heads = [...document.querySelectorAll("#rows thead th")];
const collator = new Intl.Collator("en", { numeric: true });
heads.forEach((head, column) => {
  head.querySelector("button").addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const keys = new Map(rows.map((row) => {
      const cell = row.cells[column];
      return [row, cell.dataset.n === undefined ? cell.textContent : Number(cell.dataset.n)];
    }));
    sorted = [...rows].sort((a, b) => {
      const x = keys.get(a), y = keys.get(b);
      // What is blank comes last either way, and equal rows stay in the order they came in.
      if (x === "" || y === "") return (x === "") - (y === "") || order.get(a) - order.get(b);
      const way = typeof x === "number" && typeof y === "number" ? x - y : collator.compare(x, y);
      return sign * way || order.get(a) - order.get(b);
    });
    update();
  });
});
update();

const tip = document.querySelector("#tip");
const show = (event) => {
  const cell = event.target.closest("[data-tip]");
  if (!cell) return hide();
  tip.textContent = cell.dataset.tip;
  tip.hidden = false;
  const box = cell.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${box.bottom + tip.offsetHeight + 8 > innerHeight ? box.top - tip.offsetHeight - 4 : box.bottom + 4}px`;
  cell.setAttribute("aria-describedby", "tip");
};
const hide = () => {
  tip.hidden = true;
  document.querySelectorAll("[aria-describedby=tip]").forEach((cell) => cell.removeAttribute("aria-describedby"));
};
document.addEventListener("mouseover", show);
document.addEventListener("focusin", show);
document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
