/* What is selected, and everything that follows from it. */

const state = { cost: data.costs[0].name, view: "frontier", row: data.dense, group: "frontier" };
const costLabel = (cost) => data.costs.find((each) => each.name === cost).label;
const shellQuote = (text) => /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`;
const plot = new Plot(byId("plot"), state, (row) => select(row));

const scoreLabel = capitalised(data.score);
/* By loss where there is one, else by score. */
const beats = (other, row) => rows.loss ? rows.loss[other] < rows.loss[row] : scores[other] > scores[row];
const [betterWord, rankWord] = rows.loss ? ["less damaging", "Loss"] : ["more accurate", scoreLabel];

/* How many scored candidates are better, and better at no more cost. */
function ranks(row) {
  const costs = rows[state.cost];
  let better = 0, cheaperAndBetter = 0;
  for (let other = 0; other < data.scored; other++) {
    if (beats(other, row)) {
      better++;
      if (costs[other] <= costs[row]) cheaperAndBetter++;
    }
  }
  return { better, cheaperAndBetter };
}

function select(row) {
  state.row = row;
  plot.mark();
  showSelection();
  showRegions(row);
  showCommands();
  for (const button of byId("picks").children) button.setAttribute("aria-pressed", String(+button.dataset.row === row));
  for (const line of byId("frontier").querySelectorAll("tbody tr")) {
    line.setAttribute("aria-current", String(+line.dataset.row === row));
  }
}

/* "cheapest of …", "point 4 of 10", "beaten by …": what this row is. */
function kindOf(row) {
  const front = data.frontier[state.cost], place = front.indexOf(row);
  if (place >= 0) return `Frontier point ${place + 1} of ${front.length}, by ${costLabel(state.cost)}`;
  if (row === data.dense) return "The dense network";
  if (data.included.includes(row)) return "Included by hand";
  return "Scored, not on the frontier";
}

/* The 95 % interval of a difference from dense, in points, where it is known. */
function gapOf(row) {
  const gap = data.gaps[row];
  return gap && row !== data.dense ? `95 %: ${signed(gap[0], 2)} to ${signed(gap[1], 2)}` : "";
}

function showSelection() {
  const row = state.row, cost = state.cost, costs = rows[cost], front = data.frontier[cost], place = front.indexOf(row);
  const [low, high] = interval(row), picked = data.picks[cost].filter((pick) => pick.row === row);
  byId("selection-kind").textContent = kindOf(row);
  byId("selection-title").textContent =
    `${scores[row].toFixed(2)} % at ${ofDense(row, cost).toFixed(1)} % of dense ${costLabel(cost)}`;
  const { better, cheaperAndBetter } = ranks(row);
  const why = picked.map((pick) => `${pick.label}: ${pick.why}.`);
  if (!why.length && row === data.dense) why.push("All tokens, no sharing: the base model as timm has it.");
  if (!why.length && place < 0) {
    why.push(cheaperAndBetter
      ? `${grouped(cheaperAndBetter)} scored architecture${cheaperAndBetter > 1 ? "s are" : " is"} ${betterWord} at no more cost.`
      : plot.allowed(row) ? "Another is as good at less cost." : "Over the budget.");
  }
  if (!why.length) why.push(`Nothing that was scored is both as cheap and ${betterWord}.`);
  byId("selection-why").textContent = why.join(" ");
  step("cheaper", "Cheaper", [...front].reverse().find((other) => costs[other] < costs[row]));
  step("more-expensive", "More expensive", front.find((other) => costs[other] > costs[row]));
  byId("architecture").textContent = rows.architecture[row];
  byId("picture").replaceChildren(drawPicture(rows.architecture[row]));

  const lost = rows.correct ? rows.correct[row] - rows.correct[data.dense] : null;
  const facts = [
    [scoreLabel, `${scores[row].toFixed(2)} %`, known(row) ? `95 %: ${low.toFixed(1)} to ${high.toFixed(1)}` : ""],
    ["Against dense", `${signed(scores[row] - scores[data.dense], 2)} points`,
      lost === null ? gapOf(row) : lost ? `${grouped(Math.abs(lost))} of ${grouped(data.images)} images ${lost < 0 ? "fewer" : "more"}` : "as many images right"],
  ];
  if (rows.loss) {
    const margin = rows.loss_margin ? `±${rows.loss_margin[row].toFixed(4)}, ` : "";
    facts.push(["Loss", `${rows.loss[row].toFixed(4)} ${data.unit}`, `${margin}the ${data.loss}`]);
  }
  for (const { name, label } of data.costs) {
    const here = rows[name][row], there = rows[name][data.dense];
    const change = here === there ? "no change" : `${here < there ? "−" : "+"}${quantity(Math.abs(here - there), name)}`;
    facts.push([capitalised(label), quantity(here, name),
      `${ofDense(row, name).toFixed(1)} % of dense, ${change}`]);
  }
  const scored = grouped(data.scored);
  facts.push([`${rankWord} rank`, row < data.scored ? `${grouped(better + 1)} of ${scored}` : "not among the scored",
    `in the ${data.certified ? "whole space" : "scored part of the space"}`]);
  if (data.numbers) facts.push(["Number in the space", grouped(data.numbers[row]), `of ${grouped(data.spaceSize)}, from 0`]);
  byId("numbers").replaceChildren(...facts.map(([name, value, note]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, `${value} `, make("small", {}, note)))));
}

/* A button to the next frontier point, and what it costs or gains. */
function step(id, word, row) {
  const button = byId(id), costs = rows[state.cost];
  button.disabled = row === undefined;
  button.onclick = () => row === undefined || select(row);
  if (row === undefined) return button.replaceChildren(id === "cheaper" ? "Cheapest already" : "Nothing better");
  const points = scores[row] - scores[state.row], share = 100 * (costs[row] / costs[state.row] - 1);
  button.replaceChildren(id === "cheaper" ? `← ${word}` : `${word} →`,
    make("small", {}, `${signed(points, 2)} points, ${signed(share, share > -10 && share < 10 ? 1 : 0)} % cost`));
}

function showCommands() {
  const row = state.row, text = rows.architecture[row];
  const out = `${data.run}-export${data.numbers ? `-${data.numbers[row]}` : ""}`;
  byId("take-which").textContent =
    `The selected architecture, ${scores[row].toFixed(2)} % at ${quantity(rows[state.cost][row], state.cost)}. ` +
    "Run these where the search ran.";
  byId("export").textContent =
    `poolshare export ${shellQuote(data.run)} --architecture ${shellQuote(text)} --out ${shellQuote(out)}`;
  byId("retrain").textContent = `poolshare retrain ${shellQuote(out)}`;
  byId("load").textContent = "import timm, poolshare.supernet\n" +
    `model = timm.create_model(${JSON.stringify(`local-dir:${out}`)}, pretrained=True)`;
  const forecast = data.retraining;
  byId("retrain-time").textContent = "";
  if (forecast) {
    const [epochs, seconds, stepMacs, teacher] = forecast;
    // A step of the supernet runs four networks; one alone does not get faster than a quarter of it.
    const time = roughly(seconds * (Math.max(0.25, rows.macs[row] / stepMacs) + teacher));
    byId("retrain-time").textContent = `By default ${epochs} epochs; going by the search, ${time} on its machine.`;
  }
}

function roughly(seconds) {
  if (seconds < 60) return "about a minute or less";
  return seconds < 5400 ? `about ${Math.round(seconds / 60)} min` : `about ${(seconds / 3600).toFixed(1)} h`;
}

function showPicks() {
  const cost = state.cost, picks = [...data.picks[cost]];
  if (!picks.some((pick) => pick.row === data.dense)) picks.push({ label: "Dense", row: data.dense });
  byId("picks").replaceChildren(...picks.map((pick) => {
    const share = ofDense(pick.row, cost).toFixed(0);
    const button = make("button", { type: "button", "data-row": pick.row, "aria-pressed": "false" },
      make("b", {}, pick.label), make("span", {}, `${scores[pick.row].toFixed(1)} % at ${share} % of ${costLabel(cost)}`));
    button.addEventListener("click", () => select(pick.row));
    return button;
  }));
  const best = data.picks[cost].find((pick) => pick.how === "half-point");
  const share = best && ofDense(best.row, cost);
  byId("headline").textContent = best && share < 99.95
    ? `Within half a point of dense at ${share.toFixed(0)} % of its ${costLabel(cost)}.`
    : nearest(cost);
}

/* What to say where half a point is out of reach. */
function nearest(cost) {
  const cheaper = data.frontier[cost].filter((row) => rows[cost][row] < rows[cost][data.dense]), row = cheaper.at(-1);
  if (row === undefined) return `Nothing that was scored costs fewer ${costLabel(cost)} than dense.`;
  return `Nothing that was scored comes within half a point of dense; the nearest loses ` +
    `${(scores[data.dense] - scores[row]).toFixed(1)} points at ${ofDense(row, cost).toFixed(0)} % of its ` +
    `${costLabel(cost)}.`;
}

function showTable() {
  const cost = state.cost;
  const head = make("tr", {}, make("th", { class: "text", scope: "col" }, "Architecture"),
    make("th", { class: "text narrow", scope: "col" }, "Tokens"));
  for (const name of [scoreLabel, "95 % interval", ...(rows.loss ? ["Loss"] : []), ...data.costs.map((each) => each.label), "Of dense"]) {
    head.append(make("th", { scope: "col" }, capitalised(name)));
  }
  const body = make("tbody");
  for (const row of data.frontier[cost]) {
    const [low, high] = interval(row);
    const line = make("tr", { "data-row": row, "aria-current": "false" },
      make("td", { class: "text" }, make("button", { type: "button" }, make("code", {}, rows.architecture[row]))),
      make("td", { class: "mini-cell" }, drawMini(rows.architecture[row])),
      make("td", {}, make("b", {}, `${scores[row].toFixed(2)} %`)),
      make("td", { class: "spare" }, known(row) ? `${low.toFixed(1)} to ${high.toFixed(1)}` : ""),
      ...(rows.loss ? [make("td", {}, rows.loss[row].toFixed(4))] : []),
      ...data.costs.map(({ name }) =>
        make("td", name === cost ? {} : { class: "spare" }, quantity(rows[name][row], name))),
      make("td", { class: "share" }, `${ofDense(row, cost).toFixed(1)} %`));
    line.addEventListener("click", () => select(row));
    body.append(line);
  }
  byId("frontier").replaceChildren(make("thead", {}, head), body);
}

function showCommon() {
  const group = data.layers[state.group === "all" ? "all" : state.cost];
  byId("common-words").textContent = group.words;
  drawHeat(byId("heat"), group);
}

function showLegend() {
  const icon = (shape) => make("svg", { viewBox: "0 0 18 14", "aria-hidden": "true" }, shape);
  const parts = [
    [make("circle", { cx: 9, cy: 7, r: 3, fill: "var(--crowd)" }), `scored (${grouped(data.scored)})`],
    [make("path", { class: "front", d: "M1,11 H9 V4 H17" }), "frontier"],
    [make("rect", { class: "band", x: 1, y: 2, width: 16, height: 10 }), "95 % interval"],
    [make("polygon", { class: "dense", points: "9,1 15,7 9,13 3,7" }), "dense"],
  ];
  if (data.included.length) parts.push([make("rect", { class: "mine", x: 4, y: 2, width: 10, height: 10 }), "included by hand"]);
  if (plot.over) {
    parts.push([make("circle", { cx: 9, cy: 7, r: 3, fill: "var(--crowd)", opacity: 0.35 }), "over the budget"]);
  }
  if (data.limits[state.cost]) parts.push([make("line", { class: "budget", x1: 9, x2: 9, y1: 0, y2: 14 }), "budget"]);
  byId("legend").replaceChildren(...parts.map(([shape, text]) => make("span", {}, icon(shape), text)));
  if (plot.below) byId("legend").append(make("span", {}, `${grouped(plot.below)} below this view`));
}

/* A row of choices, exactly one of them on. */
function choices(id, options, chosen, choose) {
  for (const [value, label] of options) {
    const input = make("input", { type: "radio", name: id, value, ...(value === chosen ? { checked: "" } : {}) });
    input.addEventListener("change", () => choose(value));
    byId(id).append(make("label", {}, input, make("span", {}, label)));
  }
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {  // not every viewer of a local file grants that
    const area = make("textarea", { class: "hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

let toastTimer = 0;
function toast(text) {
  byId("toast").textContent = text;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (byId("toast").textContent = ""), 1800);
}

function showAll() {
  showPicks();
  showTable();
  showCommon();
  plot.draw();
  showLegend();
  select(state.row);
}

byId("main").hidden = false;
choices("axis", data.costs.map((each) => [each.name, each.label]), state.cost, (cost) => {
  state.cost = cost;
  showAll();
});
choices("view", [["frontier", "frontier"], ["all", "all points"]], state.view, (view) => {
  state.view = view;
  plot.draw();
  showLegend();
});
choices("group", [["frontier", "frontier"], ["all", "all scored"]], state.group, (group) => {
  state.group = group;
  showCommon();
});
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const done = await copy(byId(button.dataset.copy).textContent);
    toast(done ? "Copied" : "Copying is not allowed here: select the text instead");
  });
}
byId("plot").addEventListener("keydown", (event) => {
  const front = data.frontier[state.cost], costs = rows[state.cost], at = costs[state.row];
  const target = {
    ArrowRight: () => front.find((row) => costs[row] > at) ?? front.at(-1),
    ArrowLeft: () => [...front].reverse().find((row) => costs[row] < at) ?? front[0],
    Home: () => front[0],
    End: () => front.at(-1),
  }[event.key];
  if (!target) return;
  event.preventDefault();
  select(target());
});
const first = data.picks[state.cost].find((pick) => pick.how === "half-point") || data.picks[state.cost][0];
state.row = first ? first.row : data.dense;
drawProgress();
drawCurves();
drawTrust();
showAll();
