// What tools/browse.py asks a page, once it stands in a browser. Each probe returns a list of findings as text.
window.probes = (() => {
  "use strict";
  const all = (where, root = document) => Array.from(root.querySelectorAll(where));
  const seen = (o) => o.checkVisibility({ checkOpacity: false, checkVisibilityCSS: true });
  const start = (o) => (o.textContent || o.outerHTML).trim().replace(/\s+/g, " ").slice(0, 60);
  const SLACK = 1;  // pixels: browsers round widths

  // the box in which a wide thing scrolls: itself or the nearest around it
  const scroller = (o) => {
    for (let b = o; b && b !== document.body; b = b.parentElement)
      if (/auto|scroll/.test(getComputedStyle(b).overflowX) && getComputedStyle(b).display !== "inline") return b;
    return null;
  };

  const TEX = new RegExp([
    /\$[^\s$][^$\n]*\$|\$\$|\\[([]/, /\\(?:frac|tfrac|sum|log|exp|mathbf|text|left|right|tag|begin)\b|\\[a-z]+\{/,
  ].map((o) => o.source).join("|"));
  return {
    raw_tex() {
      const walk = document.createTreeWalker(document.querySelector("main") || document.body, NodeFilter.SHOW_TEXT);
      const found = [];
      for (let t = walk.nextNode(); t; t = walk.nextNode()) {
        const p = t.parentElement;
        if (p.closest("pre, code, script, style, mjx-container") || !seen(p)) continue;
        if (TEX.test(t.data)) found.push(t.data.trim().slice(0, 80));
      }
      return found;
    },
    images() {
      return all("img").flatMap((o) => {
        const src = o.getAttribute("src").slice(0, 60), width = +o.getAttribute("width") || o.naturalWidth;
        const said = (o.getAttribute("alt") || "").trim() ? [] : [`${src} has no text (#| fig-alt)`];
        if (width <= 660 || !o.closest("main")) return said;
        return [...said, `${src} is ${(width / 100).toFixed(1)} inches wide, 6.5 at most`];
      });
    },
    wider_than_the_window() {
      const more = document.documentElement.scrollWidth - innerWidth;
      return more > SLACK ? [`the page is ${more} pixels wider than the window`] : [];
    },
    cut() {
      return all("main :is(pre, table, .math.display, mjx-container[display=true], svg)").flatMap((o) => {
        if (!seen(o)) return [];
        const box = scroller(o), column = document.querySelector("main").getBoundingClientRect();
        const wide = o.getBoundingClientRect();
        const right = wide.left + Math.max(wide.width, o.scrollWidth);
        if (!box) return right > column.right + SLACK ? [`cut at the column's edge: ${start(o)}`] : [];
        if (box.scrollWidth <= box.clientWidth + SLACK) return [];
        if (box.tabIndex < 0) return [`scrolls, but no key reaches it: ${start(o)}`];
        return box.classList.contains("scrolls") ? [] : [`scrolls, and nothing shows it: ${start(o)}`];
      });
    },
    narrow_code() {
      const box = all("main pre.sourceCode").find(seen);
      if (!box) return [];
      const style = getComputedStyle(box), pen = document.createElement("canvas").getContext("2d");
      pen.font = `${style.fontSize} ${style.fontFamily}`;
      const room = box.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
      const columns = Math.floor(room / (pen.measureText("m".repeat(100)).width / 100));
      return columns < 88 ? [`${columns} columns of code are seen, 88 are needed`] : [];
    },
    code_before_the_answer() {
      const code = all("main pre.sourceCode.cell-code").find(seen);
      const figure = all("main :is(figure, svg, .cell-output-display img)").find(seen);
      if (!figure) return ["no figure on the page of an experiment"];
      return code && code.compareDocumentPosition(figure) & Node.DOCUMENT_POSITION_FOLLOWING
        ? ["code stands before the first figure"] : [];
    },
    covered() {  // what stands in the header or right below it can be seen and touched
      scrollTo({ top: 0, behavior: "instant" });
      return all("#quarto-header :is(a, button, input), main h1").filter(seen).flatMap((o) => {
        const r = o.getBoundingClientRect();
        if (!r.width || r.bottom > innerHeight) return [];
        const top = document.elementFromPoint(r.left + r.width / 2, r.top + Math.min(r.height / 2, 20));
        return top && (o.contains(top) || top.contains(o)) ? [] : [`covered: ${start(o)}`];
      });
    },
    no_contents() {  // on a phone: the page's own contents, where it has some
      const headings = all("main h2").filter((o) => !o.closest("details")).length;
      const box = document.querySelector(".phone-contents");
      return headings > 2 && !(box && seen(box)) ? ["the contents of the page cannot be reached"] : [];
    },
  };
})();
