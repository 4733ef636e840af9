"""What a compressed model costs and what it won, measured by one set of rules.

| name | answers |
|---|---|
| `accuracy`, `accuracies` | how good are the masks, by a named protocol? |
| `average_precision` | AP and AR of masks, as COCO defines them |
| `latency` | how long does each part take on this device? |
| `memory` | how much memory does it need, in a fresh process? |
| `macs`, `parameters`, `bytes_on_disk` | how large is it, and how much must it compute? |
| `summary` | what is it made of? |
| `benchmark` | all of that for several models, resumable, as a `Report` |
| `compare` | what changed between two results? |
| `environment`, `doctor` | what was measured on, and is this machine ready? |
"""

from .accuracy import Accuracy, accuracies, accuracy, agreement
from .ap import AveragePrecision, average_precision
from .benchmark import benchmark
from .compare import Comparison, compare
from .environment import doctor, environment
from .latency import Latency, Rounds, Timing, latency
from .macs import Macs, macs
from .memory import Memory, memory
from .report import Report
from .size import bytes_on_disk, parameters
from .summary import Summary, summary

__all__ = [
    "Accuracy",
    "AveragePrecision",
    "Comparison",
    "Latency",
    "Macs",
    "Memory",
    "Report",
    "Rounds",
    "Summary",
    "Timing",
    "accuracies",
    "accuracy",
    "agreement",
    "average_precision",
    "benchmark",
    "bytes_on_disk",
    "compare",
    "doctor",
    "environment",
    "latency",
    "macs",
    "memory",
    "parameters",
    "summary",
]
