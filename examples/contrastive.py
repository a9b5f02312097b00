"""Contrastive training of an image and a text tower on packs: handwritten digits of mixed sizes and their descriptions.

python examples/contrastive.py

Both towers begin with fresh weights: a small DINOv3, and transformers' CLIP text model over bytes. The loss is SigLIP's
(Zhai et al., arXiv:2303.15343), for pairs of an image and each distinct text of a pack. Then digits are classified
by their similarity to texts, zero-shot. Needs scikit-learn, which has the digits.
"""

import torch
import torch.nn.functional as F
from digits import NAMES, digits, small_encoder, train
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import nopad

CAPACITY, EMBEDDING = 1024, 64
BEGIN, END = 256, 257
"""Behind the bytes; the text tower pools the token END."""


class TextTower(nn.Module):
    """transformers' CLIP text model over bytes."""

    def __init__(self):
        super().__init__()
        config = CLIPTextConfig(
            vocab_size=258,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=40,
            projection_dim=EMBEDDING,
            bos_token_id=BEGIN,
            eos_token_id=END,
            pad_token_id=0,
        )
        self.model = CLIPTextModelWithProjection(config)

    def forward(self, texts: list[str]) -> Tensor:
        """`(L, E)`, of length one."""
        ids = [torch.tensor([BEGIN, *text.encode(), END]) for text in texts]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        lengths = torch.tensor([len(each) for each in ids])[:, None]
        mask = (torch.arange(padded.shape[1]) < lengths).long()
        return F.normalize(self.model(input_ids=padded, attention_mask=mask).text_embeds, dim=1)


class Contrast(nn.Module):
    """Both towers, and SigLIP's scale and bias."""

    def __init__(self):
        super().__init__()
        self.encoder, self.texts = small_encoder(), TextTower()
        self.projection = nn.Linear(self.encoder.hidden_size, EMBEDDING)
        self.scale, self.bias = nn.Parameter(torch.tensor(10.0).log()), nn.Parameter(torch.tensor(-5.0))

    def forward(self, pack: nopad.Pack, texts: list[str]) -> Tensor:
        """Logits `(N, L)` of each image and text."""
        images = F.normalize(self.projection(self.encoder(pack, output="all").pooled), dim=1)
        return images @ self.texts(texts).T * self.scale.exp() + self.bias


def main(epochs: int = 10) -> tuple[list[float], float]:
    """Train; print and return the mean loss of each epoch, and the zero-shot accuracy."""
    torch.manual_seed(0)
    model = Contrast().train()
    training, test = digits(model.encoder.patch_size)
    described = [(image, f"a handwritten {NAMES[digit]}") for image, digit in training]
    packs = {"processor": model.encoder.processor, "capacity": CAPACITY, "max_segments": CAPACITY // 16}
    loader = nopad.data.PackLoader(described, shuffle=True, **packs)

    def loss_of(pack: nopad.Pack, texts: list[str]) -> Tensor:
        distinct = sorted(set(texts))
        pairs = torch.tensor([[1.0 if text == other else -1.0 for other in distinct] for text in texts])
        return -F.logsigmoid(pairs * model(pack, distinct)).sum(1).mean()

    means = train(model, loader, loss_of, epochs)

    prompts = [f"a handwritten {name}" for name in NAMES]
    with torch.inference_mode():
        test_loader = nopad.data.PackLoader(test, **packs)
        right = [model.eval()(pack, prompts).argmax(1) == labels for pack, labels in test_loader]
    accuracy = float(torch.cat(right).float().mean())
    print(f"zero-shot accuracy {accuracy:.3f}")
    return means, accuracy


if __name__ == "__main__":
    main()
