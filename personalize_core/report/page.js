"use strict";
// Images open large. Everything else on the page works without this script.
const dialog = document.getElementById("large");
const large = document.getElementById("large-image");
const caption = document.getElementById("large-caption");
const references = document.getElementById("large-references");
let current = null;

function show(button) {
  const small = button.querySelector("img");
  current = button;
  large.src = small.src;
  large.alt = small.alt;
  caption.textContent = button.dataset.caption;
  const strip = button.closest("table.images") && button.closest("article").querySelector(".references .strip");
  references.replaceChildren(...(strip ? [...strip.querySelectorAll("img")].slice(0, 4).map((one) => one.cloneNode()) : []));
  for (const arrow of dialog.querySelectorAll("[data-go]")) arrow.disabled = !next(arrow.dataset.go);
  if (!dialog.open) dialog.showModal();
}

function next(direction) {
  const cell = current && current.closest("td");
  if (!cell) {
    const group = [...document.querySelectorAll(`[data-group="${current.dataset.group}"]`)];
    return group[group.indexOf(current) + ({ left: -1, right: 1 }[direction] || group.length)];
  }
  let other = cell;
  do {
    other = { left: () => other.previousElementSibling, right: () => other.nextElementSibling,
      up: () => beside(other, -1), down: () => beside(other, 1) }[direction]();
  } while (other && other.tagName === "TD" && !other.querySelector("button"));
  return other && other.querySelector("button");
}

function beside(cell, by) {
  const rows = [...cell.closest("tbody").rows];
  const row = rows[rows.indexOf(cell.parentElement) + by];
  return row && row.cells[cell.cellIndex];
}

function go(direction) {
  const other = next(direction);
  if (other) show(other);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button.image");
  if (button) show(button);
});
dialog.addEventListener("click", (event) => {
  const arrow = event.target.closest("[data-go]");
  if (arrow) go(arrow.dataset.go);
  else if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
});
dialog.addEventListener("keydown", (event) => {
  const direction = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down" }[event.key];
  if (direction) { event.preventDefault(); go(direction); }
});
dialog.addEventListener("close", () => current && current.focus({ preventScroll: false }));

// A link into something folded unfolds it; what is printed is unfolded.
function unfold() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  for (let one = target; one; one = one.parentElement) if (one.tagName === "DETAILS") one.open = true;
}
addEventListener("hashchange", unfold);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
unfold();
