"""Rows of a study, each kept when it is measured: a killed run goes on, and tells what is left."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from samcompress.core.files import write_whole
from samcompress.evaluate.protocol import Protocol
from samcompress.evaluate.records import Accuracy, Record


class Rows:
    """Measured rows, by name.

    Args:
        work: folder of a file a row.
        kinds: every row's name, and of what kind it is: rows of a kind take equally long.
        recipes: by the names of some rows, what else these depend on.
        settings: whatever else a row depends on. Rows of other settings are not taken.
    """

    def __init__(
        self,
        work: Path,
        kinds: Mapping[str, str],
        recipes: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.kinds, self.recipes, self.settings = work, kinds, recipes or {}, settings
        self.seconds: dict[str, float] = {}

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The row, from its file or measured now."""
        slug = "".join(letter if letter.isalnum() else "_" for letter in name)
        depends = [self.settings, *([self.recipes[name]] if name in self.recipes else [])]
        text = json.dumps(depends, sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()[:10]
        path = self.work / f"{slug}-{key}.json"
        kept = json.loads(path.read_text()) if path.exists() else None
        if kept is None:
            start = time.perf_counter()
            row = make()
            kept = {"seconds": time.perf_counter() - start, "row": row}
            write_whole(path, json.dumps(kept).encode())
            self.seconds[name] = kept["seconds"]
            print(f"{name}: {kept['seconds']:.0f} s; {self.left()}", flush=True)
        self.seconds[name] = kept["seconds"]
        return kept["row"]

    def left(self) -> str:
        """How many rows are done, and about how long the others take."""
        times: dict[str, list[float]] = {}
        for name, seconds in self.seconds.items():
            times.setdefault(self.kinds[name], []).append(seconds)
        usual = statistics.mean(self.seconds.values())
        waiting = [kind for name, kind in self.kinds.items() if name not in self.seconds]
        seconds = sum(statistics.mean(times.get(kind, [usual])) for kind in waiting)
        done = len(self.kinds) - len(waiting)
        return f"{done} of {len(self.kinds)} rows, about {seconds / 60:.0f} min to go"


def plain(results: Sequence[Accuracy]) -> list[dict[str, Any]]:
    """Accuracies as JSON values, masks too if they were kept; what was skipped is left out."""
    return [
        {"settings": asdict(found.settings), "records": [asdict(r) for r in found.records]}
        for found in results
    ]


def accuracies(found: Sequence[Mapping[str, Any]]) -> list[Accuracy]:
    """What `plain` was made of."""
    return [
        Accuracy(Protocol(**each["settings"]), tuple(Record(**r) for r in each["records"]))
        for each in found
    ]
