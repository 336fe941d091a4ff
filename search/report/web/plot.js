/* Score against cost: the crowd on a canvas, so that tens of thousands of points stay fluid, the rest as SVG. */

const rows = data.candidates;
const total = rows.architecture.length;
const scores = rows.correct ? Float64Array.from(rows.correct, (correct) => (100 * correct) / data.images) : rows.score;

/* The 95 % interval of a row's score, in percent; of one that has none the score itself, twice. */
const known = (row) => data.intervals[rows.correct ? rows.correct[row] : row];
const interval = (row) => known(row) || [scores[row], scores[row]];

/* What a row costs, in percent of the dense network. */
const ofDense = (row, cost) => (100 * rows[cost][row]) / rows[cost][data.dense];

/* Round numbers that divide low..high into some `wanted` steps. */
function ticks(low, high, wanted) {
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) found.push(index * step);
  return { step, found };
}

class Plot {
  constructor(root, state, select) {
    Object.assign(this, { root, state, select, hovered: -1 });
    this.canvas = make("canvas", { "aria-hidden": "true" });
    this.svg = make("svg", { "aria-hidden": "true" });
    this.tip = make("div", { class: "tip", hidden: "" });
    root.append(this.canvas, this.svg, this.tip);
    this.x = new Float32Array(total);
    this.y = new Float32Array(total);
    new ResizeObserver(() => this.draw()).observe(root);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    root.addEventListener("pointermove", (event) => event.pointerType === "mouse" && this.hover(event));
    root.addEventListener("pointerleave", () => this.leave());
    root.addEventListener("click", (event) => {
      const row = this.nearest(event, 34);
      if (row >= 0) this.select(row);
    });
  }

  /* The ranges of both axes: everything, or what matters around the frontier and dense. */
  ranges() {
    const { cost, view } = this.state, costs = rows[cost], front = data.frontier[cost];
    let left = Infinity, right = -Infinity, bottom = Infinity, top = -Infinity;
    for (let row = 0; row < total; row++) {
      left = Math.min(left, costs[row]);
      right = Math.max(right, costs[row]);
      bottom = Math.min(bottom, scores[row]);
      top = Math.max(top, scores[row]);
    }
    if (view === "frontier") {
      const shown = [...front, data.dense, ...data.included];
      bottom = Math.min(...shown.map((row) => scores[row]), ...front.map((row) => interval(row)[0]));
    }
    top = Math.max(top, ...front.map((row) => interval(row)[1]));
    const limit = data.limits[cost];
    if (limit && limit.value < 1.2 * right) right = Math.max(right, limit.value);
    const padX = (right - left || right || 1) * 0.04, padY = (top - bottom || 1) * 0.06;
    return [Math.max(0, left - padX), right + padX, Math.max(-1, bottom - padY), Math.min(100.6, top + padY)];
  }

  draw() {
    const box = this.root.getBoundingClientRect();
    if (!box.width) return;
    const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name).trim();
    const { cost } = this.state, costs = rows[cost], narrow = box.width < 480;
    const frame = { left: 52, right: 14, top: 14, bottom: 46 };
    const wide = box.width - frame.left - frame.right, high = box.height - frame.top - frame.bottom;
    const [x0, x1, y0, y1] = this.ranges();
    const toX = (value) => frame.left + ((value - x0) / (x1 - x0)) * wide;
    const toY = (value) => frame.top + (1 - (value - y0) / (y1 - y0)) * high;
    Object.assign(this, { toX, toY, frame, box });

    const dots = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(box.width * dots);
    this.canvas.height = Math.round(box.height * dots);
    const paint = this.canvas.getContext("2d");
    paint.scale(dots, dots);
    paint.beginPath();
    paint.rect(frame.left, frame.top - 6, wide + 6, high + 6);
    paint.clip();
    paint.fillStyle = colour("--crowd");
    const alpha = Math.min(0.75, Math.max(0.2, 22 / Math.sqrt(total))), radius = total > 3000 ? 2 : 3;
    let below = 0, over = 0;
    for (let row = 0; row < total; row++) {
      const x = (this.x[row] = toX(costs[row])), y = (this.y[row] = toY(scores[row]));
      if (scores[row] < y0) below++;
      if (row >= data.scored) continue;
      const allowed = this.allowed(row);
      if (!allowed) over++;
      paint.globalAlpha = allowed ? alpha : alpha * 0.45;
      paint.beginPath();
      paint.arc(x, y, radius, 0, 2 * Math.PI);
      paint.fill();
    }
    Object.assign(this, { below, over });
    this.drawAxes(x0, x1, y0, y1, narrow);
  }

  allowed(row) {
    return data.allowed[row] === "1";
  }

  drawAxes(x0, x1, y0, y1, narrow) {
    const { cost } = this.state, { frame, box, toX, toY } = this, costs = rows[cost], dense = costs[data.dense];
    const right = box.width - frame.right, bottom = box.height - frame.bottom;
    const parts = [];
    const label = (x, y, text, anchor, name = "") =>
      parts.push(make("text", { x, y, "text-anchor": anchor, class: name }, text));
    const accuracy = ticks(y0, y1, Math.max(3, box.height / 70));
    const decimals = accuracy.step >= 1 ? 0 : accuracy.step >= 0.1 ? 1 : 2;
    for (const value of accuracy.found.filter((value) => value <= 100)) {
      parts.push(make("line", { class: "grid", x1: frame.left, x2: right, y1: toY(value), y2: toY(value) }));
      label(frame.left - 8, toY(value) + 4, `${value.toFixed(decimals)} %`, "end");
    }
    for (const value of ticks(x0, x1, narrow ? 4 : 7).found) {
      parts.push(make("line", { class: "axis", x1: toX(value), x2: toX(value), y1: bottom, y2: bottom + 4 }));
      label(toX(value), bottom + 17, short(value, cost), "middle");
      if (!narrow) label(toX(value), bottom + 32, `${Math.round((100 * value) / dense)} %`, "middle", "percent");
    }
    parts.push(make("line", { class: "axis", x1: frame.left, x2: right, y1: bottom, y2: bottom }));
    if (narrow) label(right, bottom + 34, data.costs.find((each) => each.name === cost).label, "end");
    else label(frame.left - 8, bottom + 32, "of dense", "end");

    const limit = data.limits[cost];
    if (limit) {
      const x = toX(limit.value);
      parts.push(make("line", { class: "budget", x1: x, x2: x, y1: frame.top - 6, y2: bottom }));
      const text = `budget ${limit.text}`, flip = x + 6.6 * text.length > right;
      label(x + (flip ? -6 : 6), bottom - 8, text, flip ? "end" : "start", "budget-text");
    }
    const front = data.frontier[cost];
    const step = (values) => front.map((row, index) =>
      `${index ? `H${toX(costs[row])}V` : `M${toX(costs[row])},`}${toY(values(row))}`).join("");
    const ends = Math.min(right, limit ? toX(limit.value) : right);
    const low = (row) => interval(row)[0], up = (row) => interval(row)[1];
    const back = [...front].reverse().map((row, index, list) =>
      `V${Math.min(bottom, toY(low(row)))}` + `H${toX(costs[row])}`).join("");
    parts.push(make("path", { class: "band", d: `${step(up)}H${ends}${back}Z` }));
    parts.push(make("path", { class: "front", d: `${step((row) => scores[row])}H${ends}` }));
    for (const row of data.included) {
      parts.push(make("rect", { class: "mine", x: toX(costs[row]) - 5.5, y: toY(scores[row]) - 5.5, width: 11, height: 11 }));
    }
    for (const row of front) {
      parts.push(make("circle", { class: "point", cx: toX(costs[row]), cy: toY(scores[row]), r: front.length > 60 ? 3.5 : 5 }));
    }
    const [dx, dy] = [toX(costs[data.dense]), toY(scores[data.dense])];
    parts.push(make("polygon", { class: "dense", points: `${dx},${dy - 9} ${dx + 9},${dy} ${dx},${dy + 9} ${dx - 9},${dy}` }));
    label(dx - 13, dy + 4, "dense", "end", "dense-text");
    this.marks = make("g");
    this.svg.replaceChildren(...parts, this.marks);
    this.mark();
  }

  /* The ring around the selected point, with the interval of its score. */
  mark() {
    if (!this.marks) return;
    const row = this.state.row, x = this.x[row], y = this.y[row], [low, high] = interval(row);
    const floor = this.box.height - this.frame.bottom;
    const a = this.toY(high), b = Math.min(floor, this.toY(low));
    const visible = y <= floor;
    this.marks.replaceChildren(
      ...(visible ? [
        make("path", { class: "whisker", d: `M${x - 4},${a} h8 M${x},${a} V${b} M${x - 4},${b} h8` }),
        make("circle", { class: "ring", cx: x, cy: y, r: 9 }),
      ] : []));
  }

  /* The row nearest to the pointer; points that stand out are easier to hit. */
  nearest(event, reach) {
    const box = this.root.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
    const bottom = box.height - this.frame.bottom + 6;
    let best = -1, least = reach * reach;
    const consider = (row, ease) => {
      const dx = this.x[row] - px, dy = this.y[row] - py, distance = (dx * dx + dy * dy) * ease;
      if (distance < least && this.y[row] <= bottom) [best, least] = [row, distance];
    };
    for (let row = 0; row < data.scored; row++) consider(row, 1);
    for (const row of [...data.frontier[this.state.cost], data.dense, ...data.included]) consider(row, 0.35);
    return best;
  }

  hover(event) {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      const row = this.nearest(event, 20);
      if (row < 0) return this.leave();
      const { cost } = this.state;
      this.tip.replaceChildren(
        make("b", {}, `${scores[row].toFixed(2)} %`),
        ` at ${quantity(rows[cost][row], cost)}, ${ofDense(row, cost).toFixed(1)} % of dense`,
        make("code", {}, rows.architecture[row]));
      this.tip.hidden = false;
      const left = this.x[row] > this.box.width / 2;
      this.tip.style.left = left ? "auto" : `${this.x[row] + 14}px`;
      this.tip.style.right = left ? `${this.box.width - this.x[row] + 14}px` : "auto";
      this.tip.style.top = `${Math.max(0, Math.min(this.y[row] - 20, this.box.height - 110))}px`;
    });
  }

  leave() {
    this.tip.hidden = true;
  }
}
