// Three figures that move: the matrix of candidates, the field of forces, the bound. Plain SVG, sliders for the
// keyboard. tests/site/test_moving.py compares their numbers with the package; tools/moving.py writes moving_data.js
// and the stills.
const moving = (() => {
  "use strict";
  const data = window.movingData;
  const sum = (v) => v.reduce((a, b) => a + b, 0);
  const dot = (a, b) => sum(a.map((x, k) => x * b[k]));
  const softmax = (v) => {
    const top = Math.max(...v), e = v.map((x) => Math.exp(x - top)), total = sum(e);
    return e.map((x) => x / total);
  };
  const hot = (k, n) => Array.from({ length: n }, (_, i) => +(i === k));
  const smooth = (row, eps) => row.map((x) => (1 - eps) * x + eps / row.length);
  const fixed = (x, digits) => x.toFixed(digits).replace("-", "−");

  // ---------------------------------------------------------------- numbers
  const candidates = ({ tau, eps, lam }) => {  // Eqs. (10)-(12), in-batch, eta the label frequencies
    const { logits, labels } = data.batch, N = labels.length, K = logits[0].length;
    const eta = hot(0, K).map((_, k) => labels.filter((y) => y === k).length / N);
    const rows = labels.map((y) => hot(y, K));
    const targets = rows.map((row, i) => smooth(row.map((x, k) => lam * x + (1 - lam) * rows[N - 1 - i][k]), eps));
    const scores = logits.map((row) => row.map((l, k) => l / tau - Math.log(eta[k])));
    const P = scores.map((s) => softmax(targets.map((a) => dot(a, s))));
    return { P, targets, loss: sum(P.map((row, i) => -Math.log(row[i]))) / N };
  };

  const circle = Array.from({ length: 5 }, (_, k) => {
    const angle = Math.PI * (0.5 + 0.4 * k);
    return [Math.cos(angle), Math.sin(angle)];
  });
  const force = ({ tau, eps, negatives }, z) => {  // -gradient by the embedding z, for a positive of class 0
    const T = [0, ...data.noise.slice(0, negatives)].map((k) => smooth(hot(k, 5), eps));
    const s = circle.map((w) => dot(w, z) / tau), P = softmax(T.map((a) => dot(a, s)));
    const pull = T[0].map((a, k) => (a - sum(P.map((p, m) => p * T[m][k]))) / tau);
    return [0, 1].map((d) => sum(pull.map((x, k) => x * circle[k][d])));
  };

  const bound = ({ eps, N }) => {  // between the exported points by a line
    const at = (v) => {
      const x = eps * (v.length - 1), i = Math.min(Math.floor(x), v.length - 2);
      return v[i] + (x - i) * (v[i + 1] - v[i]);
    };
    return { truth: at(data.truth), bound: at(data.bounds[N]) };
  };

  // ---------------------------------------------------------------- drawing
  const mark = (tag, attrs, text = "") =>
    `<${tag} ${Object.entries(attrs).map(([k, v]) => `${k}="${v}"`).join(" ")}>${text}</${tag}>`;
  const label = (x, y, text, more = {}) => mark("text", { x, y, "font-size": 12, fill: "currentColor", ...more }, text);
  const BLUE = "var(--moving-a, #0072B2)", ORANGE = "var(--moving-b, #D55E00)";
  const MIDDLE = { "text-anchor": "middle" }, END = { "text-anchor": "end" };
  const small = (o) => ({ ...o, "font-size": 11 });

  const drawCandidates = (v) => {
    const { P, loss } = candidates(v), n = P.length, side = 52, left = 70, top = 34;
    const cell = (p, i, m) => mark("rect", {
      x: left + m * side, y: top + i * side, width: side - 3, height: side - 3,
      fill: BLUE, "fill-opacity": (0.75 * p).toFixed(3),
      stroke: i === m ? ORANGE : "currentColor", "stroke-width": i === m ? 3 : 0.3,
    }) + label(left + (m + 0.5) * side - 1.5, top + (i + 0.5) * side + 3, fixed(p, 2), MIDDLE);
    const cells = P.flatMap((row, i) => row.map((p, m) => cell(p, i, m)));
    const heads = P.map((_, i) => label(left + (i + 0.5) * side, top - 8, `target ${i + 1}`, small(MIDDLE)) +
      label(left - 8, top + (i + 0.5) * side + 3, `sample ${i + 1}`, small(END)));
    const own = fixed(sum(P.map((r, i) => r[i])) / n, 2);
    return {
      width: left + n * side + 6, height: top + n * side + 4, body: [...cells, ...heads].join(""),
      said: `Loss ${fixed(loss, 3)}; a sample gives its own target ${own} on average.`,
    };
  };

  const TIP = '<defs><marker id="moving-tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="4" markerHeight="4" ' +
    'orient="auto"><path d="M0 0L6 3L0 6z" fill="context-stroke"/></marker></defs>';

  const arrow = (f, strength, [x, y], at) => {  // as long as the others; thicker and darker where the force is strong
    if (strength < 1e-9) return "";
    const half = f.map((c) => 0.1 * c / strength);
    const [x1, y1] = at([x - half[0], y - half[1]]), [x2, y2] = at([x + half[0], y + half[1]]);
    return mark("line", {
      x1: x1.toFixed(1), y1: y1.toFixed(1), x2: x2.toFixed(1), y2: y2.toFixed(1),
      stroke: BLUE, "marker-end": "url(#moving-tip)",
      "stroke-width": Math.min(3.2, 0.7 + 0.7 * strength).toFixed(2),
      "stroke-opacity": Math.min(1, 0.35 + 0.2 * strength).toFixed(2),
    });
  };

  const className = (k, count, [x, y]) => {  // class 0 is the positive's
    const text = k ? `${count}` : `positive, ${count}`, w = k ? 30 : 84;
    return mark("rect", {
      x: x - w / 2, y: y - 11, width: w, height: 20, rx: 4, fill: "var(--bs-body-bg, #fff)",
      stroke: k ? "currentColor" : ORANGE, "stroke-width": k ? 0.8 : 2,
    }) + label(x, y + 4, text, MIDDLE);
  };

  const drawField = (v) => {
    const size = 400, scale = size / 4.2, at = ([x, y]) => [size / 2 + scale * x, size / 2 - scale * y];
    const grid = Array.from({ length: 13 }, (_, i) => -1.8 + 0.3 * i);
    let largest = 0;
    const arrows = grid.flatMap((x) => grid.map((y) => {
      const f = force(v, [x, y]), strength = Math.hypot(...f);
      largest = Math.max(largest, strength);
      return arrow(f, strength, [x, y], at);
    }));
    const count = (k) => data.noise.slice(0, v.negatives).filter((o) => o === k).length;
    const names = circle.map((c, k) => className(k, count(k), at(c)));
    const same = `With smoothing ${fixed(v.eps, 2)} the field is that of temperature ${fixed(v.tau / (1 - v.eps), 2)}`;
    return {
      width: size, height: size, body: TIP + arrows.join("") + names.join(""),
      said: `Strongest force ${fixed(largest, 2)}. ${same} without.`,
    };
  };

  const drawBound = (v) => {
    const W = 480, H = 300, left = 46, bottom = 40, top = 16, right = 92, high = Math.max(...data.truth) * 1.05;
    const X = (e) => left + e * (W - left - right), Y = (i) => H - bottom - i / high * (H - bottom - top);
    const point = (b, i, n) => `${X(i / (n - 1)).toFixed(1)},${Y(b).toFixed(1)}`;
    const path = (values, color, dash) => mark("polyline", {
      points: values.map((b, i) => point(b, i, values.length)).join(" "),
      fill: "none", stroke: color, "stroke-width": 2.5, "stroke-dasharray": dash,
    });
    const frame = { d: `M${left} ${top}V${H - bottom}H${W - right}`, fill: "none", stroke: "currentColor" };
    const tick = (e) => label(X(e), H - bottom + 16, e, MIDDLE) + label(left - 6, Y(e) + 4, e, END);
    const axes = mark("path", frame) + [0, 0.5, 1].map(tick).join("") +
      label(X(0.5), H - 6, "smoothing ε", MIDDLE) + label(left + 6, top + 2, "information, nats");
    const at = bound(v), dashes = { stroke: "currentColor", "stroke-dasharray": "2 3" };
    const line = mark("line", { x1: X(v.eps), x2: X(v.eps), y1: Y(0), y2: Y(high), ...dashes });
    const dot = ([y, c]) => mark("circle", { cx: X(v.eps), cy: Y(y), r: 5, fill: c });
    const dots = [[at.truth, BLUE], [at.bound, ORANGE]].map(dot).join("");
    const names = label(W - right + 6, Y(0) - 18, "true value", { style: `fill: ${BLUE}` }) +
      label(W - right + 6, Y(0) - 2, `bound, N = ${v.N}`, { style: `fill: ${ORANGE}` });
    const curves = path(data.truth, BLUE, "none") + path(data.bounds[v.N], ORANGE, "7 4");
    const open = fixed(at.truth - at.bound, 3);
    return {
      width: W, height: H, body: axes + line + curves + dots + names,
      said: `I = ${fixed(at.truth, 3)}, bound ${fixed(at.bound, 3)} nats: ${open} are left open.`,
    };
  };

  const range = (name, text, min, max, step, value) => ({ name, text, min, max, step, value });
  const count = (name, text, steps, value) => ({ name, text, steps, value });  // value: the place in steps
  const FIGURES = {
    candidates: {
      draw: drawCandidates, name: "Matrix of samples and candidates",
      controls: [
        range("tau", "temperature τ", 0.25, 4, 0.05, 1),
        range("eps", "smoothing ε", 0, 0.9, 0.05, 0),
        range("lam", "MixUp weight λ", 0.5, 1, 0.05, 1),
      ],
    },
    field: {
      draw: drawField, name: "Field of forces on an embedding",
      controls: [
        range("tau", "temperature τ", 0.1, 2.5, 0.1, 0.5),
        range("eps", "smoothing ε", 0, 0.9, 0.1, 0),
        range("negatives", "negatives", 0, 64, 1, 8),
      ],
    },
    bound: {
      draw: drawBound, name: "Information and its bound over the smoothing",
      controls: [
        range("eps", "smoothing ε", 0, 1, 0.01, 0.2),
        count("N", "negatives N", Object.keys(data.bounds).map(Number), 2),
      ],
    },
  };

  const value = (c, raw) => (c.steps ? c.steps[raw] : +raw);
  const svg = (figure, v) => {
    const { width, height, body, said } = figure.draw(v);
    const picture = {
      xmlns: "http://www.w3.org/2000/svg", viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
      "aria-label": `${figure.name}. ${said}`, "font-family": "system-ui, sans-serif",
    };
    return { said, svg: mark("svg", picture, body) };
  };
  const start = (figure) => Object.fromEntries(figure.controls.map((c) => [c.name, value(c, c.value)]));
  const still = (name) => svg(FIGURES[name], start(FIGURES[name])).svg;

  const HOLDER = '<div class="moving-picture"></div><div class="moving-controls" role="group"></div>' +
    '<p class="moving-said" aria-live="polite"></p>';

  const slider = (c, v, draw) => {  // a row of the controls; what it sets is in v
    const row = document.createElement("label");
    const input = document.createElement("input"), out = document.createElement("output");
    const ends = c.steps ? { min: 0, max: c.steps.length - 1, step: 1 } : { min: c.min, max: c.max, step: c.step };
    Object.assign(input, { type: "range", ...ends });
    input.value = c.value;
    const show = () => {
      v[c.name] = value(c, input.value);
      out.textContent = v[c.name];
      input.setAttribute("aria-valuetext", `${c.text} ${v[c.name]}`);
    };
    input.addEventListener("input", () => { show(); draw(); });
    row.append(c.text, input, out);
    show();
    return row;
  };

  const build = (box) => {
    const figure = FIGURES[box.dataset.moving], v = start(figure);
    const holder = document.createElement("div");
    holder.className = "moving-live";
    holder.innerHTML = HOLDER;
    const [picture, controls, said] = holder.children;
    controls.setAttribute("aria-label", `Settings: ${figure.name}`);
    const draw = () => {
      const o = svg(figure, v);
      picture.innerHTML = o.svg;
      said.textContent = o.said;
    };
    controls.append(...figure.controls.map((c) => slider(c, v, draw)));
    draw();
    box.append(holder);
    box.classList.add("moves");
  };
  document.querySelectorAll("[data-moving]").forEach((box) => { if (FIGURES[box.dataset.moving]) build(box); });
  return { candidates, force, bound, still, FIGURES };
})();
window.moving = moving;
