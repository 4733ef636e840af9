"""A SAM that runs from exported files, against the torch model it was made from."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_sam
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from torch import nn

import samcompress as sc
from samcompress.compile._facades import ExportedEncoder
from samcompress.compile._graphs import PromptDecoder
from samcompress.compile.backends import BACKENDS, Backend, Opened
from samcompress.core.errors import BackendError

needs_onnx = pytest.mark.skipif(
    BACKENDS["onnxruntime"].unavailable() is not None, reason="onnx extra is not installed"
)
INT8 = sc.quantize.Int8Weights(min_size=0)
# Points, labels, box, mask of each prompt, in the padded frame of 64.
KINDS = {
    "one point": (1, 1, False, False),
    "one point for seven": (7, 1, False, False),
    "five points": (2, 5, False, False),
    "box": (3, 0, True, False),
    "box and points": (2, 3, True, False),
    "mask and point": (2, 1, False, True),
    "mask and box": (1, 0, True, True),
    "mask alone": (2, 0, False, True),
    "nothing": (0, 0, False, False),
}


@pytest.fixture(scope="module")
def chain() -> tuple[nn.Module, nn.Module]:
    """Fused blocks and int8 weights, in torch and exported."""
    small = (sc.attention.Fused() | INT8)(random_sam(), progress=False)
    return small, sc.compile.Export()(small, progress=False)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """A runtime that runs the torch module itself, so that a test takes no time."""
    runtime = Pretend()
    monkeypatch.setitem(BACKENDS, "onnxruntime", runtime)
    return runtime


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> Fixed:
    """The same without free sizes."""
    runtime = Fixed()
    monkeypatch.setitem(BACKENDS, "onnxruntime", runtime)
    return runtime


class Pretend(Backend):
    name, suffix, extra = "onnxruntime", ".onnx", "onnx"
    integers = True

    def __init__(self) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.off_by = 0.0
        self.threads: list[int] = []

    def export(self, module: nn.Module, example: Any, path: Path, **rest: Any) -> list[Path]:
        if path.name in self.modules and self.off_by < 0:
            raise BackendError("pretend could not export.", where="export")
        self.modules[path.name] = copy.deepcopy(module)
        path.write_text(path.name)
        return [path]

    def load(self, path: Path, *, device: str, threads: int) -> Callable[..., Any]:
        self.threads.append(threads)

        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                out = self.modules[path.name](*tensors)
            return tuple(t + self.off_by for t in (out if isinstance(out, tuple) else (out,)))

        return Opened(run, {"floats": "f32"})


class Fixed(Pretend):
    """A runtime that takes tensors of the sizes it was shown, and of no other."""

    dynamic_shapes = False

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, list[torch.Size]] = {}
        self.calls: list[str] = []

    def export(self, module: nn.Module, example: Any, path: Path, **rest: Any) -> list[Path]:
        assert rest["options"].dynamic == {}
        self.shown[path.name] = [t.shape for t in example]
        return super().export(module, example, path, **rest)

    def load(self, path: Path, *, device: str, threads: int) -> Callable[..., Any]:
        inner = super().load(path, device=device, threads=threads)

        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            assert [t.shape for t in tensors] == self.shown[path.name]
            self.calls.append(path.stem)
            return inner(*tensors)

        return run


def prompts(model: nn.Module, kind: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    count, n, box, mask = KINDS[kind]
    points = boxes = masks = None
    if n:
        labels = torch.randint(-1, 2, (count, n), generator=generator)
        points = 64 * torch.rand(count, n, 2, generator=generator), labels
    if box:
        boxes = 64 * torch.rand(count, 4, generator=generator)
    if mask:
        size = model.prompt_encoder.mask_input_size
        masks = 9 * torch.randn(count, 1, *size, generator=generator)
    return {"points": points, "boxes": boxes, "masks": masks}


def decode(model: nn.Module, multimask: bool, **asked: Any) -> tuple[torch.Tensor, torch.Tensor]:
    channels = 32 + getattr(model.mask_decoder, "features", 0)
    embedding = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        sparse, dense = model.prompt_encoder(**asked)
        return model.mask_decoder(
            image_embeddings=embedding,
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )


def assert_same(found: Any, expected: Any, atol: float = 1e-5) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


# --- against torch -----------------------------------------------------------------------------


@needs_onnx
@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts(chain: tuple[nn.Module, nn.Module], kind: str, multimask: bool) -> None:
    eager, exported = chain
    asked = prompts(eager, kind)
    found = decode(exported, multimask, **asked)
    assert found[0].shape[1] == (3 if multimask else 1)
    assert_same(found, decode(eager, multimask, **asked))


@needs_onnx
def test_labels_of_boxes_mean_nothing_for_points(chain: tuple[nn.Module, nn.Module]) -> None:
    eager, exported = chain
    points = 64 * torch.rand(2, 4, 2), torch.tensor([[1, 2, 3, 0], [-1, 3, 2, 7]])
    asked = {"points": points, "boxes": None, "masks": None}
    assert_same(decode(exported, True, **asked), decode(eager, True, **asked))


@needs_onnx
def test_one_mask_for_several_points(chain: tuple[nn.Module, nn.Module]) -> None:
    eager, exported = chain
    asked = prompts(eager, "one point for seven") | {"masks": torch.randn(1, 1, 32, 32)}
    assert_same(decode(exported, True, **asked), decode(eager, True, **asked))


@needs_onnx
def test_encoder_takes_several_images(chain: tuple[nn.Module, nn.Module]) -> None:
    eager, exported = chain
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        found, expected = exported.image_encoder(images), eager.image_encoder(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert exported.image_encoder.img_size == 64
    pe = exported.prompt_encoder.get_dense_pe()
    assert torch.equal(pe, eager.prompt_encoder.get_dense_pe())


@needs_onnx
def test_predictor(chain: tuple[nn.Module, nn.Module]) -> None:
    image = sc.shapes(1, seed=9, size=(48, 60))[0].image
    found = []
    for model in chain:
        predictor = SamPredictor(model)
        predictor.set_image(image)
        low = predictor.predict(np.array([[20, 30]]), np.array([1]))[2]
        found.append(predictor.predict(box=np.array([5, 8, 40, 40]), mask_input=low[:1])[1:])
    for ours, expected in zip(*found, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@needs_onnx
def test_state_tells_what_was_done(chain: tuple[nn.Module, nn.Module]) -> None:
    state = sc.lineage(chain[1])[-1].state
    assert state["backend"] == "onnxruntime"
    assert state["precision"] == state["decoder"] == "float32"
    assert state["image_size"] == 64
    assert state["grid"] == [8, 8]
    assert state["files"] == {
        "encoder": ["encoder.onnx"],
        "prompt_decoder": ["prompt_decoder.onnx"],
    }
    assert set(state["versions"]) == {"torch", "onnx", "onnxscript", "onnxruntime"}
    assert set(state["errors"]) == {"embedding", "logits", "scores"}
    assert all(0 <= e <= state["tolerance"] == 1e-4 for e in state["errors"].values())
    assert state["sizes"] is None
    assert state["granted"]["encoder"]["providers"] == ["CPUExecutionProvider"]
    assert set(state["reference"]) == {"image_embeddings", "masks", "iou"}
    assert all(0 <= e < 1e-5 for e in state["reference"].values())


@needs_onnx
def test_graphs_are_plain(chain: tuple[nn.Module, nn.Module]) -> None:
    import onnx

    paths = {
        name: path
        for module in chain[1].modules()
        for name, path in getattr(module, "artifacts", {}).items()
    }
    encoder = onnx.load(paths["encoder.onnx"]).graph
    assert [i.name for i in encoder.input] == ["image"]
    kinds = [i.data_type for i in encoder.initializer]
    assert kinds.count(onnx.TensorProto.INT8) == 8 + 3  # Linears of two blocks, convolutions
    decoder = onnx.load(paths["prompt_decoder.onnx"]).graph
    sizes = {
        i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
        for i in decoder.input
    }
    assert sizes == {
        "image_embeddings": [1, 32, 8, 8],
        "point_coords": ["prompts", "points", 2],
        "point_labels": ["prompts", "points"],
        "mask_input": ["prompts", 1, 32, 32],
        "has_mask_input": [1],
    }
    assert [o.name for o in decoder.output] == ["masks", "iou"]
    assert not {"NonZero", "ScatterND", "If", "Loop"} & {n.op_type for n in decoder.node}


@needs_onnx
def test_saved_copied_and_damaged(chain: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    exported = chain[1]
    asked = prompts(chain[0], "box and points")
    expected = decode(exported, True, **asked)
    folder = tmp_path / "saved"
    sc.save(exported, folder)
    names = sorted(path.name for path in (folder / "artifacts").iterdir())
    assert names == ["encoder.onnx", "manifest.json", "prompt_decoder.onnx", "reference.npz"]
    again = sc.load(folder)
    for twin in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(exported))):
        assert_same(decode(twin, True, **asked), expected, atol=0)
    path = folder / "artifacts" / "prompt_decoder.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(sc.errors.CheckpointError, match=r"prompt_decoder\.onnx"):
        sc.load(folder)


PLAIN = """
import hashlib, json, pathlib, sys
sys.modules["torch"] = None
import numpy as np, onnxruntime
folder = pathlib.Path(sys.argv[1])
about = json.loads((folder / "manifest.json").read_text())
for name, facts in about["files"].items():
    assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == facts["sha256"], name
    assert (folder / name).stat().st_size == facts["bytes"]
reference = np.load(folder / "reference.npz")
found = {}
def run(stem, **inputs):
    graph = about["graphs"][stem]
    assert set(inputs) == set(graph["inputs"])
    session = onnxruntime.InferenceSession(folder / graph["files"][0])
    arrays = {name: np.asarray(array, np.float32) for name, array in inputs.items()}
    found.update(zip(graph["outputs"], session.run(None, arrays)))
mean, std = (np.float32(about["image"][name]) for name in ("mean", "std"))
image = ((reference["pixels"] - mean) / std).transpose(2, 0, 1)[None]
run("encoder", image=image)
coords, labels = reference["point_coords"], reference["point_labels"]
mask = np.zeros((len(coords), *about["graphs"]["prompt_decoder"]["inputs"]["mask_input"][1:]))
run("prompt_decoder", image_embeddings=found["image_embeddings"], point_coords=coords,
    point_labels=labels, mask_input=mask, has_mask_input=[0])
every = about["reference"]["every"]
for name, array in found.items():
    kept = array if name == "iou" else array[..., ::every, ::every]
    print(name, np.abs(kept - reference[name]).max())
"""


@needs_onnx
def test_runs_without_torch(chain: tuple[nn.Module, nn.Module]) -> None:
    """With the runtime, NumPy, the manifest and nothing else."""
    folder = chain[1].image_encoder.folder
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    errors = dict(line.split() for line in done.stdout.splitlines())
    assert set(errors) == {"image_embeddings", "masks", "iou"}
    assert all(float(error) < 1e-4 for error in errors.values())


def test_graph_equals_segment_anything() -> None:
    sam = random_sam().eval()
    graph = PromptDecoder(sam.prompt_encoder, sam.mask_decoder).eval()
    assert graph.image_pe.is_contiguous()
    embedding = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(6))
    coords = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    with torch.no_grad():
        masks, scores = graph(
            embedding,
            coords,
            torch.tensor([[1.0, -1.0]]),
            torch.zeros(1, 1, 32, 32),
            torch.zeros(1),
        )
    points = coords[:, :1], torch.ones(1, 1)
    single = decode(sam, False, points=points, boxes=None, masks=None)
    several = decode(sam, True, points=points, boxes=None, masks=None)
    assert torch.equal(masks, torch.cat([single[0], several[0]], 1))
    assert torch.equal(scores, torch.cat([single[1], several[1]], 1))


# --- files, threads, types: the runtime does not matter ----------------------------------------


def test_files_live_as_long_as_the_model(pretend: Pretend) -> None:
    exported = sc.compile.Export()(random_sam(), progress=False)
    twin = copy.deepcopy(exported)
    path = exported.image_encoder.artifacts["encoder.onnx"]
    assert path.is_file()
    del exported
    gc.collect()
    assert twin.image_encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 32, 8, 8)
    del twin
    gc.collect()
    assert not path.exists()


def test_files_go_to_the_work_folder(pretend: Pretend, tmp_path: Path) -> None:
    sam, other = random_sam(), random_sam()
    nn.init.ones_(other.image_encoder.pos_embed)
    export = sc.compile.Export()
    paths = [
        export(model, progress=False, workdir=tmp_path).image_encoder.artifacts["encoder.onnx"]
        for model in (sam, other, sam)
    ]
    assert paths[0] == paths[2] != paths[1]
    assert all(path.is_file() and path.parents[1] == tmp_path / "exported" for path in paths)
    assert len(list((tmp_path / "exported").iterdir())) == 2


def test_as_many_threads_as_torch(pretend: Pretend) -> None:
    exported = sc.compile.Export()(random_sam(), progress=False)
    before = torch.get_num_threads()
    pretend.threads.clear()
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            exported.image_encoder(torch.zeros(1, 3, 64, 64))
    finally:
        torch.set_num_threads(before)
    assert pretend.threads == [1, 2]


def test_a_reduced_model_comes_back_in_float32(pretend: Pretend) -> None:
    exported = sc.compile.Export()(random_sam().bfloat16(), progress=False)
    assert exported.prompt_encoder.get_dense_pe().dtype == torch.float32
    embedding = exported.image_encoder(torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16))
    assert embedding.dtype == torch.float32


def test_a_file_that_is_gone(pretend: Pretend) -> None:
    encoder = ExportedEncoder("onnxruntime", ["encoder.onnx"], 64)
    encoder.bind(Path("nowhere"))
    with pytest.raises(BackendError) as caught:
        encoder(torch.zeros(1, 3, 64, 64))
    assert str(caught.value) == (
        "a file of an exported model is gone.\n"
        f"  where     {Path('nowhere/encoder.onnx').absolute()}\n"
        "  try       sc.save(model, folder) keeps a model, sc.load(folder) opens it"
    )


def test_a_file_that_was_changed(pretend: Pretend) -> None:
    exported = sc.compile.Export()(random_sam(), progress=False)
    path = exported.mask_decoder.artifacts["prompt_decoder.onnx"]
    path.write_text("other")
    with pytest.raises(BackendError, match="was changed") as caught:
        decode(copy.deepcopy(exported), True, **prompts(exported, "box"))
    assert f"where     {path}" in str(caught.value)
    assert "try       export the model again" in str(caught.value)


def test_manifest(pretend: Pretend) -> None:
    exported = sc.compile.Export()(random_sam(), progress=False)
    files = exported.mask_decoder.artifacts
    about = json.loads(files["manifest.json"].read_text())
    assert set(about["files"]) == {"encoder.onnx", "prompt_decoder.onnx", "reference.npz"}
    assert about["granted"] == {name: {"floats": "f32"} for name in ("encoder", "prompt_decoder")}
    assert about["image"]["framing"] == "longest"
    assert about["image"]["mean"] == pytest.approx([123.675, 116.28, 103.53])
    assert about["graphs"]["encoder"]["inputs"] == {"image": [1, 3, 64, 64]}
    assert about["graphs"]["prompt_decoder"]["inputs"]["point_coords"] == ["prompts", "points", 2]
    reference = np.load(files["reference.npz"])
    assert reference["pixels"].shape == (64, 64, 3)
    assert reference["image_embeddings"].shape == (1, 32, 2, 2)
    assert reference["masks"].shape == (2, 4, 8, 8)
    assert str(Path.home()) not in json.dumps(about)


def test_a_model_of_halves_on_another_device(pretend: Pretend) -> None:
    """Its constants come back in the type they had."""
    sam = random_sam().to(torch.float64)
    exported = sc.compile.Export()(sam, progress=False)
    assert exported.pixel_mean.dtype == torch.float64
    assert exported.image_encoder(torch.zeros(1, 3, 64, 64)).dtype == torch.float32


# --- runtimes whose sizes are fixed --------------------------------------------------------------


def test_graphs_of_fixed_sizes(fixed: Fixed, tmp_path: Path) -> None:
    sam = random_sam()
    exported = sc.compile.Export(prompts=(1, 4), points=(2, 5))(sam, progress=False)
    stems = [f"prompt_decoder_{p}x{n}" for p in (1, 4) for n in (2, 5)]
    state = sc.lineage(exported)[-1].state
    assert state["files"]["prompt_decoder"] == [f"{stem}.onnx" for stem in stems]
    assert set(fixed.calls) == {"encoder", *stems}  # every one was compared
    assert max(state["errors"].values()) < 1e-5
    about = json.loads(exported.mask_decoder.artifacts["manifest.json"].read_text())
    assert about["graphs"]["prompt_decoder_4x2"]["inputs"]["point_coords"] == [4, 2, 2]
    sc.save(exported, tmp_path / "saved")
    again = sc.load(tmp_path / "saved")
    asked = prompts(sam, "box")
    assert_same(decode(again, True, **asked), decode(sam, True, **asked))


def test_prompts_are_cut_and_filled_up(fixed: Fixed) -> None:
    """What fills up a batch changes nothing; a click and a box have the size of a graph."""
    sam = random_sam().eval()
    exported = sc.compile.Export(prompts=(1, 4), points=(2, 5))(sam, progress=False)
    fixed.calls.clear()
    for kind in ("one point for seven", "box", "mask and box", "box and points"):
        for multimask in (False, True):
            asked = prompts(sam, kind)
            if kind != "box and points":
                assert_same(decode(exported, multimask, **asked), decode(sam, multimask, **asked))
            else:
                assert decode(exported, multimask, **asked)[0].shape[0] == 2
    sizes = [call.partition("decoder_")[2] for call in fixed.calls]
    assert sizes == ["4x2", "4x2"] * 2 + ["4x2"] * 2 + ["1x2"] * 2 + ["4x5"] * 2
    none = {"points": (torch.zeros(0, 1, 2), torch.zeros(0, 1)), "boxes": None, "masks": None}
    assert decode(exported, True, **none)[0].shape == (0, 3, 32, 32)


def test_points_are_filled_up_with_points_of_no_meaning(fixed: Fixed) -> None:
    sam = random_sam().eval()
    exported = sc.compile.Export(prompts=(3,), points=(6,))(sam, progress=False)
    coords, labels = 64 * torch.rand(3, 2, 2), torch.tensor([[1, 0], [1, 1], [0, 1]])
    asked = {"points": (coords, labels), "boxes": None, "masks": None}
    blank = torch.cat([coords, torch.zeros(3, 3, 2)], 1), torch.cat([labels, -torch.ones(3, 3)], 1)
    assert_same(decode(exported, True, **asked), decode(sam, True, **asked | {"points": blank}))


def test_more_points_than_the_graphs_take(fixed: Fixed) -> None:
    exported = sc.compile.Export(prompts=(1,), points=(2, 4))(random_sam(), progress=False)
    with pytest.raises(sc.errors.ShapeError) as caught:
        decode(exported, True, **prompts(exported, "five points"))
    assert str(caught.value) == (
        "there are more points than the exported graphs take.\n"
        "  got       6, padding and corners of boxes included\n"
        "  expected  at most 4\n"
        "  try       sc.compile.Export(points=(..., 6))"
    )


def test_predictor_and_generator_of_fixed_sizes(fixed: Fixed) -> None:
    image = sc.shapes(1, seed=9, size=(48, 60))[0].image
    sam = random_sam().eval()
    exported = sc.compile.Export(prompts=(1, 16))(sam, progress=False)
    found = []
    for model in (sam, exported):
        predictor = SamPredictor(model)
        predictor.set_image(image)
        found.append(predictor.predict(np.array([[20, 30]]), np.array([1]))[2])
        settings = {"points_per_side": 5, "pred_iou_thresh": -9, "stability_score_thresh": -1}
        found.append(len(SamAutomaticMaskGenerator(model, **settings).generate(image)))
    np.testing.assert_allclose(found[0], found[2], rtol=0, atol=1e-4)
    assert found[1] == found[3] > 0


@pytest.mark.parametrize("sizes", [(), (0, 1), (4, 2), (2, 2)])
@pytest.mark.parametrize("name", ["prompts", "points"])
def test_sizes_that_are_none(name: str, sizes: tuple[int, ...]) -> None:
    with pytest.raises(sc.errors.ConfigError, match=f"{name} is out of range") as caught:
        sc.compile.Export(**{name: sizes})
    assert "expected  rising numbers, the first at least 1" in str(caught.value)


def test_wrong_size(pretend: Pretend) -> None:
    exported = sc.compile.Export()(random_sam(), progress=False)
    with pytest.raises(sc.errors.ShapeError, match=r"image has the wrong shape") as caught:
        exported.image_encoder(torch.zeros(1, 3, 32, 32))
    assert "(B 3 S S) with S=64" in str(caught.value)
    with pytest.raises(sc.errors.ShapeError, match="sparse_prompt_embeddings"):
        exported.mask_decoder(
            image_embeddings=torch.zeros(1, 32, 8, 8),
            image_pe=torch.zeros(1, 32, 8, 8),
            sparse_prompt_embeddings=torch.zeros(1, 2, 32),
            dense_prompt_embeddings=torch.zeros(1, 32, 8, 8),
            multimask_output=True,
        )


@pytest.mark.parametrize("off_by", [1e-2, float("nan")])
def test_other_numbers_are_refused(pretend: Pretend, off_by: float, tmp_path: Path) -> None:
    pretend.off_by = off_by
    with pytest.raises(BackendError) as caught:
        sc.compile.Export()(random_sam(), progress=False, workdir=tmp_path)
    text = str(caught.value)
    assert text.startswith("onnxruntime gives another embedding than torch.")
    assert "expected  at most 0.0001" in text
    assert list((tmp_path / "exported").iterdir()) == []


def test_nothing_is_left_of_a_failed_export(pretend: Pretend, tmp_path: Path) -> None:
    pretend.off_by = -1
    pretend.modules["prompt_decoder.onnx"] = nn.Identity()
    with pytest.raises(BackendError, match="pretend could not export"):
        sc.compile.Export()(random_sam(), progress=False, workdir=tmp_path)
    assert list((tmp_path / "exported").iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(sc.errors.MissingDependencyError) as caught:
        sc.compile.Export()(random_sam())
    text = str(caught.value)
    assert text.startswith(f"{package} is needed for compile.export and could not be imported.")
    assert "pip install 'samcompress[onnx]'" in text


@needs_onnx
def test_other_decoders_are_an_error() -> None:
    sam = random_sam()
    sam.mask_decoder = nn.Identity()
    with pytest.raises(sc.errors.ModelError) as caught:
        sc.compile.Export()(sam)
    assert str(caught.value) == (
        "compile.export cannot make a graph of this prompt encoder and mask decoder.\n"
        "  where     mask_decoder.predict_masks\n"
        "  got       PromptEncoder, Identity\n"
        "  expected  those of segment_anything\n"
        "  try       run this model in torch; of published models only EfficientSAM is such a one"
    )


@needs_onnx
def test_efficient_sam_is_refused() -> None:
    sam = sc.substitute.Conventions(of="efficient_sam")(random_sam(), progress=False)
    with pytest.raises(sc.errors.ModelError, match="cannot make a graph") as caught:
        sc.compile.Export()(sam)
    assert "where     prompt_encoder.not_a_point_embed, prompt_encoder.no_mask_embed" in str(
        caught.value
    )


@needs_onnx
@pytest.mark.parametrize(
    "step",
    [sc.substitute.Conventions(of="nano_sam"), sc.substitute.HQ()],
    ids=["nano_sam", "sam_hq"],
)
def test_other_conventions_and_further_channels(step: Any) -> None:
    """As in torch for every kind of prompt, and for any number of them."""
    sam = step(random_sam(), progress=False)
    exported = sc.compile.Export()(sam, progress=False)
    assert max(sc.lineage(exported)[-1].state["errors"].values()) < 1e-5
    for kind in KINDS:
        for multimask in (False, True):
            found, expected = (decode(m, multimask, **prompts(m, kind)) for m in (exported, sam))
            assert_same(found, expected)


def test_layers_of_integers_and_where_they_fit(pretend: Pretend) -> None:
    small = sc.quantize.Int8Dynamic(force=True)(random_sam(), progress=False)
    assert pretend.integers
    sc.compile.Export().check(small)
    with pytest.raises(sc.errors.ModelError) as caught:
        sc.compile.Export(backend="aot").check(small)
    assert str(caught.value) == (
        "compile.export finds layers that multiply integers already.\n"
        "  where     DynamicLinear\n"
        "  got       backend='aot', precision='float32'\n"
        "  expected  a model of floating point, or backend='onnxruntime' and its floats\n"
        "  try       export the model from before that step, with precision='int8'"
    )
    pretend.dtypes = ("float32", "int8")
    with pytest.raises(sc.errors.ModelError, match="multiply integers already"):
        sc.compile.Export(precision="int8").check(small)


def test_measured_like_any_other_model(pretend: Pretend) -> None:
    sam = random_sam()
    exported = sc.compile.Export()(sam, progress=False)
    report = sc.evaluate.benchmark(
        {"base": sam, "exported": exported},
        sc.shapes(2, seed=1, size=64),
        prompts=("box",),
        memory=False,
        progress=False,
    )
    base, ours = report.rows
    for row in (base, ours):
        assert row["status"] == "measured"
        assert row["latency"]["encoder"]["median_ms"] > 0
    assert ours["accuracy"][0]["miou"] == pytest.approx(base["accuracy"][0]["miou"], abs=1e-3)
    assert ours["macs"] == base["macs"]


def test_a_runtime_that_only_writes_here(pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs, and the manifest says so; torch's answers are there for the machine that can."""
    monkeypatch.setattr(pretend, "unrunnable", lambda: "there is no such system here")
    monkeypatch.setattr(pretend, "load", None)
    exported = sc.compile.Export()(random_sam(), progress=False)
    state = sc.lineage(exported)[-1].state
    assert state["unchecked"] == "there is no such system here"
    assert state["errors"] == state["granted"] == state["reference"] == {}
    files = exported.mask_decoder.artifacts
    assert json.loads(files["manifest.json"].read_text())["unchecked"] == state["unchecked"]
    assert set(np.load(files["reference.npz"])) >= {"image_embeddings", "masks", "iou"}


def test_a_runtime_may_be_allowed_more(pretend: Pretend) -> None:
    pretend.off_by = 1e-2
    pretend.tolerance = {"float32": 0.1}
    exported = sc.compile.Export()(random_sam(), progress=False)
    assert sc.lineage(exported)[-1].state["tolerance"] == 0.1
