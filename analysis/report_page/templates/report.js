"use strict";
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = root.dataset.theme || (dark ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
});
for (const part of document.querySelectorAll(".records")) {
  const entries = [...part.querySelectorAll(".entry")];
  const texts = entries.map((entry) => entry.textContent.toLowerCase());
  const count = part.querySelector(".count");
  const show = (words) => {
    let shown = 0;
    entries.forEach((entry, i) => {
      const fits = words.every((word) => texts[i].includes(word));
      entry.hidden = !fits;
      shown += fits;
    });
    count.textContent = `${shown} of ${entries.length}`;
  };
  part.querySelector(".filter").addEventListener("input", (event) => {
    show(event.target.value.toLowerCase().split(/\s+/).filter(Boolean));
  });
  show([]);
}
const number = (text) => parseFloat(text.replace(/,/g, ""));
for (const box of document.querySelectorAll(".table")) {
  const body = box.querySelector("tbody");
  const heads = [...box.querySelectorAll("th")];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].textContent.trim();
      const compare = head.classList.contains("n")
        ? (a, b) => number(a) - number(b)
        : (a, b) => a.localeCompare(b, "en", { numeric: true });
      const rows = [...body.rows].map((row) => [key(row), row]);
      const empty = rows.filter(([text]) => !text);  // last, whichever way
      const full = rows.filter(([text]) => text);
      full.sort(([a], [b]) => (up ? compare(a, b) : compare(b, a)));
      body.append(...full.concat(empty).map(([, row]) => row));
    });
  });
  const filter = box.previousElementSibling;
  if (!filter || !filter.matches(".filters")) continue;
  filter.querySelector("input").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = [...body.rows];
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    const shown = rows.filter((row) => !row.hidden).length;
    filter.querySelector("output").textContent = `${shown} of ${rows.length}`;
  });
}
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
for (const svg of document.querySelectorAll("figure svg")) {
  const marks = [...svg.querySelectorAll("use > title")].map((title) => {
    const mark = title.parentNode;
    const text = title.textContent;
    title.remove();  // the browser's own hint would come on top
    mark.setAttribute("aria-label", text);
    return [mark, text];
  });
  if (!marks.length) continue;
  svg.addEventListener("pointermove", (event) => {
    let best = 18;
    let said = null;
    for (const [mark, text] of marks) {
      const at = mark.getBoundingClientRect();
      const x = at.left + at.width / 2 - event.clientX;
      const away = Math.hypot(x, at.top + at.height / 2 - event.clientY);
      if (away < best) [best, said] = [away, text];
      else if (said && Math.abs(away - best) < 1 && !said.includes(text)) said += `\n${text}`;
    }
    tip.hidden = said === null;
    if (said === null) return;
    tip.textContent = said;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 4;
    tip.style.left = `${scrollX + Math.max(4, Math.min(event.clientX + 12, room))}px`;
    tip.style.top = `${scrollY + event.clientY + 14}px`;
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
}
if (navigator.clipboard) {
  for (const block of document.querySelectorAll("pre")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    const text = block.textContent;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    });
    block.prepend(button);
  }
}
