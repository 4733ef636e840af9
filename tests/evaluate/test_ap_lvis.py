"""AP by LVIS's rules, against figures of the lvis package, and against it where it is installed."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samcompress.core import data
from samcompress.core.data import Dataset, Sample
from samcompress.core.data._annotation import decoder
from samcompress.core.data._sample import Held
from samcompress.core.errors import ConfigError
from samcompress.evaluate.ap import AveragePrecision, average_precision
from samcompress.evaluate.masks import encode

Result = dict[str, Any]
# AP, AP50, AP75, S, M, L, rare, common, frequent, AR@300, its S, M, L: by lvis 0.5.3.
FIGURES = [
    *(0.271748, 0.403134, 0.282427, 0.129657, 0.307924, 0.489923),
    *(0.250190, 0.305685, 0.251721),
    *(0.318681, 0.147705, 0.346032, 0.498907),
]


@pytest.fixture(scope="module")
def content(shared: Path) -> dict[str, Any]:
    """COCO's annotations in LVIS's form: nothing is a crowd, absences are known in part."""
    file = shared / "data/coco/annotations/instances_val2017.json"
    found: dict[str, Any] = json.loads(file.read_text())
    found["annotations"] = [a for a in found["annotations"] if not a["iscrowd"]]
    present = defaultdict(set)
    for annotation in found["annotations"]:
        present[annotation["image_id"]].add(annotation["category_id"])
    names = sorted(category["id"] for category in found["categories"])
    for image in found["images"]:
        here = present[image["id"]]
        absent = [name for name in names if name not in here]
        image["neg_category_ids"] = absent[image["id"] % 5 :: 6]
        image["not_exhaustive_category_ids"] = sorted(here)[image["id"] % 3 :: 3]
    for category in found["categories"]:
        category["frequency"] = "rcf"[category["id"] % 3]
    return found


@pytest.fixture(scope="module")
def lvis(content: dict[str, Any], shared: Path, tmp_path_factory: Any) -> Dataset:
    """The same as a data set, decoded once."""
    file = tmp_path_factory.mktemp("lvis") / "lvis_v1_val.json"
    file.write_text(json.dumps(content))
    found = data.lvis(shared / "data/coco/val2017", file)
    return Dataset(list(found.readable()), found.name)


@pytest.fixture(scope="module")
def results(content: dict[str, Any]) -> list[Result]:
    """Moved masks, some of other categories, and one image with far more than 300."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    names = sorted(category["id"] for category in content["categories"])
    annotations = sorted(content["annotations"], key=lambda a: a["id"])
    found = []

    def add(annotation: dict[str, Any], j: int, right: int, down: int) -> None:
        height, width = sizes[annotation["image_id"]]
        mask = decoder(annotation["segmentation"], (height, width))()
        moved = np.zeros_like(mask)
        moved[down:, right:] = mask[: height - down, : width - right]
        category = names[j % len(names)] if j % 3 == 0 else annotation["category_id"]
        score = (7919 * j % 1000) / 1000
        ids = {"image_id": annotation["image_id"], "category_id": category}
        found.append({**ids, "score": score, "segmentation": encode(moved)})

    for j, annotation in enumerate(annotations):
        if j % 5:
            add(annotation, j, j % 7, j % 3)
    crowded = max(sizes, key=lambda key: sum(a["image_id"] == key for a in annotations))
    mine = [annotation for annotation in annotations if annotation["image_id"] == crowded]
    for j in range(400):
        add(mine[j % len(mine)], j + 5, j % 4, j % 2)
    return found


def thirteen(found: AveragePrecision) -> list[float]:
    sizes = [found.by_size[name] for name in "SML"]
    precisions = [found.ap, found.ap50, found.ap75, *(size["ap"] for size in sizes)]
    precisions += [found.by_group[name] for name in "rcf"]
    return [*precisions, found.ar[300], *(size["ar"][300] for size in sizes)]


def groups(content: dict[str, Any]) -> dict[int, str]:
    return {category["id"]: category["frequency"] for category in content["categories"]}


def test_thirteen_figures(content: dict[str, Any], lvis: Dataset, results: list[Result]) -> None:
    found = average_precision(results, lvis, groups=groups(content))
    assert thirteen(found) == pytest.approx(FIGURES, abs=1e-6)
    rules = "AP:mask/categories=yes,rules=lvis/max=300"
    assert found.protocol == f"lvis@val#108/detections/{rules}"
    assert found.n_detections < len(results)
    assert {"AP r", "AP c", "AP f", "AR@300"} < set(found.cells())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Logger.warn
def test_equals_the_lvis_package(
    content: dict[str, Any],
    lvis: Dataset,
    results: list[Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = pytest.importorskip("lvis", reason="the lvis package is not installed")
    monkeypatch.setattr(np, "float", float, raising=False)  # it was written for numpy 1
    file = tmp_path / "lvis.json"
    file.write_text(json.dumps(content))
    run = package.LVISEval(package.LVIS(str(file)), [dict(r) for r in results], "segm")
    run.run()
    expected = [float(value) for value in run.get_results().values()]
    found = average_precision(results, lvis, groups=groups(content))
    assert thirteen(found) == pytest.approx(expected, abs=1e-6)


def test_groups_are_those_of_the_data(
    content: dict[str, Any], lvis: Dataset, results: list[Result]
) -> None:
    words = {"r": "rare", "c": "common", "f": "frequent"}
    told = {key: words[name] for key, name in groups(content).items()}
    same = Dataset(list(lvis), lvis.name, groups=told)
    found = average_precision(results, same)
    assert list(found.by_group.values()) == pytest.approx(
        [FIGURES[6 + "rcf".index(name[0])] for name in found.by_group], abs=1e-6
    )
    assert average_precision(results, same, class_agnostic=True).by_group == {}


def test_coco_rules_are_others(lvis: Dataset, results: list[Result]) -> None:
    loose = average_precision(results, lvis)
    strict = average_precision(results, lvis, rules="coco")
    assert strict.ap < loose.ap
    assert strict.protocol == "lvis@val#108/detections/AP:mask/categories=yes/max=1,10,100"
    bare = average_precision(results, lvis, class_agnostic=True, max_detections=(1000,))
    assert bare.protocol.endswith("/categories=no/max=1000")
    assert bare.n_detections == len(results)


# --- by hand ---


def scene(**known: tuple[int, ...]) -> Dataset:
    """One object of category 1 in an image of 20 x 20."""
    mask = np.zeros((20, 20), bool)
    mask[4:12, 4:12] = True
    sample = Sample.from_arrays("a", np.zeros((20, 20, 3), np.uint8), [mask])
    (instance,) = sample.instances
    instance = data.Instance(0, 1, instance.area, instance.box, source=instance.source)
    return Dataset([Held("a", "a", sample.image, (instance,), **known)], "scene")


def found(dataset: Dataset, *categories: int, **options: Any) -> AveragePrecision:
    """A wrong mask of each category, all above the right one."""
    right = dataset[0].instances[0].mask
    wrong = [
        {"image_id": "a", "category_id": c, "score": 0.9, "segmentation": ~right}
        for c in categories
    ]
    right_one = {"image_id": "a", "category_id": 1, "score": 0.5, "segmentation": right}
    return average_precision([*wrong, right_one], dataset, **options)


def test_a_wrong_mask_where_the_annotation_is_not_exhaustive_is_no_mistake() -> None:
    assert found(scene(negative=(2,)), 1).ap == pytest.approx(0.5)
    assert found(scene(negative=(2,), not_exhaustive=(1,)), 1).ap == pytest.approx(1)


def test_categories_of_which_nothing_is_known_are_not_judged() -> None:
    assert found(scene(negative=(2,)), 2, 3).n_detections == 2
    assert found(scene(negative=(2, 3)), 2, 3).n_detections == 3


def test_an_image_takes_its_best_only() -> None:
    assert found(scene(negative=(2,)), 2, 2).ap == pytest.approx(1)
    assert found(scene(negative=(2,)), 2, 2, max_detections=(2,)).ap == 0


def test_rules_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"unknown rules[\s\S]*coco \| lvis"):
        found(scene(), rules="voc")
    with pytest.raises(ConfigError, match="LVIS's rules are about categories"):
        found(scene(), rules="lvis", class_agnostic=True)
