"""The example that runs an exported SAM without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import random_sam
from PIL import Image

import samcompress as sc
from samcompress.compile.backends import BACKENDS

SCRIPT = Path(__file__).parents[2] / "examples" / "plain_runtime.py"
ALONE = """
import runpy, sys
for name in ("torch", "torchvision", "segment_anything", "samcompress"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(
    BACKENDS["onnxruntime"].unavailable() is not None, reason="onnx extra is not installed"
)
def test_same_mask_without_torch(tmp_path: Path) -> None:
    exported = sc.compile.Export()(random_sam(), progress=False)
    sc.save(exported, tmp_path / "exported")
    image = sc.shapes(1, seed=9, size=(60, 81))[0].image
    Image.fromarray(image).save(tmp_path / "photo.png")
    arguments = [SCRIPT, tmp_path / "exported", tmp_path / "photo.png", 20, 30, tmp_path / "m.png"]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    mask = np.asarray(Image.open(tmp_path / "m.png"))
    prompt = sc.Prompt(points=[[20, 30]])
    found = sc.predict(exported, [image], [[prompt]], multimask=False)[0]
    expected = found.masks[0, 0].numpy()
    assert mask.shape == (60, 81)
    assert 0.01 < expected.mean() < 0.99
    # Pixels whose logit is zero but for rounding.
    assert (mask != expected).mean() < 0.005
    assert done.stdout == (
        f"{mask.mean():.1%} of the photo, predicted IoU {float(found.scores[0, 0]):.2f}\n"
    )
