"""A mask from an exported SAM with onnxruntime and numpy alone; pillow reads the photo.

python plain_runtime.py FOLDER PHOTO X Y MASK.png, the folder being one that `sc.save` wrote.
"""

import json
import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image

folder, (photo, x, y, target) = Path(sys.argv[1], "artifacts"), sys.argv[2:6]
rule = json.loads((folder / "manifest.json").read_text())["image"]
encoder, decoder = (InferenceSession(folder / f"{n}.onnx") for n in ("encoder", "prompt_decoder"))

# The longest side fills the square; zeros at the right and below.
image, size = Image.open(photo).convert("RGB"), rule["size"]
scale = size / max(image.size)
width, height = (int(side * scale + 0.5) for side in image.size)
pixels = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
normal = ((pixels - rule["mean"]) / rule["std"]).astype(np.float32)
square = np.pad(normal, ((0, size - height), (0, size - width), (0, 0)))
(embedding,) = encoder.run(None, {"image": square.transpose(2, 0, 1)[None]})

# One click, and the point of no meaning that ends every prompt without a box.
points = {"point_labels": np.float32([[1, -1]]), "has_mask_input": np.zeros(1, np.float32)}
points["point_coords"] = np.float32([[[float(x) * scale, float(y) * scale], [0, 0]]])
points["mask_input"] = np.zeros((1, 1, *decoder.get_outputs()[0].shape[-2:]), np.float32)
logits, scores = decoder.run(None, {"image_embeddings": embedding, **points})

# The first mask is the one for a single answer; what was padded is cut off.
enlarged = Image.fromarray(logits[0, 0]).resize((size, size), Image.Resampling.BILINEAR)
inside = enlarged.crop((0, 0, width, height)).resize(image.size, Image.Resampling.BILINEAR)
mask = np.array(inside) > 0
Image.fromarray(mask).save(target)
print(f"{mask.mean():.1%} of the photo, predicted IoU {scores[0, 0]:.2f}")
