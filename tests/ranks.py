"""Two processes that train encoders in parallel on gloo; `tests/test_parallel.py` starts them."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import tiny_encoders
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import nopad

WORLD, STEPS = 2, 2
GRIDS = (torch.tensor([[1, 5, 5], [1, 5, 5]]), torch.tensor([[1, 5, 5], [2, 5, 5], [1, 5, 5]]))
"""The pack of each rank: they are not alike."""
FAMILIES = (*tiny_encoders.DISTINCT, "dinov2 gated")
"""Those whose forwards differ, and one whose gates are resumed."""
HEADLESS = ("aimv2 with a head", "siglip2")
"""Families that are trained by their tokens, too."""
COMPILED = ("aimv2", "dinov3 gated")
"""Families that are trained compiled, too."""
RESUMED = ("aimv2", "siglip2", "dinov2 gated", "dinov3 gated")
"""Families that are resumed, too: gates, a head, registers, other names in memory."""


def loss_of(output: nopad.PackedOutput) -> Tensor:
    """A number that all that an encoder returns takes part in."""
    parts = [output.tokens, output.pooled, output.prefix_tokens, output.image_embeds, output.merged]
    parts += [*(output.hidden_states or ()), *(output.deepstack_features or ())]
    return sum((part.square().mean() for part in parts if part is not None), torch.zeros(()))


def adamw(encoder) -> torch.optim.Optimizer:
    """An optimizer with a state; by its epsilon, weights whose gradient is rounding alone do not move."""
    return torch.optim.AdamW(encoder.parameters(), lr=1e-3, eps=1e-3)


def train(encoder, losses_of, optimizer=None, steps: int = STEPS) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a few steps, and the weights after them.

    Args:
        encoder: whose parameters are trained.
        losses_of: runs the packs of this process.
        optimizer: plain SGD unless given.
        steps: how many.
    """
    optimizer, losses = optimizer or torch.optim.SGD(encoder.parameters(), lr=1e-2), []
    for _ in range(steps):
        loss = torch.stack(losses_of()).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in encoder.named_parameters()}
    return losses, {name: weight.detach() for name, weight in weights.items()}


def all_outputs(encoder) -> dict[str, bool]:
    """Options of a forward in which every parameter takes part."""
    return {"output_hidden_states": True, "output_deepstack": bool(encoder.deepstack_layers)}


def by_ddp(encoder, arguments):
    model = DistributedDataParallel(encoder)
    return train(encoder, lambda: [loss_of(model(*arguments, output="all", **all_outputs(encoder)))])


def by_ddp_of_tokens(encoder, arguments):
    model = DistributedDataParallel(encoder)
    return train(encoder, lambda: [model(*arguments).square().mean()])


def by_fsdp(encoder, arguments):
    shard(encoder)
    return train(encoder, lambda: [loss_of(encoder.encode(*arguments, **all_outputs(encoder)))])


def by_compiled_ddp(encoder, arguments):
    encoder.compile_for_training(128, 8)
    return by_ddp(encoder, arguments)


def by_compiled_fsdp(encoder, arguments):
    encoder.compile_for_training(128, 8)
    return by_fsdp(encoder, arguments)


def shard(encoder, blocks: int = 2) -> None:
    """FSDP2 by groups of layers, each fetching the next, as docs/training.md says."""
    layers: Any = list(encoder.layers)
    groups = [layers[start : start + blocks] for start in range(0, len(layers), blocks)]
    for group in groups:
        fully_shard(group)
    fully_shard(encoder)
    for (first, *_), (following, *_) in itertools.pairwise(groups):
        first.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([first])


def save(encoder, optimizer, folder: Path) -> None:
    """A distributed checkpoint, as docs/training.md says."""
    model, state = get_state_dict(encoder, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)


def resume(encoder, optimizer, folder: Path) -> None:
    """Load one, whatever number of ranks has saved it."""
    model, state = get_state_dict(encoder, optimizer)
    states = {"model": model, "optimizer": state}
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(encoder, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])


def resumed(encoder, arguments, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Go on from a checkpoint of one process in `folder / "one"`, and leave one of all ranks in `folder / "all"`."""
    shard(encoder)
    optimizer = adamw(encoder)
    resume(encoder, optimizer, folder / "one")
    result = train(encoder, lambda: [loss_of(encoder.encode(*arguments))], optimizer)
    save(encoder, optimizer, folder / "all")
    return result


def run_rank(rank: int, out: Path, folders: list[Path]) -> None:
    torch.set_num_threads(1)
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # without a compiler
    store = dist.FileStore(str(out / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=60))
    init_device_mesh("cpu", (WORLD,))
    for folder in folders:
        ways: list[Any] = [by_ddp, by_fsdp]
        ways += [by_compiled_ddp, by_compiled_fsdp] * (folder.name in COMPILED)
        ways += [by_ddp_of_tokens] * (folder.name in HEADLESS)
        ways += [functools.partial(resumed, folder=folder)] * (folder.name in RESUMED)
        for way in ways:
            encoder = nopad.load(folder, head=way is not by_ddp_of_tokens)
            arguments = tiny_encoders.patches_of(encoder, GRIDS[rank], seed=rank), GRIDS[rank]
            name = "resumed" if isinstance(way, functools.partial) else way.__name__
            torch.save(way(encoder, arguments), out / f"{folder.name}-{name}-{rank}.pt")
    torch.save(messages_of_loaders(rank), out / f"loaders-{rank}.pt")
    torch.save(errors_of_the_last(rank, folders[0]), out / "alone.pt")


def messages_of_loaders(rank: int) -> list[str]:
    """How many images `PackLoader` has for a rank, and what it says where ranks differ."""
    messages = [str(sum(len(pack) for pack, _ in loader_of(capacity=32)))]
    for options in ({"capacity": 32 + rank}, {"capacity": 32, "rank": 0, "world_size": WORLD}):
        try:
            next(iter(loader_of(**options)))
        except ValueError as error:
            messages.append(str(error))
    return messages


def loader_of(**options) -> nopad.data.PackLoader:
    images = [torch.zeros(3, 8, 4 * number, dtype=torch.uint8) for number in range(1, 9)]
    processor = nopad.processor("untrained:apple/aimv2-large-patch14-native")
    return nopad.data.PackLoader(images, dataclasses.replace(processor, patch_size=4), **options)


def errors_of_the_last(rank: int, folder: Path) -> list[str]:
    """What becomes of DDP, FSDP2 and the loader on rank 0 after rank 1 has died."""
    encoder, sharded, loader = nopad.load(folder), nopad.load(folder), loader_of(capacity=32)
    arguments = tiny_encoders.patches_of(encoder, GRIDS[rank]), GRIDS[rank]
    ddp = DistributedDataParallel(encoder)
    shard(sharded)
    for model in (ddp, sharded):
        model(*arguments).square().mean().backward()
    dist.barrier()
    if rank:
        os._exit(0)
    attempts: dict[str, Any] = {
        "ddp": lambda: ddp(*arguments).square().mean().backward(),
        "fsdp": lambda: sharded(*arguments),
        "loader": lambda: list(loader),
    }
    errors = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except RuntimeError:
            errors.append(name)
    return errors


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
