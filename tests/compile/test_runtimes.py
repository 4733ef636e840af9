"""Precisions below float32 on whole SAMs, and large ones; `test_backends.py` has float32."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from conftest import random_sam, randomise
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from zoo_models import MODELS

import samcompress as sc
from samcompress.compile._graphs import PromptDecoder
from samcompress.compile.backends import BACKENDS
from samcompress.core.predict import preprocess

DATA = sc.shapes(3, seed=3, size=(60, 80))
PROMPTS = [sc.Prompt(points=[[20, 30]]), sc.Prompt(box=[5, 8, 60, 50])]
# Largest relative L2 error of the embedding.
KINDS = {
    ("onnxruntime", "int8"): 0.03,
    ("openvino", "bfloat16"): 0.02,
    ("openvino", "int8"): 0.06,
    ("aot", "bfloat16"): 0.02,
    ("aot", "int8"): 0.06,
}
AGAIN = """
import sys, numpy as np, samcompress as sc
image = sc.shapes(1, seed=9, size=(60, 80))[0].image
prompts = [sc.Prompt(points=[[20, 30]]), sc.Prompt(box=[5, 8, 60, 50])]
found = sc.predict(sc.load(sys.argv[1]), [image], [prompts], multimask=True)[0].logits
np.save(sys.argv[2], found.numpy())
"""


def logits(model: torch.nn.Module) -> torch.Tensor:
    image = sc.shapes(1, seed=9, size=(60, 80))[0].image
    return sc.predict(model, [image], [PROMPTS], multimask=True)[0].logits


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(kind, id="-".join(kind), marks=[pytest.mark.slow] * (kind[0] == "aot"))
        for kind in KINDS
    ],
)
def made(request: pytest.FixtureRequest) -> tuple[Any, Any, sc.compile.Export]:
    """A SAM, the same exported, and the step."""
    backend, precision = request.param
    reason = BACKENDS[backend].unavailable(precision)
    if reason:
        pytest.skip(reason)
    sam = random_sam().eval()
    step = sc.compile.Export(backend=backend, precision=precision, images=2)
    return sam, step(sam, data=DATA, progress=False), step


def test_embedding_and_masks(made: tuple[Any, Any, sc.compile.Export]) -> None:
    sam, exported, step = made
    allowed = KINDS[step.backend, step.precision]
    image = preprocess(sam, DATA[0].image)[0][None]
    with torch.no_grad():
        expected, found = sam.image_encoder(image), exported.image_encoder(image)
    error = float((found - expected).norm() / expected.norm())
    assert 1e-4 < error < allowed
    state = sc.lineage(exported)[-1].state
    assert state["precision"] == step.precision
    assert state["errors"]["embedding"] <= state["tolerance"]
    # The decoder stays in floats: its own error is that of rounding.
    assert state["errors"]["logits"] < 1e-5
    calibrators = set(BACKENDS[step.backend].calibrators)
    assert calibrators & state["versions"].keys() == (calibrators if step.needs_data else set())
    if step.backend == "openvino":
        # Asked for, not left to the runtime, which takes bfloat16 for floats by itself.
        assert state["granted"]["encoder"] == {"floats": "bf16"}
        assert state["granted"]["prompt_decoder"] == {"floats": "f32"}
    apart = (logits(exported) - logits(sam)).norm() / logits(sam).norm()
    assert float(apart) < 3 * allowed + 1e-5


def test_predictor_and_generator(made: tuple[Any, Any, sc.compile.Export]) -> None:
    _, exported, _ = made
    image = sc.shapes(1, seed=9, size=(48, 60))[0].image
    predictor = SamPredictor(exported)
    predictor.set_image(image)
    low = predictor.predict(np.array([[20, 30], [3, 3]]), np.array([1, 0]))[2]
    masks, scores, _ = predictor.predict(box=np.array([5, 8, 40, 40]), mask_input=low[:1])
    assert masks.shape == (3, 48, 60)
    assert np.isfinite(scores).all()
    generator = SamAutomaticMaskGenerator(
        exported, points_per_side=2, pred_iou_thresh=-9, stability_score_thresh=-1
    )
    assert len(generator.generate(image)) > 0


def test_saved_and_opened_in_another_process(
    made: tuple[Any, Any, sc.compile.Export], tmp_path: Path
) -> None:
    _, exported, step = made
    folder = tmp_path / "saved"
    sc.save(exported, folder)
    names = {path.suffix for path in (folder / "artifacts").iterdir()}
    assert BACKENDS[step.backend].suffix in names
    arguments = [sys.executable, "-c", AGAIN, str(folder), str(tmp_path / "found.npy")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.from_numpy(np.load(tmp_path / "found.npy"))
    torch.testing.assert_close(found, logits(exported), rtol=0, atol=1e-5)
    path = next((folder / "artifacts").glob(f"encoder{BACKENDS[step.backend].suffix}"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(sc.errors.CheckpointError, match="missing or cut short"):
        sc.load(folder)


def test_integers_of_openvino_follow_trained_weights() -> None:
    reason = BACKENDS["openvino"].unavailable("int8")
    if reason:
        pytest.skip(reason)
    tiny, scenes = sc.load("tiny").eval(), sc.shapes(6, seed=5, size=256)
    step = sc.compile.Export(backend="openvino", precision="int8", images=6)
    exported = step(tiny, data=scenes, progress=False)
    with torch.no_grad():
        image = preprocess(tiny, sc.shapes(1, seed=9, size=256)[0].image)[0][None]
        expected, found = tiny.image_encoder(image), exported.image_encoder(image)
    # 0.19 if NNCF smooths scales, 0.03 if it takes every product.
    assert float((found - expected).norm() / expected.norm()) < 0.025


def test_integers_of_openvino_need_images() -> None:
    step = sc.compile.Export(backend="openvino", precision="int8")
    assert step.needs_data
    assert not sc.compile.Export(backend="onnxruntime", precision="int8").needs_data
    with pytest.raises(sc.errors.DataError, match=r"compile\.export needs images"):
        step(random_sam())


def test_no_integers_of_onnxruntime_for_convolutions() -> None:
    reason = BACKENDS["onnxruntime"].unavailable("int8")
    if reason:
        pytest.skip(reason)
    step = sc.compile.Export(backend="onnxruntime", precision="int8")
    with pytest.raises(sc.errors.BackendError, match="would have no integer products") as caught:
        step(MODELS["efficient_vit_sam"](), progress=False)
    assert "backend='openvino'" in str(caught.value)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["openvino", pytest.param("aot", marks=pytest.mark.slow)])
def test_decoder(backend: str, precision: Literal["float32", "bfloat16"]) -> None:
    """In either type; a model with other channels, and int8 weights stored, exports too."""
    reason = BACKENDS[backend].unavailable(precision)
    if reason:
        pytest.skip(reason)
    chain = (
        sc.substitute.HQ()
        | sc.quantize.Int8Weights(min_size=0)
        | sc.compile.Export(backend=backend, decoder=precision)
    )
    exported = chain(random_sam(), progress=False)
    errors = sc.lineage(exported)[-1].state["errors"]
    assert errors["embedding"] < 1e-5
    assert (errors["logits"] > 1e-4) == (precision == "bfloat16")


def test_coordinates_keep_their_bits() -> None:
    """The graph's phases of points are segment_anything's, where its own lose bits too."""
    sam = random_sam()
    graph, layer = PromptDecoder(sam.prompt_encoder, sam.mask_decoder), sam.prompt_encoder.pe_layer
    points, size = 128 * torch.rand(4, 3, 2), sam.prompt_encoder.input_image_size
    expected = layer.forward_with_coords(points, size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, usual = graph._placed(points), layer.forward_with_coords(points, size)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (usual - expected).abs().max() > 1e-3


@pytest.mark.slow
def test_masks_of_a_bfloat16_decoder() -> None:
    reason = BACKENDS["aot"].unavailable("bfloat16")
    if reason:
        pytest.skip(reason)
    sam = random_sam()
    exported = sc.compile.Export(backend="aot", decoder="bfloat16")(sam, progress=False)
    error = float((logits(exported) - logits(sam)).norm() / logits(sam).norm())
    assert 1e-4 < error < 0.02


def test_nothing_is_reported(tmp_path: Path) -> None:
    """Importing OpenVINO and NNCF says so over the network, and to a file at home, unless told."""
    if BACKENDS["openvino"].unavailable("int8"):
        pytest.skip(str(BACKENDS["openvino"].unavailable("int8")))
    code = (
        "from samcompress.compile.backends import BACKENDS; BACKENDS['openvino'].ready('int8');"
        "from openvino_telemetry import Telemetry; print(Telemetry().consent)"
    )
    home = {"HOME": str(tmp_path), "PATH": "", "CI": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=home
    )
    assert done.stdout == "False\n"
    assert not (tmp_path / "intel").exists()


def test_settings() -> None:
    with pytest.raises(sc.errors.ConfigError, match="there is no such backend") as caught:
        sc.compile.Export(backend="openvine")
    assert "openvino" in str(caught.value)
    with pytest.raises(sc.errors.ConfigError, match=r"compile\.export: precision has a value"):
        sc.compile.Export(precision="float8")
    with pytest.raises(sc.errors.ConfigError) as caught:
        sc.compile.Export(precision="bfloat16")
    assert str(caught.value).startswith(
        "compile.export: onnxruntime does not compute in this precision.\n"
        "  got       bfloat16\n"
        "  expected  float32 | int8\n"
        "  try       onnxruntime: float32, int8; openvino: float32, bfloat16, int8; aot: float32, "
    )
    with pytest.raises(sc.errors.ConfigError, match="aot does not compute in this decoder"):
        sc.compile.Export(backend="aot", decoder="float16")
    with pytest.raises(sc.errors.ConfigError, match="images is out of range"):
        sc.compile.Export(images=0)


def test_recipes_of_version_1() -> None:
    old = {"type": "compile.export", "version": 1, "params": {"dtype": "float32"}}
    (step,) = sc.Pipeline.from_dict([old])
    assert step == sc.compile.Export()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "aot"])
def test_vit_b(backend: str) -> None:
    """Minutes each."""
    reason = BACKENDS[backend].unavailable()
    if reason:
        pytest.skip(reason)
    sam = randomise(sc.build("vit_b", image_size=512))
    chain = sc.attention.Fused() | sc.compile.Export(backend=backend)
    exported = chain(sam, consume=True, progress=False)
    errors = sc.lineage(exported)[-1].state["errors"]
    assert max(errors.values()) < 1e-4
    assert logits(exported).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["mobile_sam", "efficient_vit_sam_l0"])
def test_published_encoders(name: str, precision: str) -> None:
    reason = BACKENDS["openvino"].unavailable(precision)
    if reason:
        pytest.skip(reason)
    pytest.importorskip("timm")
    step = sc.compile.Export(backend="openvino", precision=precision)
    exported = step(randomise(sc.build(name)), consume=True, progress=False)
    state = sc.lineage(exported)[-1].state
    assert state["errors"]["embedding"] < (1e-4 if precision == "float32" else 0.05)
    assert state["errors"]["logits"] < 1e-4
    assert logits(exported).isfinite().all()
