"""Reference outputs of published variants with synthetic weights, in the folder of shared data."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

import samcompress as sc
from samcompress.core.predict import Embedding, decode, encode, preprocess


@dataclass
class Reference:
    """One variant: its manifest, its arrays, its synthetic state dict under official names."""

    name: str
    synthetic: ModuleType
    manifest: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @classmethod
    def of(cls, name: str, shared: Path) -> Reference:
        folder = shared / "golden"
        spec = importlib.util.spec_from_file_location("synthetic", folder / "synthetic.py")
        synthetic = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(synthetic)
        manifest = json.loads((folder / f"{name}.json").read_text())
        with np.load(folder / f"{name}.npz") as arrays:
            return cls(name, synthetic, manifest, dict(arrays))

    def state(self, prefix: str = "") -> dict[str, torch.Tensor]:
        return self.synthetic.synthetic_state_dict(self.manifest, prefix=prefix)

    def image(self) -> np.ndarray:
        return self.synthetic.synthetic_image(**self.synthetic.IMAGE)

    def prompts(self) -> dict[str, sc.Prompt]:
        """The public prompts; the boxes of MobileSAMv2 are in its own file."""
        made = {}
        for name, asked in self.synthetic.PROMPTS.items():
            seed = asked.get("mask_seed")
            mask = None if seed is None else self.synthetic.synthetic_mask_logits(seed)
            made[name] = sc.Prompt(
                points=asked.get("points"),
                labels=asked.get("labels"),
                box=asked.get("box"),
                mask=mask,
            )
        return made

    def compare(self, kind: str, key: str, found: np.ndarray) -> float:
        """Error of the stored part; statistics of the whole are checked on the way."""
        if f"{key}_stats" in self.arrays:
            np.testing.assert_allclose(
                stats(found, rows=self.arrays[f"{key}_stats"].ndim == 2),
                self.arrays[f"{key}_stats"],
                rtol=1e-4,
                atol=1e-4,
            )
        return error(self.synthetic.subsample(kind, found), self.arrays[key])


def stats(array: np.ndarray, *, rows: bool) -> np.ndarray:
    """Mean, deviation, L2 norm, minimum and maximum, of all or of each first index."""
    flat = array.astype(np.float64).reshape(len(array) if rows else 1, -1)
    found = np.stack(
        [flat.mean(1), flat.std(1), np.linalg.norm(flat, axis=1), flat.min(1), flat.max(1)], 1
    )
    return found if rows else found[0]


def error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def sam_with(encoder: Any, image_size: int = 1024, **sizes: Any) -> Any:
    """segment_anything's prompt encoder and decoder with another image encoder, or with none."""
    least = {"depth": 1, "embed_dim": 12, "global_attn_indexes": ()}
    sam = sc.build("vit_b", image_size=image_size, **least, **sizes)
    if encoder is None:
        encoder = torch.nn.Identity()
        encoder.img_size = image_size
    sam.image_encoder = encoder
    return sam.eval()


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def eps_of(module: torch.nn.Module, kind: str) -> set[float]:
    return {m.eps for m in module.modules() if type(m).__name__ == kind}


def embed(reference: Reference, sam: Any) -> tuple[Embedding, dict[str, float]]:
    """The image through preprocessing and encoder, with the errors of both."""
    image = reference.image()
    pixels, _ = preprocess(sam, image)
    assert tuple(pixels[None].shape) == tuple(reference.arrays["input_shape"])
    errors = {"input": reference.compare("input", "input", pixels.numpy())}
    embedding = encode(sam, [image])[0]
    features = embedding.features[0, :256].numpy()
    assert features.shape == tuple(reference.arrays["embedding_shape"])
    errors["embedding"] = reference.compare("embedding", "embedding", features)
    mean = features.mean((1, 2))
    errors["channel mean"] = error(mean, reference.arrays["embedding_channel_mean"])
    return embedding, errors


def answer(
    sam: Any, embedding: Embedding, prompts: list[sc.Prompt], *, multimask: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(P, M, ...) low-resolution logits, scores and logits of the original size."""
    found = decode(sam, embedding, prompts, multimask=multimask, full_size=False)
    full = sam.postprocess_masks(found.logits, embedding.input_size, embedding.size)
    return found.logits.numpy(), found.scores.numpy(), full.numpy()


def check(
    reference: Reference, key: str, low: np.ndarray, scores: np.ndarray, full: np.ndarray
) -> dict[str, float]:
    """Errors of the masks of one key, (M, ...)."""
    iou = float(np.abs(scores - reference.arrays[f"{key}__iou"]).max())
    positive = np.abs((full > 0).sum((1, 2)) - reference.arrays[f"{key}__full_positive"])
    assert positive.max() <= 20, (key, positive)
    return {
        f"{key} low_res": reference.compare("low_res", f"{key}__low_res", low),
        f"{key} iou": iou,
        f"{key} full": reference.compare("full", f"{key}__full", full),
    }
