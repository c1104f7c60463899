/* Draws the charts of a report from the JSON in #data: SVG, a crosshair with the values of every run, by mouse, finger
   or keyboard; x is optimizer steps or time of training. */
(() => {
"use strict";
const { runs, charts } = JSON.parse(document.getElementById("data").textContent);
const PALETTE = 8, TOP = 12, BOTTOM = 26, RIGHT = 14;
const hidden = new Set();
let axis = "step", printing = false;
const plots = [];

/* ---- numbers ---- */
const trim = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
const grouped = (value, digits = 0) =>
  value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
function decimal(value) {
  const size = Math.abs(value);
  if (size >= 1000) return grouped(value);
  if (size >= 100) return value.toFixed(1);
  if (size >= 10) return value.toFixed(2);
  if (size >= 0.1 || size === 0) return value.toFixed(4);
  return trim(value.toPrecision(4));
}
function power(value) {
  if (value === 0) return "0";
  const [digits, exponent] = value.toExponential(3).split("e");
  return `${trim(digits)}e${Number(exponent)}`;
}
const STYLES = {
  decimal,
  short: (value) => (Math.abs(value) >= 1000 ? grouped(value) : value.toPrecision(4)),
  percent: (value) => `${(100 * value).toFixed(2)} %`,
  power,
};
function tickText(style, value, step) {
  if (style === "power") return power(value);
  if (style === "percent") return `${trim((100 * value).toFixed(Math.max(0, -Math.floor(Math.log10(step * 100) + 1e-9))))} %`;
  const big = [[1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([size]) => style === "short" && Math.abs(value) >= size);
  if (big) return trim((value / big[0]).toFixed(2)) + big[1];
  return Math.abs(value) >= 1000 ? grouped(value) : value.toFixed(Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
}
function clock(seconds) {
  const whole = Math.round(seconds), h = Math.floor(whole / 3600), m = Math.floor(whole / 60) % 60, s = whole % 60;
  const two = (n) => String(n).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
}
const stepText = (value) => (value >= 1e6 ? `${trim((value / 1e6).toFixed(3))}M` : grouped(value));
const atText = (value) => (axis === "step" ? stepText(value) : clock(value));

/* ---- axes ---- */
function spacing(span, wanted) {
  const size = 10 ** Math.floor(Math.log10(span / wanted));
  return [1, 2, 5, 10].map((f) => f * size).find((s) => span / s <= wanted);
}
function ticks(low, high, step) {
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(Number((n * step).toPrecision(12)));
  return found;
}
function timeTicks(high, wanted) {
  const units = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];
  const step = units.find((s) => high / s <= wanted) || 86400 * Math.ceil(high / 86400 / wanted);
  return Array.from({ length: Math.floor(high / step + 1e-9) + 1 }, (_, n) => n * step);
}
function logTicks(low, high) {
  const decades = Math.log10(high / low), found = [];
  const inside = decades < 2.2 ? [1, 2, 5] : decades < 4.5 ? [1, 3] : [1];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
    for (const f of inside) found.push(f * 10 ** e);
  return found.filter((v) => v >= low * (1 - 1e-9) && v <= high * (1 + 1e-9));
}
function yAxis(chart, values) {
  let low = Infinity, high = -Infinity;
  for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
  if (chart.scale === "log") {
    const floor = (v, up) => {
      const e = 10 ** Math.floor(Math.log10(v)), list = [1, 2, 5, 10].map((f) => f * e);
      return up ? list.find((f) => f >= v * (1 - 1e-9)) : list.reverse().find((f) => f <= v * (1 + 1e-9));
    };
    low = floor(low, false);
    high = floor(high, true);
    if (high <= low) high = low * 10;
    const span = Math.log(high / low);
    return { of: (v) => Math.log(v / low) / span, ticks: logTicks(low, high), step: 1 };
  }
  if (chart.fromZero && low > 0) low = 0;
  if (high <= low) { const room = Math.abs(low) * 0.1 || 1; high = low + room; if (low !== 0) low -= room; }
  const step = spacing(high - low, 5);
  low = Math.floor(low / step + 1e-9) * step;
  high = Math.ceil(high / step - 1e-9) * step;
  return { of: (v) => (v - low) / (high - low), ticks: ticks(low, high, step), step };
}

/* ---- drawing ---- */
function svg(name, attributes, parent, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.appendChild(element);
  return element;
}
function html(name, attributes, parent, text) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.appendChild(element);
  return element;
}
const colour = (run) => `r${run % PALETTE}${run >= PALETTE ? " second" : ""}`;
const shown = (chart) => chart.curves.filter((curve) => !hidden.has(curve.run));
const xHigh = () => {
  let high = 0;
  for (const chart of charts) for (const curve of shown(chart)) high = Math.max(high, curve[axis][curve[axis].length - 1]);
  return high || 1;
};

function draw(plot) {
  const { chart, element } = plot;
  const width = Math.max(240, Math.round(printing ? (plot.wide ? 680 : 330) : element.clientWidth)), height = plot.wide && width > 600 ? 330 : 220;
  const curves = shown(chart);
  const y = yAxis(chart, (curves.length ? curves : chart.curves).flatMap((curve) => curve.value));
  const labels = y.ticks.map((v) => tickText(chart.style, v, y.step));
  const left = 12 + 6.6 * Math.max(...labels.map((t) => t.length));
  const inner = width - left - RIGHT, tall = height - TOP - BOTTOM, high = xHigh();
  const X = (v) => left + (v / high) * inner, Y = (v) => TOP + (1 - y.of(v)) * tall;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": chart.alt });
  y.ticks.forEach((v, n) => {
    svg("line", { class: "grid", x1: left, x2: width - RIGHT, y1: Y(v).toFixed(2), y2: Y(v).toFixed(2) }, picture);
    svg("text", { class: "ytick", x: left - 8, y: (Y(v) + 4).toFixed(2), "text-anchor": "end", "data-value": v }, picture, labels[n]);
  });
  const wanted = Math.max(2, Math.floor(inner / 64));
  for (const v of axis === "step" ? ticks(0, high, Math.max(1, spacing(high, wanted))) : timeTicks(high, wanted)) {
    const end = X(v) > width - RIGHT - 16;
    svg("text", { class: "xtick", x: (end ? width : X(v)).toFixed(2), y: height - 8, "text-anchor": end ? "end" : "middle", "data-value": v }, picture, atText(v));
  }
  runs.forEach((run, number) => {
    for (const start of hidden.has(number) ? [] : run.restarts) {
      const x = X(start[axis]), group = svg("g", { class: colour(number) }, picture);
      svg("line", { class: "restart", x1: x, x2: x, y1: TOP, y2: height - BOTTOM }, group);
      svg("path", { class: "restart-head", d: `M${x - 4} ${TOP - 6}h8l-4 6z` }, group);
      svg("title", {}, group, `${run.name}: started again after step ${stepText(start.step)} on ${start.what}`);
    }
  });
  for (const curve of curves) {
    const alone = curve.kind === "measured" && !chart.curves.some((one) => one.kind !== "measured");
    const group = svg("g", { class: colour(curve.run) }, picture);
    const places = curve.value.map((v, n) => `${X(curve[axis][n]).toFixed(2)} ${Y(v).toFixed(2)}`);
    const marks = { class: `${curve.kind}${alone ? " alone" : ""}${curve.run >= PALETTE ? " second" : ""}`, "data-run": curve.run, "data-kind": curve.kind };
    svg("path", { ...marks, d: `M${places.join("L")}` }, group);
    if (places.length === 1 || (curve.kind === "measured" && places.length <= inner / 10))
      for (const place of places) svg("circle", { cx: place.split(" ")[0], cy: place.split(" ")[1], r: 2.6 }, group);
  }
  const cursor = svg("g", { class: "cursor" }, picture);
  if (plot.picture) plot.picture.replaceWith(picture);
  else element.prepend(picture);
  Object.assign(plot, { picture, cursor, X, Y, width, height, left, high, inner });
}

/* ---- crosshair ---- */
function nearest(list, x) {
  let low = 0, high = list.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (list[middle] < x) low = middle; else high = middle; }
  return Math.abs(list[low] - x) <= Math.abs(list[high] - x) ? low : high;
}
const isMain = (chart) => (curve) => curve.kind === "raw" || curve.kind === "line" || !chart.curves.some((c) => c.kind !== "measured");
const LABELS = { smooth: "smoothed", measured: "validation" };

function point(plot, x) {
  const { chart, X, Y } = plot, rows = [], close = 14 / plot.inner * plot.high;
  const main = shown(chart).filter(isMain(chart));
  if (!main.length) return hide();
  const first = main.map((curve) => curve[axis][nearest(curve[axis], x)]).reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a));
  let step = null;
  plot.cursor.replaceChildren();
  svg("line", { class: "crosshair", x1: X(first), x2: X(first), y1: TOP, y2: plot.height - BOTTOM }, plot.cursor);
  for (const curve of shown(chart)) {
    const n = nearest(curve[axis], first), isFirst = isMain(chart)(curve);
    if (isFirst && curve[axis][n] === first && step === null) step = curve.step[n];
    if (Math.abs(curve[axis][n] - first) > (isFirst ? Math.max(close, plot.high / 50) : close)) continue;
    if (curve.kind !== "smooth" || isFirst)
      svg("circle", { class: `at ${colour(curve.run)}`, cx: X(curve[axis][n]), cy: Y(curve.value[n]), r: 4 }, plot.cursor);
    const value = STYLES[chart.style](curve.value[n]), same = rows.find((row) => row[0] === curve.run);
    if (curve.kind === "smooth" && same) same[1] = `${value} smoothed`;
    else rows.push([curve.run, isFirst ? "" : LABELS[curve.kind], value, curve.step[n]]);
  }
  const notes = runs.flatMap((run, number) => (hidden.has(number) ? [] : run.restarts)
    .filter((start) => Math.abs(X(start[axis]) - X(first)) < 6)
    .map((start) => `${runs.length > 1 ? run.name + " s" : "S"}tarted again after step ${stepText(start.step)}: ${start.what}`));
  say(plot, first, step, rows, notes);
  for (const other of plots) {
    if (other === plot || !other.picture) continue;
    other.tip.hidden = true;
    other.cursor.replaceChildren();
    svg("line", { class: "crosshair", x1: other.X(first), x2: other.X(first), y1: TOP, y2: other.height - BOTTOM }, other.cursor);
  }
  plot.at = first;
}
function say(plot, x, step, rows, notes) {
  const { tip } = plot, head = axis === "step" ? `step ${stepText(x)}` : `${clock(x)}, step ${stepText(step)}`;
  tip.replaceChildren();
  html("div", { class: "what head" }, tip, head);
  const table = html("table", {}, tip);
  for (const [run, label, value, at] of rows) {
    const row = html("tr", {}, table), name = html("td", {}, row);
    html("i", { class: `key ${colour(run)}` }, name);
    name.append(runs.length > 1 ? runs[run].name : label ? "" : plot.chart.title);
    html("td", { class: "value" }, row, value);
    html("td", { class: "what" }, row, [label, axis === "step" && at !== x ? `step ${stepText(at)}` : ""].filter(Boolean).join(", "));
  }
  for (const note of notes) html("p", { class: "what" }, tip, note);
  tip.hidden = false;
  const share = plot.element.clientWidth / plot.width, at = plot.X(x) * share;
  const room = plot.element.clientWidth - tip.offsetWidth;
  const beside = at + 14 + tip.offsetWidth > plot.element.clientWidth ? at - 14 - tip.offsetWidth : at + 14;
  tip.style.left = `${Math.min(Math.max(0, beside), room)}px`;
  plot.live.textContent = [head, ...rows.map(([run, label, value]) => [runs[run].name, value, label].filter(Boolean).join(" ")), ...notes].join("; ");
}
function hide() {
  for (const plot of plots) {
    plot.tip.hidden = true;
    plot.at = null;
    if (plot.cursor) plot.cursor.replaceChildren();
  }
}
function follow(plot, event) {
  const box = plot.picture.getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width * plot.width;
  point(plot, Math.min(Math.max(0, (x - plot.left) / plot.inner), 1) * plot.high);
}
function press(plot, event) {
  const main = shown(plot.chart).find(isMain(plot.chart));
  if (!main) return;
  const xs = main[axis], here = plot.at === null ? xs.length - 1 : nearest(xs, plot.at);
  const far = event.shiftKey ? Math.max(1, Math.round(xs.length / 20)) : 1;
  const to = { ArrowLeft: here - far, ArrowRight: here + far, Home: 0, End: xs.length - 1 }[event.key];
  if (event.key === "Escape") hide();
  if (to === undefined) return;
  event.preventDefault();
  point(plot, xs[Math.min(Math.max(0, to), xs.length - 1)]);
}

/* ---- the page ---- */
function toolbar() {
  const bar = document.getElementById("toolbar");
  if (runs.length > 1) {
    const group = html("div", { class: "runs", role: "group", "aria-label": "Runs shown" }, bar);
    runs.forEach((run, number) => {
      const button = html("button", { type: "button", "aria-pressed": "true" }, group);
      html("i", { class: `key ${colour(number)}` }, button);
      button.append(run.name);
      button.addEventListener("click", () => {
        hidden.has(number) ? hidden.delete(number) : hidden.add(number);
        button.setAttribute("aria-pressed", String(!hidden.has(number)));
        redraw();
      });
    });
  }
  if (runs.some((run) => run.restarts.length)) {
    const sign = html("span", { class: "sign" }, bar);
    const triangle = svg("svg", { viewBox: "0 0 8 6", width: 9, height: 7, "aria-hidden": "true" }, sign);
    svg("path", { d: "M0 0h8l-4 6z" }, triangle);
    sign.append("started again");
  }
  const choice = html("div", { class: "axis" }, bar);
  html("span", { id: "axis-label" }, choice, "x axis");
  const group = html("div", { role: "group", "aria-labelledby": "axis-label" }, choice);
  for (const name of ["step", "time"]) {
    const button = html("button", { type: "button", "aria-pressed": String(name === axis), "data-axis": name }, group, name);
    button.addEventListener("click", () => {
      axis = name;
      for (const one of group.children) one.setAttribute("aria-pressed", String(one === button));
      redraw();
    });
  }
}
function redraw() {
  hide();
  plots.forEach(draw);
}
toolbar();
document.querySelectorAll("[data-chart]").forEach((figure) => {
  const element = figure.querySelector(".plot"), chart = charts[Number(figure.dataset.chart)];
  const plot = { chart, element, wide: figure.classList.contains("wide"), at: null, picture: null };
  plot.tip = html("div", { class: "tip", "aria-hidden": "true" }, element);
  plot.tip.hidden = true;
  plot.live = html("div", { class: "hidden", role: "status" }, element);
  element.addEventListener("pointermove", (event) => follow(plot, event));
  element.addEventListener("pointerdown", (event) => follow(plot, event));
  // A finger that is lifted leaves the values to be read; a tap elsewhere takes the focus, and them, away.
  element.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") hide(); });
  element.addEventListener("keydown", (event) => press(plot, event));
  element.addEventListener("blur", hide);
  plots.push(plot);
});
redraw();
// On paper the same proportions, from whatever window.
addEventListener("beforeprint", () => { printing = true; redraw(); });
addEventListener("afterprint", () => { printing = false; redraw(); });
let before = 0;
new ResizeObserver(() => {
  if (document.body.clientWidth === before) return;
  before = document.body.clientWidth;
  redraw();
}).observe(document.body);
})();
