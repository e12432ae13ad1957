"""Weights of linear layers in the order in which oneDNN reads them: faster products on x86 processors.

torch hands products of fp32 to MKL, which rearranges the weights anew for each call. Where a product has few rows, as
when tokens are written, that takes as long as the product itself. `benchmarks/predict_throughput.py` has the figures.
"""

from __future__ import annotations

import platform

import torch
from torch import nn
from transformers import PreTrainedModel


class PackedLinear(nn.Module):
    """A linear layer for inference in fp32 on a CPU. Its weights are in no state dict: it cannot be saved or trained.

    Args:
        linear: the layer whose products it computes, up to rounding.
        keep_weight: leave its weights readable as `weight` too.
    """

    def __init__(self, linear: nn.Linear, keep_weight: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias
        if keep_weight:
            self.weight = linear.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Products of inputs [..., in_features] with the weights: [..., out_features]."""
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")
        return product


def pack_weights(model: PreTrainedModel) -> None:
    """Put PackedLinear in the place of every linear layer, where that helps: fp32 on an x86 processor.

    The weights are held once, but for those of the output layer, which others share or read.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.device.type == "cpu" and child.weight.dtype == torch.float32:
                setattr(parent, name, PackedLinear(child, keep_weight=child is head))
