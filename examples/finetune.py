"""Fine-tuning on images of mixed sizes: handwritten digits, whose rows and columns of patches are their own.

python examples/finetune.py [MODEL]

With the name of a checkpoint all of its layers are trained, those in front at lower rates. Without one a small DINOv3
begins with fresh weights. Needs scikit-learn, which has the digits.
"""

import sys

import torch
import torch.nn.functional as F
from digits import digits, small_encoder

import nopad

CAPACITY = 1024
"""Tokens of a pack, about 40 digits."""


def jitter(pixels: torch.Tensor) -> torch.Tensor:
    """Turn, stretch and move an image `(3, H, W)` a little, at random; `PackLoader` calls it in its workers."""
    angle = torch.empty(()).uniform_(-0.2, 0.2)
    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos())).view(2, 2)
    stretch, move = torch.empty(2, 1).uniform_(0.85, 1.15), torch.empty(2, 1).uniform_(-0.2, 0.2)
    grid = F.affine_grid(torch.cat((stretch * turn, move), 1)[None], [1, *pixels.shape], align_corners=False)
    return F.grid_sample(pixels[None].float(), grid, align_corners=False)[0].byte()


def main(model: str | None = None, epochs: int = 20) -> float:
    """Train, print the accuracy on the test set from time to time, and return the last one."""
    torch.manual_seed(0)
    encoder = small_encoder() if model is None else nopad.load(model, size="native")
    classifier = torch.nn.Linear(encoder.hidden_size, 10)
    training, test = digits(encoder.patch_size)
    packs = {"processor": encoder.processor, "capacity": CAPACITY, "max_segments": CAPACITY // 16}  # of small images
    loader = nopad.data.PackLoader(training, shuffle=True, augment=jitter, **packs)
    test_loader = nopad.data.PackLoader(test, **packs)

    lr, layer_decay = (2e-3, 1.0) if model is None else (1e-4, 0.75)
    groups = encoder.parameter_groups(lr, layer_decay=layer_decay, weight_decay=0.05)
    optimizer = torch.optim.AdamW([*groups, {"params": classifier.parameters(), "lr": lr}], betas=(0.9, 0.98))
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = epochs * (len(loader) + 1)  # epochs may differ by a pack
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.15)
    accuracy = 0.0
    for epoch in range(epochs):
        encoder.train()
        losses = []
        for pack, labels in loader:
            loss = F.cross_entropy(classifier(encoder(pack, output="all").pooled), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.detach())
        if epoch % 4 == 3 or epoch == epochs - 1:
            accuracy = evaluate(encoder.eval(), classifier, test_loader)
            print(f"epoch {epoch + 1}: loss {torch.stack(losses).mean():.3f}, accuracy {accuracy:.3f}", flush=True)
    return accuracy


@torch.inference_mode()
def evaluate(encoder, classifier, loader) -> float:
    """The share of digits that are recognised."""
    right = [classifier(encoder.encode(pack).pooled).argmax(1) == labels for pack, labels in loader]
    return float(torch.cat(right).float().mean())


if __name__ == "__main__":
    main(*sys.argv[1:])
