"""The page of examples/browser in headless Chromium: its masks are Python's, its errors are told."""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chromium import WAIT, Browser, Page
from PIL import Image

import samcompress as sc
from samcompress.core.framing import Framing
from samcompress.core.predict import preprocess

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "examples" / "browser"

spec = importlib.util.spec_from_file_location("serve", PAGE / "serve.py")
serve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(serve)


@pytest.fixture(scope="module")
def runtime() -> Path:
    found = serve.find_runtime()
    if found is None:
        pytest.skip(
            "no onnxruntime-web (npm install --prefix examples/browser, or set SAMCOMPRESS_ORT_WEB)"
        )
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if program is None:
        pytest.skip("no Chromium")
    found = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def sam() -> torch.nn.Module:
    return sc.load("mini")


@pytest.fixture(scope="module")
def exported(runtime: Path, browser: Browser, sam: Any, tmp_path_factory: Any) -> Path:
    """Asks for runtime and browser first: where they are missing, nothing is exported."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("mini")
    sc.save(sc.compile.Export(backend="onnxruntime")(sam, progress=False), folder)
    return folder


@contextmanager
def serving(model: Path | None, runtime: Path) -> Iterator[str]:
    """Address of a running server."""
    with serve.server(model, runtime, port=0) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def address(exported: Path, runtime: Path) -> Iterator[str]:
    with serving(exported, runtime) as found:
        yield found


@pytest.fixture
def scene(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A drawn scene in a file, and its pixels."""
    image = sc.shapes(1, seed=3, size=(300, 420))[0].image
    path = tmp_path / "scene.png"
    Image.fromarray(image).save(path)
    return path, image


def iou(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    assert b.any()
    return float((a & b).sum() / (a | b).sum())


def python(sam: Any, image: np.ndarray, **prompt: Any) -> tuple[np.ndarray, float]:
    found = sc.predict(sam, [image], [[sc.Prompt(**prompt)]])[0]
    return found.masks[0, 0].numpy(), float(found.scores[0, 0])


@pytest.fixture
def tab(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages, which are closed after the test."""
    opened = []

    def opening(address: str, **options: Any) -> Page:
        opened.append(Page(browser, address, **options))
        return opened[-1]

    yield opening
    for page in opened:
        page.close()


@pytest.fixture
def page(tab: Callable[..., Page], address: str) -> Page:
    return tab(address)


def test_clicks_and_boxes_give_pythons_masks(
    page: Page, sam: Any, scene: tuple[Path, np.ndarray]
) -> None:
    path, image = scene
    page.choose(path)
    page.ready()
    page.click(200, 120)
    found, score = python(sam, image, points=[[200, 120]])
    assert iou(page.mask(), found) >= 0.99
    assert page.js("view.score") == pytest.approx(score, abs=1e-3)
    page.click(60, 240, button="right")
    page.click(300, 40, modifiers=8)  # shift
    assert [given["label"] for given in page.prompts()] == [1, 0, 0]
    points, labels = [[200, 120], [60, 240], [300, 40]], [1, 0, 0]
    assert iou(page.mask(), python(sam, image, points=points, labels=labels)[0]) >= 0.99
    page.drag((120, 60, 280, 200))
    assert page.prompts()[-1] == {"box": [120, 60, 280, 200]}
    prompt = {"points": points, "labels": labels, "box": [120, 60, 280, 200]}
    assert iou(page.mask(), python(sam, image, **prompt)[0]) >= 0.99
    page.js("document.querySelector('[data-does=clear]').click()")
    page.drag((280, 200, 120, 60))  # from any corner
    assert iou(page.mask(), python(sam, image, box=[120, 60, 280, 200])[0]) >= 0.99
    for name in ("encoder", "prompt"):
        assert float(page.text(f"#{name}-ms").removesuffix(" ms").replace(",", "")) > 0


def test_a_photo(page: Page, sam: Any, shared: Path) -> None:
    path = sorted((shared / "data" / "bsds500" / "test").glob("*.jpg"))[0]
    image = np.asarray(Image.open(path).convert("RGB"))
    page.choose(path)
    page.ready()
    x, y = image.shape[1] // 2, image.shape[0] // 2
    page.click(x, y)
    assert iou(page.mask(), python(sam, image, points=[[x, y]])[0]) >= 0.99


def test_keys_alone(page: Page, scene: tuple[Path, np.ndarray]) -> None:
    page.choose(scene[0])
    page.ready()
    page.click(230, 150)
    clicked = page.mask()
    page.js("document.querySelector('[data-does=clear]').click()")
    page.js("document.getElementById('canvas').focus()")
    page.key("ArrowRight", 39, modifiers=8)  # ten steps of two pixels from the middle, 210, 150
    page.key("Enter", 13)
    assert page.prompts() == [{"x": 230, "y": 150, "label": 1}]
    assert (page.mask() == clicked).all()
    page.key("ArrowUp", 38)
    page.key("Enter", 13, modifiers=8)
    assert page.prompts()[1:] == [{"x": 230, "y": 148, "label": 0}]
    page.key("Backspace", 8)
    assert (page.mask() == clicked).all()
    page.key("Escape", 27)
    assert page.prompts() == []
    assert page.js("view.mask") is None
    page.js("document.querySelector('input[value=box]').click()")
    page.key("Enter", 13)
    page.key("ArrowDown", 40, modifiers=8)
    page.key("ArrowLeft", 37, modifiers=8)
    page.key("Enter", 13)
    assert page.prompts() == [{"box": [210, 148, 230, 168]}]
    assert page.mask().shape == (300, 420)


@pytest.mark.parametrize("size", [(300, 420), (97, 33), (256, 256), (1025, 700)])
def test_the_encoder_is_given_the_librarys_numbers(
    page: Page, sam: Any, size: tuple[int, int]
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    rgba = np.dstack([image, np.full(size, 255, np.uint8)])
    packed = base64.b64encode(rgba.tobytes()).decode()
    page.js(
        f"globalThis.pixels = Uint8ClampedArray.from(atob('{packed}'), (c) => c.charCodeAt(0)).buffer"
    )
    model = "{ side: 256, mean: [123.675, 116.28, 103.53], std: [58.395, 57.12, 57.375] }"
    photo = f"new ImageData(new Uint8ClampedArray(pixels), {size[1]}, {size[0]})"
    page.js(f"void (globalThis.planes = (await import('/sam.js')).preprocess({photo}, {model}))")
    found = page.array("planes", np.float32)
    assert (found == preprocess(sam, image)[0].numpy().ravel()).all()


def test_a_frame_that_is_larger_than_the_image(page: Page) -> None:
    """As of EfficientViT-SAM, whose encoder takes half of what prompts and masks are placed in."""
    framing, size, ratio = Framing(size=64, frame=128), (75, 50), 64 / 128
    model = "{ frame: 128, promptSide: 64, maskSize: [32, 32], padding: [0, 1, 0, 0] }"
    rule = "(await import('/sam.js'))"
    asked = "{ points: [{ x: 7, y: 9, label: 1 }], box: [3, 4, 30, 60] }"
    packed = page.js(
        f"(({{ coords, labels }}) => [[...coords], [...labels]])({rule}.pack({asked}, [75, 50], {model}))"
    )
    framed = np.array([[7, 9], [3, 4], [30, 60]]) * framing.scale(size)
    assert packed[0] == pytest.approx(((framed + 0.5) * ratio - 0.5).ravel(), abs=1e-5)
    assert packed[1] == [1, 2, 3]
    low = np.random.default_rng(0).normal(size=(1, 1, 32, 32)).astype(np.float32)
    page.js(
        f"void (globalThis.full = {rule}.fullSize(Float32Array.from({low.ravel().tolist()}), [75, 50], {model}))"
    )
    expected = framing.full_size(torch.from_numpy(low), size)[0, 0].numpy()
    found = page.array("full", np.uint8).reshape(size) > 0
    assert (found == (expected > 0))[np.abs(expected) > 1e-5].all()


def test_narrow_screens_light_and_dark(tab: Any, address: str, scene: Any) -> None:
    page = tab(address, width=400)
    page.choose(scene[0])
    page.ready()
    page.click(200, 120)
    assert page.mask().any()
    page.js("document.querySelector('summary').click()")
    assert page.js("document.documentElement.scrollWidth") == 400
    small = "[...document.querySelectorAll('button, fieldset span')].filter(({ offsetHeight: h }) => h && h < 44)"
    assert page.js(f"{small}.map((button) => button.innerText)") == []
    for scheme, shade in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(21, 24, 28)")):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.call("Emulation.setEmulatedMedia", features=[feature])
        assert page.js("getComputedStyle(document.body).backgroundColor") == shade


def test_a_photo_that_is_none(page: Page, tmp_path: Path, scene: Any) -> None:
    page.until("view.model")
    path = tmp_path / "letter.txt"
    path.write_text("Dear Sir")
    page.choose(path)
    assert "cannot read this as a photo" in page.problem()
    assert "letter.txt" in page.problem()
    narrow = tmp_path / "narrow.png"
    Image.fromarray(np.zeros((2000, 2, 3), np.uint8)).save(narrow)
    page.choose(narrow)
    page.until("document.getElementById('problem').innerText.includes('too narrow')")
    page.choose(scene[0])
    page.ready()


def test_a_model_from_a_folder(tab: Any, exported: Path, runtime: Path, scene: Any) -> None:
    with serving(None, runtime) as address:
        page = tab(address)
        page.choose(scene[0])
        told = page.problem()
        assert "There is no model" in told
        assert "serve.py FOLDER" in told
        page.click(200, 120)  # is answered when there is a model
        page.choose(exported, "#model-files")
        page.until("view.mask")
        assert page.mask().any()


def edited(exported: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The model with another manifest."""
    shutil.copytree(exported, folder)
    document = json.loads((folder / "samcompress.json").read_text())
    change(document)
    (folder / "samcompress.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d["steps"].clear(), "saved, but not exported"),
        (lambda d: d["steps"][-1]["state"].update(backend="openvino"), "another runtime"),
        (lambda d: d.update(format=9), "newer samcompress"),
        (lambda d: d.pop("steps"), "not one of samcompress"),
        (lambda d: d["base"]["config"].update(pixel_std=None), "manifest is damaged"),
        (lambda d: d["files"].pop("artifacts/encoder.onnx"), "manifest is damaged"),
        (
            lambda d: d["steps"][-1]["state"].update(framing={"rule": "Stretched"}),
            "rule of its own",
        ),
    ],
)
def test_a_wrong_manifest(
    tab: Any, exported: Path, runtime: Path, tmp_path: Path, change: Any, told: str
) -> None:
    with serving(edited(exported, tmp_path / "model", change), runtime) as address:
        problem = tab(address).problem()
    assert told in problem
    assert "samcompress.json" in problem


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"!")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (Path.unlink, "is missing"),
        (cut, "cut short or changed"),
        (change_a_byte, "another SHA-256"),
    ],
)
def test_a_damaged_file(
    tab: Any, exported: Path, runtime: Path, tmp_path: Path, damage: Any, told: str
) -> None:
    model = shutil.copytree(exported, tmp_path / "model")
    damage(model / "artifacts" / "prompt_decoder.onnx")
    with serving(model, runtime) as address:
        problem = tab(address).problem()
    assert told in problem
    assert "prompt_decoder.onnx" in problem


@pytest.mark.parametrize(
    ("kept", "told"),
    [("nothing", "onnxruntime-web is not there"), ("ort.*", "WebAssembly could not be loaded")],
)
def test_a_missing_runtime(
    tab: Any, exported: Path, runtime: Path, tmp_path: Path, kept: str, told: str
) -> None:
    for path in runtime.glob(kept):
        (tmp_path / path.name).symlink_to(path)
    with serving(exported, tmp_path) as address:
        problem = tab(address).problem()
    assert told in problem
    assert "npm install" in problem


def test_the_server_refuses_early(tmp_path: Path) -> None:
    command = [sys.executable, str(PAGE / "serve.py")]
    for arguments, told in (
        ([str(tmp_path)], "no samcompress.json"),
        (["--runtime", str(tmp_path)], "no onnxruntime-web"),
    ):
        ended = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=WAIT)
        assert ended.returncode == 2
        assert told in ended.stderr
