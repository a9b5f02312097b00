"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from nopad.layers.linear import StackedLinears
from nopad.layers.roles import RoleAliases

Activation = Callable[[Tensor], Tensor]


class MLP(RoleAliases):
    """`down(activation(up(x)))`; the roles for `names` are `up` and `down`."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: Activation, *, bias: bool, names: Mapping[str, str]
    ):
        super().__init__()
        self.names = names
        self.up = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.activation = activation
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(T, D)` to `(T, D)`."""
        return self.down(self.activation(self.up(hidden_states)))


class GatedMLP(StackedLinears):
    """`down(activation(gate(x)) · up(x))` (Shazeer, arXiv:2002.05202); roles `gate`, `up`, `down`."""

    siblings = ("gate", "up")

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: Activation, *, bias: bool, names: Mapping[str, str]
    ):
        super().__init__()
        self.names = names
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.activation = activation
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(T, D)` to `(T, D)`."""
        gate_up = self.stacked_forward(hidden_states)
        gate, up = (self.gate(hidden_states), self.up(hidden_states)) if gate_up is None else gate_up.chunk(2, dim=1)
        return self.down(self.activation(gate) * up)
