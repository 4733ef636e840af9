// The page: shows the photo, collects prompts, draws masks. All computing is done by worker.js.

import { render } from "./draw.js";
import { Problem } from "./sam.js";

const $ = (id) => document.getElementById(id);
const canvas = $("canvas"), stage = $("stage"), status = $("status");
const options = new URLSearchParams(location.search);
const address = (name, usual) => new URL(options.get(name) ?? usual, location.href).href.replace(/\/?$/, "/");
const RUNTIME = address("runtime", "node_modules/onnxruntime-web/dist/");
const MODEL = address("model", "model/");
const DRAG = 5; // so many pixels of the screen make a drag of a click

/** What is on the page now. */
export const view = {
  model: null, // {name, side, ...} once it is open
  photo: null, // {bitmap, size: [H, W]}
  encoded: false,
  prompts: [], // in the order given: {x, y, label} or {box}
  mask: null, // H x W, 1 inside
  score: null,
  ms: {},
};
let cursor = null; // {x, y} of the keyboard's cross
let corner = null; // first corner of a box by keys
let drag = null; // {from, to} of a box by pointer
let wanted = false, working = false; // a prompt is to be answered, one is being answered

// The worker

const worker = new Worker("worker.js", { type: "module" });
const waiting = new Map();
let calls = 0;

worker.onmessage = ({ data: { id, found, problem, progress } }) => {
  if (progress) return loading(progress);
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  if (problem) reject(new Problem(problem.what, problem));
  else resolve(found);
};
worker.onerror = (event) => {
  event.preventDefault();
  show(new Problem("The page's worker does not start.", {
    got: event.message, fix: "a browser of 2023 or later; load the page again",
  }));
};

function call(name, given) {
  return new Promise((resolve, reject) => {
    waiting.set(++calls, { resolve, reject });
    worker.postMessage({ id: calls, call: name, given });
  });
}

async function open(source) {
  Object.assign(view, { model: null, encoded: false });
  say("loading", "Opening the model.");
  try {
    view.model = await call("open", { runtime: RUNTIME, device: options.get("device"), ...source });
  } catch (problem) {
    return show(problem, { folder: true });
  } finally {
    $("progress").hidden = true;
  }
  const { name, side, steps, bytes, device, threads } = view.model;
  const where = device === "webgpu" ? "WebGPU"
    : `WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}`;
  $("model").textContent =
    `Model: ${name}, ${side} px, ${digits(bytes / 1e6)} MB (${steps.join(" | ")}). Runs on ${where}.`;
  return encode();
}

/** Show a photo, at once, and encode it when there is a model. */
async function choose(blob) {
  if (!blob) return undefined;
  try {
    const bitmap = await picture(blob);
    Object.assign(view, { photo: { bitmap, size: [bitmap.height, bitmap.width] }, encoded: false });
  } catch (problem) {
    return show(problem);
  }
  reset();
  draw();
  return view.model && encode();
}

async function encode() {
  const { photo } = view;
  if (!photo) return say("ready", "Choose a photo, or drop one.");
  say("busy", "Encoding the photo.");
  try {
    const ms = await call("encode", { bitmap: photo.bitmap });
    if (photo !== view.photo) return undefined; // another was chosen meanwhile
    Object.assign(view, { ms, encoded: true });
  } catch (problem) {
    return show(problem);
  }
  $("encoder-ms").textContent = `${digits(view.ms.encoder)} ms`;
  $("encoder-more").textContent = `+ ${digits(view.ms.resize)} ms resize`;
  say("ready", "Click on a thing in the photo.");
  return ask();
}

/** Answer the prompts there are; those that came meanwhile are answered together after that. */
async function ask() {
  draw();
  wanted = true;
  if (working) return;
  working = true;
  while (wanted) {
    wanted = false;
    const { photo } = view;
    if (view.encoded && view.prompts.length) await answer(photo);
  }
  working = false;
}

async function answer(photo) {
  say("busy", "Finding the mask.");
  try {
    const { mask, score, ms } = await call("decode", { prompt: prompt() });
    if (photo !== view.photo || !view.prompts.length) return;
    Object.assign(view, { mask, score, ms: { ...view.ms, ...ms } });
    $("prompt-ms").textContent = `${digits(ms.prompt)} ms`;
    $("prompt-more").textContent = `+ ${digits(ms.mask)} ms resize`;
    let area = 0;
    for (const pixel of mask) area += pixel / mask.length;
    say("ready", area ? `The mask covers ${digits(100 * area)} % of the photo. Expected IoU ${score.toFixed(2)}.`
      : "The mask is empty. Mark another place.");
    draw();
  } catch (problem) {
    show(problem);
  }
}

/** All points, and the last box. */
function prompt() {
  return {
    points: view.prompts.filter((given) => !given.box),
    box: view.prompts.findLast((given) => given.box)?.box ?? null,
  };
}

const MOST_PIXELS = 16_000_000; // phones have no larger canvas

async function picture(blob) {
  // Pixels as they are stored, turned as the camera says: what Python reads.
  const as = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, as);
  } catch {
    throw new Problem("The browser cannot read this as a photo.", {
      where: blob.name, got: blob.type || "a file of unknown type", expected: "JPEG, PNG or WebP",
    });
  }
  const shrink = Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height));
  if (shrink >= 1) return bitmap;
  const shorter = (side) => Math.max(1, Math.floor(side * shrink));
  return createImageBitmap(bitmap, {
    ...as, resizeWidth: shorter(bitmap.width), resizeHeight: shorter(bitmap.height), resizeQuality: "high",
  });
}

// What is said

function say(state, text) {
  $("problem").hidden = true;
  status.dataset.state = state;
  status.textContent = text;
}

function show(problem, { folder = false } = {}) {
  const { what, ...parts } = { what: problem.message, ...problem.parts };
  const rows = ["where", "got", "expected", "fix"].filter((name) => parts[name]);
  const cell = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
  $("problem").querySelector("h2").textContent = what;
  $("problem").querySelector("dl").replaceChildren(
    ...rows.flatMap((name) => [cell("dt", name === "fix" ? "try" : name), cell("dd", parts[name])]),
  );
  $("problem").querySelector("button").hidden = !folder;
  $("problem").hidden = false;
  status.dataset.state = "error";
}

function loading({ name, share }) {
  $("progress").hidden = false;
  $("progress").value = share;
  say("loading", `Loading ${name}.`);
}

const digits = (number) => Number(number.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 2 });

// What is seen

function draw() {
  const { photo, mask, prompts } = view;
  canvas.hidden = !photo;
  $("empty").hidden = Boolean(photo);
  stage.toggleAttribute("data-empty", !photo);
  $("modes").disabled = !photo;
  for (const name of ["undo", "clear"]) button(name).disabled = !prompts.length;
  button("save").disabled = !mask;
  document.querySelector(".row [data-does=photo]").disabled = !photo;
  if (!photo) return;
  const box = drag ? edges(drag.from, drag.to) : corner ? edges(corner, cursor) : prompt().box;
  const cross = document.activeElement === canvas ? cursor : null;
  render(canvas, { photo, mask, points: prompt().points, box, cross });
}

// Prompts

const mode = () => new FormData($("tools")).get("mode");

function add(given) {
  view.prompts.push(given);
  ask();
}

function reset() {
  Object.assign(view, { prompts: [], mask: null, score: null });
  cursor = corner = drag = null;
  $("prompt-ms").textContent = "–";
  $("prompt-more").textContent = "once a click";
}

const edges = (a, b) => [Math.min(a.x, b.x), Math.min(a.y, b.y), Math.max(a.x, b.x), Math.max(a.y, b.y)];

/** Whole pixels, as the library's prompts. */
function pixel({ clientX, clientY }) {
  const { left, top, width, height } = canvas.getBoundingClientRect();
  const [h, w] = view.photo.size;
  const within = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
  return { x: within((clientX - left) / width, w), y: within((clientY - top) / height, h) };
}

canvas.addEventListener("pointerdown", (event) => {
  if (!view.photo || event.button > 2 || !event.isPrimary) return;
  const outside = event.button === 2 || event.shiftKey || event.ctrlKey;
  drag = { from: pixel(event), to: pixel(event), start: event, outside, far: false };
  cursor = corner = null;
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", (event) => {
  if (!drag) return;
  drag.to = pixel(event);
  // A finger scrolls, unless it is to draw a box.
  const draws = !drag.outside && (event.pointerType === "mouse" || mode() === "box");
  drag.far ||= draws
    && Math.hypot(event.clientX - drag.start.clientX, event.clientY - drag.start.clientY) > DRAG;
  if (drag.far) draw();
});
canvas.addEventListener("pointerup", () => {
  if (!drag) return;
  const { from, to, outside, far } = drag;
  drag = null;
  if (far) add({ box: edges(from, to) });
  else if (outside || mode() !== "box") add({ ...from, label: outside ? 0 : Number(mode()) });
  else say("ready", "Drag from corner to corner for a box.");
});
canvas.addEventListener("pointercancel", () => {
  drag = null;
  draw();
});
canvas.addEventListener("contextmenu", (event) => event.preventDefault());

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

canvas.addEventListener("keydown", (event) => {
  if (!view.photo) return;
  const [height, width] = view.photo.size;
  const arrow = ARROWS[event.key];
  if (arrow) {
    const far = Math.max(1, Math.round(Math.max(height, width) / 200)) * (event.shiftKey ? 10 : 1);
    const from = cursor ?? { x: width >> 1, y: height >> 1 };
    cursor = {
      x: Math.min(width - 1, Math.max(0, from.x + arrow[0] * far)),
      y: Math.min(height - 1, Math.max(0, from.y + arrow[1] * far)),
    };
    draw();
  } else if (event.key === "Enter" || event.key === " ") {
    cursor ??= { x: width >> 1, y: height >> 1 };
    mark(event.shiftKey);
  } else if (event.key === "Backspace" || event.key === "Delete") {
    DOES.undo();
  } else if (event.key === "Escape") {
    DOES.clear();
  } else {
    return;
  }
  event.preventDefault();
});

/** What Enter does where the cross is. */
function mark(outside) {
  if (mode() !== "box" || outside) return add({ ...cursor, label: outside ? 0 : Number(mode()) });
  if (!corner) {
    corner = cursor;
    say("ready", "First corner. Move on and press Enter for the other one.");
    return draw();
  }
  const box = edges(corner, cursor);
  corner = null;
  return add({ box });
}

for (const name of ["focus", "blur"]) {
  canvas.addEventListener(name, () => {
    if (name === "focus" && canvas.matches(":focus-visible") && view.photo && !drag) {
      cursor ??= { x: view.photo.size[1] >> 1, y: view.photo.size[0] >> 1 };
    }
    draw();
  });
}
$("modes").addEventListener("change", () => {
  canvas.dataset.mode = mode();
  corner = null;
});

// Buttons, files

const button = (name) => document.querySelector(`[data-does=${name}]`);

const DOES = {
  photo: () => $("photo-file").click(),
  model: () => $("model-files").click(),
  undo() {
    corner ? (corner = null) : view.prompts.pop();
    view.prompts.length ? ask() : DOES.clear();
  },
  clear() {
    const at = cursor;
    reset();
    cursor = at;
    if (view.encoded) say("ready", "Click on a thing in the photo.");
    draw();
  },
  async save() {
    const [height, width] = view.photo.size;
    const picture = new ImageData(width, height);
    new Uint32Array(picture.data.buffer).set(Uint32Array.from(view.mask, (m) => (m ? 0xffffffff : 0xff000000)));
    const paper = new OffscreenCanvas(width, height);
    paper.getContext("2d").putImageData(picture, 0, 0);
    const href = URL.createObjectURL(await paper.convertToBlob());
    Object.assign(document.createElement("a"), { href, download: "mask.png" }).click();
    setTimeout(() => URL.revokeObjectURL(href), 60_000);
  },
};
document.addEventListener("click", ({ target }) => DOES[target.dataset?.does]?.());
$("photo-file").addEventListener("change", ({ target }) => {
  choose(target.files[0]);
  target.value = ""; // so that the same one can be chosen again
});
$("model-files").addEventListener("change", ({ target }) => {
  // "folder/artifacts/encoder.onnx" without the folder.
  const path = (file) => file.webkitRelativePath.split("/").slice(1).join("/");
  if (target.files.length) open({ files: new Map([...target.files].map((file) => [path(file), file])) });
  target.value = "";
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  stage.classList.add("over");
});
document.addEventListener("dragleave", ({ relatedTarget }) => relatedTarget || stage.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  stage.classList.remove("over");
  choose(event.dataTransfer.files[0]);
});
new ResizeObserver(draw).observe(stage);

open({ url: MODEL });
