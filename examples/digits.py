"""What the examples of training share: digits as images of mixed sizes (scikit-learn), a small encoder, and a loop."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

import nopad
from nopad.preprocessing.rules import Preprocessing

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_TEST = 360


def digits(patch_size: int, sides: tuple[int, ...] = (4, 5, 6)) -> tuple[list, list]:
    """Training set (1,437) and test set (360): pairs of an image `(H, W, 3)` uint8 and its digit.

    Each scan of 8 × 8 pixels is enlarged to rows and columns of patches of its own.

    Args:
        patch_size: of the encoder.
        sides: numbers of rows and columns to draw from.
    """
    scans, random = load_digits(), np.random.default_rng(0)
    items = []
    for index in random.permutation(len(scans.images)):
        rows, columns = random.choice(sides, 2) * patch_size
        scan = Image.fromarray((scans.images[index] * (255 / 16)).astype(np.uint8))
        image = scan.resize((columns, rows), Image.Resampling.BILINEAR).convert("RGB")
        items.append((np.asarray(image), int(scans.target[index])))
    return items[NUM_TEST:], items[:NUM_TEST]


def small_encoder(multiple_of: int = 1) -> nopad.PackedEncoder:
    """A DINOv3 of 4 layers with fresh weights, whose grids have multiples of so many rows and columns."""
    config = nopad.DINOv3ViTPacking.config_class(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_register_tokens=0,
        patch_size=4,
        initializer_range=0.08,
    )
    encoder = nopad.DINOv3ViTPacking(config)
    half = (0.5, 0.5, 0.5)
    encoder.preprocessing = Preprocessing(
        rule="native", resample="bilinear", mean=half, std=half, multiple_of=multiple_of
    )
    return encoder


def train(
    model: nn.Module, loader: nopad.data.PackLoader, loss_of: Callable[[nopad.Pack, Any], Tensor], epochs: int
) -> list[float]:
    """Train by AdamW with a learning rate in one cycle; print and return the mean loss of each epoch.

    Args:
        loss_of: returns the loss of a pack and its targets.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * (len(loader) + 1))
    means = []
    for epoch in range(epochs):
        losses = []
        for pack, targets in loader:
            loss = loss_of(pack, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.detach())
        means.append(float(torch.stack(losses).mean()))
        print(f"epoch {epoch + 1}: loss {means[-1]:.3f}", flush=True)
    return means
