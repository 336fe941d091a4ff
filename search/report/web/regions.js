/* Some images, and which parts of them are one token in the selected architecture: as report/sheet.py draws them. */

const DROPPED = [236, 239, 242], HATCH = [164, 173, 183];

/* A kept image, decoded without a request. */
function decoded(text) {
  return createImageBitmap(new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))]));
}

/* The photo on a canvas of 320 pixels; a tiny one keeps its pixels. */
function photoCanvas(photo, label) {
  const scale = 320 / Math.max(photo.width, photo.height);
  const canvas = make("canvas", { width: Math.round(scale * photo.width), height: Math.round(scale * photo.height), role: "img",
    "aria-label": label });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = Math.min(photo.width, photo.height) >= 64;
  context.imageSmoothingQuality = "high";
  context.drawImage(photo, 0, 0, canvas.width, canvas.height);
  return canvas;
}

/* Each region in its mean colour, edges between them, and what was dropped hatched. */
function colour(canvas, step, text) {
  const { width, height } = canvas, context = canvas.getContext("2d"), image = context.getImageData(0, 0, width, height);
  const parts = text.split(" ").map(Number), sums = new Map(), pixels = image.data;
  const region = new Int32Array(width * height);
  for (let y = 0; y < height; y++) {
    const row = Math.floor((y * step.rows) / height) * step.columns;
    for (let x = 0; x < width; x++) {
      const at = y * width + x, token = parts[row + Math.floor((x * step.columns) / width)];
      region[at] = token;
      if (!sums.has(token)) sums.set(token, [0, 0, 0, 0]);
      const sum = sums.get(token);
      for (let channel = 0; channel < 3; channel++) sum[channel] += pixels[4 * at + channel];
      sum[3]++;
    }
  }
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const at = y * width + x, token = region[at], [red, green, blue, count] = sums.get(token);
      let shown = token >= 0 ? [red / count, green / count, blue / count] : (x + y) % 9 ? DROPPED : HATCH;
      const edge = (x + 1 < width && region[at + 1] !== token) || (y + 1 < height && region[at + width] !== token);
      const bright = shown[0] + shown[1] + shown[2] > 3 * 150;
      if (edge) shown = shown.map((value) => bright ? 0.7 * value : value + 0.55 * (255 - value));
      pixels.set(shown, 4 * at);
    }
  }
  context.putImageData(image, 0, 0);
}

const pictures = data.regions ? Promise.all(data.regions.images.map(decoded)) : null;

async function showRegions(row) {
  if (!pictures) return;
  byId("regions-card").hidden = false;
  const steps = data.regions.steps[row], place = byId("regions");
  if (!steps) {
    const kept = Object.keys(data.regions.steps).length;
    byId("regions-words").textContent =
      `Pictures are kept of ${kept} point${kept > 1 ? "s" : ""} of the frontier, and not of this one.`;
    return place.replaceChildren();
  }
  const all = layersOf(rows.architecture[row]).filter((layer) => layer.operator).length;
  const lost = steps.some((step) => step.regions.some((text) => text.includes("-")));
  byId("regions-words").textContent = "Search-validation images, and beside them the parts that are one token, each in its " +
    "mean colour." + (lost ? " Hatched: dropped." : "") + (steps.length < all ? ` ${steps.length} of ${all} reductions are shown.` : "");
  const photos = await pictures;
  if (state.row !== row) return;  // another one was selected meanwhile
  place.replaceChildren(...photos.map((photo, number) => {
    const name = data.regions.names[number];
    const figures = steps.map((step) => {
      const text = `layer ${step.layer}: ${step.tokens} token${step.tokens > 1 ? "s" : ""}`;
      const canvas = photoCanvas(photo, `${name}, ${text}`);
      colour(canvas, step, step.regions[number]);
      return make("figure", {}, canvas, make("figcaption", {}, text, make("small", {}, step.operator)));
    });
    return make("div", { class: "strip" },
      make("figure", {}, photoCanvas(photo, name), make("figcaption", {}, name)), ...figures);
  }));
}
