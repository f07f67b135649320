"use strict";
// All text goes in by textContent, so that no text of a document is ever read as HTML.
const content = JSON.parse(document.getElementById("content").textContent);
const { tokens, layers, quantities } = content;
const at = (id) => document.getElementById(id);
const FEWEST = 1e-3; // of half-lives, as in the pictures: a decay at once has none on a logarithmic axis
const MARGIN = 56, RIGHT = 14; // beside the charts, for their numbers

const state = { quantity: "erase", layer: 0, head: 0, stretch: false, token: null };

const layer = () => layers[state.layer];
const rowsOf = (name) => layer().values[name];
const valueHeads = () => rowsOf("state").length;
// Gates of the key axis have a row per key head, which several value heads may read.
const rowOfHead = (name, head) => Math.floor(head / (valueHeads() / rowsOf(name).length));
const firstHead = (name, row) => row * (valueHeads() / rowsOf(name).length);
const chosenRow = () => rowsOf(state.quantity)[rowOfHead(state.quantity, state.head)];
const number = (x) => (x === 0 ? "0" : Math.abs(x) < 0.001 || Math.abs(x) >= 1e5 ? x.toExponential(2) : String(Number(x.toPrecision(4))));

/** The range of the colours and of the chart, and where a value lies in it, from 0 to 1. */
function scaleOf(name) {
  const kind = quantities[name].scale;
  const flat = rowsOf(name).flat();
  let low = flat.reduce((a, b) => Math.min(a, b), Infinity);
  let high = flat.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!state.stretch && kind === "gate") [low, high] = [0, layer().reach[name]];
  if (!state.stretch && kind === "norm") low = 0;
  if (state.stretch && layer().reach[name] === 2) {
    // Colours that part at 1 stay parted there.
    const far = Math.max(1 - low, high - 1);
    [low, high] = [1 - far, 1 + far];
  }
  const place = kind === "log" ? (x) => Math.log10(Math.max(x, FEWEST)) : (x) => x;
  const from = place(low), span = place(high) - from;
  return { low, high, kind, share: (x) => (span > 0 ? Math.min(Math.max((place(x) - from) / span, 0), 1) : 0.5) };
}

function shadesOf(name) {
  return content.shades[layer().colours[name]];
}

function shade(name, share) {
  const shades = shadesOf(name);
  return shades[Math.round(share * (shades.length - 1))];
}

/** Black or white, whichever stands out from a colour more. */
function inkOn(colour) {
  const [r, g, b] = [1, 3, 5].map((i) => {
    const c = parseInt(colour.slice(i, i + 2), 16) / 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

function option(value, text) {
  const made = document.createElement("option");
  made.value = value;
  made.textContent = text;
  return made;
}

/** Scrolls the text, and nothing around it, so far that a token is seen. */
function reveal(span) {
  const box = at("text"), above = span.offsetTop, below = above + span.offsetHeight;
  if (above < box.scrollTop) box.scrollTop = above;
  else if (below > box.scrollTop + box.clientHeight) box.scrollTop = below - box.clientHeight;
}

const spans = tokens.map((token, index) => {
  const span = document.createElement("span");
  span.textContent = token.label;
  span.dataset.index = index;
  if (token.text === "") span.className = "mark";
  at("text").append(span);
  // Lines break where the text's do.
  at("text").append("\n".repeat(token.text.split("\n").length - 1));
  return span;
});

function fillHeads() {
  const shared = valueHeads() / rowsOf("erase").length;
  const name = (head) => (shared > 1 ? `${head} (key head ${Math.floor(head / shared)})` : String(head));
  at("head").replaceChildren(...Array.from({ length: valueHeads() }, (_, head) => option(head, name(head))));
  state.head = Math.min(state.head, valueHeads() - 1);
  at("head").value = state.head;
}

function colourText() {
  const scale = scaleOf(state.quantity), row = chosenRow();
  spans.forEach((span, index) => {
    const colour = shade(state.quantity, scale.share(row[index]));
    span.style.backgroundColor = colour;
    span.style.color = inkOn(colour);
  });
  const quantity = quantities[state.quantity];
  at("meaning").textContent = `${quantity.title}: ${quantity.meaning}`;
  at("low").textContent = number(scale.low);
  at("high").textContent = number(scale.high) + (scale.kind === "log" ? " tokens (logarithmic)" : "");
  at("bar").style.background = `linear-gradient(to right, ${shadesOf(state.quantity).join(",")})`;
}

/** A canvas as many pixels wide as it is shown, cleared, and its context in CSS pixels. */
function fresh(canvas, height) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.font = "12px system-ui, sans-serif";
  return { context, width: width - RIGHT };
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function drawChart() {
  const height = 200, top = 10, bottom = height - 24;
  const { context, width } = fresh(at("chart"), height);
  const scale = scaleOf(state.quantity), rows = rowsOf(state.quantity), chosen = chosenRow();
  const x = (index) => MARGIN + ((index + 0.5) * (width - MARGIN)) / tokens.length;
  const y = (value) => bottom - scale.share(value) * (bottom - top);
  context.textBaseline = "middle";
  for (const share of [0, 0.5, 1]) {
    const between = scale.low + share * (scale.high - scale.low);
    const least = Math.max(scale.low, FEWEST), most = Math.max(scale.high, FEWEST);
    const value = scale.kind === "log" ? least * (most / least) ** share : between;
    const level = bottom - share * (bottom - top);
    context.strokeStyle = css("--line");
    context.beginPath();
    context.moveTo(MARGIN, level);
    context.lineTo(width, level);
    context.stroke();
    context.fillStyle = css("--faint");
    context.textAlign = "right";
    context.fillText(number(Number(value.toPrecision(3))), MARGIN - 6, level);
  }
  const line = (row) => {
    context.beginPath();
    row.forEach((value, index) => (index ? context.lineTo(x(index), y(value)) : context.moveTo(x(index), y(value))));
    if (row.length === 1) context.arc(x(0), y(row[0]), 2, 0, 7);
    context.stroke();
  };
  context.lineWidth = 1;
  context.strokeStyle = css("--others");
  rows.filter((row) => row !== chosen).forEach(line);
  context.lineWidth = 1.8;
  context.strokeStyle = css("--accent");
  line(chosen);
  numberTokens(context, x, height - 10, width);
  if (state.token !== null) {
    context.strokeStyle = css("--ink");
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(x(state.token), top);
    context.lineTo(x(state.token), bottom);
    context.stroke();
  }
  const { title } = quantities[state.quantity];
  const others = rows.length > 1 ? "; thin lines: the layer's other heads" : "";
  at("chart-title").textContent = `Along the text: ${title}, layer ${layer().layer}, head ${state.head}${others}`;
}

/** Numbers of tokens, about one for every 80 pixels. */
function numberTokens(context, x, level, width) {
  const step = 2 ** Math.ceil(Math.log2(Math.max((tokens.length * 80) / (width - MARGIN), 1)));
  context.fillStyle = css("--faint");
  context.textAlign = "center";
  context.textBaseline = "middle";
  for (let index = 0; index < tokens.length; index += step) context.fillText(index, x(index), level);
}

function drawHeads() {
  const rows = rowsOf(state.quantity), scale = scaleOf(state.quantity);
  const tall = Math.max(10, Math.min(28, 320 / rows.length)), height = tall * rows.length + 24;
  const { context, width } = fresh(at("heads"), height);
  const wide = (width - MARGIN) / tokens.length;
  rows.forEach((row, head) => {
    row.forEach((value, index) => {
      context.fillStyle = shade(state.quantity, scale.share(value));
      context.fillRect(MARGIN + index * wide, head * tall, wide + 0.5, tall - 1);
    });
    const chosen = rowOfHead(state.quantity, state.head) === head;
    context.fillStyle = css(chosen ? "--accent" : "--faint");
    context.textAlign = "right";
    context.textBaseline = "middle";
    context.fillText(`${chosen ? "▸ " : ""}${head}`, MARGIN - 6, head * tall + tall / 2);
  });
  numberTokens(context, (index) => MARGIN + (index + 0.5) * wide, height - 10, width);
  if (state.token !== null) {
    context.strokeStyle = css("--ink");
    context.strokeRect(MARGIN + state.token * wide, 0.5, wide, tall * rows.length - 1);
  }
  const kind = rows.length < valueHeads() ? "key heads" : "heads";
  at("heads-title").textContent = `All ${kind} of layer ${layer().layer}: ${quantities[state.quantity].title}`;
  at("deviation").textContent =
    "The memory is followed token by token from this layer's own gates; its outputs differ from those of the layer's " +
    `operator by ${number(layer().deviation)} of the largest.`;
}

function show() {
  colourText();
  drawChart();
  drawHeads();
  // So that a view can be linked to, and is there again after a reload.
  const view = new URLSearchParams({ quantity: state.quantity, layer: layer().layer, head: state.head });
  if (state.stretch) view.set("stretch", "1");
  window.location.replace(`#${view}`);
}

function lookAt(index) {
  if (state.token === index) return;
  if (state.token !== null) spans[state.token].classList.remove("here");
  state.token = index;
  if (index !== null) spans[index].classList.add("here");
  drawChart();
  drawHeads();
}

function numbersOf(index) {
  return Object.entries(quantities).map(([name, { title }]) => {
    const value = rowsOf(name)[rowOfHead(name, state.head)][index];
    return [name, title, number(value) + (name === "half_life" ? " tokens" : "")];
  });
}

const nameOf = (index) => {
  const { id, text, label } = tokens[index];
  return `token ${index}: ${text === "" ? label : JSON.stringify(text)} (id ${id})`;
};

function showTip(index, left, top) {
  const head = document.createElement("div"), table = document.createElement("table");
  head.textContent = nameOf(index);
  for (const [name, title, value] of numbersOf(index)) {
    const row = table.insertRow(), name_cell = document.createElement("th");
    if (name === state.quantity) row.className = "chosen";
    name_cell.textContent = title;
    row.append(name_cell);
    row.insertCell().textContent = value;
  }
  const tip = at("tip");
  tip.replaceChildren(head, table);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(left + 14, window.innerWidth - box.width - 4))}px`;
  tip.style.top = `${top + 20 + box.height > window.innerHeight ? Math.max(4, top - box.height - 12) : top + 20}px`;
}

function hideTip() {
  at("tip").hidden = true;
}

at("text").addEventListener("pointermove", (event) => {
  const index = event.target.dataset.index;
  if (index === undefined) return hideTip();
  lookAt(Number(index));
  showTip(Number(index), event.clientX, event.clientY);
});
at("text").addEventListener("pointerleave", hideTip);
at("text").addEventListener("keydown", (event) => {
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
  if (event.key === "Escape") hideTip();
  if (!(event.key in steps)) return;
  event.preventDefault();
  const index = Math.max(0, Math.min((state.token ?? -1) + steps[event.key], tokens.length - 1));
  lookAt(index);
  reveal(spans[index]);
  const numbers = numbersOf(index).map(([, title, value]) => `${title} ${value}`);
  at("numbers").textContent = `${nameOf(index)}; ${numbers.join(", ")}`;
});
at("text").addEventListener("blur", hideTip);

for (const id of ["chart", "heads"]) {
  const tokenAt = (event) => {
    const share = (event.offsetX - MARGIN) / (at(id).clientWidth - RIGHT - MARGIN);
    return share >= 0 && share < 1 ? Math.floor(share * tokens.length) : null;
  };
  at(id).addEventListener("pointermove", (event) => {
    const index = tokenAt(event);
    if (index === null) return hideTip();
    lookAt(index);
    reveal(spans[index]);
    showTip(index, event.clientX, event.clientY);
  });
  at(id).addEventListener("pointerleave", hideTip);
}
at("heads").addEventListener("click", (event) => {
  const rows = rowsOf(state.quantity).length;
  const row = Math.floor(event.offsetY / ((at("heads").clientHeight - 24) / rows));
  if (row >= rows) return;
  state.head = firstHead(state.quantity, row);
  at("head").value = state.head;
  show();
});

at("quantity").append(...Object.entries(quantities).map(([name, { title }]) => option(name, title)));
at("layer").append(...layers.map((one, index) => option(index, one.layer)));
for (const id of ["quantity", "layer", "head", "stretch"]) {
  at(id).addEventListener("change", () => {
    state.quantity = at("quantity").value;
    state.stretch = at("stretch").checked;
    state.head = Number(at("head").value);
    if (id === "layer") {
      state.layer = Number(at("layer").value);
      fillHeads();
    }
    show();
  });
}
window.addEventListener("resize", show);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);

/** What the address asks for where it makes sense, and otherwise what the command was asked for. */
function start() {
  const asked = new URLSearchParams(window.location.hash.slice(1));
  const whole = (name, other) => (/^\d+$/.test(asked.get(name) ?? "") ? Number(asked.get(name)) : other);
  const index = (number) => layers.findIndex((one) => one.layer === number);
  if (Object.hasOwn(quantities, asked.get("quantity") ?? "")) state.quantity = asked.get("quantity");
  const wanted = index(whole("layer", content.chosen.layer));
  state.layer = wanted >= 0 ? wanted : index(content.chosen.layer);
  state.head = whole("head", content.chosen.head);
  state.stretch = asked.get("stretch") === "1";
  at("quantity").value = state.quantity;
  at("layer").value = state.layer;
  at("stretch").checked = state.stretch;
  fillHeads();
  show();
}
start();
