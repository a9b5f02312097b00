"""Two processes that train encoders in parallel on gloo; `tests/test_parallel.py` starts them."""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path

import tiny_encoders
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import nopad

WORLD, STEPS = 2, 2
GRIDS = (torch.tensor([[1, 5, 5], [1, 5, 5]]), torch.tensor([[1, 5, 5], [2, 5, 5], [1, 5, 5]]))
"""The pack of each rank: they are not alike."""


def loss_of(output: nopad.PackedOutput) -> Tensor:
    """A number that all that an encoder returns takes part in."""
    parts = [output.tokens, output.pooled, output.prefix_tokens, output.image_embeds, *(output.hidden_states or ())]
    return sum((part.square().mean() for part in parts if part is not None), torch.zeros(()))


def train(encoder, losses_of) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a few steps, and the weights after them.

    Args:
        encoder: whose parameters are trained.
        losses_of: runs the packs of this process.
    """
    optimizer, losses = torch.optim.SGD(encoder.parameters(), lr=1e-2), []
    for _ in range(STEPS):
        loss = torch.stack(losses_of()).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in encoder.named_parameters()}
    return losses, {name: weight.detach() for name, weight in weights.items()}


def by_ddp(encoder, arguments):
    model = DistributedDataParallel(encoder)
    return train(encoder, lambda: [loss_of(model(*arguments, output="all", output_hidden_states=True))])


def by_fsdp(encoder, arguments):
    for layer in encoder.layers:
        fully_shard(layer)
    fully_shard(encoder)
    return train(encoder, lambda: [loss_of(encoder.encode(*arguments, output_hidden_states=True))])


def run_rank(rank: int, out: Path, folders: list[Path]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(out / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=60))
    init_device_mesh("cpu", (WORLD,))
    for folder in folders:
        for way in (by_ddp, by_fsdp):
            encoder = nopad.load(folder)
            arguments = tiny_encoders.patches_of(encoder, GRIDS[rank], seed=rank), GRIDS[rank]
            torch.save(way(encoder, arguments), out / f"{folder.name}-{way.__name__}-{rank}.pt")
    dist.destroy_process_group()


def main(out: Path, folders: list[Path]) -> None:
    """Fork the ranks, which share the imports."""
    children = []
    for rank in range(WORLD):
        children.append(os.fork())
        if not children[-1]:
            run_rank(rank, out, folders)
            os._exit(0)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise ChildProcessError("a rank failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
