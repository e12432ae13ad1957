"""How far apart two results may lie that differ in the order of their sums alone.

Kernels of other processors, other batch shapes and other numbers of ranks add in another order. What that changes
follows from the number format and from the size of what is added, so tolerances here are counted in roundings of the
largest number: one rounding of a format is its machine epsilon.
"""

import torch

# Of sums through several layers and back, up to 40 were seen with kernels for AVX-512, for AVX2 and for SSE alone.
ROUNDINGS = 256
# Of a loss, which is a mean: for `pytest.approx(…, rel=LOSS_TOLERANCE)`.
LOSS_TOLERANCE = 128 * torch.finfo(torch.float32).eps


def assert_close(
    ours: torch.Tensor, expected: torch.Tensor, name: str = "", roundings: int = ROUNDINGS, size: float | None = None
) -> None:
    """Both are equal but for so many roundings of the largest entry.

    Args:
        ours: of any shape and float type.
        expected: of the same shape; where its type is another one, the coarser of the two counts.
        name: said where they differ.
        roundings: how many.
        size: of the largest number that was added, where sums cancel it; by default the largest entry of `expected`.
    """
    assert ours.shape == expected.shape, (name, ours.shape, expected.shape)
    if not expected.numel():
        return
    epsilon = max(torch.finfo(tensor.dtype).eps for tensor in (ours, expected))
    largest = float(expected.detach().abs().max()) if size is None else size
    difference = float((ours.detach().double() - expected.detach().double()).abs().max())
    assert difference <= roundings * epsilon * largest, (name, difference, largest, difference / (epsilon * largest))
