"""Linear layers with weights prepacked for oneDNN: faster matrix products in fp32 on x86 processors.

torch passes fp32 products to MKL, which repacks the weights in every call. For few rows, as in decoding, that takes as
long as the product itself. The ops are private to torch: without them, weights stay as they are.
`benchmarks/predict_throughput.py` has the figures.
"""

from __future__ import annotations

import platform

import torch
from torch import nn
from transformers import PreTrainedModel


class PackedLinear(nn.Module):
    """A linear layer for inference in fp32 on a CPU. It has no state dict, and cannot be saved or trained.

    Args:
        linear: the layer it replaces; equal up to rounding.
        keep_weight: also keep the weights as `weight`.
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
    """Replace every linear layer by a PackedLinear where that helps: in fp32 on an x86 processor.

    Weights are held once, except those of the output layer, which may be shared or read.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return
    try:
        _ = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    except AttributeError:
        return
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.device.type == "cpu" and child.weight.dtype == torch.float32:
                setattr(parent, name, PackedLinear(child, keep_weight=child is head))
