// What is drawn: the photo, its mask, the prompts. In colours that all eyes tell apart, with light
// edges that show on any photo.

const BLUE = [0, 114, 178];
const ORANGE = [179, 74, 0];
const HALO = "#fff", INK = "#000";
let layer = {}; // the mask as it is seen, and what it was made for

/**
 * Draw everything.
 * @param {HTMLCanvasElement} canvas gets as many pixels as are seen of it
 * @param {object} shown
 * @param {{bitmap: ImageBitmap, size: [number, number]}} shown.photo
 * @param {Uint8Array | null} shown.mask H x W
 * @param {{x: number, y: number, label: number}[]} shown.points
 * @param {number[] | null} shown.box
 * @param {{x: number, y: number} | null} shown.cross of the keyboard
 */
export function render(canvas, { photo, mask, points, box, cross }) {
  const [height, width] = photo.size;
  const unit = devicePixelRatio;
  canvas.style.setProperty("--ratio", width / height);
  const scale = (canvas.clientWidth * unit) / width;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.drawImage(photo.bitmap, 0, 0, canvas.width, canvas.height);
  if (mask) context.drawImage(outlined(mask, photo.size, canvas), 0, 0);
  const at = ({ x, y }) => [(x + 0.5) * scale, (y + 0.5) * scale];
  if (box) drawBox(context, box.map((v, i) => (i < 2 ? v : v + 1) * scale), unit);
  for (const point of points) drawPoint(context, at(point), point.label, unit);
  if (cross) drawCross(context, at(cross), unit);
}

/** The mask in its colour, at the photo's size. */
function painted(mask, [height, width]) {
  const picture = new ImageData(width, height);
  const colours = new Uint32Array(picture.data.buffer);
  const [full] = new Uint32Array(new Uint8Array([...BLUE, 255]).buffer);
  for (let i = 0; i < mask.length; i++) if (mask[i]) colours[i] = full;
  const sheet = new OffscreenCanvas(width, height);
  sheet.getContext("2d").putImageData(picture, 0, 0);
  return sheet;
}

/** The same at the size at which it is seen, half transparent, with a light edge around it. */
function outlined(mask, size, { width, height }) {
  if (layer.mask === mask && layer.width === width && layer.height === height) return layer.canvas;
  const sheet = painted(mask, size);
  const found = new OffscreenCanvas(width, height);
  const context = found.getContext("2d");
  const wide = 2 * devicePixelRatio;
  for (let turn = 0; turn < 16; turn++) {
    const angle = (turn * Math.PI) / 8;
    context.drawImage(sheet, wide * Math.cos(angle), wide * Math.sin(angle), width, height);
  }
  context.globalCompositeOperation = "source-in";
  context.fillStyle = HALO;
  context.fillRect(0, 0, width, height);
  context.globalCompositeOperation = "destination-out";
  context.drawImage(sheet, 0, 0, width, height);
  context.globalCompositeOperation = "destination-over";
  context.globalAlpha = 0.55;
  context.drawImage(sheet, 0, 0, width, height);
  layer = { mask, width, height, canvas: found };
  return found;
}

/** A dark line with a light edge. */
function twice(context, path, unit) {
  for (const [style, lineWidth] of [[HALO, 5 * unit], [INK, 2 * unit]]) {
    Object.assign(context, { strokeStyle: style, lineWidth });
    context.stroke(path);
  }
}

function drawBox(context, [x0, y0, x1, y1], unit) {
  const path = new Path2D();
  path.rect(x0, y0, x1 - x0, y1 - y0);
  twice(context, path, unit);
}

/** A disc with a plus or a minus: no need to see colours. */
function drawPoint(context, [x, y], label, unit) {
  const disc = new Path2D();
  disc.arc(x, y, 9 * unit, 0, 2 * Math.PI);
  context.fillStyle = `rgb(${label ? BLUE : ORANGE})`;
  context.fill(disc);
  Object.assign(context, { strokeStyle: HALO, lineWidth: 2 * unit });
  context.stroke(disc);
  const sign = new Path2D();
  sign.moveTo(x - 5 * unit, y);
  sign.lineTo(x + 5 * unit, y);
  if (label) {
    sign.moveTo(x, y - 5 * unit);
    sign.lineTo(x, y + 5 * unit);
  }
  context.stroke(sign);
}

function drawCross(context, [x, y], unit) {
  const path = new Path2D();
  for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
    path.moveTo(x + 12 * unit * dx, y + 12 * unit * dy);
    path.lineTo(x + 24 * unit * dx, y + 24 * unit * dy);
  }
  twice(context, path, unit);
}
