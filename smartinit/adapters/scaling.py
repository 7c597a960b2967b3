"""By how much adapters are scaled: ``s = alpha / r``, or ``alpha / √r`` for rank-stabilised LoRA (arXiv 2312.03732)."""

from __future__ import annotations

import math

import torch


class Scaled:
    """What a layer with adapters does with their scalings.

    Attributes:
        r: adapter -> its rank.
        lora_alpha: adapter -> alpha.
        scaling: adapter -> ``s``.
        use_rslora: adapter -> whether it is rank-stabilised.
        active_adapters: those whose scalings `scale_layer` changes.
    """

    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]
    active_adapters: list[str]

    def set_alpha(self, adapter_name: str, lora_alpha: float) -> None:
        """Change one adapter's alpha, and with it its scaling."""
        self.lora_alpha[adapter_name] = lora_alpha
        self.set_scale(adapter_name, 1.0)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Set one adapter's scaling to ``scale`` times what its rank and alpha say; nothing if it is not here."""
        if adapter_name in self.r:
            rank = self.r[adapter_name]
            divisor = math.sqrt(rank) if self.use_rslora[adapter_name] else rank
            value = scale * self.lora_alpha[adapter_name] / divisor
            kept: object = self.scaling.get(adapter_name)
            if isinstance(kept, torch.Tensor):  # prepared for swaps: compiled code reads this very tensor
                kept.fill_(value)
            else:
                self.scaling[adapter_name] = value

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters; None: back to what rank and alpha say."""
        for name in self.active_adapters:
            if scale is None:
                self.set_scale(name, 1.0)
            elif name in self.scaling:
                self.scaling[name] /= scale
