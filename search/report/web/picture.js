"use strict";
/* Small things every part of the page needs, and an architecture as a picture. */

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

/* An element with attributes and children; strings become text, never markup. */
function make(tag, attributes = {}, ...children) {
  const svgTags = ["svg", "g", "path", "rect", "circle", "line", "text", "title", "polygon"];
  const element = svgTags.includes(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/* A count in three digits and a unit: 1261000000 → "1.26 G". */
function human(count) {
  for (const [scale, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(count) >= 0.9995 * scale) {
      const value = count / scale, size = Math.abs(value);
      return `${value.toFixed(size < 9.995 ? 2 : size < 99.95 ? 1 : 0)} ${letter}`;
    }
  }
  return String(+count.toPrecision(3));
}
const quantity = (value, cost) => cost === "latency_ms" ? `${+value.toPrecision(3)} ms` : human(value);
/* The same without zeros at its end, for axes. */
const short = (value, cost) => quantity(value, cost).replace(/(\.\d*?)0+(?=\s|$)/, "$1").replace(/\.(?=\s|$)/, "");
const capitalised = (text) => text[0].toUpperCase() + text.slice(1);
const grouped = (number) => number.toLocaleString("en-US");
const signed = (value, decimals) =>
  `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(decimals)}`.replace(/^[+−](0\.?0*)$/, "±$1");

/* "64*2 16@max2d" → layers with tokens, operator and whether the map of the layer before is shared. */
function layersOf(text) {
  const layers = [];
  for (const word of text.split(" ")) {
    const [, tokens, operator, length] = /^(\d+)(?:@([a-z0-9_]+))?(?:\*(\d+))?$/.exec(word) || [null, "0", "", "1"];
    for (let index = 0; index < +(length || 1); index++) {
      layers.push({ tokens: +tokens, operator: index ? "" : operator || "", shared: index > 0 });
    }
  }
  return layers;
}

/* The same in words, for those who cannot see the picture. */
function inWords(layers) {
  const parts = layers.map((layer, index) => `layer ${index}: ${layer.tokens} tokens` +
    (layer.operator ? ` after ${layer.operator}` : "") + (layer.shared ? ", shares the map" : ""));
  return parts.join("; ");
}

function drawPicture(text) {
  const layers = layersOf(text), count = layers.length, full = layers[0].tokens;
  const width = 360, column = width / count, bar = column * 0.72, top = 16, height = 92, base = top + height;
  const centre = (index) => column * (index + 0.5);
  const svg = make("svg", { role: "img", "aria-label": inWords(layers) });
  let depth = base + 34, lastMark = -Infinity, lower = false;
  layers.forEach((layer, index) => {
    const tall = Math.max(3, (height * layer.tokens) / full), before = layers[index - 1];
    const box = make("rect", { x: centre(index) - bar / 2, y: base - tall, width: bar, height: tall, rx: 2,
      class: layer.shared ? "follower" : "own" });
    box.append(make("title", {}, `layer ${index}: ${layer.tokens} tokens, ${layer.shared ? "shared map" : "own map"}`));
    svg.append(box);
    if (!before || before.tokens !== layer.tokens) {
      svg.append(make("text", { x: centre(index), y: base - tall - 4, "text-anchor": "middle" }, String(layer.tokens)));
    }
    if (column >= 13 || index % 4 === 0) {
      svg.append(make("text", { x: centre(index), y: base + 13, "text-anchor": "middle" }, String(index)));
    }
    if (layer.operator) {
      const edge = column * index, room = 6.2 * layer.operator.length + 10;
      lower = edge - lastMark < room ? !lower : false;
      lastMark = edge;
      const y = base + 44 + (lower ? 13 : 0), half = room / 2;
      svg.append(make("polygon", { class: "mark", points: `${edge - 4},${top - 2} ${edge + 4},${top - 2} ${edge},${top + 5}` }));
      svg.append(make("line", { class: "grid", x1: edge, x2: edge, y1: top + 5, y2: y - 10 }));
      svg.append(make("text", { class: "mark-text", "text-anchor": "middle", y,
        x: Math.min(Math.max(edge, half), width - half) }, layer.operator));
      depth = Math.max(depth, y + 5);
    }
  });
  for (let start = 0; start < count; ) {
    let end = start;
    while (end + 1 < count && layers[end + 1].shared) end++;
    const y = base + 18;
    if (end > start) {
      svg.append(make("path", { class: "bracket", d: `M${centre(start)},${y} v7 H${centre(end)} v-7` }));
    }
    start = end + 1;
  }
  svg.setAttribute("viewBox", `0 0 ${width} ${depth}`);
  return svg;
}

/* The picture at the size of a table cell: bars only. */
function drawMini(text) {
  const layers = layersOf(text), full = layers[0].tokens, column = 92 / layers.length;
  const svg = make("svg", { viewBox: "0 0 92 22", class: "mini", "aria-hidden": "true" });
  layers.forEach((layer, index) => {
    const tall = Math.max(1.5, (22 * layer.tokens) / full);
    svg.append(make("rect", { x: column * index, y: 22 - tall, width: column * 0.82, height: tall,
      class: layer.shared ? "follower" : "own" }));
  });
  return svg;
}
