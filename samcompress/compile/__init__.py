"""Another runtime. Call it as `sc.compile`; importing the name would hide Python's own `compile`.

| technique | what it does |
|---|---|
| `Export` | image encoder and prompt decoder as files of a runtime, the SAM running from them |
| `Torch` | image encoder and mask decoder through torch's compiler |

`for_device` times what could run on a device and keeps the fastest that still gives the same masks.
`edge_tpu_check` says what of a .tflite file would run on an Edge TPU.
"""

from .edge_tpu import edge_tpu_check
from .export import Export
from .profiles import Choice, Profile, for_device
from .torch import Torch

__all__ = ["Choice", "Export", "Profile", "Torch", "edge_tpu_check", "for_device"]
