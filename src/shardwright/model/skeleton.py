"""Stand-ins for the parts of a model that a stage does not hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shardwright.model.probe import LayerFacts, OutputShape


class StageEnd(Exception):  # noqa: N818
    """Not an error: ends a forward where the stage ends, and carries what leaves it."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class PassThrough(nn.Module):
    """Stands where a layer of another stage is, and hands its input on.

    It has the layer's plain attributes, since some families' loops read them. In the place of the model's last layer
    it ends the forward: what follows is another stage's.
    """

    def __init__(self, layer: nn.Module, facts: LayerFacts, *, is_end: bool) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            if not name.startswith("_") and isinstance(value, int | float | str | bool | None):
                setattr(self, name, value)
        self.training = False
        self._num_outputs = facts.num_outputs
        self._is_end = is_end

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states, in the form in which the layer returned them."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._is_end:
            raise StageEnd(hidden)
        if self._num_outputs is None:
            return hidden
        return (hidden, *(None,) * (self._num_outputs - 1))


class Absent(nn.Module):
    """Stands for a module that another stage holds. Never called.

    The names of its parameters remain as plain tensors without content, since some families' own initialisation
    reaches for them.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.training = False
        for name, parameter in module.named_parameters(recurse=False):
            setattr(self, name, parameter.data)


class EmptyOutput(Absent):
    """Stands for a module before the layers, on a stage whose layers' input comes from elsewhere."""

    def __init__(self, module: nn.Module, shape: OutputShape, dtype: torch.dtype) -> None:
        super().__init__(module)
        self._shape = shape
        self._dtype = dtype

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Zeros of the shape that the module would return; their own memory, since some families scale in place."""
        like = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        tokens = max(like.shape[:2])
        return torch.zeros(self._shape.for_tokens(tokens), dtype=self._dtype, device=like.device)
