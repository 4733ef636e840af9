"""Published models that have reference outputs: which reference is whose, and which are slow."""

from __future__ import annotations

# Name for sc.load: reference. Slow are those that take seconds, and those that differ little from
# one that is here.
FAST = {
    "mobile_sam": "mobilesam",
    "tiny_sam": "tinysam",
    "sam_hq_vit_tiny": "sam_hq_vit_tiny",
    "edge_sam": "edgesam",
    "nano_sam": "nanosam_resnet18",
    "efficient_sam_ti": "efficientsam_vitt",
    "efficient_vit_sam_l0": "efficientvit_sam_l0",
    "mobile_sam_v2_l2": "mobilesamv2_efficientvit_l2",
}
SLOW = {
    "mobile_sam_v2": "mobilesamv2_tiny_vit",
    "efficient_vit_sam_l1": "efficientvit_sam_l1",
    "efficient_vit_sam_l2": "efficientvit_sam_l2",
    "edge_sam_3x": "edgesam",
    "repvit_sam": "repvit_sam",
    "efficient_sam_s": "efficientsam_vits",
    "efficient_vit_sam_xl0": "efficientvit_sam_xl0",
    "efficient_vit_sam_xl1": "efficientvit_sam_xl1",
    "sam_vit_b": "sam_vit_b",
    "sam_vit_l": "sam_vit_l",
    "sam_vit_h": "sam_vit_h",
    "sam_hq_vit_b": "sam_hq_vit_b",
}
REFERENCES = FAST | SLOW
# SAM-HQ's two larger sizes have none.
OURS = (*REFERENCES, "sam_hq_vit_l", "sam_hq_vit_h")
