"""A vision-language model on packs: tokens of a vision tower, merged 2 × 2, in the place of placeholders in a text.

python examples/vlm_tower.py

As in LLaVA, the tokens are those of the last layer but one, behind them is an MLP of two layers, and the language model
of transformers, here a tiny Llama over bytes, takes its output as embeddings. It learns to name handwritten digits of
mixed sizes, and all parts are trained. Needs scikit-learn, which has the digits.
"""

import torch
from digits import NAMES, digits, small_encoder, train
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import nopad

CAPACITY = 1024
IMAGE, END = 256, 257
"""Ids behind the bytes: the placeholder of one merged token, and the end of an answer."""
PROMPT = list(b" is ")


class VisionLanguageModel(nn.Module):
    """Tower, projector and language model."""

    def __init__(self, encoder: nopad.PackedEncoder):
        super().__init__()
        config = LlamaConfig(
            vocab_size=258,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=END,
        )
        self.tower, self.language = encoder, LlamaForCausalLM(config)
        width = 4 * encoder.hidden_size
        self.projector = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 64))

    def forward(self, pack: nopad.Pack, answers: list[str]) -> Tensor:
        """The language model's loss on the answers, one for each image of the pack."""
        ids, labels = [], []
        for number, answer in zip(pack.lengths(merge=2), answers, strict=True):
            prompt, answer_ids = [IMAGE] * number + PROMPT, [*answer.encode(), END]
            ids.append(torch.tensor(prompt + answer_ids))
            labels.append(torch.tensor([-100] * len(prompt) + answer_ids))
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=END)
        labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        # Padding is on the right and attention causal: nothing that counts sees it.
        return self.language(inputs_embeds=self.embed(pack, ids), labels=labels).loss

    def embed(self, pack: nopad.Pack, ids: Tensor) -> Tensor:
        """Embeddings of the ids, those of the images in the place of IMAGE."""
        tokens = self.tower.encode(pack, output_hidden_states=True).hidden_states[-2]
        images = self.projector(nopad.merge(tokens, pack, 2))
        embeddings = self.language.get_input_embeddings()(ids.clamp(max=END))
        return embeddings.masked_scatter((ids == IMAGE)[..., None], images)

    @torch.inference_mode()
    def name(self, pack: nopad.Pack) -> list[str]:
        """The most likely of `NAMES` for each image."""
        losses = []
        for image in pack:
            losses.append(torch.stack([self(image, [name]) * (len(name) + 1) for name in NAMES]))
        return [NAMES[each.argmin()] for each in losses]


def main(epochs: int = 10) -> list[float]:
    """Train; print and return the mean loss of each epoch."""
    torch.manual_seed(0)
    model = VisionLanguageModel(small_encoder(multiple_of=2)).train()
    training, test = digits(model.tower.patch_size, sides=(4, 6))
    packs = {"processor": model.tower.processor, "capacity": CAPACITY, "max_segments": CAPACITY // 16}
    loader = nopad.data.PackLoader([(image, NAMES[digit]) for image, digit in training], shuffle=True, **packs)
    means = train(model, loader, model, epochs)
    pack = model.tower.pack([image for image, _ in test[:8]])
    print("answers:", model.eval().name(pack), "expected:", [NAMES[digit] for _, digit in test[:8]])
    return means


if __name__ == "__main__":
    main()
