"""The encoders of `substitute` other than SAM's own kind, but narrow and shallow."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from samcompress.substitute import (
    _efficientformer,
    _efficientvit,
    _hiera,
    _hq,
    _litevit,
    _repvit,
    _resnet,
    _rwkv,
    _timm,
    _tiny_vit,
    _unet,
)

SIDE, OUT = 64, 16
TINY_VIT = _tiny_vit.TinyViTConfig(
    (16, 24, 32, 48), (2, 1, 2, 1), (2, 2, 2, 2), (2, 2, 2, 2), 2.0, 2.0
)
EFFICIENT_VIT = _efficientvit.EfficientViTConfig(
    widths=(8, 16, 16, 32, 32), depths=(1, 1, 1, 1, 1), neck_depth=1, neck_width=16, head_dim=8
)
REP_VIT = _repvit.RepViTConfig((16, 16, 32, 32), ("10", "01", "01", "10"), True, 2, True)
REP_VIT_2 = _repvit.RepViTConfig((16, 16, 32, 32), ("10", "01", "01", "10"), False, 1, False)
EFFICIENT_FORMER = _efficientformer.EfficientFormerConfig(
    (16, 16, 24, 32), ((2,), (2,), (2, 3), (2, 2)), 1
)
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "tiny_vit": lambda: _tiny_vit.build(TINY_VIT, SIDE, OUT),
    "hq_tiny_vit": lambda: _hq.HqTinyViT(TINY_VIT, SIDE, OUT),
    "rep_vit_m1": lambda: _repvit.build(REP_VIT, SIDE, OUT),
    "rep_vit_m2": lambda: _repvit.build(REP_VIT_2, SIDE, OUT),
    "efficient_vit": lambda: _efficientvit.build(EFFICIENT_VIT, SIDE, OUT),
    "res_net": lambda: _resnet.build(_resnet.ResNetConfig((1, 1, 1, 1), width=16), SIDE, OUT),
    "efficient_former": lambda: _efficientformer.build(EFFICIENT_FORMER, SIDE, OUT),
    "lite_vit": lambda: _litevit.build(
        _litevit.LiteViTConfig((16, 16, 24, 32), (1, 1, 1, 1), 2, 2), SIDE, OUT
    ),
    "u_net": lambda: _unet.build(_unet.UNetConfig((8, 8, 16, 16, 32), (1, 1), 8, 2.0), SIDE, OUT),
    "rwkv": lambda: _rwkv.build(_rwkv.RWKVConfig(16, 2, 2, (8, 16), (1, 1)), SIDE, OUT),
    "hiera": lambda: _hiera.build(_hiera.HieraConfig(16, 1, (1, 1, 2, 1), (3,)), SIDE, OUT),
    "timm": lambda: _timm.TimmEncoder(
        "test_efficientnet", SIDE, 8, OUT, _timm.planned("test_efficientnet", SIDE, 8)
    ),
}
