"""The command line; each verb is one Python call, which its ``--help`` shows.

Exit codes: 0 done, 1 an error of ours (one message), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

from . import (
    search,  # noqa: F401
    verbs,  # noqa: F401 - registers them, in the order of --help
)
from ._app import app, main
from ._shared import named

__all__ = ["app", "main", "named"]
