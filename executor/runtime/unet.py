"""A U-Net: the segmenter with skip connections that transformers does not have.

Source: O. Ronneberger, P. Fischer, T. Brox, "U-Net: convolutional networks for biomedical image segmentation", MICCAI
2015; with padding, so that the output is as large as the input, and batch normalisation.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["UNet"]


class UNet(nn.Module):
    """Segmentation of images whose sides are multiples of 2 to the power of ``depth``.

    Args:
        width: Channels of the first level; each level down has twice as many.
        depth: Levels below the first.
        classes: Channels of the output.
    """

    def __init__(self, width: int, depth: int, classes: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(_block(before, after) for before, after in zip([3, *widths], widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        pairs = list(zip(reversed(widths[1:]), reversed(widths[:-1]), strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(deep, shallow, 2, stride=2) for deep, shallow in pairs)
        self.merge = nn.ModuleList(_block(2 * shallow, shallow) for _, shallow in pairs)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``logits`` of shape (batch, classes, height, width) for images (batch, 3, height, width)."""
        skipped = []
        hidden = pixel_values
        for level, block in enumerate(self.down):
            hidden = block(hidden if level == 0 else self.pool(hidden))
            skipped.append(hidden)
        for up, merge, skip in zip(self.up, self.merge, reversed(skipped[:-1]), strict=True):
            hidden = merge(torch.cat([skip, up(hidden)], dim=1))
        return {"logits": self.head(hidden)}


def _block(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
