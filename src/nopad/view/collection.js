"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
const places = new Uint16Array(bytes(data.places).buffer), labels = bytes(data.labels);
const directions = new Int8Array(bytes(data.directions).buffer), sizes = new Int32Array(bytes(data.sizes).buffer);
const number = data.number, width = directions.length / number;
const names = data.ids.map((name) => name.toLowerCase());
const pictured = Object.keys(data.thumbnails).map(Number);
const NEAREST = 12, NONE = 255, PICTURE = 64, REACH = 24;
const canvas = document.getElementById("map"), context = canvas.getContext("2d");
const panel = document.getElementById("panel"), find = document.getElementById("find");
const view = { x: 0.5, y: 0.5, zoom: 1, chosen: -1, hovered: -1, near: [], cluster: -1, found: null, pictures: true };
const images = new Map();
let theme, waiting = false, layer = null;

// Pictures

function source(place) {
  return `data:image/jpeg;base64,${data.thumbnails[place]}`;
}

function picture(place) {
  if (!(place in data.thumbnails)) return document.createElement("i");
  const image = document.createElement("img");
  [image.alt, image.loading, image.decoding, image.src] = ["", "lazy", "async", source(place)];
  return image;
}

function decoded(place) {
  if (!images.has(place)) {
    const image = new Image();
    image.onload = redraw;
    image.src = source(place);
    images.set(place, image);
  }
  const image = images.get(place);
  return image.complete && image.naturalWidth ? image : null;
}

// Cosines

const lengths = new Float32Array(number);
for (let place = 0; place < number; place++) {
  let sum = 0;
  for (let i = place * width; i < (place + 1) * width; i++) sum += directions[i] * directions[i];
  lengths[place] = Math.sqrt(sum) || 1;
}

function nearest(chosen, among = null) {
  const near = [], from = chosen * width, total = among ? among.length : number;
  for (let each = 0; each < total; each++) {
    const place = among ? among[each] : each;
    if (place === chosen) continue;
    let sum = 0;
    for (let i = 0, at = place * width; i < width; i++) sum += directions[from + i] * directions[at + i];
    const cosine = sum / lengths[place] / lengths[chosen];
    if (near.length === NEAREST && cosine <= near[NEAREST - 1].cosine) continue;
    let slot = near.length;
    while (slot > 0 && near[slot - 1].cosine < cosine) slot--;
    near.splice(slot, 0, { place, cosine });
    near.length = Math.min(near.length, NEAREST);
  }
  return near;
}

// The map

const reach = [0, 1].map((axis) => {
  let [low, high] = [65535, 0];
  for (let i = axis; i < places.length; i += 2) [low, high] = [Math.min(low, places[i]), Math.max(high, places[i])];
  return Math.max((high - low) / 65535, 0.01);
});

function colour(label, dark) {
  return label === NONE ? [0, 0, dark ? 70 : 45] : [(label * 137.508) % 360, dark ? 62 : 68, dark ? 64 : 44];
}

function rgb([hue, saturation, light]) {
  const s = saturation / 100, l = light / 100, reach = s * Math.min(l, 1 - l);
  return [0, 8, 4].map((step) => {
    const k = (step + hue / 30) % 12;
    return Math.round(255 * (l - reach * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  });
}

function readTheme() {
  const style = getComputedStyle(document.documentElement), dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const little = new Uint8Array(new Uint32Array([1]).buffer)[0] === 1;
  const word = ([r, g, b], alpha) =>
    (little ? (alpha << 24) | (b << 16) | (g << 8) | r : (r << 24) | (g << 16) | (b << 8) | alpha) >>> 0;
  const colours = Array.from({ length: NONE + 1 }, (_, label) => rgb(colour(label, dark)));
  theme = {
    ink: style.getPropertyValue("--ink"), paper: style.getPropertyValue("--paper"),
    css: colours.map((each) => `rgb(${each.join(" ")})`),
    strong: colours.map((each) => word(each, 255)), faint: colours.map((each) => word(each, 40)),
  };
  document.querySelectorAll("[data-cluster] i").forEach((dot) => {
    dot.style.background = theme.css[dot.parentElement.dataset.cluster];
  });
}

// Pixels from 0 to 1, so that at zoom 1 all places fit, with their pictures.
function scale() {
  const edge = (PICTURE + 8) * (devicePixelRatio || 1), side = (pixels) => Math.max(pixels - edge, pixels / 2);
  return Math.min(side(canvas.width) / reach[0], side(canvas.height) / reach[1]) * 0.97 * view.zoom;
}

function onCanvas(place) {
  const size = scale();
  return [(places[2 * place] / 65535 - view.x) * size + canvas.width / 2,
          (places[2 * place + 1] / 65535 - view.y) * size + canvas.height / 2];
}

function isLit(place) {
  return (view.cluster < 0 || labels[place] === view.cluster) && (!view.found || view.found[place] === 1);
}

function drawPoints() {
  if (!layer || layer.width !== canvas.width || layer.height !== canvas.height) {
    layer = context.createImageData(canvas.width, canvas.height);
  }
  const words = new Uint32Array(layer.data.buffer), size = scale(), { width: w, height: h } = canvas;
  const ratio = devicePixelRatio || 1, base = number < 2000 ? 5 : number < 30000 ? 3 : 1.5;
  const side = Math.max(1, Math.round(Math.min(base * ratio * view.zoom ** 0.25, 9 * ratio)));
  const left = w / 2 - view.x * size, top = h / 2 - view.y * size, step = size / 65535, half = side >> 1;
  words.fill(0);
  for (const lit of [false, true]) {
    if (!lit && view.cluster < 0 && !view.found) continue;
    const colours = lit ? theme.strong : theme.faint;
    for (let place = 0; place < number; place++) {
      const x = (places[2 * place] * step + left - half) | 0, y = (places[2 * place + 1] * step + top - half) | 0;
      if (x < 0 || y < 0 || x + side > w || y + side > h || isLit(place) !== lit) continue;
      const word = colours[labels[place]];
      for (let row = y * w + x, end = row + side * w; row < end; row += w) words.fill(word, row, row + side);
    }
  }
  context.putImageData(layer, 0, 0);
}

// One picture for each cell of a grid that moves with the map.
function shownPictures() {
  const cell = (PICTURE * (devicePixelRatio || 1)) / scale(), taken = new Map();
  if (!view.pictures) return taken;
  for (const place of pictured) {
    const [x, y] = onCanvas(place);
    if (x < 0 || y < 0 || x > canvas.width || y > canvas.height || !isLit(place)) continue;
    const key = `${Math.floor(places[2 * place] / 65535 / cell)} ${Math.floor(places[2 * place + 1] / 65535 / cell)}`;
    if (!taken.has(key)) taken.set(key, place);
  }
  return taken;
}

function drawPictures() {
  const side = PICTURE * (devicePixelRatio || 1) * 0.86;
  view.boxes = [];
  for (const place of shownPictures().values()) {
    const image = decoded(place);
    if (!image) continue;
    const fit = side / Math.max(image.naturalWidth, image.naturalHeight), [x, y] = onCanvas(place);
    const [w, h] = [image.naturalWidth * fit, image.naturalHeight * fit];
    const covers = (box) => Math.abs(box.x + box.w / 2 - x) * 2 < box.w + w + 8 &&
      Math.abs(box.y + box.h / 2 - y) * 2 < box.h + h + 8;
    if (view.boxes.some(covers)) continue;
    context.fillStyle = theme.css[labels[place]];
    context.fillRect(x - w / 2 - 2, y - h / 2 - 2, w + 4, h + 4);
    context.drawImage(image, x - w / 2, y - h / 2, w, h);
    view.boxes.push({ place, x: x - w / 2, y: y - h / 2, w, h });
  }
}

// Around a point, or around its picture where that is drawn.
function ring(place, radius, line) {
  const [x, y] = onCanvas(place), ratio = devicePixelRatio || 1, box = view.boxes.find((each) => each.place === place);
  for (const [style, extra] of [[theme.paper, 2], [theme.ink, 0]]) {
    context.beginPath();
    if (box) context.rect(box.x - 2, box.y - 2, box.w + 4, box.h + 4);
    else context.arc(x, y, radius * ratio, 0, 2 * Math.PI);
    [context.strokeStyle, context.lineWidth] = [style, (line + extra) * ratio];
    context.stroke();
  }
}

function drawName(place) {
  const ratio = devicePixelRatio || 1, [x, y] = onCanvas(place), pad = 4 * ratio;
  context.font = `${12 * ratio}px system-ui, sans-serif`;
  const name = data.ids[place].length > 60 ? `…${data.ids[place].slice(-59)}` : data.ids[place];
  const room = context.measureText(name).width + 2 * pad;
  const left = Math.max(0, Math.min(x + 8 * ratio, canvas.width - room)), top = Math.max(0, y - 26 * ratio);
  context.fillStyle = theme.paper;
  context.fillRect(left, top, room, 20 * ratio);
  context.fillStyle = theme.ink;
  context.fillText(name, left + pad, top + 14 * ratio);
}

function draw() {
  waiting = false;
  if (!canvas.width || !canvas.height) return;
  drawPoints();
  drawPictures();
  view.near.forEach(({ place }) => ring(place, 5, 1.5));
  if (view.chosen >= 0) ring(view.chosen, 9, 3);
  if (view.hovered >= 0) drawName(view.hovered);
}

function redraw() {
  if (!waiting) requestAnimationFrame(draw);
  waiting = true;
}

function resize() {
  const ratio = devicePixelRatio || 1;
  [canvas.width, canvas.height] = [canvas.clientWidth * ratio, canvas.clientHeight * ratio].map(Math.round);
  redraw();
}

function zoom(factor, x = canvas.width / 2, y = canvas.height / 2) {
  const before = scale();
  view.zoom = Math.min(Math.max(view.zoom * factor, 0.5), 4000);
  const change = 1 / before - 1 / scale();
  view.x += (x - canvas.width / 2) * change;
  view.y += (y - canvas.height / 2) * change;
  redraw();
}

function showAll() {
  Object.assign(view, { x: 0.5, y: 0.5, zoom: 1 });
  redraw();
}

// The lit place of the least distance, by its offset in pixels from (x, y); -1 where none is nearer than `least`.
function closest(x, y, least, distance) {
  const size = scale(), step = size / 65535;
  const left = canvas.width / 2 - view.x * size - x, top = canvas.height / 2 - view.y * size - y;
  let best = -1;
  for (let place = 0; place < number; place++) {
    const found = distance(places[2 * place] * step + left, places[2 * place + 1] * step + top);
    if (found < least && isLit(place)) [best, least] = [place, found];
  }
  return best;
}

const squared = (x, y) => x * x + y * y;

function at(x, y) {
  const boxes = view.boxes ?? [], reach = REACH * (devicePixelRatio || 1);
  for (let i = boxes.length - 1; i >= 0; i--) {
    const box = boxes[i];
    if (x >= box.x && y >= box.y && x <= box.x + box.w && y <= box.y + box.h) return box.place;
  }
  return closest(x, y, reach * reach, squared);
}

function towards(dx, dy) {
  if (view.chosen < 0) return closest(canvas.width / 2, canvas.height / 2, Infinity, squared);
  return closest(...onCanvas(view.chosen), Infinity, (x, y) => {
    const along = x * dx + y * dy, across = Math.abs(x * dy) + Math.abs(y * dx);
    return along < 1e-6 || across > along ? Infinity : along + 2 * across;
  });
}

// What is chosen

function element(tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function pick(place, note) {
  const button = element("button", undefined, "pick");
  button.type = "button";
  const words = element("div", data.ids[place]);
  words.append(element("span", note));
  button.append(picture(place), words);
  button.addEventListener("click", () => choose(place));
  return button;
}

function list(near) {
  const made = element("ol", undefined, "near");
  for (const { place, cosine } of near) {
    const item = element("li");
    item.append(pick(place, cosine.toFixed(3)));
    made.append(item);
  }
  return made;
}

function describe() {
  if (view.chosen < 0) {
    panel.replaceChildren(element("p", "Choose an image on the map."));
    return;
  }
  const place = view.chosen, figure = element("figure"), caption = element("figcaption");
  const name = element("b", data.ids[place]), facts = element("dl");
  name.setAttribute("aria-live", "polite");
  if (place in data.thumbnails) figure.append(picture(place));
  const pairs = [["size", `${sizes[2 * place + 1]} × ${sizes[2 * place]}`]];
  if (labels[place] !== NONE) pairs.push(["cluster", labels[place] + 1]);
  for (const [column, values] of Object.entries(data.columns)) if (values[place]) pairs.push([column, values[place]]);
  for (const [key, value] of pairs) {
    const pair = element("div");
    pair.append(element("dt", key), element("dd", value));
    facts.append(pair);
  }
  caption.append(name);
  figure.append(caption);
  const words = width < data.width ? `By cosine, in the ${width} strongest of ${data.width} directions.` : "By cosine.";
  panel.replaceChildren(figure, facts, element("h3", "Most similar"), element("p", words), list(view.near));
  if (view.near.some((each) => !(each.place in data.thumbnails)) && pictured.length) {
    panel.append(element("h3", "Most similar of those with an image here"), list(nearest(place, pictured)));
  }
  panel.scrollTop = 0;
}

function choose(place, { show = true } = {}) {
  view.chosen = place;
  view.near = place < 0 ? [] : nearest(place);
  if (place >= 0 && show) {
    const [x, y] = onCanvas(place);
    if (x < 0 || y < 0 || x > canvas.width || y > canvas.height) {
      [view.x, view.y] = [places[2 * place] / 65535, places[2 * place + 1] / 65535];
    }
  }
  describe();
  redraw();
}

function search() {
  const words = find.value.trim().toLowerCase(), found = document.getElementById("found");
  view.found = null;
  let count = 0;
  if (words) {
    const columns = Object.values(data.columns);
    view.found = new Uint8Array(number);
    for (let place = 0; place < number; place++) {
      const is = names[place].includes(words) || columns.some((values) => values[place].toLowerCase().includes(words));
      if (is) count += view.found[place] = 1;
    }
  }
  found.textContent = words ? `${count.toLocaleString("en")} found` : "";
  redraw();
}

function chooseCluster(cluster) {
  view.cluster = view.cluster === cluster ? -1 : cluster;
  document.querySelectorAll("[data-cluster]").forEach((button) => {
    button.setAttribute("aria-pressed", String(Number(button.dataset.cluster) === view.cluster));
  });
  redraw();
}

// Keyboard and pointer

const STEPS = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = STEPS[event.key];
  if (step && event.shiftKey) {
    view.x += (step[0] * canvas.width) / scale() / 8;
    view.y += (step[1] * canvas.height) / scale() / 8;
    redraw();
  } else if (step) {
    const place = towards(...step);
    if (place >= 0) choose(place);
  } else if (event.key === "+" || event.key === "=") zoom(1.5);
  else if (event.key === "-") zoom(1 / 1.5);
  else if (event.key === "0") showAll();
  else if (event.key === "Escape") choose(-1);
  else return;
  event.preventDefault();
}

const pointers = new Map();
let moved = false;

function point(event) {
  const frame = canvas.getBoundingClientRect();
  return [((event.clientX - frame.left) / frame.width) * canvas.width,
          ((event.clientY - frame.top) / frame.height) * canvas.height];
}

function down(event) {
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, point(event));
  if (pointers.size === 1) moved = false;
}

function move(event) {
  const before = pointers.get(event.pointerId), now = point(event);
  if (!before) {
    const hovered = event.pointerType === "mouse" ? at(...now) : -1;
    if (hovered !== view.hovered) redraw();
    view.hovered = hovered;
    return;
  }
  const [dx, dy] = [now[0] - before[0], now[1] - before[1]];
  if (!moved && Math.hypot(dx, dy) < 4 * (devicePixelRatio || 1)) return;
  moved = true;
  view.hovered = -1;
  if (pointers.size === 2) {
    const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
    const [far, near] = [Math.hypot(now[0] - other[0], now[1] - other[1]),
                         Math.hypot(before[0] - other[0], before[1] - other[1])];
    zoom(far / Math.max(near, 1), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
  }
  view.x -= dx / scale() / pointers.size;
  view.y -= dy / scale() / pointers.size;
  pointers.set(event.pointerId, now);
  redraw();
}

function up(event) {
  if (pointers.delete(event.pointerId) && !moved && !pointers.size && event.type === "pointerup") {
    const place = at(...point(event));
    if (place >= 0) choose(place, { show: false });
  }
}

function wheel(event) {
  if (!event.ctrlKey && document.activeElement !== canvas) return;  // the page scrolls until the map is chosen
  event.preventDefault();
  zoom(Math.exp(-event.deltaY / (event.deltaMode ? 20 : 400)), ...point(event));
}

canvas.addEventListener("keydown", key);
canvas.addEventListener("pointerdown", down);
canvas.addEventListener("pointermove", move);
canvas.addEventListener("pointerup", up);
canvas.addEventListener("pointercancel", up);
canvas.addEventListener("pointerleave", () => { view.hovered = -1; redraw(); });
canvas.addEventListener("wheel", wheel, { passive: false });
document.getElementById("in").addEventListener("click", () => zoom(1.5));
document.getElementById("out").addEventListener("click", () => zoom(1 / 1.5));
document.getElementById("all").addEventListener("click", showAll);
document.getElementById("pictures").addEventListener("change", (event) => {
  view.pictures = event.target.checked;
  redraw();
});
find.addEventListener("input", search);
find.form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (view.found && view.found.includes(1)) choose(view.found.indexOf(1));
});
document.querySelectorAll("[data-cluster]").forEach((button) => {
  button.addEventListener("click", () => chooseCluster(Number(button.dataset.cluster)));
});
document.querySelectorAll("[data-place]").forEach((button) => {
  button.prepend(picture(Number(button.dataset.place)));
  button.addEventListener("click", () => {
    choose(Number(button.dataset.place));
    document.getElementById("collection").scrollIntoView({ block: "start" });
    canvas.focus({ preventScroll: true });
  });
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readTheme(); redraw(); });
new ResizeObserver(resize).observe(canvas);
readTheme();
resize();
document.body.dataset.ready = "yes";
