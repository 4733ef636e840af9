"""What a compressed model costs and what it won, measured by one set of rules.

| name | answers |
|---|---|
| `accuracy`, `accuracies` | how good are the masks, by a named protocol? |
| `detections` | what masks does the model make of a detector's boxes? |
| `average_precision` | AP and AR of masks, as COCO and LVIS define them |
| `recall` | how many objects do proposals find: AR@1000, mask recall |
| `table` | accuracies of one protocol side by side; unequal ones are refused |
| `latency` | how long does each part take on this device? |
| `memory` | how much memory does it need, in a fresh process? |
| `energy` | how many joules does an image take? |
| `macs`, `parameters`, `bytes_on_disk` | how large is it, and how much must it compute? |
| `summary` | what is it made of? |
| `benchmark` | all of that for several models, resumable, as a `Report` |
| `sweep`, `search`, `Space` | which chain of techniques shall I take? |
| `sensitivity` | which block may be compressed? |
| `leaderboard` | results of several machines, a table for each |
| `compare` | what changed between two results? |
| `environment`, `doctor` | what was measured on, and is this machine ready? |
"""

from .accuracy import Accuracy, accuracies, accuracy, agreement
from .ap import AveragePrecision, average_precision
from .benchmark import benchmark
from .compare import Comparison, compare
from .detections import Boxes, Detections, detections
from .energy import Energy, energy
from .environment import doctor, environment
from .latency import Latency, Rounds, Timing, latency
from .leaderboard import Leaderboard, leaderboard
from .macs import Macs, macs
from .memory import Memory, memory
from .presets import PRESETS
from .proposals import Recall, recall
from .remote import Launcher
from .report import Report
from .search import search
from .sensitivity import Sensitivity, sensitivity
from .size import bytes_on_disk, parameters
from .space import Space
from .study import Study
from .summary import Summary, summary
from .sweep import sweep
from .tables import table

__all__ = [
    "PRESETS",
    "Accuracy",
    "AveragePrecision",
    "Boxes",
    "Comparison",
    "Detections",
    "Energy",
    "Latency",
    "Launcher",
    "Leaderboard",
    "Macs",
    "Memory",
    "Recall",
    "Report",
    "Rounds",
    "Sensitivity",
    "Space",
    "Study",
    "Summary",
    "Timing",
    "accuracies",
    "accuracy",
    "agreement",
    "average_precision",
    "benchmark",
    "bytes_on_disk",
    "compare",
    "detections",
    "doctor",
    "energy",
    "environment",
    "latency",
    "leaderboard",
    "macs",
    "memory",
    "parameters",
    "recall",
    "search",
    "sensitivity",
    "summary",
    "sweep",
    "table",
]
