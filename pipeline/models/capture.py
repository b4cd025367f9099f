"""Read what passes through the edited layer during an ordinary forward of the base model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from pipeline.models.base_model import BaseModel
from pipeline.models.value_matrix import block, value_module


@dataclass
class Captured:
    """Tensors of the last forward, in the model's dtype."""

    states_BTD: Tensor = field(init=False)  # residual stream entering layer L: what the router reads
    keys_BTF: Tensor = field(init=False)  # A(x): what enters W_v
    hidden_BTD: Tensor = field(init=False)  # residual stream as layer L leaves it


@contextmanager
def capture(base: BaseModel) -> Iterator[Captured]:
    captured = Captured()

    def read_states(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        captured.states_BTD = inputs[0]

    def read_keys(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # OPT hands its FFN one long row of tokens, (B·T) × F.
        captured.keys_BTF = inputs[0].view(*captured.states_BTD.shape[:2], -1)

    def read_hidden(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        captured.hidden_BTD = output if isinstance(output, Tensor) else output[0]

    handles = [
        block(base.model, base.layer).register_forward_pre_hook(read_states),
        value_module(base.model, base.layer).register_forward_pre_hook(read_keys),
        block(base.model, base.layer).register_forward_hook(read_hidden),
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
