"""How equal the cost of ranks is that train on packs of `nopad.data.PackLoader`, over made-up sizes; no pixels.

python benchmarks/balance.py
"""

from __future__ import annotations

import argparse

import torch

import nopad

SPREADS = {"uniform": None, "log-normal 0.8": (6.1, 0.8), "log-normal 1.2": (6.5, 1.2)}
"""Mean and standard deviation of the logarithm of an image's tokens; uniform is 64 to 1,024."""


def tokens(spread: str, number: int, max_tokens: int) -> torch.Tensor:
    """Tokens of `number` images."""
    generator = torch.Generator().manual_seed(0)
    parameters = SPREADS[spread]
    if parameters is None:
        return torch.randint(64, 1025, (number,), generator=generator)
    drawn = torch.empty(number).log_normal_(*parameters, generator=generator)
    return drawn.long().clamp(16, max_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4000, help="of each rank")
    arguments = parser.parse_args()
    processor = nopad.processor("untrained:apple/aimv2-large-patch14-native")
    side = processor.patch_size
    print(f"{'tokens of an image':20}{'capacity':>10}{'ranks':>7}{'steps':>7}{'fill':>8}{'balance':>9}")
    for spread in SPREADS:
        for capacity in (4096, 16896, 37888):
            for world_size in (2, 8):
                lengths = tokens(spread, arguments.images * world_size, capacity)
                sizes = torch.stack((torch.full_like(lengths, side), lengths * side), dim=1)  # one row of patches
                options = {"capacity": capacity, "sizes": sizes, "rank": 0, "world_size": world_size, "shuffle": True}
                statistics = nopad.data.PackLoader(range(len(lengths)), processor, **options).statistics()
                numbers = f"{statistics.steps:>7}{statistics.fill:>8.3f}{statistics.balance:>9.3f}"
                print(f"{spread:20}{capacity:>10,}{world_size:>7}{numbers}")


if __name__ == "__main__":
    main()
