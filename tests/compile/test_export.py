"""A SAM that runs from exported files, against the torch model it was made from."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_sam
from segment_anything import SamPredictor
from torch import nn

import samcompress as sc
from samcompress.compile._facades import ExportedEncoder
from samcompress.compile._graphs import PromptDecoder
from samcompress.compile.backends import BACKENDS
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


class Pretend:
    suffix, extra = ".onnx", "onnx"

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
    assert state["dtype"] == "float32"
    assert state["image_size"] == 64
    assert state["grid"] == [8, 8]
    assert state["files"] == {
        "encoder": ["encoder.onnx"],
        "prompt_decoder": ["prompt_decoder.onnx"],
    }
    assert set(state["versions"]) == {"onnx", "onnxscript", "onnxruntime"}
    assert set(state["errors"]) == {"embedding", "logits", "scores"}
    assert all(0 <= e <= state["tolerance"] == 1e-4 for e in state["errors"].values())
    assert state["reference"]["embedding"] == pytest.approx([0, 1], abs=0.2)  # a layer norm's


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
    assert names == ["encoder.onnx", "prompt_decoder.onnx"]
    again = sc.load(folder)
    for twin in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(exported))):
        assert_same(decode(twin, True, **asked), expected, atol=0)
    path = folder / "artifacts" / "prompt_decoder.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(sc.errors.CheckpointError, match=r"prompt_decoder\.onnx"):
        sc.load(folder)


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


def test_settings() -> None:
    with pytest.raises(sc.errors.ConfigError, match=r"compile\.export: backend has a value"):
        sc.compile.Export(backend="openvino")
    with pytest.raises(sc.errors.ConfigError, match=r"compile\.export: dtype has a value"):
        sc.compile.Export(dtype="bfloat16")
