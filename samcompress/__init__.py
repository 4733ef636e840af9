"""temporary while the parts are being written (lead): imports what exists."""
import importlib as _il
__version__ = "0.1.0"
def _grab(module, *names):
    try:
        m = _il.import_module(f"samcompress.{module}")
    except ImportError as e:
        if "samcompress" not in str(e): raise
        return
    for n in names:
        globals()[n] = getattr(m, n, None) if n != "." else m
_grab("core.build", "ARCHITECTURES", "SamConfig", "build")
_grab("core.checkpoint", "save")
_grab("core.history", "Step", "lineage")
_grab("core.pipeline", "Pipeline", "list_recipes")
_grab("core.predict", "Embedding", "Prediction", "Prompt", "predict")
_grab("core.registry", "get", "list_transforms", "register")
_grab("core.transform", "Context", "Transform")
_grab("core.where", "Where")
_grab("core.errors")
_grab("core.data", "Dataset", "Sample", "shapes")
_grab("core.load", "load")
_grab("core.adapters", "to_transformers")
for _f in ("attention", "compile", "distill", "prune", "quantize", "substitute", "evaluate"):
    try:
        globals()[_f] = _il.import_module(f"samcompress.{_f}")
    except ImportError as e:
        if "samcompress" not in str(e): raise
try:
    data = _il.import_module("samcompress.core.data")
    from samcompress.core import errors
except ImportError: pass
