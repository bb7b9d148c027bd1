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
