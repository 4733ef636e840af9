"""A mask from an exported SAM with onnxruntime and numpy alone; pillow reads the photo.

python plain_runtime.py FOLDER PHOTO X Y MASK.png, the folder being one that `sc.save` wrote.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

folder, (photo, x, y, target) = Path(sys.argv[1]) / "artifacts", sys.argv[2:6]
rule = json.loads((folder / "manifest.json").read_text())["image"]
encoder, decoder = (
    onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
    for name in ("encoder.onnx", "prompt_decoder.onnx")
)

# The longest side fills the square; zeros at the right and below.
image, size = Image.open(photo).convert("RGB"), rule["size"]
scale = size / max(image.size)
width, height = (int(side * scale + 0.5) for side in image.size)
square = np.zeros((1, 3, size, size), np.float32)
pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)
normal = (pixels - rule["mean"]) / rule["std"]
square[0, :, :height, :width] = normal.transpose(2, 0, 1)
(embedding,) = encoder.run(None, {"image": square})

# One click, and the point of no meaning that ends every prompt without a box.
_, _, _, side = decoder.get_outputs()[0].shape
points = {
    "image_embeddings": embedding,
    "point_coords": np.float32([[[float(x) * scale, float(y) * scale], [0, 0]]]),
    "point_labels": np.float32([[1, -1]]),
    "mask_input": np.zeros((1, 1, side, side), np.float32),
    "has_mask_input": np.zeros(1, np.float32),
}
logits, scores = decoder.run(None, points)

# The first mask is the one for a single answer; what was padded is cut off.
enlarged = Image.fromarray(logits[0, 0]).resize((size, size), Image.Resampling.BILINEAR)
inside = enlarged.crop((0, 0, width, height)).resize(image.size, Image.Resampling.BILINEAR)
mask = np.asarray(inside) > 0
Image.fromarray(mask).save(target)
print(f"{mask.mean():.1%} of the photo, predicted IoU {scores[0, 0]:.2f}")
