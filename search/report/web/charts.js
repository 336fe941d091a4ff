/* The smaller pictures: maps over layers, progress of the search, trust. */

function drawHeat(table, group) {
  const depth = group.rows[0].shares.length;
  for (const part of [table, table.closest(".pair")]) part.classList.toggle("deep", depth > 14);
  const names = { tokens: (value) => `${value} token${value === "1" ? "" : "s"}`, drops: (value) => `dropped by ${value}`,
    shares: () => "shares a map" };
  const head = make("tr", {}, make("th", { class: "text", scope: "col" }, "layer"));
  for (let layer = 0; layer < depth; layer++) head.append(make("th", { scope: "col" }, String(layer)));
  const body = make("tbody");
  let before = "";
  for (const { kind, value, shares } of group.rows) {
    const line = make("tr", before && before !== kind ? { class: "first" } : {},
      make("th", { class: "text", scope: "row" }, names[kind](value)));
    before = kind;
    for (const share of shares) {
      const percent = Math.round(100 * share);
      const cell = make("td", { class: kind },
        make("span", {}, percent ? String(percent) : share > 0 ? "<1" : ""));
      cell.style.setProperty("--share", share.toFixed(3));
      line.append(cell);
    }
    body.append(line);
  }
  table.replaceChildren(make("thead", {}, head), body);
}

/* Axes of a small chart of 420 × 230; returns the SVG and the scales. */
function smallChart(label, [x0, x1], [y0, y1], formatX, formatY) {
  const width = 420, height = 230, left = 56, right = 408, top = 10, bottom = 200;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const toX = (value) => left + ((value - x0) / (x1 - x0 || 1)) * (right - left);
  const toY = (value) => bottom - ((value - y0) / (y1 - y0 || 1)) * (bottom - top);
  for (const value of ticks(y0, y1, 4).found) {
    svg.append(make("line", { class: "grid", x1: left, x2: right, y1: toY(value), y2: toY(value) }),
      make("text", { x: left - 8, y: toY(value) + 4, "text-anchor": "end" }, formatY(value)));
  }
  for (const value of ticks(x0, x1, 4).found) {
    svg.append(make("text", { x: toX(value), y: bottom + 20, "text-anchor": "middle" }, formatX(value)));
  }
  svg.append(make("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  return { svg, toX, toY };
}

function drawProgress() {
  const { evaluations, hypervolume } = data.progress, last = evaluations.length - 1;
  const low = hypervolume[0], high = hypervolume[last], pad = (high - low || 0.01) * 0.08;
  const { svg, toX, toY } = smallChart("Hypervolume over evaluations", [0, evaluations[last]],
    [Math.max(0, low - pad), Math.min(1, high + pad)], (value) => grouped(Math.round(value) + 0), (value) => String(+value.toPrecision(4)));
  const path = evaluations.map((count, index) =>
    `${index ? `H${toX(count)}V` : `M${toX(count)},`}${toY(hypervolume[index])}`).join("");
  svg.append(make("path", { class: "front", d: path }));
  byId("progress").replaceChildren(svg);
  const reached = evaluations[hypervolume.findIndex((value) => value >= low + 0.99 * (high - low))];
  byId("progress-words").replaceChildren(
    `Hypervolume: the share of the rectangle between ${data.reference[0].toFixed(1)} % at dense cost and 100 % at none ` +
    `that is dominated. It ended at ${high.toFixed(4)} after ${grouped(evaluations[last])} evaluations; 99 % of the gain ` +
    `was there after ${grouped(reached)}.` +
    (data.certified ? " The whole space was scored in its own order, so this curve says nothing about a searcher." : ""));
}

/* Losses over epochs, a chart for each training. */
function drawCurves() {
  byId("curves-card").hidden = !data.curves.length;
  byId("curves").replaceChildren(...data.curves.map(({ title, epoch, loss }) => {
    const low = Math.min(...loss), high = Math.max(...loss), pad = (high - low || 1) * 0.06, last = loss.length - 1;
    const { svg, toX, toY } = smallChart(`${title}: loss over epochs`, [0, epoch[last]],
      [Math.max(0, low - pad), high + pad], (value) => String(+value.toFixed(2)), (value) => String(+value.toPrecision(3)));
    svg.append(make("path", { class: "front",
      d: loss.map((value, index) => `${index ? "L" : "M"}${toX(epoch[index]).toFixed(1)},${toY(value).toFixed(1)}`).join("") }));
    if (!last) svg.append(make("circle", { class: "point", cx: toX(epoch[0]), cy: toY(loss[0]), r: 4 }));
    return make("figure", {}, make("figcaption", {}, `${title}: loss over epochs. It ended at ${+loss[last].toPrecision(3)}.`), svg);
  }));
}

/* A number with its interval: "0.62 (0.48 to 0.73)". */
const withInterval = (each) => each && each.value != null
  ? `${each.value.toFixed(2)}${each.low != null ? ` (${each.low.toFixed(2)} to ${each.high.toFixed(2)})` : ""}`
  : "not measured";

function drawTrust() {
  const trust = data.trust;
  if (!trust) return;
  byId("trust-card").hidden = false;
  const points = trust.points.map((point) => ({ ...point,
    mean: point.retrained_top1.reduce((sum, value) => sum + value, 0) / point.retrained_top1.length }));
  const runs = points.reduce((sum, point) => sum + point.retrained_top1.length, 0);
  byId("trust-words").replaceChildren(
    `Kendall τ between the supernet’s scores and the same architectures trained alone: ${withInterval(trust.tau)}. ` +
    (trust.ceiling ? `One training against another agrees by ${withInterval(trust.ceiling)}; more cannot be had. ` : "") +
    (trust.within ? `Among architectures of like cost τ is ${withInterval(trust.within.tau)}, ` +
      `its ceiling ${withInterval(trust.within.ceiling)}. ` : "") +
    `${points.length} architectures, ${runs} trainings; intervals are 95 % ones.`);
  if (points.length) {
    const spread = (values) => {
      const low = Math.min(...values), high = Math.max(...values), pad = (high - low || 1) * 0.08;
      return [low - pad, high + pad];
    };
    const { svg, toX, toY } = smallChart("Accuracy trained alone against supernet score",
      spread(points.map((point) => point.supernet_top1)), spread(points.flatMap((point) => point.retrained_top1)),
      (value) => `${+value.toFixed(2)} %`, (value) => `${+value.toFixed(2)} %`);
    for (const point of points) {
      const x = toX(point.supernet_top1);
      svg.append(make("line", { class: "axis", x1: x, x2: x, y1: toY(Math.min(...point.retrained_top1)),
        y2: toY(Math.max(...point.retrained_top1)) }));
      svg.append(make("circle", { class: "point", cx: x, cy: toY(point.mean), r: 4 },
        make("title", {}, `${point.architecture}: ${point.supernet_top1.toFixed(2)} % in the supernet, ` +
          `${point.mean.toFixed(2)} % trained alone`)));
    }
    svg.setAttribute("viewBox", "0 0 420 250");
    svg.append(make("text", { x: 408, y: 244, "text-anchor": "end" }, "top-1 in the supernet; upwards: trained alone"));
    byId("trust").replaceChildren(svg);
  }
  const bands = trust.bands || [];
  if (bands.length) {
    const body = make("tbody");
    for (const band of bands) {
      body.append(make("tr", {}, make("td", { class: "text" }, `${human(band.low_macs)} to ${human(band.high_macs)}`),
        make("td", {}, String(band.n)), make("td", {}, withInterval(band.tau)), make("td", {}, withInterval(band.ceiling))));
    }
    byId("trust-bands").replaceChildren(make("thead", {}, make("tr", {}, make("th", { class: "text" }, "MACs"),
      make("th", {}, "n"), make("th", {}, "τ"), make("th", {}, "ceiling"))), body);
  }
}
