"""Another runtime. Call it as `sc.compile`; importing the name would hide Python's own `compile`.

| technique | what it does | runtimes |
|---|---|---|
| `Export` | image encoder and prompt decoder as files, the SAM running from them | `onnxruntime` |
"""

from .export import Export

__all__ = ["Export"]
