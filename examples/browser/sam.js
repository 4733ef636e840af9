// What the page knows about SAM: the manifest, how a photo and its prompts get into the model's
// square, and how a mask gets out of it. As in samcompress/core/framing.py and predict.py: the same
// numbers come out. No page and no runtime in here.

/** Something that the page can explain. */
export class Problem extends Error {
  /**
   * @param {string} what one sentence
   * @param {{where?: string, got?: string, expected?: string, fix?: string}} parts
   */
  constructor(what, parts = {}) {
    super(what);
    this.parts = parts;
  }
}

export const MANIFEST = "samcompress.json";
const FORMAT = 1;
const EXPORT = 'sc.save(sc.compile.Export(backend="onnxruntime")(sam), folder)';

/**
 * What the page needs of samcompress.json.
 * @param {string} text the file
 * @param {string} where its address, for errors
 */
export function readManifest(text, where) {
  let document;
  try {
    document = JSON.parse(text);
  } catch (error) {
    throw new Problem("The manifest is not JSON.", {
      where, got: error.message, expected: "what sc.save wrote", fix: "copy the folder again",
    });
  }
  if (!Array.isArray(document?.steps) || !document.base || !document.files) {
    throw new Problem("The manifest is not one of samcompress.", {
      where, expected: "base, steps and files, as sc.save writes", fix: EXPORT,
    });
  }
  if (document.format > FORMAT) {
    throw new Problem("The model was saved by a newer samcompress.", {
      where, got: `format ${document.format}`, expected: `format ${FORMAT}`,
      fix: "take the page of that version",
    });
  }
  const state = document.steps.at(-1)?.state;
  if (!state?.files?.encoder) {
    throw new Problem("The model is saved, but not exported.", {
      where,
      got: document.steps.map((step) => step.type).join(" | ") || "no steps",
      expected: "compile.export as the last step",
      fix: EXPORT,
    });
  }
  if (state.backend !== "onnxruntime") {
    throw new Problem("The model is exported for another runtime.", {
      where, got: state.backend, expected: "onnxruntime", fix: EXPORT,
    });
  }
  try {
    return settings(document, state, where);
  } catch (error) {
    if (error instanceof Problem) throw error;
    throw new Problem("The manifest is damaged.", {
      where, got: error.message, expected: "what sc.save wrote", fix: "copy the folder again",
    });
  }
}

function settings(document, state, where) {
  const { config, source } = document.base;
  const files = (names) =>
    names.map((name) => ({ name, path: `artifacts/${name}`, ...document.files[`artifacts/${name}`] }));
  const found = {
    name: source ?? "model",
    steps: document.steps.map((step) => step.type),
    side: state.image_size,
    frame: frameOf(document, state, where),
    promptSide: state.frame[0],
    maskSize: state.grid.map((n) => 4 * n),
    padding: state.padding,
    mean: config.pixel_mean,
    std: config.pixel_std,
    encoder: files(state.files.encoder),
    decoder: files(state.files.prompt_decoder),
  };
  const numbers = [found.side, found.frame, found.promptSide, ...found.maskSize, ...found.padding,
    ...found.mean, ...found.std, ...[...found.encoder, ...found.decoder].map((file) => file.bytes)];
  if (!numbers.every(Number.isFinite)) throw new TypeError("a size is missing");
  return found;
}

/** Side of the square in which prompts and masks are placed, if the rule is SAM's. */
function frameOf(document, state, where) {
  const other = document.base.architecture === "sam2"
    || document.steps.some((step) => step.params?.of === "nano_sam");
  const { rule, frame } = state.framing
    ?? { rule: other ? "another" : "Framing", frame: state.image_size };
  if (rule !== "Framing") {
    throw new Problem("The model has a rule of its own for getting photos into its square.", {
      where, got: rule, expected: "SAM's: the longest side fills it",
      fix: "of published models NanoSAM and SAM 2 are such; run them in Python",
    });
  }
  return frame;
}

/** Height and width of a photo whose longest side becomes `side`. */
export function inside([height, width], side) {
  const scale = side / Math.max(height, width);
  return [Math.floor(height * scale + 0.5), Math.floor(width * scale + 0.5)];
}

/**
 * A photo as the encoder takes it: resized, normalised, padded at the right and below.
 * @param {ImageData} photo
 * @returns {Float32Array} 3 x S x S
 */
export function preprocess(photo, { side, mean, std }) {
  const [height, width] = inside([photo.height, photo.width], side);
  if (Math.min(height, width) === 0) {
    throw new Problem("The photo is too narrow for this model.", {
      got: `${photo.width} x ${photo.height} pixels`,
      expected: `at most ${2 * side} times as long as wide`,
    });
  }
  const pixels = resize(photo.data, [photo.height, photo.width], [height, width]);
  const planes = new Float32Array(3 * side * side);
  for (let c = 0; c < 3; c++) {
    const [m, s] = [Math.fround(mean[c]), Math.fround(std[c])];
    const normalised = Float32Array.from({ length: 256 }, (_, v) => Math.fround(v - m) / s);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        planes[(c * side + y) * side + x] = normalised[pixels[4 * (y * width + x) + c]];
      }
    }
  }
  return planes;
}

/** Pillow's bilinear filter on RGBA bytes, to the bit: rows first, then columns, in integers. */
export function resize(pixels, [height, width], [newHeight, newWidth]) {
  if (width !== newWidth) {
    const across = new Uint8ClampedArray(4 * height * newWidth);
    const columns = taps(width, newWidth);
    for (let y = 0; y < height; y++) {
      weigh(pixels, 4 * y * width, 4, across, 4 * y * newWidth, 4, columns);
    }
    pixels = across;
  }
  if (height !== newHeight) {
    const down = new Uint8ClampedArray(4 * newHeight * newWidth);
    const rows = taps(height, newHeight);
    for (let x = 0; x < newWidth; x++) {
      weigh(pixels, 4 * x, 4 * newWidth, down, 4 * x, 4 * newWidth, rows);
    }
    pixels = down;
  }
  return pixels;
}

const BITS = 22; // behind the point, of Pillow's weights

/** For each new pixel the first old one and the weights from there on. */
function taps(size, newSize) {
  const scale = size / newSize;
  const support = Math.max(scale, 1); // wider when shrinking: no aliasing
  return Array.from({ length: newSize }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const last = Math.min(size, Math.trunc(center + support + 0.5));
    const weights = [];
    for (let k = first; k < last; k++) {
      weights.push(Math.max(0, 1 - Math.abs((k - center + 0.5) * (1 / support))));
    }
    const sum = weights.reduce((a, b) => a + b, 0);
    const whole = weights.map((w) => Math.trunc(0.5 + (w / sum) * (1 << BITS)));
    return { first, weights: Int32Array.from(whole) };
  });
}

/** One row or column of three colours. */
function weigh(source, from, step, target, to, stride, taps) {
  for (let i = 0; i < taps.length; i++) {
    const { first, weights } = taps[i];
    let red = 1 << (BITS - 1), green = red, blue = red;
    for (let k = 0, at = from + first * step; k < weights.length; k++, at += step) {
      red += source[at] * weights[k];
      green += source[at + 1] * weights[k];
      blue += source[at + 2] * weights[k];
    }
    const at = to + i * stride;
    target[at] = red >> BITS;
    target[at + 1] = green >> BITS;
    target[at + 2] = blue >> BITS;
  }
}

/**
 * Points and box as the decoder takes them.
 * @param {{points: {x: number, y: number, label: 0 | 1}[], box: number[] | null}} prompt in pixels
 * @param {[number, number]} size height and width of the photo
 * @returns {{coords: Float32Array, labels: Float32Array}} N x 2 and N
 */
export function pack({ points, box }, size, { frame, promptSide, padding }) {
  const [height, width] = inside(size, frame);
  const ratio = promptSide / frame;
  const place = (x, y) => [x * (width / size[1]), y * (height / size[0])]
    // Pixel centres are whole numbers in either square.
    .map((v) => (ratio === 1 ? v : (v + 0.5) * ratio - 0.5));
  const coords = points.flatMap(({ x, y }) => place(x, y));
  const labels = points.map(({ label }) => label);
  const added = padding[(points.length > 0) + 2 * (box !== null)];
  for (let i = 0; i < added; i++) {
    coords.push(0, 0);
    labels.push(-1);
  }
  if (box !== null) {
    coords.push(...place(box[0], box[1]), ...place(box[2], box[3]));
    labels.push(2, 3);
  }
  return { coords: Float32Array.from(coords), labels: Float32Array.from(labels) };
}

/**
 * Logits of one mask as a mask of the photo.
 * @param {Float32Array} logits 4h x 4w, in the square
 * @param {[number, number]} size height and width of the photo
 * @returns {Uint8Array} H x W, 1 inside
 */
export function fullSize(logits, size, { maskSize, frame }) {
  const square = bilinear(logits, maskSize, maskSize[1], [frame, frame]);
  const full = bilinear(square, inside(size, frame), frame, size);
  const mask = new Uint8Array(full.length);
  for (let i = 0; i < full.length; i++) mask[i] = full[i] > 0;
  return mask;
}

/** torch's bilinear interpolation of the upper left part of an array. */
function bilinear(source, [height, width], stride, [newHeight, newWidth]) {
  const rows = between(height, newHeight);
  const columns = between(width, newWidth);
  const found = new Float32Array(newHeight * newWidth);
  const row = new Float32Array(width);
  for (let y = 0; y < newHeight; y++) {
    const above = rows.low[y] * stride, below = rows.high[y] * stride, down = rows.part[y];
    for (let x = 0; x < width; x++) {
      row[x] = (1 - down) * source[above + x] + down * source[below + x];
    }
    for (let x = 0, at = y * newWidth; x < newWidth; x++, at++) {
      const right = columns.part[x];
      found[at] = (1 - right) * row[columns.low[x]] + right * row[columns.high[x]];
    }
  }
  return found;
}

/** For each new place the two old ones it lies between, and how far it is from the first. */
function between(size, newSize) {
  const low = new Int32Array(newSize), high = new Int32Array(newSize);
  const part = new Float32Array(newSize);
  for (let i = 0; i < newSize; i++) {
    const at = Math.max(0, (i + 0.5) * (size / newSize) - 0.5);
    low[i] = Math.min(size - 1, Math.floor(at));
    high[i] = Math.min(size - 1, low[i] + 1);
    part[i] = at - low[i];
  }
  return { low, high, part };
}
