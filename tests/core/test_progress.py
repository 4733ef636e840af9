from __future__ import annotations

import sys

import pytest

from samcompress.core import _progress
from samcompress.core._progress import Event, Progress


def test_events() -> None:
    events: list[Event] = []
    assert list(Progress(events.append, "prune.mlp").track("ab", label="blocks")) == ["a", "b"]
    assert events == [Event("prune.mlp", "blocks", 1, 2), Event("prune.mlp", "blocks", 2, 2)]


def test_unknown_length() -> None:
    events: list[Event] = []
    assert list(Progress(events.append).track(iter("ab"))) == ["a", "b"]
    assert [event.total for event in events] == [None, None]


def test_no_bar_off_a_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # another test may be a notebook
    for mode in (True, False):
        assert list(Progress(mode, "x").track([1, 2])) == [1, 2]
    assert capfd.readouterr() == ("", "")


def test_bar_on_a_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_progress, "_visible", lambda: True)
    assert list(Progress(True, "prune.mlp").track([1, 2], label="blocks")) == [1, 2]
    out, err = capfd.readouterr()
    assert out == ""
    assert "prune.mlp blocks" in err
    assert list(Progress(False, "x").track([1, 2])) == [1, 2]
    assert capfd.readouterr() == ("", "")
