// The model at work, away from the page, which so never freezes: opens it, encodes a photo, answers
// prompts. Messages in: {id, call, given}; out: {id, found} or {id, problem}, and {progress}.

import { MANIFEST, Problem, fullSize, pack, preprocess, readManifest } from "./sam.js";

let ort, device, model, encoder, decoder;
let photo; // {size: [H, W], embedding}

const CALLS = { open, encode, decode };

// One after the other: a session is not to be called twice at once.
let queue = Promise.resolve();
self.onmessage = ({ data: { id, call, given } }) => {
  queue = queue.then(async () => {
    try {
      const { found, transfer } = await CALLS[call](given);
      self.postMessage({ id, found }, transfer ?? []);
    } catch (error) {
      self.postMessage({ id, problem: explained(error) });
    }
  });
};

function explained(error) {
  if (error instanceof Problem) return { what: error.message, ...error.parts };
  const memory = error instanceof RangeError || /memory|alloc/i.test(error.message);
  return {
    what: memory ? "There is not enough memory for this." : "Something went wrong.",
    got: error.message,
    fix: memory ? "a smaller model, or fewer open pages"
      : device === "webgpu" ? "?device=wasm at the end of the address" : "load the page again",
  };
}

/** Open runtime and model. */
async function open({ runtime, device: wanted, url, files }) {
  [encoder, decoder, photo] = [];
  const source = files ? fromFiles(files) : fromServer(url);
  model = readManifest(await (await source(MANIFEST)).text(), files ? MANIFEST : url + MANIFEST);
  await start(runtime, wanted);
  try {
    await sessions(source);
  } catch (error) {
    if (error instanceof Problem || device !== "webgpu" || wanted === "webgpu") throw error;
    // A graphics processor that cannot is no reason to do without.
    await start(runtime, "wasm");
    await sessions(source);
  }
  const { name, side, steps } = model;
  const bytes = [...model.encoder, ...model.decoder].reduce((sum, file) => sum + file.bytes, 0);
  const threads = ort.env.wasm.numThreads || 1;
  return { found: { name, side, steps, bytes, device, threads } };
}

async function start(runtime, wanted) {
  if (typeof WebAssembly === "undefined") throw wasmProblem("no WebAssembly in this browser");
  const adapter = wanted !== "wasm" && (await navigator.gpu?.requestAdapter().catch(() => null));
  // One that is software is slower than WebAssembly.
  const graphics = adapter && (wanted === "webgpu" || !adapter.info?.isFallbackAdapter);
  if (wanted === "webgpu" && !graphics) {
    throw new Problem("This browser has no WebGPU here.", {
      got: "device=webgpu", fix: "leave device= out of the address",
    });
  }
  device = graphics ? "webgpu" : "wasm";
  const address = `${runtime}ort.${device}.min.mjs`;
  try {
    ort = await import(address);
  } catch (error) {
    throw new Problem("onnxruntime-web is not there.", {
      where: address, got: error.message,
      fix: "npm install --prefix examples/browser, or serve.py --runtime FOLDER",
    });
  }
  ort.env.logLevel = "error";
}

async function sessions(source) {
  encoder = await session(model.encoder, source);
  decoder = await session(model.decoder, source);
  for (const [half, files, count] of [[encoder, model.encoder, 1], [decoder, model.decoder, 5]]) {
    if (half.inputNames.length !== count) {
      throw new Problem("A graph takes other inputs than this page gives.", {
        where: files[0].name, got: half.inputNames.join(", "), expected: `${count}`,
        fix: "export the model again",
      });
    }
  }
}

async function session([main, ...rest], source) {
  const bytes = await read(main, source);
  const externalData = [];
  for (const file of rest) externalData.push({ path: file.name, data: await read(file, source) });
  try {
    return await ort.InferenceSession.create(bytes, { executionProviders: [device], externalData });
  } catch (error) {
    if (/no available backend|webassembly|\.wasm/i.test(error.message)) throw wasmProblem(error.message);
    throw new Problem("onnxruntime-web cannot open a file of the model.", {
      where: main.name, got: error.message, fix: "export the model again",
    });
  }
}

function wasmProblem(got) {
  return new Problem("WebAssembly could not be loaded.", {
    got,
    expected: "onnxruntime-web's .wasm and .mjs files in one folder, of one version",
    fix: "npm install --prefix examples/browser, then load the page again; or another browser",
  });
}

/** Reads a folder of a server: path to Response. */
function fromServer(url) {
  return async (path) => {
    let response;
    try {
      response = await fetch(url + path);
    } catch (error) {
      throw new Problem("The server does not answer.", {
        where: url + path, got: error.message, fix: "start serve.py again",
      });
    }
    if (response.ok) return response;
    throw path === MANIFEST
      ? new Problem("There is no model.", {
        where: url + path, got: `${response.status} ${response.statusText}`,
        fix: "python examples/browser/serve.py FOLDER, or open a folder here",
      })
      : missing(url + path, `${response.status} ${response.statusText}`);
  };
}

/** Reads a folder that was chosen in the page: path to Response. */
function fromFiles(files) {
  return async (path) => {
    if (files.has(path)) return new Response(files.get(path).stream());
    throw path === MANIFEST
      ? new Problem("There is no model in this folder.", {
        got: [...files.keys()].slice(0, 3).join(", "), expected: MANIFEST,
        fix: "choose the folder that sc.save wrote",
      })
      : missing(path, "no file");
  };
}

function missing(where, got) {
  return new Problem("A file of the model is missing.", { where, got, fix: "copy the whole folder again" });
}

/** A file of the model, checked against the manifest. */
async function read(file, source) {
  const response = await source(file.path);
  const bytes = new Uint8Array(file.bytes);
  let done = 0;
  const reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (done + part.value.length <= file.bytes) bytes.set(part.value, done);
    done += part.value.length;
    self.postMessage({ progress: { name: file.name, share: Math.min(1, done / file.bytes) } });
  }
  // Browsers give out hashes on https and localhost only.
  const damaged = done !== file.bytes ? `${done} bytes`
    : crypto.subtle && (await sha256(bytes)) !== file.sha256 ? "another SHA-256" : null;
  if (damaged) {
    throw new Problem("A file of the model was cut short or changed.", {
      where: file.path, got: damaged,
      expected: done !== file.bytes ? `${file.bytes} bytes` : file.sha256,
      fix: "copy the whole folder again",
    });
  }
  return bytes;
}

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Encode a photo; every prompt after it is about this one. */
async function encode({ bitmap }) {
  photo = undefined;
  const size = [bitmap.height, bitmap.width];
  const context = new OffscreenCanvas(size[1], size[0]).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const start = performance.now();
  const planes = preprocess(context.getImageData(0, 0, size[1], size[0]), model);
  const ready = performance.now();
  const [embedding] = await run(encoder, new ort.Tensor("float32", planes, [1, 3, model.side, model.side]));
  photo = { size, embedding };
  return { found: { resize: ready - start, encoder: performance.now() - ready } };
}

/** The single mask of a prompt. */
async function decode({ prompt }) {
  const { size, embedding } = photo;
  const { coords, labels } = pack(prompt, size, model);
  const [h, w] = model.maskSize;
  const float = (data, shape) => new ort.Tensor("float32", data, shape);
  const start = performance.now();
  const [masks, scores] = await run(
    decoder,
    embedding,
    float(coords, [1, labels.length, 2]),
    float(labels, [1, labels.length]),
    float(new Float32Array(h * w), [1, 1, h, w]),
    float(new Float32Array(1), [1]),
  );
  const ready = performance.now();
  // The first of all masks is the one for a prompt taken as it is.
  const mask = fullSize(masks.data.subarray(0, h * w), size, model);
  const ms = { prompt: ready - start, mask: performance.now() - ready };
  return { found: { mask, score: scores.data[0], ms }, transfer: [mask.buffer] };
}

/** Tensors in and out by their place, as in Python. */
async function run(session, ...tensors) {
  const given = Object.fromEntries(session.inputNames.map((name, i) => [name, tensors[i]]));
  const found = await session.run(given);
  return session.outputNames.map((name) => found[name]);
}
