// Draw the trade-off plots and the heat map from the JSON in #data, in the colours of the page.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const config = { displayModeBar: false, responsive: false, scrollZoom: false, doubleClick: false };
  const metricTitle = { kld_mean: "KL divergence, mean (nats per token)", perplexity: "Perplexity" };
  const axisTitle = { size: "Weight memory (MB)", speed: "Decode speed (tokens/s)" };
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const FONT = getComputedStyle(document.body).fontFamily;
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = `12px ${FONT}`; // labels are placed before they are drawn

  // Plotly reads a little markup in its texts; foreign text must not be read so.
  const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll("\n", "<br>");
  const short = (text) => (text.length > 28 ? text.slice(0, 27) + "…" : text);

  function tickText(value) {
    if (value >= 1000) return value.toLocaleString("en-US");
    return String(Number(value.toPrecision(3)));
  }

  // 1, 2, 5 of each decade inside the range; only the decades if there are many.
  function logTicks(low, high) {
    const decades = Math.log10(high / low);
    const steps = decades > 3 ? [1] : decades > 1.2 ? [1, 3] : [1, 2, 3, 5, 7];
    const values = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
      for (const step of steps) {
        const value = step * 10 ** e;
        if (value >= low && value <= high) values.push(value);
      }
    }
    return values;
  }

  // The range of an axis with room for labels; logarithmic where the values span much.
  function scale(values, mayBeLog, room) {
    const low = Math.min(...values), high = Math.max(...values);
    if (mayBeLog && low > 0 && high / low > 4) {
      const pad = 10 ** (Math.log10(high / low) * room);
      return { log: true, low: low / pad, high: high * pad };
    }
    const pad = high === low ? Math.abs(high) * 0.2 || 1 : (high - low) * room;
    return { log: false, low: Math.max(low - pad, low >= 0 ? 0 : -Infinity), high: high + pad };
  }

  const along = (s, value) => s.log
    ? Math.log(value / s.low) / Math.log(s.high / s.low)
    : (value - s.low) / (s.high - s.low);

  function axis(s, title, spread) {
    const base = {
      title: { text: title, standoff: 10, font: { size: 12, color: color("--muted") } },
      gridcolor: color("--rule"), zeroline: false, showline: false, fixedrange: true,
      tickfont: { size: 12, color: color("--muted") }, automargin: true,
    };
    if (!s.log) return { ...base, range: [s.low, s.high], nticks: spread };
    const ticks = logTicks(s.low, s.high);
    return { ...base, type: "log", range: [Math.log10(s.low), Math.log10(s.high)],
      tickvals: ticks, ticktext: ticks.map(tickText) };
  }

  // Labels where there is room: above, below, beside the point; across a line only if there is no other place, and
  // none at all if every place is taken by a point or another label.
  function placeLabels({ points, fronts, baselines }, xs, ys, width, height, stepFirst) {
    const at = (p) => [along(xs, p.x) * width, (1 - along(ys, p.y)) * height];
    const lines = fronts.flatMap((f) => f.slice(1).flatMap((i, k) => steps(at(points[f[k]]), at(points[i]), stepFirst)));
    for (const [, x] of baselines) lines.push(between([along(xs, x) * width, 0], [along(xs, x) * width, height]));
    const best = new Set(fronts.flat());
    const order = points.map((_, i) => i).sort((a, b) => best.has(b) - best.has(a));
    const taken = points.map((p) => box(along(xs, p.x) * width, (1 - along(ys, p.y)) * height, 12, 12));
    const found = [];
    for (const i of order) {
      const p = points[i], text = short(p.label), w = pen.measureText(text).width, h = 15;
      const [cx, cy] = at(p);
      const side = 9 + w / 2;
      const places = [
        { xanchor: "center", yanchor: "bottom", xshift: 0, yshift: 6, box: box(cx, cy - 15, w, h) },
        { xanchor: "left", yanchor: "middle", xshift: 8, yshift: 0, box: box(cx + side, cy, w, h) },
        { xanchor: "center", yanchor: "top", xshift: 0, yshift: -6, box: box(cx, cy + 15, w, h) },
        { xanchor: "right", yanchor: "middle", xshift: -8, yshift: 0, box: box(cx - side, cy, w, h) },
        { xanchor: "left", yanchor: "bottom", xshift: 6, yshift: 5, box: box(cx + side - 2, cy - 15, w, h) },
        { xanchor: "right", yanchor: "top", xshift: -6, yshift: -5, box: box(cx - side + 2, cy + 15, w, h) },
        { xanchor: "right", yanchor: "bottom", xshift: -2, yshift: 6, box: box(cx - side + 6, cy - 16, w, h) },
      ].filter((q) => inside(q.box, width, height) && !taken.some((other, j) => j !== i && overlap(q.box, other)));
      const place = places.find((q) => !lines.some((line) => overlap(q.box, line))) || places[0];
      if (!place) continue;
      taken.push(place.box);
      const { box: _, ...anchor } = place;
      found.push({ x: xs.log ? Math.log10(p.x) : p.x, y: ys.log ? Math.log10(p.y) : p.y, text: plain(text),
        showarrow: false, font: { size: 12, color: color("--ink") }, ...anchor });
    }
    return found;
  }

  const box = (cx, cy, w, h) => ({ left: cx - w / 2, right: cx + w / 2, top: cy - h / 2, bottom: cy + h / 2 });
  const between = (a, b) => ({ left: Math.min(a[0], b[0]) - 1, right: Math.max(a[0], b[0]) + 1,
    top: Math.min(a[1], b[1]) - 1, bottom: Math.max(a[1], b[1]) + 1 });
  // The two strokes of a step from a to b: along x first (hv), or along y first (vh).
  function steps(a, b, first) {
    const corner = first === "hv" ? [b[0], a[1]] : [a[0], b[1]];
    return [between(a, corner), between(corner, b)];
  }
  const overlap = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  const inside = (b, width, height) => b.left >= 2 && b.right <= width + 12 && b.top >= -4 && b.bottom <= height;

  function drawPanel(figure, metric) {
    const target = figure.querySelector(".plot"), absent = figure.querySelector(".absent");
    const panel = data.panels.find((p) => p.metric === metric && p.axis === figure.dataset.axis);
    figure.hidden = !panel;
    if (!panel) return;
    absent.textContent = panel.missing.length ? `Not plotted: ${panel.missing.join(", ")}.` : "";
    const series = [...new Set(panel.points.map((p) => p.series))];
    const points = panel.points, width = target.clientWidth, height = width < 420 ? 300 : 360;
    const margin = { l: 58, r: 14, t: 22, b: 52 };
    const xs = scale([...points.map((p) => p.x), ...panel.baselines.map((b) => b[1])], true, 0.12);
    const ys = scale(points.map((p) => p.y), true, 0.14);
    const shades = [color("--accent"), color("--second"), color("--third"), color("--muted")];
    const shade = (name) => shades[series.indexOf(name) % shades.length];
    drawLegend(figure.querySelector(".legend"), series, shade);
    const best = new Set(panel.fronts.flat());
    const shape = panel.axis === "size" ? "hv" : "vh";
    const lines = panel.fronts.filter((f) => f.length > 1).map((f) => ({
      type: "scatter", mode: "lines", hoverinfo: "skip", showlegend: false,
      x: f.map((i) => points[i].x), y: f.map((i) => points[i].y),
      // A step: between two models, the size (or speed) of a budget buys the quality of the one that fits.
      line: { color: shade(points[f[0]].series), width: 2, shape },
    }));
    const dots = series.map((name) => {
      const members = points.map((p, i) => [p, i]).filter(([p]) => p.series === name);
      return {
        type: "scatter", mode: "markers", showlegend: false,
        x: members.map(([p]) => p.x), y: members.map(([p]) => p.y),
        text: members.map(([p]) => plain(p.text)), hoverinfo: "text",
        marker: { size: members.map(([p]) => (p.baseline ? 11 : 10)),
          opacity: 1, symbol: members.map(([p]) => (p.baseline ? "diamond" : "circle")),
          color: members.map(([, i]) => (best.has(i) ? shade(name) : color("--paper"))),
          line: { width: 2, color: shade(name) } },
      };
    });
    const inner = [width - margin.l - margin.r, height - margin.t - margin.b];
    const labels = placeLabels(panel, xs, ys, ...inner, shape);
    Plotly.react(target, [...lines, ...dots], {
      ...frame(width, height, margin),
      xaxis: axis(xs, axisTitle[panel.axis], width < 420 ? 5 : 8),
      yaxis: axis(ys, metricTitle[metric], 6),
      shapes: panel.baselines.map(([, x]) => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper",
        line: { color: color("--muted"), width: 1, dash: "dot" } })),
      annotations: [...labels, ...panel.baselines.map((b) => baselineLabel(b, xs))],
    }, config);
  }

  // Which colour is which protocol, where there is more than one.
  function drawLegend(target, series, shade) {
    target.replaceChildren(...(series.length > 1 ? series : []).map((name) => {
      const entry = document.createElement("span"), dot = document.createElement("i");
      dot.style.background = shade(name);
      entry.append(dot, `protocol ${name}`);
      return entry;
    }));
  }

  function baselineLabel([label, x], xs) {
    const right = along(xs, x) > 0.5;
    return { x: xs.log ? Math.log10(x) : x, y: 1, yref: "paper", yanchor: "bottom", showarrow: false,
      xanchor: right ? "right" : "left", xshift: right ? 4 : -4, text: plain(`${short(label)}, baseline`),
      font: { size: 12, color: color("--muted") } };
  }

  function frame(width, height, margin) {
    return {
      width, height, margin, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: FONT, size: 12, color: color("--ink") }, hovermode: "closest", dragmode: false,
      hoverlabel: { bgcolor: color("--raised"), bordercolor: color("--rule"), align: "left",
        font: { family: FONT, size: 12, color: color("--ink") } },
    };
  }

  function drawHeat() {
    const target = document.getElementById("heat");
    const select = document.getElementById("heat-model"), shared = document.getElementById("heat-shared");
    const heat = data.heat[select ? Number(select.value) : 0];
    const peers = shared && shared.checked ? data.heat.filter((h) => h.unit === heat.unit) : [heat];
    const known = peers.flatMap((h) => h.error.flat()).filter((e) => e > 0);
    const low = known.length ? Math.min(...known) : 1e-3, high = Math.max(...known, low * 1.05);
    const ticks = logTicks(low, high), width = target.clientWidth, narrow = width < 560;
    const height = heat.linears.length * (narrow ? 26 : 30) + (narrow ? 120 : 64);
    document.getElementById("heat-caption").textContent =
      `${heat.unit[0].toUpperCase()}${heat.unit.slice(1)} of each linear layer, on a logarithmic scale. Largest: ${heat.worst}.`;
    Plotly.react(target, [{
      type: "heatmap", x: heat.blocks.map((_, i) => i), y: heat.linears.map((_, i) => i),
      z: heat.error.map((line) => line.map((e) => (e > 0 ? Math.log10(e) : null))),
      text: heat.text.map((line) => line.map(plain)), hoverinfo: "text", hoverongaps: false,
      zmin: Math.log10(low), zmax: Math.log10(high), xgap: 1.5, ygap: 1.5,
      colorscale: ["--heat-0", "--heat-1", "--heat-2", "--heat-3", "--heat-4"].map((name, i) => [i / 4, color(name)]),
      colorbar: {
        orientation: narrow ? "h" : "v", thickness: 10, outlinewidth: 0, len: narrow ? 1 : 1.06, lenmode: "fraction",
        ...(narrow ? { x: 0.5, y: -0.34, yanchor: "top", xpad: 0 } : { xpad: 14 }),
        title: { text: heat.unit, side: narrow ? "top" : "right", font: { size: 12, color: color("--muted") } },
        tickvals: ticks.map(Math.log10), ticktext: ticks.map(tickText), tickfont: { size: 11, color: color("--muted") },
      },
    }], {
      ...frame(width, height, { l: 48, r: narrow ? 8 : 20, t: 4, b: narrow ? 106 : 48 }),
      xaxis: grid("block", heat.blocks.map(String), Math.ceil(heat.blocks.length / (narrow ? 8 : 30))),
      yaxis: { ...grid("", heat.linears.map((name) => plain(short(name))), 1), autorange: "reversed" },
    }, config);
  }

  // A category axis by position: names are foreign text, positions are not.
  function grid(title, names, step) {
    const shown = names.map((_, i) => i).filter((i) => i % step === 0);
    return { title: { text: title, standoff: 6, font: { size: 12, color: color("--muted") } },
      tickvals: shown, ticktext: shown.map((i) => names[i]), tickfont: { size: 12, color: color("--muted") },
      showgrid: false, zeroline: false, fixedrange: true, ticks: "outside", ticklen: 4, tickcolor: "rgba(0,0,0,0)", automargin: true };
  }

  function draw() {
    const chosen = document.querySelector("#metric input:checked");
    const metric = chosen ? chosen.value : data.panels.length ? data.panels[0].metric : null;
    for (const figure of document.querySelectorAll("figure[data-axis]")) drawPanel(figure, metric);
    if (data.heat.length) drawHeat();
  }

  let width = innerWidth, waiting = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's address bar comes and goes
    width = innerWidth;
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(draw);
  });
  dark.addEventListener("change", draw);
  for (const control of document.querySelectorAll("#metric input, #heat-model, #heat-shared")) {
    control.addEventListener("change", draw);
  }
  draw();
})();
