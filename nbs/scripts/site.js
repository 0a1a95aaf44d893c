// What is wider than its column scrolls, shows that it does, and can be reached with the Tab key.
(() => {
  "use strict";
  const WIDE = "pre, .cell-output-display, .sd-table, .math.display, .table-wide, figure p"
    .split(", ").map((o) => `main ${o}`).join(", ");
  const SLACK = 1;  // pixels: browsers round widths

  const mark = (box) => {
    const more = box.scrollWidth - box.clientWidth > SLACK;
    box.classList.toggle("scrolls", more);
    box.classList.toggle("at-end", more && box.scrollLeft + box.clientWidth >= box.scrollWidth - SLACK);
    if (more) {
      box.tabIndex = 0;
      box.setAttribute("role", "group");
      box.setAttribute("aria-label", "scrolls sideways");
    } else if (box.getAttribute("aria-label") === "scrolls sideways") {
      box.removeAttribute("tabindex"); box.removeAttribute("role"); box.removeAttribute("aria-label");
    }
  };

  const boxes = Array.from(document.querySelectorAll(WIDE));
  const seen = new ResizeObserver((entries) => {
    new Set(entries.map((e) => e.target.closest(WIDE))).forEach((box) => box && mark(box));
  });
  boxes.forEach((box) => {
    seen.observe(box);
    Array.from(box.children).forEach((o) => seen.observe(o));
    box.addEventListener("scroll", () => mark(box), { passive: true });
    mark(box);
  });
  const all = () => boxes.forEach(mark);
  window.addEventListener("load", () => {
    all();
    if (window.MathJax && window.MathJax.startup) window.MathJax.startup.promise.then(all);
  });
  document.addEventListener("toggle", all, true);  // what was folded has a width only when it opens
})();

// The theme: after a switch the page is marked by the ground that its style sheet gives, however late that comes.
(() => {
  "use strict";
  const mark = () => {
    const rgb = (getComputedStyle(document.body).backgroundColor.match(/[\d.]+/g) || []).map(Number);
    if (rgb.length < 3 || rgb[3] === 0) return;
    const dark = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] < 128;
    if (!document.querySelector("link.quarto-color-scheme[data-mode]")) return;
    document.documentElement.classList.toggle("quarto-dark", dark);
  };
  document.querySelectorAll("link.quarto-color-scheme").forEach((o) => {
    o.addEventListener("load", mark);
    const soon = () => [0, 100, 400, 1500].forEach((t) => setTimeout(mark, t));
    new MutationObserver(soon).observe(o, { attributes: true });
  });
})();
