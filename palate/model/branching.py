"""Keys and values while completions are sampled: a prompt's stand once, whatever the number of its samples.

transformers hands every layer's new keys and values to `update` and then calls `stream_attention`: over a stream of
prompts first, and from then on over one new token a row, which `attend` answers. What a completion adds lies in
tensors made beforehand; a finished row's place goes to the last one, so that little is copied when it leaves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache

GROWTH = 64  # tokens a completion has room for at first; doubled when they are full


class Branches(Cache):
    """The cache of a batch: rows that go on from prompts.

    lengths: tokens of each prompt, in the stream's order. owners: the prompt of each row, as an index into these.
    most: tokens of a completion at most.
    """

    def __init__(self, lengths: Sequence[int], owners: Sequence[int], most: int, device: torch.device):
        super().__init__(layers=[])
        self.most, self.device = most, device
        self.lengths = torch.tensor(lengths, device=device)
        self.owners = list(owners)
        before: dict[int, int] = {}
        self.places = []  # of each row among its prompt's
        for owner in self.owners:
            self.places.append(before.get(owner, 0))
            before[owner] = self.places[-1] + 1
        self.width = max(before.values())
        column = torch.arange(max(lengths), device=device)
        starts = self.lengths.cumsum(0) - self.lengths
        self.inside = column < self.lengths[:, None]  # (P, L)
        self.at = torch.where(self.inside, starts[:, None] + column, 0)  # where a prompt's tokens stand in the stream
        self.stems: list[list[Tensor]] = []  # a layer's keys and values of prompts, (P, heads, L, dim)
        self.own: list[list[Tensor]] = []  # and of completions, (rows, heads, room, dim)
        self.tokens = -1  # written of each completion, less the one being computed
        self.now = 0
        self._arranged()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Keeps what a layer computed: (1, heads, T, dim) of the prompts' stream, (1, heads, rows, dim) of a step."""
        states = [key_states, value_states]
        if self.tokens < 0:
            self.stems.append([x[0][:, self.at].transpose(0, 1).contiguous() for x in states])
            return key_states, value_states
        self.now = layer_idx
        if layer_idx == len(self.own):
            self.own.append([x.new_empty(len(self.owners), x.shape[1], 0, x.shape[3]) for x in states])
        for i, x in enumerate(states):
            room = self.own[layer_idx][i]
            if room.shape[2] == self.tokens:
                more = min(max(GROWTH, self.tokens), self.most - self.tokens)
                room = torch.cat((room, room.new_empty(*room.shape[:2], more, room.shape[3])), 2)
                self.own[layer_idx][i] = room
            room[: len(self.owners), :, self.tokens] = x[0].transpose(0, 1)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are given to the model, so nothing is computed from this."""
        return 0

    def step(self) -> Tensor:
        """Begins the next token of every row; (1, rows) its position."""
        self.tokens += 1
        self._biases: dict[int | None, Tensor | None] = {}
        return (self.lengths[self.of] + self.tokens)[None]

    def keep(self, stay: Sequence[int]) -> list[int]:
        """The rows that go on, in their new order: the last ones take the places of those that leave."""
        order = _closed(stay, len(self.owners))
        self._move(self.own, order)
        self.owners, self.places = [self.owners[i] for i in order], [self.places[i] for i in order]
        prompts = _closed(sorted(set(self.owners)), len(self.lengths))
        if len(prompts) < len(self.lengths):
            self._move(self.stems, prompts)
            new = {old: i for i, old in enumerate(prompts)}
            self.owners = [new[owner] for owner in self.owners]
            picked = torch.tensor(prompts, device=self.device)
            self.lengths, self.inside = self.lengths[picked], self.inside[picked]
        self._arranged()
        return order

    @staticmethod
    def _move(layers: list[list[Tensor]], order: list[int]) -> None:
        gaps = [(to, source) for to, source in enumerate(order) if to != source]
        for layer in layers:
            for x in layer:
                for to, source in gaps:
                    x[to] = x[source]

    def _arranged(self) -> None:
        self.of = torch.tensor(self.owners, device=self.device)
        slots = [owner * self.width + place for owner, place in zip(self.owners, self.places, strict=True)]
        self.whole = slots == list(range(len(self.lengths) * self.width))
        self.slots = torch.tensor(slots, device=self.device)

    def attend(self, query: Tensor, scaling, window: int | None, softcap, sinks: Tensor | None) -> Tensor:
        """Attention output (1, rows, heads, dim) of one token a row; query (1, heads, rows, dim)."""
        rows, now = len(self.owners), self.tokens + 1
        keys, values = (x[: len(self.lengths)] for x in self.stems[self.now])
        own_keys, own_values = (x[:rows, :, :now] for x in self.own[self.now])
        q = query[0].transpose(0, 1).unflatten(1, (keys.shape[1], -1))  # (rows, kv heads, queries of each, dim)
        q = q * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = torch.cat((self._by_row(self._by_prompt(q) @ keys.mT), q @ own_keys.mT), -1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if (bias := self._bias(window)) is not None:
            scores = scores + bias
        if sinks is not None:  # a learned score per head that takes part in the softmax and has no value
            extra = sinks.to(scores.dtype).view(1, *q.shape[1:3], 1).expand(rows, -1, -1, -1)
            weights = torch.cat((scores, extra), -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        before, after = weights.to(values.dtype).split((keys.shape[2], now), -1)
        out = self._by_row(self._by_prompt(before) @ values) + after @ own_values
        return out.flatten(1, 2)[None]

    def _by_prompt(self, x: Tensor) -> Tensor:
        """(rows, heads, queries, n) -> (prompts, heads, rows of a prompt * queries, n), zeros where rows are gone."""
        laid = x
        if not self.whole:
            laid = x.new_zeros(len(self.lengths) * self.width, *x.shape[1:])
            laid[self.slots] = x
        return laid.unflatten(0, (-1, self.width)).transpose(1, 2).flatten(2, 3)

    def _by_row(self, x: Tensor) -> Tensor:
        laid = x.unflatten(2, (self.width, -1)).transpose(1, 2).flatten(0, 1)
        return laid if self.whole else laid[self.slots]

    def _bias(self, window: int | None) -> Tensor | None:
        """(rows, 1, 1, columns): 0 where a row may look, minus infinity elsewhere; None where it may look anywhere."""
        if window not in self._biases:
            allowed = self.inside[self.of]
            if window is not None:
                far = self.lengths[self.of, None] + self.tokens - torch.arange(allowed.shape[1], device=self.device)
                allowed = allowed & (far < window)
            own = torch.arange(self.tokens, -1, -1, device=self.device) < (window or self.tokens + 1)
            allowed = torch.cat((allowed, own.expand(len(self.owners), -1)), 1)
            bias = torch.zeros(allowed.shape, device=self.device).masked_fill_(~allowed, float("-inf"))
            self._biases[window] = None if bool(allowed.all()) else bias[:, None, None]
        return self._biases[window]


def _closed(stay: Sequence[int], count: int) -> list[int]:
    """`stay`, ascending, reordered so that most stand where they stood: the last fill the gaps of those that left."""
    kept = len(stay)
    late = [i for i in stay if i >= kept]
    here = set(stay)
    return [i if i in here else late.pop() for i in range(kept)]
