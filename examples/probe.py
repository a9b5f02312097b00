"""An attentive probe on frozen features: one query attends to the tokens of each image, then a linear classifier.

python examples/probe.py [MODEL]

The features of handwritten digits of mixed sizes are made once. Needs scikit-learn, which has the digits. Without
access to the Hugging Face Hub, MODEL is untrained:facebook/dinov3-vits16-pretrain-lvd1689m: random weights.
"""

import sys

import torch
import torch.nn.functional as F
from digits import digits
from torch import Tensor, nn

import nopad
from nopad.layers.pooling import attention_pool
from nopad.segments import Segments


class AttentiveProbe(nn.Module):
    """Attention pooling with a learned query, as AIMv2 and V-JEPA are evaluated, and a linear classifier."""

    def __init__(self, hidden_size: int, num_heads: int, num_classes: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(hidden_size)
        self.query = nn.Parameter(torch.randn(hidden_size))
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.classifier = nn.Linear(hidden_size, num_classes)

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Tokens `(T, D)` of images with these lengths to `(N, classes)`."""
        tokens, segments = self.norm(tokens), Segments.of(lengths, tokens.device)
        key, value = self.key(tokens), self.value(tokens)
        return self.classifier(attention_pool(self.query, key, value, segments, self.num_heads, "auto"))


@torch.inference_mode()
def features_of(encoder, items) -> list[tuple[Tensor, Tensor]]:
    """Of each image its tokens `(h · w, D)`, float32 on the CPU, and its digit."""
    features = []
    for pack, labels in nopad.data.PackLoader(items, encoder.processor, capacity=8192):
        tokens = encoder(pack.to(encoder.device, encoder.dtype)).float().cpu()
        features += zip(tokens.split(pack.lengths()), labels, strict=True)
    return features


def main(model: str = "facebook/dinov3-vits16-pretrain-lvd1689m", epochs: int = 20) -> float:
    """Train the probe, print its accuracy on the test set, and return it."""
    torch.manual_seed(0)
    encoder = nopad.load(model, size="native").requires_grad_(False)
    training, test = (features_of(encoder, items) for items in digits(encoder.patch_size))
    probe = AttentiveProbe(encoder.hidden_size, max(1, encoder.hidden_size // 64), 10)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.05)
    batches = torch.utils.data.DataLoader(training, batch_size=64, shuffle=True, collate_fn=list)
    for epoch in range(epochs):
        for batch in batches:
            tokens, labels = zip(*batch, strict=True)
            loss = F.cross_entropy(probe(torch.cat(tokens), list(map(len, tokens))), torch.stack(labels))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss of the last batch {loss:.3f}", flush=True)
    tokens, labels = zip(*test, strict=True)
    with torch.inference_mode():
        right = probe(torch.cat(tokens), list(map(len, tokens))).argmax(1) == torch.stack(labels)
    accuracy = float(right.float().mean())
    print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main(*sys.argv[1:])
