"""What the runs of a frontier are, and what their folders say: every evaluated checkpoint a point."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.errors import PalateError, UsageError
from palate.recipes import ppo, preference, reward, sft
from palate.recipes.grid import filled, nearest, paths
from palate.recipes.grounds import Drawn, ground_of
from palate.recipes.training import TrainingConfig

if TYPE_CHECKING:
    from palate.recipes.frontier import FrontierConfig

BY_REWARD_MODEL = {"ppo", "rloo", "best_of_n"}

VERBS: dict[str, tuple[type[TrainingConfig], Callable]] = {
    "sft": (sft.SftConfig, sft.run),
    "reward": (reward.RewardConfig, reward.run),
    "dpo": (preference.PreferenceConfig, preference.run),
    "ppo": (ppo.PpoConfig, ppo.run),
}


@dataclass
class Cell:
    """A method with a setting on a seed. verb, config: of its run; nothing is trained without, config is the n then."""

    method: str
    setting: str
    seed: int
    verb: str | None = None
    config: Any = None
    error: str | None = None

    @property
    def name(self) -> str:
        """Its folder."""
        return ",".join(filter(None, (self.method, self.setting, f"seed={self.seed}")))

    @property
    def lends(self) -> bool:
        """Whether it makes what the others need, and is none of the methods."""
        return self.method in ("reference", "reward")

    @property
    def options(self) -> tuple[str, ...]:
        """Under which names --options speaks of its run: what is said of ppo is said of its kin too."""
        return tuple(dict.fromkeys(("ppo", self.method) if self.verb == "ppo" else (self.method,)))


def cells_of(config: "FrontierConfig", seed: int, out: Path) -> Iterator[Cell]:
    """The cells of a seed: the reference, the reward model, then each method's, with the configs of their runs.

    Raises UsageError naming the cell whose options cannot be.
    """
    ground = ground_of(config, seed, out)
    pairs: dict[str, Any] = {"model": ground.model, "data": ground.pairs, "steps": config.value("steps")}
    silent: dict[str, Any] = {"retain": "none", "retain_samples": 0}

    def cell(method: str, setting: str, verb: str, options: dict[str, Any]) -> Cell:
        found = Cell(method, setting, seed, verb)
        common = {"eval": "none", "report": False, "samples": 0, "seed": seed, "device": config.device}
        base = common | options | config.defaults["options"].get(found.options[0], {})
        given = {name: key for kind in found.options for key, name in _said_of(config, kind)}
        for name, key in given.items():
            if name not in (takes := paths(VERBS[verb][0])):
                raise UsageError("no such option", where=f"options.{key}", code="E301", next=nearest(name, takes))
        where = ", ".join(f"options.{key}" for key in given.values()) or None
        mine = {name: config.options[key] for name, key in given.items()}
        found.config = filled(VERBS[verb][0], base, mine, f"cell {found.name}", where)
        if verb == "dpo":
            try:
                preference.check_loss(found.config, verb)
            except UsageError as error:
                what = f"cell {found.name}: {error.what}"
                raise UsageError(what, where=error.where, code=error.code, next=error.next) from None
        return found

    if ground.made_from is not None:
        yield cell("reference", "", "sft", ground.made_from)
    yield Cell("sft", "", seed)
    if BY_REWARD_MODEL & {*config.methods}:
        yield cell("reward", "", "reward", pairs | {"eval": ground.held_pairs})
    for beta in config.value("betas") if "dpo" in config.methods else ():
        yield cell("dpo", f"beta={beta:g}", "dpo", pairs | silent | {"beta": beta})
    for alpha in config.value("alphas") if "unlikelihood" in config.methods else ():
        loss = {"loss": "unlikelihood", "loss_options": {"alpha": alpha}}
        yield cell("unlikelihood", f"alpha={alpha:g}", "dpo", pairs | silent | loss)
    if "preferred_ft" in config.methods:
        yield cell("preferred_ft", "", "sft", pairs)
    if "best_of_n" in config.methods:
        yield from (Cell("best_of_n", f"n={n}", seed, config=n) for n in config.value("best_of"))
    for method in [method for method in ("ppo", "ppo_true", "rloo") if method in config.methods]:
        judge = ground.reward if method == "ppo_true" else ground.reward_model
        options = {"model": ground.model, "data": ground.prompts, "reward": judge}
        options |= {"steps": config.value("rollouts"), "max_tokens": config.max_tokens}
        if method == "rloo":
            options |= {"critic": "none", "group": 4}
        for kl in (config.true_kls if method == "ppo_true" else None) or config.value("target_kls"):
            begins = round(1 / math.sqrt(2 * kl), 4)  # where the optimum of a normal reward of deviation 1 has this KL
            yield cell(method, f"target_kl={kl:g}", "ppo", options | {"target_kl": kl, "kl_coef": begins})


def _said_of(config: "FrontierConfig", kind: str) -> list[tuple[str, str]]:
    """(key of --options, option of the run) of all that is said of this kind of run."""
    keys = [key for key in config.options if key.startswith(f"{kind}.")]
    return [(key, key.removeprefix(f"{kind}.").replace("-", "_")) for key in keys]


def is_done(path: Path) -> bool:
    """Whether the run in this folder came to its end."""
    from palate.run import status_of

    return (path / "run.json").exists() and status_of(path) == "done"


def points_of(out: Path, cells: Sequence[Cell], drawn: Drawn) -> list[dict[str, Any]]:
    """Every evaluated checkpoint of the cells, from their folders: the same whether they ran now or before.

    seconds: for the pairs, the reward model, the reference's scores, and of the steps with what they sampled; not for
    measuring and saving. samples: completions drawn for all that; of best-of-N also the N of one answer.
    """
    from palate.files import read_json
    from palate.run import read_lines

    def lines(cell: Cell) -> list[dict[str, Any]]:
        return read_lines(out / "cells" / cell.name / "metrics.jsonl")

    def scoring(cell: Cell) -> float:
        path = out / "cells" / cell.name / "run.json"
        result = (read_json(path).get("result") or {}) if path.exists() else {}
        return result.get("reference_seconds", 0.0)

    rewarding = sum(
        line["seconds"] for cell in cells if cell.verb == "reward" for line in lines(cell) if "loss" in line
    )
    scored = max((scoring(cell) for cell in cells if cell.verb == "dpo"), default=0.0)
    points = []
    for cell in cells:
        if cell.lends:
            continue
        seconds = 0.0 if cell.method in ("sft", "ppo_true") else drawn.seconds
        seconds += rewarding if cell.method in BY_REWARD_MODEL else 0.0
        seconds += scored if cell.method == "dpo" else 0.0
        samples = 0 if cell.method in ("sft", "ppo_true") else drawn.samples
        samples += cell.config if cell.method == "best_of_n" else 0
        for line in lines(cell):
            seconds += line["seconds"] if "loss" in line else 0.0
            if line.get("eval/reward") is None or line.get("eval/kl") is None or (cell.verb and not line["step"]):
                continue
            points.append(
                {
                    "method": cell.method,
                    "setting": cell.setting,
                    "seed": cell.seed,
                    "step": line["step"],
                    "reward": line["eval/reward"],
                    "kl": line["eval/kl"],
                    "seconds": round(seconds, 3),
                    "samples": samples + _sampled(cell, line["step"]),
                    "exact_reward": line.get("eval/best_reward"),
                    **{name: line[f"eval/{name}"] for name in ("reward_low", "reward_high", "kl_low", "kl_high")},
                    "cell": cell.name,
                }
            )
    return points


def _sampled(cell: Cell, step: int) -> int:
    """Completions that a run has drawn by itself until this optimizer step."""
    if cell.verb != "ppo":
        return 0
    return cell.config.batch * -(-step // (cell.config.passes * cell.config.minibatches))


def refuse_above(points: Sequence[dict[str, Any]]) -> None:
    """Nothing, unless a point lies above the exact frontier: then PalateError, for that is a wrong KL or reward."""
    from palate.evaluation.frontier import check_below

    for point in check_below(points):
        what = (
            f"step {point['step']} has reward {point['reward']:.9f} at KL {point['kl']:.9f}, where no policy has more "
            f"than {point['exact_reward']:.9f}"
        )
        raise PalateError(what, where=point["cell"], next="report it: the KL or the reward is computed wrongly")
