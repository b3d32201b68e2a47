"use strict";
// Draws what `mwplan.report.content` gathered. Nothing is computed here but positions and texts.
(() => {
const data = JSON.parse(document.getElementById("content").textContent);
const at = id => document.getElementById(id);
const plans = data.plans, layers = data.profile.layers, MiB = 2 ** 20;
const base = data.profile.fixed + data.profile.beside;
const fastest = Math.min(...data.frontier.map(p => p[1]), ...plans.map(p => p.ns));
const dashes = {
  "": "", "/": "135deg", "\\": "45deg", "-": "0deg", "|": "90deg",
};
let chosen = data.chosen;

function bytes(n) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (Math.abs(n) < 1024) return unit === "B" ? `${Math.round(n)} B` : `${n.toFixed(2)} ${unit}`;
    n /= 1024;
  }
  return `${n.toFixed(2)} TiB`;
}
function nanoseconds(n) {
  for (const [limit, unit, scale] of [[1e3, "ns", 1], [1e6, "µs", 1e3], [1e9, "ms", 1e6]])
    if (n < limit) return `${+(n / scale).toPrecision(3)} ${unit}`;
  return `${+(n / 1e9).toPrecision(3)} s`;
}
function made(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    name === "style" ? Object.assign(node.style, value) : node[name] = value;
  node.append(...children);
  return node;
}
// The colour of a look with its pattern, for what is not drawn by plotly.
function fill(look) {
  const style = {backgroundColor: look.color, color: look.ink};
  const ink = look.ink === "#fff" ? "#fff5" : "#0004";
  if (dashes[look.pattern]) style.backgroundImage =
    `repeating-linear-gradient(${dashes[look.pattern]}, transparent 0 4px, ${ink} 4px 5px)`;
  if (look.pattern === ".") {
    style.backgroundImage = `radial-gradient(${ink} 1px, transparent 1.3px)`;
    style.backgroundSize = "5px 5px";
  }
  if (look.pattern === "x") style.backgroundImage = ["45deg", "135deg"].map(angle =>
    `repeating-linear-gradient(${angle}, transparent 0 4px, ${ink} 4px 5px)`).join(",");
  return style;
}
const swatch = look => made("span", {className: "swatch", style: fill(look)}, look.letter);
const counts = plan => Object.entries(plan.counts)
  .map(([letter, n]) => `${data.strategies[letter].name} ${n}`).join(", ");
const config = {displaylogo: false, responsive: true, displayModeBar: false};
const plain = {
  font: {family: 'system-ui, "DejaVu Sans", Helvetica, Arial, sans-serif', size: 13, color: "#111"},
  paper_bgcolor: "#fff", plot_bgcolor: "#fff", hoverlabel: {bgcolor: "#fff", font: {color: "#111"}},
};
const axis = {showline: true, linecolor: "#888", ticks: "outside", gridcolor: "#e6e6e6", zeroline: false};
// Ticks of a logarithmic axis where people expect numbers.
function ticks(low, high) {
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
    for (const m of [1, 1.5, 2, 3, 5, 7]) if (m * 10 ** e >= low * 0.97 && m * 10 ** e <= high * 1.03)
      found.push(+(m * 10 ** e).toPrecision(3));
  return {tickmode: "array", tickvals: found, ticktext: found.map(v => `${v}`)};
}

function drawFrontier() {
  const line = (points, name, color, dash) => ({
    x: points.map(p => p[0] / MiB), y: points.map(p => p[1] / fastest), name, mode: "lines", hoverinfo: "skip",
    line: {color, dash, shape: "hv", width: 2.5},
  });
  const traces = [];
  if (data.recomputation.length)
    traces.push(line(data.recomputation, "storing and recomputing alone", data.lines.recomputation, "dash"));
  traces.push(line(data.frontier, "all strategies", data.lines.frontier, "solid"));
  traces.push({
    x: plans.map(p => p.total / MiB), y: plans.map(p => p.ns / fastest), name: "plans of this page",
    mode: "markers", marker: {color: "#fff", size: 8, line: {color: data.lines.frontier, width: 2}},
    text: plans.map(p => `${bytes(p.total)}, ${nanoseconds(p.ns)}<br>${counts(p)}`),
    hovertemplate: "%{text}<extra></extra>", customdata: plans.map((_, i) => i),
  });
  if (data.backpropagation) traces.push({
    x: [data.backpropagation[0] / MiB], y: [data.backpropagation[1] / fastest], mode: "markers+text",
    name: "everything stored (backpropagation)", hoverinfo: "name", text: ["backpropagation"],
    textposition: "top left", marker: {symbol: "square", size: 11, color: data.lines.backpropagation},
  });
  const plan = plans[chosen];
  traces.push({
    x: [plan.total / MiB], y: [plan.ns / fastest], name: "shown", mode: "markers", hoverinfo: "skip",
    marker: {symbol: "diamond", size: 17, color: "#111"},
  });
  const xs = [...data.frontier, ...data.recomputation].map(p => p[0] / MiB);
  if (data.backpropagation) xs.push(data.backpropagation[0] / MiB);
  const low = Math.min(...xs), high = Math.max(...xs);
  // Recomputation's last stretch may be many times slower: what lies above is cut off, with a word.
  const top = Math.max(...data.frontier.map(p => p[1] / fastest)) * 1.25;
  const annotations = [];
  if (data.recomputation.length) {
    const end = data.recomputation[0];
    const y = Math.min(end[1] / fastest, top * 0.93);
    annotations.push({
      x: Math.log10(end[0] / MiB), y, ax: 46, ay: end[1] / fastest > y ? 34 : 24, arrowhead: 2, xanchor: "left",
      bgcolor: "#ffffffd0",
      text: end[0] > data.frontier[0][0]
        ? `recomputation alone ends at ${bytes(end[0])}` : `recomputation alone reaches as far`,
    });
  }
  const shapes = [{
    type: "line", xref: "x", yref: "paper", x0: plan.budget / MiB, x1: plan.budget / MiB, y0: 0, y1: 1,
    line: {color: "#111", width: 1, dash: "dot"},
  }];
  const room = Math.log10(high / low) * 0.04 + 0.01;
  Plotly.react("frontier", traces, {
    ...plain, height: 400, margin: {l: 70, r: 20, t: 10, b: 50}, annotations, shapes,
    xaxis: {...axis, type: "log", title: {text: "device memory of the step (MiB)"}, ...ticks(low, high),
      range: [Math.log10(low) - room, Math.log10(high) + room]},
    yaxis: {...axis, title: {text: "predicted time / the fastest's"},
      range: [0.95, Math.max(top, 1.3)]},
    legend: {orientation: "h", y: -0.17},
  }, config);
}

function drawStrip() {
  const plan = plans[chosen], starts = new Set(plan.starts);
  at("strip").replaceChildren(...plan.lanes.map((lane, i) => {
    const title = lane.map(([letter, option]) =>
      data.strategies[letter].name + (option ? ` (${option})` : "")).join(", then ");
    const joined = !i || (starts.has(i) && !("SO".includes(lane[0][0]) && "SO".includes(plan.lanes[i - 1][0][0])));
    return made("div", {className: joined && i ? "cell start" : "cell", title: `layer ${i + 1}, ${layers[i]}: ${title}`},
      made("i", {}, i === 0 || (i + 1) % 5 === 0 ? `${i + 1}` : ""),
      ...lane.map(([letter]) => made("b", {style: fill(data.strategies[letter])}, letter)));
  }));
  const used = new Set(plans.flatMap(p => p.lanes.flatMap(lane => lane.map(([letter]) => letter))));
  at("legend").replaceChildren(...Object.values(data.strategies).filter(s => used.has(s.letter)).map(s =>
    made("span", {}, swatch(s), `${s.name}: ${s.what}`)));
}

function drawMap() {
  const letters = Object.keys(data.strategies), count = letters.length;
  const scale = letters.flatMap((l, i) =>
    [[i / count, data.strategies[l].color], [(i + 1) / count, data.strategies[l].color]]);
  const z = plans.map(p => [...p.letters].map(l => letters.indexOf(l)));
  const fits = layers.length <= 90;
  // Letters in the ink of their colour.
  const annotations = !fits ? [] : plans.flatMap((p, row) => [...p.letters].map((letter, i) => ({
    x: i + 1, y: row, text: letter, showarrow: false,
    font: {size: layers.length > 60 ? 8 : 10, color: data.strategies[letter].ink},
  })));
  Plotly.react("map", [{
    type: "heatmap", z, x: layers.map((_, i) => i + 1), y: plans.map((_, i) => i), zmin: -0.5, zmax: count - 0.5,
    colorscale: scale, showscale: false, xgap: fits ? 1 : 0, ygap: 1, hoverinfo: "text",
    text: plans.map(p => [...p.letters].map((l, i) =>
      `layer ${i + 1}, ${layers[i]}: ${data.strategies[l].name}<br>${bytes(p.budget)}`)),
  }], {
    ...plain, height: 90 + 21 * plans.length, margin: {l: 90, r: 20, t: 10, b: 45}, annotations,
    xaxis: {...axis, title: {text: "layer, from the input"}, showgrid: false, range: [0.4, layers.length + 0.6]},
    yaxis: {...axis, title: {text: "budget"}, showgrid: false, tickvals: plans.map((_, i) => i),
      ticktext: plans.map(p => bytes(p.budget)), tickfont: {size: 11}, range: [-0.6, plans.length - 0.4]},
    shapes: [{type: "rect", x0: 0.45, x1: layers.length + 0.55, y0: chosen - 0.5, y1: chosen + 0.5,
      line: {color: "#111", width: 3}}],
  }, config);
}

function drawMemory() {
  const plan = plans[chosen], events = plan.events, x = events.shown.map(i => i + 1);
  const area = (look, y, name) => ({
    x, y: y.map(v => v / MiB), name, stackgroup: "memory", mode: "lines", line: {width: 0.6, color: "#222", shape: "hvh"},
    fillcolor: look.color,
    fillpattern: {shape: look.pattern, bgcolor: look.color, fgcolor: look.ink === "#fff" ? "#cfe3f0" : "#444",
      size: 7, solidity: 0.18},
    hovertemplate: `${name} %{y:.2f} MiB<extra></extra>`,
  });
  const traces = [area(data.always, x.map(() => base), data.always.name)];
  data.kinds.forEach((kind, k) => {
    const y = events.sizes.map(sizes => sizes[k]);
    if (Math.max(...y)) traces.push(area(kind, y, kind.name));
  });
  traces.push({x, y: x.map(() => plan.total / MiB), mode: "lines", line: {width: 0, color: "#0000"}, showlegend: false,
    text: events.where, hovertemplate: "<b>%{text}</b><extra></extra>"});
  const level = (bytesAt, text, dash, anchor) => ({
    shape: {type: "line", xref: "paper", x0: 0, x1: 1, y0: bytesAt / MiB, y1: bytesAt / MiB,
      line: {color: "#111", width: 1.6, dash}},
    note: {xref: "paper", x: anchor === "right" ? 1 : anchor === "left" ? 0.005 : 0.5, xanchor: anchor, y: bytesAt / MiB,
      yanchor: "bottom", showarrow: false, text, bgcolor: "#ffffffc0", borderpad: 1},
  });
  const levels = [level(plan.budget, `budget ${bytes(plan.budget)}`, "dash", "right")];
  if (Math.abs(plan.total - plan.budget) > 0.002 * plan.budget)
    levels.push(level(plan.total, `predicted ${bytes(plan.total)}`, "dot", "left"));
  const compiled = compiledTotal();
  if (compiled) levels.push(level(compiled, `compiled ${bytes(compiled)}`, "solid", "center"));
  const peak = events.shown[events.peak] + 1;
  const most = Math.max(plan.budget, plan.total, compiled || 0) / MiB;
  Plotly.react("memory", traces, {
    ...plain, height: 420, margin: {l: 70, r: 20, t: 10, b: 50}, hovermode: "x unified",
    shapes: levels.map(one => one.shape),
    annotations: [...levels.map(one => one.note), {
      x: peak, y: plan.total / MiB, yshift: -4, ax: 0, ay: 34, arrowhead: 2, text: "peak", bgcolor: "#ffffffd0"}],
    xaxis: {...axis, title: {text: "operation of the step: forward, then back"}, range: [0.5, events.of + 0.5]},
    yaxis: {...axis, title: {text: "device memory (MiB)"}, range: [0, most * 1.12]},
    legend: {orientation: "h", y: -0.2, traceorder: "normal"},
  }, config);
  at("spans").textContent = `What is alive at each of ${events.of} operations, by the ledger` +
    (events.of > x.length ? `; drawn are ${x.length}, of each stretch the one with the most alive.` : ".");
}
const compiledTotal = () => data.compiled && chosen === data.chosen
  ? data.profile.fixed + data.compiled.temporary_bytes : null;

function drawPeak() {
  const plan = plans[chosen], peak = plan.peak, looks = Object.fromEntries(data.kinds.map(k => [k.name, k]));
  const rows = peak.rows.map(([kind, words, size]) => [looks[kind], `${kind}`, words, size]);
  if (base) rows.push([data.always, data.always.name, data.always.what, base]);
  rows.sort((a, b) => b[3] - a[3]);
  const most = Math.max(...rows.map(row => row[3]));
  at("where").textContent = `Most is alive in ${peak.where}: ${bytes(peak.bytes)} of temporaries.` +
    (peak.saving ? ` ${bytes(peak.saving)} of what follows are written over by what is made then.` : "");
  at("peak").replaceChildren(
    made("thead", {}, made("tr", {}, made("th", {}, "kind"), made("th", {}, "what is alive"),
      made("th", {className: "number"}, "bytes"), made("th", {}))),
    made("tbody", {}, ...rows.map(([look, kind, words, size]) => made("tr", {},
      made("td", {}, swatch(look), ` ${kind}`), made("td", {}, words),
      made("td", {className: "number"}, bytes(size)),
      made("td", {className: "bar"}, made("div", {style: {...fill(look), width: `${100 * size / most}%`}}))))));
  const compiled = compiledTotal();
  at("compiled").replaceChildren();
  if (!compiled) return;
  const roles = data.compiled.alive.map(([role, size]) => `${role} ${bytes(size)}`).join(", ");
  at("compiled").append(made("p", {}, `Compiled, the step takes ${bytes(compiled)}: ` +
    `${(100 * (compiled / plan.total - 1)).toFixed(2)}% beside the prediction (${data.compiled.by}).` +
    (roles ? ` Alive at that peak: ${roles}.` : "")));
}

function drawWords() {
  const plan = plans[chosen];
  at("words").replaceChildren(...plan.words.flatMap(([term, text]) => [made("dt", {}, term), made("dd", {}, text)]));
  at("size").textContent = bytes(plan.budget);
  at("budget").value = chosen;
  at("budget").setAttribute("aria-valuetext", bytes(plan.budget));
  const flag = data.compiled && chosen === data.chosen ? " This plan was compiled." : "";
  at("said").textContent = `${nanoseconds(plan.ns)} a step, ${(plan.ns / fastest).toFixed(2)} of the fastest's; ` +
    `${layers.length} layers: ${counts(plan)}.${flag}`;
  at("plans").querySelectorAll("tbody tr").forEach((row, i) =>
    row.classList.toggle("shown", +row.dataset.plan === chosen));
}

function tables() {
  const order = plans.map((_, i) => i).reverse();
  at("plans").replaceChildren(
    made("thead", {}, made("tr", {}, ...["budget", "predicted", "time", "of the fastest's", "error"].map(text =>
      made("th", {className: "number"}, text)), made("th", {}, "layers by strategy"))),
    made("tbody", {}, ...order.map(i => {
      const p = plans[i];
      const mini = made("div", {className: "mini", title: counts(p)}, ...Object.entries(p.counts).map(([letter, n]) =>
        made("span", {style: {...fill(data.strategies[letter]), width: `${100 * n / layers.length}%`}},
          n / layers.length > 0.09 ? `${letter} ${n}` : "")));
      const row = made("tr", {onclick: () => show(i)},
        ...[bytes(p.budget), bytes(p.total), nanoseconds(p.ns), (p.ns / fastest).toFixed(2),
          p.error ? p.error.toExponential(1) : "none"].map(text => made("td", {className: "number"}, text)),
        made("td", {}, mini));
      row.dataset.plan = i;
      return row;
    })));
  if (data.measured.length) {
    const [head, ...rows] = data.measured;
    const cells = (tag, row) => made("tr", {}, ...row.map((text, i) =>
      made(tag, {className: i ? "number" : ""}, text)));
    at("measured").hidden = false;
    at("measured").querySelector("table").append(
      made("thead", {}, cells("th", head)), made("tbody", {}, ...rows.map(row => cells("td", row))));
  }
}

function show(i) {
  chosen = i;
  drawFrontier(); drawStrip(); drawMap(); drawMemory(); drawPeak(); drawWords();
}

at("about").textContent = `${layers.length} layers on ${data.profile.device || "an unnamed device"} ` +
  `(${data.profile.source || "a profile made by hand"}). Times and bytes are predictions but where it says otherwise.`;
at("source").textContent = "Made by mwplan; nothing on this page comes from a network. Letters and patterns tell " +
  "the same as colours.";
at("budget").max = plans.length - 1;
at("marks").append(...plans.map((_, i) => made("option", {value: i})));
at("budget").addEventListener("input", event => show(+event.target.value));
tables();
show(chosen);
for (const id of ["frontier", "map"]) at(id).on("plotly_click", event => {
  const point = event.points[0];
  const i = id === "map" ? point.y : point.customdata;
  if (Number.isInteger(i)) show(i);
});
// Charts as wide as the paper while it is printed, and lower, so that two fit on a page.
const printed = {frontier: 340, map: 80 + Math.min(21, 380 / plans.length) * plans.length, memory: 350};
addEventListener("beforeprint", () => {
  for (const [id, height] of Object.entries(printed)) Plotly.relayout(id, {width: 680, height});
});
addEventListener("afterprint", () => {
  for (const id of Object.keys(printed)) { Plotly.relayout(id, {width: null}); Plotly.Plots.resize(id); }
  show(chosen);
});
document.body.dataset.ready = "yes";
})();
