"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const VIRIDIS = data.colours;
const state = { kind: data.kinds[0], layer: data.layers.length - 1, opacity: 0.6 };
const panels = [];

function bytes(text) {
  return text === null ? null : Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
}

function colour(value) {
  const place = Math.min(Math.max(value, 0), 1) * (VIRIDIS.length - 1);
  const below = Math.min(Math.floor(place), VIRIDIS.length - 2), share = place - below;
  return VIRIDIS[below].map((level, i) => Math.round(level * (1 - share) + VIRIDIS[below + 1][i] * share));
}

class Panel {
  constructor(figure, picture, model) {
    this.picture = picture;
    this.model = model;
    this.canvas = figure.querySelector("canvas");
    this.output = figure.querySelector("output");
    this.grid = document.createElement("canvas");
    [this.grid.height, this.grid.width] = [model.rows, model.columns];
    this.layers = model.layers.map((layer) => ({
      pca: bytes(layer.pca), norms: bytes(layer.norms), attention: bytes(layer.attention),
      directions: new Int8Array(bytes(layer.directions).buffer), range: layer.range, share: layer.share,
    }));
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  patch() {
    const [x0, y0, x1, y1] = this.model.box, { x, y } = this.picture.at;
    const inside = (at, from, to, count) =>
      Math.min(Math.max(Math.floor(((at - from) / (to - from)) * count), 0), count - 1);
    return [inside(y, y0, y1, this.model.rows), inside(x, x0, x1, this.model.columns)];
  }

  choose(row, column) {
    const [x0, y0, x1, y1] = this.model.box;
    this.picture.at = {
      x: x0 + ((column + 0.5) / this.model.columns) * (x1 - x0),
      y: y0 + ((row + 0.5) / this.model.rows) * (y1 - y0),
    };
    panels.filter((panel) => panel.picture === this.picture).forEach((panel) => panel.draw());
  }

  point(event) {
    const frame = this.canvas.getBoundingClientRect();
    this.picture.at = { x: (event.clientX - frame.left) / frame.width, y: (event.clientY - frame.top) / frame.height };
    this.choose(...this.patch());
  }

  key(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [row, column] = this.patch();
    this.choose(Math.min(Math.max(row + step[0], 0), this.model.rows - 1),
                Math.min(Math.max(column + step[1], 0), this.model.columns - 1));
  }

  similarities(layer, chosen) {
    const number = this.model.rows * this.model.columns, size = layer.directions.length / number;
    const lengths = layer.lengths ??= Array.from({ length: number }, (_, patch) => {
      let sum = 0;
      for (let i = 0; i < size; i++) sum += layer.directions[patch * size + i] ** 2;
      return Math.sqrt(sum) || 1;
    });
    return Array.from({ length: number }, (_, patch) => {
      let sum = 0;
      for (let i = 0; i < size; i++) sum += layer.directions[patch * size + i] * layer.directions[chosen * size + i];
      return sum / lengths[patch] / lengths[chosen];
    });
  }

  draw() {
    const { rows, columns, box } = this.model, layer = this.layers[Math.min(state.layer, this.layers.length - 1)];
    const [row, column] = this.patch(), chosen = row * columns + column, number = rows * columns;
    const cosines = state.kind === "similarity" ? this.similarities(layer, chosen) : null;
    const least = cosines ? Math.min(...cosines) : 0;
    const values = { norms: layer.norms, attention: layer.attention }[state.kind];
    const pixels = new ImageData(columns, rows);
    for (let patch = 0; patch < number; patch++) {
      let rgb = [0, 0, 0];
      if (state.kind === "pca") rgb = layer.pca.subarray(3 * patch, 3 * patch + 3);
      else if (cosines) rgb = colour((cosines[patch] - least) / (1 - least || 1));
      else if (values) rgb = colour(values[patch] / 255);
      pixels.data.set([...rgb, 255], 4 * patch);
    }
    this.grid.getContext("2d").putImageData(pixels, 0, 0);
    const context = this.canvas.getContext("2d"), { width, height } = this.canvas;
    context.clearRect(0, 0, width, height);
    context.drawImage(this.picture.image, 0, 0, width, height);
    const place = [box[0] * width, box[1] * height, (box[2] - box[0]) * width, (box[3] - box[1]) * height];
    context.imageSmoothingEnabled = false;
    context.globalAlpha = state.kind !== "attention" || values ? state.opacity : 0;
    context.drawImage(this.grid, ...place);
    context.globalAlpha = 1;
    const [stepX, stepY] = [place[2] / columns, place[3] / rows];
    for (const [style, line] of [["#000", 4], ["#fff", 2]]) {
      [context.strokeStyle, context.lineWidth] = [style, line];
      context.strokeRect(place[0] + column * stepX, place[1] + row * stepY, stepX, stepY);
    }
    this.output.textContent = `row ${row + 1} of ${rows}, column ${column + 1} of ${columns}: ` +
      this.describe(layer, values, cosines, chosen);
  }

  describe(layer, values, cosines, chosen) {
    const [low, high] = layer.range;
    const norm = `norm ${(low + (layer.norms[chosen] / 255) * (high - low)).toPrecision(3)}`;
    if (cosines) {
      const most = cosines.reduce((best, cosine, patch) =>
        patch !== chosen && (best < 0 || cosine > cosines[best]) ? patch : best, -1);
      if (most < 0) return norm;
      const at = `row ${Math.floor(most / this.model.columns) + 1}, column ${(most % this.model.columns) + 1}`;
      return `${norm}, most similar to ${at} (${cosines[most].toFixed(2)})`;
    }
    if (state.kind !== "attention") return norm;
    if (!values) return "no attention of this layer";
    return `attention ${((values[chosen] / 255) * layer.share * 100).toPrecision(2)} %`;
  }
}

function drawAll() {
  document.getElementById("layer-name").textContent = `layer ${data.layers[state.layer]}`;
  document.querySelectorAll("[data-about]").forEach((text) => { text.hidden = text.dataset.about !== state.kind; });
  panels.forEach((panel) => panel.draw());
}

async function start() {
  for (const picture of data.pictures) {
    picture.image = new Image();
    picture.image.src = picture.source;
    await picture.image.decode();
    picture.at = { x: 0.5, y: 0.5 };
  }
  document.querySelectorAll("figure[data-picture]").forEach((figure) => {
    const picture = data.pictures[figure.dataset.picture];
    panels.push(new Panel(figure, picture, picture.models[figure.dataset.model]));
  });
  document.querySelectorAll("input[name=kind]").forEach((input) => input.addEventListener("change", () => {
    state.kind = input.value;
    drawAll();
  }));
  for (const name of ["layer", "opacity"]) {
    const input = document.getElementById(name);
    input.addEventListener("input", () => { state[name] = Number(input.value); drawAll(); });
  }
  drawAll();
  document.body.dataset.ready = "yes";
}
start();
