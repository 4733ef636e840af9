"""What a SAM is and how to change one; knows no technique."""

from ._require import require
from ._shapes import expect
from .build import ARCHITECTURES, SamConfig, build
from .checkpoint import save
from .contract import check_sam, parts
from .history import Step, lineage
from .load import load
from .models import list_models, model_info
from .pipeline import Pipeline, list_recipes
from .predict import Embedding, Prediction, predict
from .prompt import Prompt
from .registry import get, list_transforms, register
from .transform import Context, State, Transform
from .where import Where

__all__ = [
    "ARCHITECTURES",
    "Context",
    "Embedding",
    "Pipeline",
    "Prediction",
    "Prompt",
    "SamConfig",
    "State",
    "Step",
    "Transform",
    "Where",
    "build",
    "check_sam",
    "expect",
    "get",
    "lineage",
    "list_models",
    "list_recipes",
    "list_transforms",
    "load",
    "model_info",
    "parts",
    "predict",
    "register",
    "require",
    "save",
]
