"""Another input size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import ConfigError, ModelError, NoEffectError
from ..core.framing import ATTRIBUTE, framing_of
from ..core.registry import register
from ..core.transform import Context, State, Transform


@register
@dataclass(frozen=True, kw_only=True)
class ImageSize(Transform, family="substitute", phase=10):
    """Run a SAM at another input size, with its position tables resized to match.

    Use it first when time or memory is short and objects are not tiny: half the side is a quarter
    of the tokens and a sixteenth of the memory of global attention. Do not use it for small objects
    or fine outlines: the masks' own grid shrinks with the image. A model trained at one size loses
    accuracy at another until it is distilled or trained there.

    Args:
        size: new padded side S of the input, in pixels; a multiple of the patch size. May be larger
            than the present one.

    Raises:
        ConfigError: if `size` is not positive, or not a multiple of the patch size.
        NoEffectError: if the model has this size already.
        ModelError: if the image encoder is neither a ViT of segment_anything's kind nor one of the
            encoders of `substitute`.

    Effect:
        ``vit_b`` from 1024 to 512 pixels: encoder 486 to 114 GMAC and 0.15 of the time on a CPU,
        decoder 0.29 of the time, low-resolution masks 128 x 128 instead of 256 x 256, parameters
        93.7 to 91.3 million (shorter position tables).

    Composes with:
        Comes before every other technique. Pruning scores, embeddings for distillation and exported
        graphs are then those of the new size.

    Source:
        Resizing of absolute positions: A. Dosovitskiy et al., 2020, arXiv 2010.11929 (bicubic, as
        common since H. Touvron et al., 2020, arXiv 2012.12877). Relative positions: linear along
        the table, as segment_anything's own encoder does when a table does not fit. Own code.

    Example:
        >>> import samcompress as sc
        >>> small = sc.substitute.ImageSize(size=64)(sc.build("tiny"))
        >>> small.image_encoder.img_size, small.image_encoder.pos_embed.shape
        (64, torch.Size([1, 8, 8, 64]))
    """

    size: int = 512

    def validate(self) -> None:
        """Check that the size is positive."""
        if self.size < 1:
            raise ConfigError(
                f"{self.label}: size is not a size.", got=self.size, expected="at least 1 pixel"
            )

    def check(self, model: nn.Module) -> None:
        """Check that the encoder is a ViT and that the size fits its patches."""
        sam: Any = model
        patch = _multiple(sam, self.label)
        if self.size % patch:
            down, up = self.size // patch * patch, -(-self.size // patch) * patch
            raise ConfigError(
                f"{self.label}: size does not fit the image encoder.",
                got=self.size,
                expected=f"a multiple of {patch}",
                fix=" or ".join(f"ImageSize(size={s})" for s in (down, up) if s),
            )
        if self.size == sam.image_encoder.img_size:
            raise NoEffectError(
                f"{self.label}: the model has this size already.",
                where="image_encoder.img_size",
                got=self.size,
                fix="leave this step out, or choose another size",
            )

    def apply(self, model: nn.Module, ctx: Context) -> State:
        """Resize the tables and tell the parts their new sizes."""
        return self.rebuild(model, {"size": self.size})

    def rebuild(self, model: nn.Module, state: State) -> State:
        """The same; the values of the tables are then replaced by saved ones."""
        sam: Any = model
        size, old = state["size"], sam.image_encoder.img_size
        if hasattr(sam.image_encoder, "resize"):
            sam.image_encoder.resize(size)
        else:
            _resize_vit(sam.image_encoder, size // _multiple(model, self.label))
            sam.image_encoder.img_size = size
        prompt: Any = sam.prompt_encoder
        grid = prompt.image_embedding_size[0] * size // old
        prompt.input_image_size = (size, size)
        prompt.image_embedding_size = (grid, grid)
        prompt.mask_input_size = (4 * grid, 4 * grid)
        if hasattr(model, ATTRIBUTE):
            setattr(model, ATTRIBUTE, framing_of(model).at(size))
        return state


def _resize_vit(encoder: Any, grid: int) -> None:
    """Position tables for another grid."""
    if encoder.pos_embed is not None:
        encoder.pos_embed = _like(encoder.pos_embed, resize_positions(encoder.pos_embed, grid))
    for block in encoder.blocks:
        # A window keeps its side, and with it its tables; the grid is padded to whole windows.
        if block.window_size == 0 and block.attn.use_rel_pos:
            for name in ("rel_pos_h", "rel_pos_w"):
                table = getattr(block.attn, name)
                setattr(block.attn, name, _like(table, resize_relative(table, 2 * grid - 1)))


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """Resize absolute positions to another grid, bicubic, with antialiasing when shrinking.

    Args:
        table: (1, h, w, C).
        grid: new height and width.

    Returns:
        (1, grid, grid, C), in the type of `table`.
    """
    image = table.detach().float().permute(0, 3, 1, 2)
    resized = F.interpolate(
        image, (grid, grid), mode="bicubic", align_corners=False, antialias=True
    )
    return resized.permute(0, 2, 3, 1).to(table.dtype).contiguous()


def resize_relative(table: Tensor, length: int) -> Tensor:
    """Resize relative positions along their length, linearly.

    Args:
        table: (L, C), one row for each distance.
        length: new number of rows, ``2 * side - 1``.

    Returns:
        (length, C), in the type of `table`.
    """
    rows = table.detach().float().T[None]
    resized = F.interpolate(rows, length, mode="linear", align_corners=False)
    return resized[0].T.to(table.dtype).contiguous()


def _multiple(model: Any, step: str) -> int:
    """What the image side must be a multiple of: the side of a patch, for a ViT."""
    encoder = model.image_encoder
    if hasattr(encoder, "resize"):
        multiple: int = getattr(encoder, "multiple", encoder.stride)
        return multiple
    try:
        patch = encoder.patch_embed.proj.stride[0]
        _ = encoder.pos_embed, [(b.window_size, b.attn.use_rel_pos) for b in encoder.blocks]
        _ = model.prompt_encoder.input_image_size, model.prompt_encoder.image_embedding_size
    except AttributeError as err:
        raise ModelError(
            f"{step} does not know how to resize this model.",
            where="image_encoder",
            got=f"{type(encoder).__name__}: {err}",
            expected="a ViT with patch_embed, pos_embed and blocks, as in segment_anything",
            fix="build or substitute the encoder at the size wanted",
        ) from err
    return int(patch)


def _like(old: nn.Parameter, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=old.requires_grad)
