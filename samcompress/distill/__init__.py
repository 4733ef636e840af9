"""Train a smaller SAM to do what the original does.

| technique | trains | by |
|---|---|---|
| `Encoder` | the image encoder | the teacher's image embeddings, with unlabelled images |
| `PromptLoop` | encoder and decoder | the teacher's masks, with clicks where they differ |
| `FullStage` | the encoder | embeddings, tokens, masks of the teacher, and annotated masks |
| `LayerWise` | the image encoder | the teacher's hidden states, shallow layers first |
| `Sami` | the image encoder | the teacher's tokens, three quarters of them hidden |
| `AlignBottleneck` | a pruned image encoder | SlimSAM's first alignment |
| `AlignEmbedding` | a pruned image encoder | SlimSAM's second alignment |
| `Supervised` | all of the model | annotated masks, as SAM itself was trained |
| `HeatHead` | a head that says where to ask | annotated masks, for segmenting everything |
"""

from __future__ import annotations

from ._samples import Augment
from .align_bottleneck import AlignBottleneck
from .align_embedding import AlignEmbedding
from .encoder import Encoder
from .full_stage import FullStage
from .heat_head import HeatHead
from .layer_wise import LayerWise
from .prompt_loop import PromptLoop
from .sami import Sami
from .supervised import Supervised

__all__ = [
    "AlignBottleneck",
    "AlignEmbedding",
    "Augment",
    "Encoder",
    "FullStage",
    "HeatHead",
    "LayerWise",
    "PromptLoop",
    "Sami",
    "Supervised",
]
