"""What a row may hold beside accuracy, size and speed: AP of masks, everything, checks of files."""

from __future__ import annotations

from dataclasses import fields
from statistics import median
from typing import TYPE_CHECKING, Any

from ..core.contract import parts
from ..core.everything import Everything, Segments
from ..core.everything.samplers import Grid
from ._reading import evaluating
from .ap import average_precision
from .detections import detections
from .devices import pinned
from .proposals import recall

if TYPE_CHECKING:
    from .row import Job

Row = dict[str, Any]


def detection(model: Any, base: Row | None, job: Job) -> Row:
    """AP of one mask for each box of a detector, and its difference to the base's.

    Raises:
        DataError: if it cannot be scored, as where objects have no category.
    """
    assert job.detections is not None  # it is asked for
    found = detections(model, job.data, job.detections, progress=job.progress)
    scored = average_precision(found, job.data).to_dict(base)
    return {**scored, "skipped": [vars(item) for item in found.skipped]}


def everything(model: Any, base: Row | None, job: Job) -> Row:
    """What the masks of whole images find, beside the base's; the seconds that an image takes.

    Raises:
        DataError: if there is nothing to find.
    """
    assert job.everything is not None  # it is asked for
    generate, times = generator(job.everything), []

    def masks(image: Any) -> Segments:
        found = generate(model, image)
        assert found.stats is not None  # the generator always counts
        times.append(found.stats.total_s)
        return found

    with evaluating(model), pinned(job.threads):
        found = recall(
            masks, job.data, rank="sam", source=generator_id(generate), progress=job.progress
        )
    return {**found.to_dict(base), "seconds": median(times)}


def generator(asked: int | Everything) -> Everything:
    """A generator of one's own, or SAM's for AR by the points along each side of its grid.

    Raises:
        ConfigError: if the number is below 1.

    Source:
        Segment Anything, arXiv 2304.02643, appendix D.3, with 64 points.
    """
    if isinstance(asked, Everything):
        return asked
    return Everything(sampler=Grid(side=asked), min_iou=0, min_stability=0, nms=0.9)


def generator_id(generate: Everything) -> str:
    """All that changes its masks, for a protocol id.

    Example:
        >>> generator_id(generator(64))
        'everything=Grid(side=64),min_iou=0,min_stability=0,nms=0.9'
    """
    usual = Everything(sampler=generate.sampler)
    names = [f.name for f in fields(Everything) if f.name not in ("sampler", "points_per_batch")]
    values = {name: getattr(generate, name) for name in names}
    changed = [f"{name}={x}" for name, x in values.items() if x != getattr(usual, name)]
    return ",".join([f"everything={generate.sampler!r}", *changed])


def checks(model: Any) -> list[Row]:
    """What parts that run from files say of these for devices that are not here."""
    return [check for part in parts(model) for check in getattr(part, "checks", list)()]
