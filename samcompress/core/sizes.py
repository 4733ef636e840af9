"""How much a model holds."""

from __future__ import annotations

from pathlib import Path

from torch import nn


def parameter_count(module: nn.Module) -> int:
    """Stored weights, each tensor once; the integers of quantised layers are weights too."""
    integers = [
        buffer
        for name, buffer in module.named_buffers()
        # A batch norm counts its batches, which is no weight.
        if not buffer.is_floating_point() and not name.endswith("num_batches_tracked")
    ]
    return sum({_key(t): t.numel() for t in (*module.parameters(), *integers)}.values())


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of all weights and buffers, each tensor once, and of the files of an exported model."""
    tensors = (*module.parameters(), *module.buffers())
    files: set[Path] = set()
    for part in module.modules():
        files.update(getattr(part, "artifacts", {}).values())
    stored = {_key(t): t.numel() * t.element_size() for t in tensors}
    return sum(stored.values()) + sum(f.stat().st_size for f in files)


def _key(tensor: object) -> tuple[int, object]:
    # Tensors on the meta device all have address 0, so they are told apart by identity.
    address = tensor.data_ptr()  # type: ignore[attr-defined]
    return (address, tensor.shape) if address else (id(tensor), None)  # type: ignore[attr-defined]
