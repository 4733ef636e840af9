"""COCO and LVIS: the facts of the shared subset, and damage of every kind."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from samcompress.core import data
from samcompress.core.errors import DataError


def annotation(number: int, image: int, **fields: Any) -> dict[str, Any]:
    segmentation = [[2, 1, 5, 1, 5, 3, 2, 3]]
    sound = {"id": number, "image_id": image, "category_id": 1, "iscrowd": 0, "area": 6.0}
    return {**sound, "bbox": [2, 1, 3, 2], "segmentation": segmentation, **fields}


def write(folder: Path, images: list[Any], annotations: list[Any], **more: Any) -> Path:
    path = folder / "instances_val.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, **more}))
    return path


def picture(path: Path, width: int = 8, height: int = 6) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return {"file_name": path.name, "width": width, "height": height}


def test_the_shared_subset(shared: Path) -> None:
    coco = data.open(shared / "data" / "coco@val2017")
    assert (coco.name, len(coco), coco.skipped) == ("coco@val2017", 108, ())
    assert "Attribution-NonCommercial License" in (coco.licence or "")
    pycocotools = pytest.importorskip("pycocotools.mask")
    strings, total = {}, 0
    for sample in coco.readable():
        for instance in sample.instances:
            mask = instance.mask
            total += int(mask.sum())
            runs = pycocotools.encode(np.asfortranarray(mask.view(np.uint8)))
            strings[instance.id] = runs["counts"].decode()
    assert coco.skipped == ()
    assert len(strings) == 1050
    assert sum(instance.crowd for sample in coco for instance in sample.instances) == 14
    assert total == 9_544_020
    digest = hashlib.sha256("".join(f"{k}:{strings[k]}" for k in sorted(strings)).encode())
    assert digest.hexdigest().startswith("281be4e5e83b64c6")


def test_fingerprint_does_not_depend_on_the_place(tmp_path: Path) -> None:
    images = [{"id": k, **picture(tmp_path / "a" / f"{k}.jpg")} for k in (1, 2)]
    rows = [annotation(1, 1), annotation(2, 2), annotation(3, 2)]
    one = data.coco(tmp_path / "a", write(tmp_path, images, rows))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    other = data.coco(tmp_path / "b", write(tmp_path / "b", images[::-1], rows[::-1]))
    assert one.fingerprint == other.fingerprint
    rows[0]["area"] = 7.0
    assert data.coco(tmp_path / "a", write(tmp_path, images, rows)).fingerprint != one.fingerprint


def test_damage_is_named_and_the_rest_is_used(tmp_path: Path) -> None:
    images = [{"id": k, **picture(tmp_path / f"{k}.png", 64, 64)} for k in range(1, 6)]
    (tmp_path / "2.png").unlink()
    (tmp_path / "3.png").write_bytes(b"no image")
    images[3]["width"] = 63
    cut = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").write_bytes(cut[: len(cut) // 2])
    images += [{"id": 6}, {**images[0]}, "nonsense"]
    crowd = {"size": [64, 64], "counts": [0, 64, 4032]}
    rows = [
        annotation(1, 1),
        annotation(2, 1, segmentation=[]),
        annotation(3, 1, segmentation={"size": [6, 8], "counts": [48]}),
        annotation(4, 1, segmentation=crowd, iscrowd=1),
        annotation(5, 1, segmentation=[[2, 1, 2, 1, 2, 1]]),
        annotation(6, 99),
        {"id": 7},
        annotation(8, 5),
        "nonsense",
    ]
    path = write(tmp_path, images, rows)
    coco = data.coco(tmp_path, path)
    assert [sample.id for sample in coco] == [1, 5]
    at_opening = [str(s) for s in coco.skipped]
    assert at_opening == [
        "annotation number 6 of coco@val: it names no image",
        "annotation number 8 of coco@val: it names no image",
        "annotation 2 of 1: segmentation is empty",
        "annotation 3 of 1: mask has another size than its image: [6, 8], expected [64, 64]",
        "image of 2: file cannot be opened: No such file or directory",
        "image of 3: image cannot be decoded: cannot identify image file",
        "image of 4: image has another size than its annotation: 64 x 64, "
        "expected 63 x 64 (width x height)",
        "image number 5 of coco@val: malformed entry: KeyError('file_name')",
        "image of 1: id is used twice",
        at_opening[9],
        "annotation 6 of 99: no image has this id",
    ]
    assert at_opening[9].startswith("image number 7 of coco@val: malformed entry: TypeError")
    (sample,) = coco.readable()
    assert [(i.id, i.crowd, int(i.mask.sum())) for i in sample.instances] == [
        (1, False, 6),
        (4, True, 64),
    ]
    late = [str(s) for s in coco.skipped[len(at_opening) :]]
    assert late[0] == "annotation 5 of 1: mask is empty"
    assert late[1].startswith("image of 5: image cannot be decoded: ")
    with pytest.raises(DataError, match="annotation number 6 of 'coco@val' cannot be used"):
        data.coco(tmp_path, path, on_error="raise")


def test_an_image_without_objects_is_kept(tmp_path: Path) -> None:
    coco = data.coco(tmp_path, write(tmp_path, [{"id": 1, **picture(tmp_path / "1.jpg")}], []))
    (sample,) = coco.readable()
    assert sample.instances == ()
    assert sample.masks().shape == (0, 6, 8)


def test_nothing_usable(tmp_path: Path) -> None:
    with pytest.raises(DataError) as err:
        data.coco(tmp_path, write(tmp_path, [{"id": 1, "height": 1, "width": 1}], []))
    assert str(err.value) == (
        "coco@val holds no usable image.\n"
        "  got       image number 0 of coco@val: malformed entry: KeyError('file_name')\n"
        "  expected  at least one image with its annotation"
    )


@pytest.mark.parametrize(
    ("content", "got"),
    [("[]", "list"), ("{}", "no 'images'"), ('{"images": []}', "no 'annotations'")],
)
def test_not_an_annotation_file(tmp_path: Path, content: str, got: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError) as err:
        data.coco(tmp_path, path)
    assert str(err.value) == (
        f"this is no COCO annotation file.\n  where     {path}\n  got       {got}\n"
        "  expected  an object with images and annotations"
    )


def test_lvis_images_lie_where_their_address_says(tmp_path: Path) -> None:
    site = "http://images.cocodataset.org"
    first, second = picture(tmp_path / "train2017" / "1.jpg"), picture(tmp_path / "2.jpg")
    del first["file_name"], second["file_name"]
    images = [
        {
            **first,
            "id": 1,
            "coco_url": f"{site}/train2017/1.jpg",
            "neg_category_ids": [4, 9],
            "not_exhaustive_category_ids": [1],
        },
        {**second, "id": 2, "coco_url": f"{site}/val2017/2.jpg"},
        {**second, "id": 3, "coco_url": f"{site}/val2017/3.jpg"},
    ]
    (tmp_path / "annotations").mkdir()
    path = write(tmp_path, images, [annotation(1, 1)])
    content = json.loads(path.read_text())
    categories = [{"id": 1, "frequency": "r"}, {"id": 2, "frequency": "f"}, {"id": 3}]
    path.write_text(json.dumps({**content, "categories": categories}))
    path.rename(tmp_path / "annotations" / "lvis_v1_val.json")
    lvis = data.open(tmp_path)
    assert lvis.name == "lvis@val"
    assert [s.name for s in lvis] == ["1.jpg", "2.jpg"]
    assert lvis[0].negative == (4, 9)
    assert lvis[0].not_exhaustive == (1,)
    assert lvis[1].negative == ()
    assert lvis.groups == lvis[:1].groups == {1: "rare", 2: "frequent"}
    read = next(lvis.readable())
    assert read.negative == (4, 9)
    assert read.not_exhaustive == (1,)
    assert [s.id for s in lvis.skipped] == [3]
