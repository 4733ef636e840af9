"""SA-1B's layout: loose, in shards, damaged."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from samcompress.core import data
from samcompress.core.errors import DataError


def pair(number: int, **fields: Any) -> dict[str, bytes]:
    """The two files of one image, 16 x 12, with one mask of 5 pixels."""
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    name = f"sa_{number}.jpg"
    image = {"image_id": number, "width": 16, "height": 12, "file_name": name}
    record = {
        "id": 10 * number,
        "segmentation": {"size": [12, 16], "counts": [7, 5, 180]},
        "bbox": [0, 7, 1, 5],
        "area": 5,
        "predicted_iou": 0.9,
        "stability_score": 0.95,
        "crop_box": [0, 0, 16, 12],
        "point_coords": [[0.5, 9.5]],
    }
    content = {"image": image, "annotations": [{**record, **fields}]}
    return {name: file.getvalue(), f"sa_{number}.json": json.dumps(content).encode()}


def loose(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def shard(path: Path, files: dict[str, bytes], prefix: str = "") -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def same(one: data.Dataset, other: data.Dataset) -> None:
    assert one.fingerprint == other.fingerprint
    for a, b in zip(one, other, strict=True):
        assert (a.id, a.name, a.size, a.instances) == (b.id, b.name, b.size, b.instances)
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.masks(), b.masks())


def test_the_shared_folder_and_shard(shared: Path) -> None:
    folder = shared / "data" / "sa1b"
    whole, packed = data.open(folder), data.open(folder / "sa_000000.tar")
    assert sum(len(sample.instances) for sample in whole) == 486
    assert (len(whole), whole.skipped, packed.skipped) == (48, (), ())
    ids = [sample.id for sample in packed]
    assert ids == sorted(ids)
    same(data.sa1b(folder, ids=ids), packed)
    for sample in packed.readable():
        for instance in sample.instances:
            assert instance.mask.sum() == instance.area
    assert "agreement with SAM" in (packed.note or "")


def test_folder_shard_and_shards_are_the_same(tmp_path: Path) -> None:
    pairs = [pair(k) for k in (30, 4, 100)]
    files = {name: content for p in pairs for name, content in p.items()}
    folder = data.sa1b(loose(tmp_path / "loose", files))
    assert [sample.id for sample in folder] == [4, 30, 100]
    assert folder[0].instances[0].point == (0.5, 9.5)
    assert folder[0].masks().sum() == 5
    reverse = dict(reversed(files.items()))  # json before jpg
    same(folder, data.sa1b(shard(tmp_path / "a.tar", reverse, prefix="./inside/")))
    (tmp_path / "shards").mkdir()
    # one image's two files lie in two shards
    one = shard(tmp_path / "shards" / "sa_0.tar", {k: files[k] for k in list(files)[:3]})
    two = shard(tmp_path / "shards" / "sa_1.tar", {k: files[k] for k in list(files)[3:]})
    same(folder, data.sa1b([two, one]))
    same(folder, data.open(tmp_path / "shards"))
    assert data.sa1b([two, one]).name == "sa1b-layout@sa_1+sa_0"


def test_ids(tmp_path: Path) -> None:
    folder = loose(tmp_path, {**pair(1), **pair(2), "sa_3.jpg": b"never looked at"})
    some = data.sa1b(folder, ids=[2, 8])
    assert [sample.id for sample in some] == [2]
    assert [str(s) for s in some.skipped] == ["image of 8: not found"]


def test_damage_is_named_and_the_rest_is_used(tmp_path: Path) -> None:
    files = {**pair(1), **pair(2), **pair(3), **pair(4), **pair(5), **pair(6), **pair(7)}
    del files["sa_2.json"], files["sa_3.jpg"]
    files["sa_4.json"] = b"{"
    files["sa_5.json"] = files["sa_5.json"].replace(b'"width": 16', b'"width": 15')
    files["sa_6.json"] = files["sa_6.json"].replace(b"[12, 16]", b"[16, 12]")
    files["sa_7.json"] = b'{"image": {"width": 16, "height": 12, "file_name": "a"}}'
    found = data.sa1b(loose(tmp_path, files))
    assert [sample.id for sample in found] == [1, 6]
    assert [str(s) for s in found.skipped] == [
        "image of 2: its annotation (json) is missing",
        "image of 3: its picture (jpg) is missing",
        "image of 4: file is not JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)",
        "image of 5: image has another size than its annotation: 16 x 12, "
        "expected 15 x 12 (width x height)",
        "annotation 60 of 6: mask has another size than its image: [16, 12], expected [12, 16]",
        "image of 7: this is no annotation in SA-1B's form: KeyError('annotations')",
    ]
    assert found[1].instances == ()
    with pytest.raises(DataError, match="image of 2 cannot be used"):
        data.sa1b(tmp_path, on_error="raise")


@pytest.mark.parametrize("where", ["data", "header", "border"])
def test_a_truncated_shard(tmp_path: Path, where: str) -> None:
    files = {**pair(1), **pair(2), **pair(3)}
    path = shard(tmp_path / "sa_0.tar", files)
    with tarfile.open(path) as tar:
        last = tar.getmember("sa_3.json")
    cut = {"data": last.offset_data + 10, "header": last.offset + 100, "border": last.offset}[where]
    path.write_bytes(path.read_bytes()[:cut])
    found = data.sa1b(path)
    assert [sample.id for sample in found.readable()] == [1, 2]
    first, second = (str(s) for s in found.skipped)
    expected = {"data": "inside sa_3.json", "header": "or damaged after sa_3.jpg"}
    expected["border"] = expected["header"]
    assert first == f"shard of sa_0.tar: cut off {expected[where]}"
    assert second == "image of 3: its annotation (json) is missing"
    with pytest.raises(DataError, match=r"shard of 'sa_0\.tar' cannot be used"):
        data.sa1b(path, on_error="raise")


def test_a_shard_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "sa_0.tar"
    path.write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match=r"holds no usable image\.\n.*shard of sa_0\.tar"):
        data.sa1b(path)
    with pytest.raises(DataError, match=r"there is no such folder or shard\."):
        data.sa1b(tmp_path / "missing")


def test_the_same_image_twice(tmp_path: Path) -> None:
    one, two = shard(tmp_path / "a.tar", pair(1)), shard(tmp_path / "b.tar", pair(1))
    found = data.sa1b([one, two])
    assert len(found) == 1
    assert [str(s) for s in found.skipped] == [
        "image of 1: found twice; the first is taken",
        "json of 1: found twice; the first is taken",
    ]


def test_damage_after_opening(tmp_path: Path) -> None:
    found = data.sa1b(loose(tmp_path, {**pair(1), **pair(2), **pair(3)}))
    (tmp_path / "sa_1.jpg").write_bytes(b"gone bad")
    (tmp_path / "sa_2.json").unlink()
    assert [sample.id for sample in found.readable()] == [3]
    assert [str(s) for s in found.skipped] == [
        "image of 1: image cannot be decoded: cannot identify image file",
        "image of 2: file cannot be opened: No such file or directory",
    ]
