"""samcompress: make Segment Anything Models small and fast, and prove it.

``import samcompress as sc``; then ``sc.load`` a SAM, chain techniques with ``|``, call the chain on
the model, and let ``sc.evaluate`` measure what it cost and won.
"""

from . import attention, compile, distill, evaluate, prune, quantize, substitute  # noqa: A004
from .core import data, errors
from .core.adapters import to_transformers
from .core.build import ARCHITECTURES, SamConfig, build
from .core.checkpoint import save
from .core.data import Dataset, Sample, shapes
from .core.everything import Everything, EverythingStats, Segments, samplers
from .core.history import Step, lineage
from .core.load import load
from .core.models import list_models, model_info
from .core.pipeline import Pipeline, list_recipes
from .core.predict import Embedding, Prediction, predict
from .core.prompt import Prompt
from .core.registry import get, list_transforms, register
from .core.transform import Context, Transform
from .core.where import Where
from .evaluate.summary import summary

__version__ = "0.1.0"

__all__ = [
    "ARCHITECTURES",
    "Context",
    "Dataset",
    "Embedding",
    "Everything",
    "EverythingStats",
    "Pipeline",
    "Prediction",
    "Prompt",
    "SamConfig",
    "Sample",
    "Segments",
    "Step",
    "Transform",
    "Where",
    "attention",
    "build",
    "compile",
    "data",
    "distill",
    "errors",
    "evaluate",
    "get",
    "lineage",
    "list_models",
    "list_recipes",
    "list_transforms",
    "load",
    "model_info",
    "predict",
    "prune",
    "quantize",
    "register",
    "samplers",
    "save",
    "shapes",
    "substitute",
    "summary",
    "to_transformers",
]
