"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


class MLP(nn.Module):
    """`down(activation(up(x)))`."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Activation, *, bias: bool):
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.activation = activation
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(T, D)` to `(T, D)`."""
        return self.down(self.activation(self.up(hidden_states)))


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) · up(x))`, with gate and up in one matrix (Shazeer, arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Activation, *, bias: bool):
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.activation = activation
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(T, D)` to `(T, D)`."""
        gate, up = self.gate_up(hidden_states).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)
