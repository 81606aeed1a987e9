"""Layers that carry a state (linear attention, state spaces, short convolutions) on a shared-prompt stream.

Such a layer runs over each prompt once; its state at the prompt's end is handed to every branch, which goes on from it.
A layer that cannot go on from a state runs over [prompt, branch] again: it alone, not the model around it.
"""

import copy
import inspect
from functools import cache

import torch
from torch import Tensor, nn

from palate.layout import Layout

# what transformers' layers call a cache, newest name first, and what they ask of it
_PARAMETERS = ("cache", "cache_params", "past_key_values")
_STATEFUL = {"update_conv_state", "update_recurrent_state", "get_linear_cache"}
_TOLERANCE = 1e-5  # of the largest output; float32 is within 1e-6


class States:
    """Stands in for transformers' cache of one layer: states are kept as they are made, so that gradients flow."""

    def __init__(self, conv: dict[int, Tensor] | None = None, recurrent: dict[int, Tensor] | None = None):
        self.conv, self.recurrent = conv or {}, recurrent or {}

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The last inputs of a convolution; None at the start of a text."""
        return self.conv.get(state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """What was read so far; None at the start of a text."""
        return self.recurrent.get(state_idx)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_
    ) -> Tensor:
        """The inputs before these and these; the last `conv_kernel_size` are kept."""
        before = self.conv.get(state_idx)
        size = conv_kernel_size or (conv_states if before is None else before).shape[-1]
        if before is None:
            whole = nn.functional.pad(conv_states, (max(size - conv_states.shape[-1], 0), 0))
        else:
            whole = torch.cat((before, conv_states), -1)
        self.conv[state_idx] = whole[..., -size:]
        return whole

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_) -> Tensor:
        """Keeps the state."""
        self.recurrent[state_idx] = recurrent_states
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether a text was begun."""
        return bool(self.conv or self.recurrent)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Yes: a single token then takes the same way as many, which writes into nothing that backward needs."""
        return True

    def rows(self, rows: list[int]) -> "States":
        """The states of these rows of the batch, in this order."""
        conv, recurrent = ({i: state[rows] for i, state in kept.items()} for kept in (self.conv, self.recurrent))
        return States(conv, recurrent)


@cache
def cache_parameter(kind: type[nn.Module]) -> str | None:
    """The keyword under which layers of this class take a cache for their state; None where they carry none."""
    functions = [inspect.unwrap(f) for _, f in inspect.getmembers(kind, inspect.isfunction)]
    if not any(_STATEFUL & set(function.__code__.co_names) for function in functions):
        return None
    given = inspect.signature(inspect.unwrap(kind.forward)).parameters
    return next((name for name in _PARAMETERS if name in given), None)


def stateful_layers(model: nn.Module) -> list[nn.Module]:
    """The model's layers that carry a state along the text."""
    return [module for module in model.modules() if cache_parameter(type(module)) is not None]


class Branching:
    """The forward of such a layer on a stream. `calls` counts, for the probe."""

    calls = 0
    _resumes: dict[type, bool] = {}

    def __init__(self, layer: nn.Module, layout: Layout):
        self.layer, self.forward, self.layout = layer, layer.forward, layout
        self.parameter = cache_parameter(type(layer))
        self.names = list(inspect.signature(inspect.unwrap(type(layer).forward)).parameters)[
            2:
        ]  # after the hidden states

    def __call__(self, hidden_states: Tensor, *args, **kwargs):
        Branching.calls += 1
        kwargs |= dict(zip(self.names, args, strict=False))
        kwargs = {name: None if name == "attention_mask" else value for name, value in kwargs.items()}
        extra = ()

        def run(rows: Tensor, states: States | None) -> Tensor:
            nonlocal extra
            made = self.forward(rows, **kwargs | {self.parameter: states})
            if isinstance(made, tuple):
                made, *extra = made
                extra = tuple(None for _ in extra)
            return made

        resumes = self._can_resume(hidden_states.shape[-1], kwargs)
        parts = list(hidden_states.split(self.layout.sizes, dim=1))
        out, known = list(parts), {}
        for stems in self.layout.stems.values():
            states = States() if resumes else None
            made = run(torch.cat([parts[i] for i in stems]), states)
            for row, stem in enumerate(stems):
                out[stem], known[stem] = made[row : row + 1], (states, row)
        for (prompt, length), pairs in self.layout.forks.items():
            rows = torch.cat([parts[branch] for _, branch in pairs])
            if not (prompt and resumes):
                whole = torch.cat((torch.cat([parts[stem] for stem, _ in pairs]), rows), 1) if prompt else rows
                made = run(whole, None)[:, prompt:]
            else:
                states, _ = known[pairs[0][0]]  # prompts of one length ran together
                # one token alone takes another way in some layers, which writes into the state
                rows = nn.functional.pad(rows, (0, 0, 0, int(length == 1)))
                made = run(rows, states.rows([known[stem][1] for stem, _ in pairs]))[:, :length]
            for row, (_, branch) in enumerate(pairs):
                out[branch] = made[row : row + 1]
        out = torch.cat(out, dim=1)
        return (out, *extra) if extra else out

    def _can_resume(self, width: int, kwargs: dict) -> bool:
        """Whether the layer's class goes on from a state: some do for single tokens alone. Tried once, in float32."""
        kind = type(self.layer)
        if kind not in self._resumes:
            own = self.layer.__dict__.pop("forward")
            try:
                layer = copy.deepcopy(self.layer).float()
                device = next(layer.parameters()).device
                rows = torch.randn(1, 8, width, generator=torch.Generator().manual_seed(0)).to(device)

                def run(part: Tensor, states: States | None) -> Tensor:
                    made = layer(part, **kwargs | {self.parameter: states})
                    return made[0] if isinstance(made, tuple) else made

                with torch.no_grad(), torch.autocast(device.type, enabled=False):
                    states, whole = States(), run(rows, None)
                    parted = torch.cat((run(rows[:, :5], states), run(rows[:, 5:], states)), 1)
                self._resumes[kind] = bool((parted - whole).abs().max() <= _TOLERANCE * whole.abs().max())
            except (AttributeError, RuntimeError, TypeError):
                self._resumes[kind] = False  # running again is always right
            finally:
                self.layer.forward = own
        return self._resumes[kind]
