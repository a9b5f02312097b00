"""Ranks of torch.distributed, and whether they plan the same epoch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch.distributed as dist

from nopad.counts import is_count


def rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and world size: as given, else those of torch.distributed, else 0 and 1.

    Raises:
        ValueError: one without the other, or a rank that there is not.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank, world_size: expected both or neither, got {rank} and {world_size}")
    if rank is None or world_size is None:
        return (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)
    if not is_count(world_size) or not is_count(rank, 0) or rank >= world_size:
        raise ValueError(f"rank, world_size: expected 0 ≤ rank < world_size, got {rank!r:.80} and {world_size!r:.80}")
    return int(rank), int(world_size)


def check_agreement(rank: int, settings: Mapping[str, Any]) -> None:
    """Compare the settings of all ranks; every rank raises where they differ, so that none waits for another.

    Args:
        rank: rank of this process, whose packs it takes.
        settings: settings that all ranks must have alike, plain values. Where their `world_size` is not that of
            torch.distributed, ranks are not compared.

    Raises:
        ValueError: settings that differ, or two processes with one rank.
    """
    if settings["world_size"] == 1 or not _is_distributed() or dist.get_world_size() != settings["world_size"]:
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (rank, dict(settings)), group=_cpu_group(dist.group.WORLD))
    ranks = [each for each, _ in everyone]
    if len(set(ranks)) < len(ranks):
        raise ValueError(f"rank: expected each process to have its own, got {ranks}")
    for name, value in settings.items():
        values = {each: of_rank[name] for each, of_rank in everyone}
        if any(other != value for other in values.values()):
            listed = ", ".join(f"{values[each]!r:.80} on rank {each}" for each in sorted(values)[:8])
            raise ValueError(f"{name}: expected the same on all ranks, got {listed}")


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


@lru_cache(maxsize=1)
def _cpu_group(world: Any) -> Any:
    """A group whose processes talk without a GPU, and whose members notice at once that one has died."""
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")
