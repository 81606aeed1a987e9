"""The best of several samples by a judge: what a reward is worth with no training at all.

Source: Stiennon et al. 2020, arXiv:2009.01325, section 4.2; the law of the sample that is kept: METHODS 8.16.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from palate.data.records import Text
from palate.sampling.judge import Completions, Judge


@dataclass(frozen=True, slots=True)
class Best:
    """place: of the completion that is kept, among those of its prompt. scores: of all of these."""

    place: int
    scores: tuple[float, ...]

    @property
    def score(self) -> float:
        """Of the completion that is kept."""
        return self.scores[self.place]


def best_of(judge: Judge, prompts: Sequence[Text], drawn: Sequence[Completions]) -> list[Best]:
    """Which of each prompt's completions the judge scores highest; of equally good ones the first.

    drawn: of each prompt at least one. Of n independent draws the one that is kept lies within a KL of
    log n - (n - 1) / n nats of the law they were drawn from (`worlds.enumerable.best_of_kl_bound`).
    Raises UsageError (E308) for a judge that only compares, and what the judge raises.
    """
    asked = [prompt for prompt, ours in zip(prompts, drawn, strict=True) for _ in ours]
    values = iter(judge.scores(asked, [completion for ours in drawn for completion in ours]))
    made = []
    for ours in drawn:
        scores = tuple(next(values) for _ in ours)
        made.append(Best(scores.index(max(scores)), scores))
    return made
