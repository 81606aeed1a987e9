"""The scale of a reward model: samples of its start, drawn once, on which rewards get mean 0 and deviation 1.

Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
"""

import math
from itertools import chain

from palate.errors import ModelError
from palate.recipes.retain import spread

MOST_TOKENS = 128  # of a sample
ROWS = 16  # times --normalise: rows whose prompts are looked at before all others are


def draw(config, tokenizer, policy, groups) -> list[dict[str, list[int]]]:
    """Ids of --normalise samples at temperature 1 and of their prompts; the data's own where it has no prompts."""
    from palate.data.table import Lengths
    from palate.data.tokens import end_tokens
    from palate.sampling.generate import generate

    longest = int(Lengths.of(groups).completion.max())
    first, found = spread(groups, ROWS * config.normalise), {}
    for number, group in enumerate(chain(first, groups)):
        if number >= len(first) and len(found) >= config.normalise:
            break
        if len(group.prompt):
            found[group.prompt.tobytes()] = group.prompt
    if not found:
        rows = [{"prompt": [], "ids": ids.tolist()} for group in first for ids in group.completions]
        return spread(rows, config.normalise)
    prompts = spread(list(found.values()), config.normalise)
    made = generate(
        policy,
        tokenizer,
        prompts,
        max_tokens=min(longest, MOST_TOKENS),
        samples=-(-config.normalise // len(prompts)),
        seed=config.seed,
        end_ids=end_tokens(tokenizer),
    )
    rows = [{"prompt": prompts[one.prompt].tolist(), "ids": one.ids.tolist()} for one in made]
    return spread(rows, config.normalise)


def as_groups(rows: list[dict[str, list[int]]]) -> list:
    """The rows of `draw` as groups of one completion."""
    import numpy as np

    from palate.data.tokens import TokenGroup

    def array(ids):
        return np.array(ids, dtype=np.int32)

    return [TokenGroup(array(r["prompt"]), (array(r["ids"]),), (((0, len(r["ids"])),),)) for r in rows]


def moments(config, prepared, groups) -> tuple[float, float]:
    """Mean and deviation of what the head says of the groups' completions, `reward_bias` left out.

    Raises ModelError (E412) where it says the same of all of them, or nothing finite.
    """
    import numpy as np

    from palate.scoring import reward_bias, rewards

    model = prepared.loaded.model
    found = rewards(model, groups, numerics=prepared.objective.numerics, tokens=config.train.tokens)
    values = np.array(found) - reward_bias(model)
    mean, deviation = float(values.mean()), float(values.std())
    if not (math.isfinite(deviation) and deviation > 1e-9 * max(1.0, abs(mean))):
        what = f"the rewards of {len(groups)} samples of the starting model have deviation {deviation:g}"
        raise ModelError(
            what, where=prepared.loaded.name, code="E412", next="take more --normalise samples, or lower --lr"
        )
    return mean, deviation
