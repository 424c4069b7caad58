"use strict";
// What is under the pointer, or has the focus, is named beside it; a click on a point opens its samples.
const tip = document.getElementById("tip");

function show(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18) + "px";
}

// A cell of a heat map is named by its row and its column.
function words(element) {
  const mark = element.closest("[data-tip]");
  if (mark) return mark.dataset.tip;
  const cell = element.closest(".heat td");
  if (!cell) return "";
  const column = cell.closest("table").tHead.rows[0].cells[cell.cellIndex];
  return cell.parentElement.cells[0].textContent + ": " + (cell.title || cell.textContent) + " — " + column.dataset.name;
}

document.addEventListener("pointermove", (event) => {
  const text = event.target instanceof Element ? words(event.target) : "";
  if (text) show(text, event.clientX, event.clientY);
  else tip.hidden = true;
});
document.addEventListener("focusin", (event) => {
  const text = words(event.target);
  const box = event.target.getBoundingClientRect();
  if (text && event.target.matches(":focus-visible")) show(text, box.right - 8, box.bottom - 12);
  else tip.hidden = true;
});
document.addEventListener("focusout", () => { tip.hidden = true; });

document.addEventListener("click", (event) => {
  if (event.target instanceof HTMLDialogElement) return event.target.close();
  const link = event.target instanceof Element ? event.target.closest("a[href^='#']") : null;
  const target = link && document.getElementById(link.getAttribute("href").slice(1));
  if (!(target instanceof HTMLDialogElement)) return;
  event.preventDefault();
  tip.hidden = true;
  // Full precision is the same for all points of a model, and is in the file once.
  for (const image of target.querySelectorAll("img[data-same]")) image.src = document.getElementById(image.dataset.same).src;
  target.showModal();
});
