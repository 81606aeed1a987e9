"""Reward against KL, as Figure 2 (left) of the DPO paper has it: who ends where, for docs/results.md.

    python examples/frontier.py enumerable --work FOLDER   # 7,776 completions a prompt: every number exact
    python examples/frontier.py reviews --work FOLDER      # the built-in world: sampled, with intervals

Each is one `palate frontier` a seed; what is in the folder already is gone on with, or read. SETTINGS and CHECKS were
written down after the pilot seed, 100, and before the seeds that are reported.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import wrap

from palate.report.frontier import NAMES

SETTINGS = {
    "enumerable": "--world enumerable --alphas 0.1,1 --rollouts 12 --points 3",
    "reviews": "--data builtin:reviews[:150] --prompts builtin:prompts[:100] --pairs 640 --betas 0.05,0.2,0.5,2 "
    "--alphas 0.5 --best-of 2,4 --target-kls 0.5,1,2,4 --true-kls 2 --at 0.5,1,2,4 --steps 20 --rollouts 6 --points 2 "
    "--methods dpo,ppo,ppo_true,best_of_n,unlikelihood,preferred_ft,sft --options dpo.batch=32,dpo.lr=4e-4,"
    "unlikelihood.batch=32,preferred_ft.batch=32,reward.batch=32,reward.steps=40,reward.lr=1e-3,ppo.critic=trunk",
}


def frontier(world: str, work: Path, seeds: list[int]) -> dict:
    """The points, exact curves and KLs of the frontiers in the folder, one a seed, together."""
    from palate.cli import main as palate

    tables = []
    for seed in seeds:
        out, words = work / f"{world}-{seed}", SETTINGS[world].split()
        if palate(["frontier", *words, "--seed", str(seed), "--out", str(out), "--resume"]) != 0:
            sys.exit(f"{out} did not come to its end")
        tables.append(json.loads((out / "frontier.json").read_text()))
    found = {name: [one for table in tables for one in table[name]] for name in ("points", "exact", "cells")}
    return found | {"at": tables[0]["at"]}


# --- what was written down before ------------------------------------------------------------------------------------


def hulls(found: dict) -> dict:
    from palate.recipes.hulls import hulls_of

    return hulls_of(found["points"])


def ends(found: dict, method: str, seed: int) -> list[dict]:
    """The last point of every setting of a method, in the order of the settings."""
    mine = [p for p in found["points"] if (p["method"], p["seed"]) == (method, seed)]
    return list({p["setting"]: p for p in mine}.values())


def not_below(found: dict, seed: int, kl: float, one: str, two: str) -> bool:
    """Whether the hull of one method reaches at least what the other's does within this KL."""
    from palate.evaluation.frontier import reward_at

    values = [reward_at(hulls(found)[method][seed], kl) for method in (one, two)]
    return values[0] >= values[1]


def falls(found: dict, seed: int) -> bool:
    """Whether the KL at the end of DPO falls from each beta to the next larger one."""
    kls = [p["kl"] for p in ends(found, "dpo", seed)]
    return kls == sorted(kls, reverse=True)


def share(found: dict, seed: int, kl: float, method: str = "dpo") -> float:
    """Of what the exact frontier gains within this KL, the share that the method's hull gains."""
    from palate.evaluation.frontier import reward_at

    curve = next(one["curve"] for one in found["exact"] if one["seed"] == seed)
    start = curve[0][1]
    return (reward_at(hulls(found)[method][seed], kl) - start) / (reward_at(curve, kl) - start)


def gain(found: dict, seed: int, kl: float, method: str) -> float:
    """The reward that a method's hull gains within this KL."""
    from palate.evaluation.frontier import reward_at

    hull = hulls(found)[method][seed]
    return reward_at(hull, kl) - hull[0][1]


def near(found: dict, seed: int) -> bool:
    """Whether every run of PPO with the reward model ends between half its target KL and twice it."""
    targets = [(float(p["setting"].partition("=")[2]), p["kl"]) for p in ends(found, "ppo", seed)]
    return all(target / 2 <= kl <= 2 * target for target, kl in targets)


def above(kl: float, two: str = "ppo") -> Callable[[dict, int], bool]:
    """Whether DPO's hull reaches at least what this method's does within a KL."""
    return lambda found, seed: not_below(found, seed, kl, "dpo", two)


EXACT: dict[str, Callable[[dict, int], bool]] = {
    "DPO gains at least 65 % of what any policy can gain within KL 0.5": lambda f, s: share(f, s, 0.5) >= 0.65,
    "DPO gains at least 65 % of it within KL 1": lambda f, s: share(f, s, 1.0) >= 0.65,
    "PPO with the reward model gains at least half of it within KL 1": lambda f, s: share(f, s, 1.0, "ppo") >= 0.5,
    **{f"DPO reaches at least what PPO does within KL {kl:g}": above(kl) for kl in (0.25, 0.5, 1.0, 2.0)},
    "DPO reaches at least what best-of-N does within KL 0.5": above(0.5, "best_of_n"),
    "the KL at the end of DPO falls from each beta to the next larger one": falls,
    "every run of PPO ends between half its target KL and twice it": near,
}
SAMPLED: dict[str, Callable[[dict, int], bool]] = {
    "DPO gains at least half a point of reward within KL 4": lambda f, s: gain(f, s, 4.0, "dpo") >= 0.5,
    "PPO with the reward model gains at least a tenth of a point within KL 4": lambda f, s: (
        gain(f, s, 4.0, "ppo") >= 0.1
    ),
    **{f"DPO reaches at least what PPO does within KL {kl:g}": above(kl) for kl in (0.5, 1.0, 2.0, 4.0)},
    "DPO reaches at least what PPO with the true reward does within KL 1": above(1.0, "ppo_true"),
    "DPO reaches at least what best-of-N does within KL 1": above(1.0, "best_of_n"),
    "the KL at the end of DPO falls from each beta to the next larger one": falls,
}
CHECKS = {"enumerable": EXACT, "reviews": SAMPLED}


# --- what is kept, and the page --------------------------------------------------------------------------------------


def row_of(world: str, found: dict, seeds: list[int]) -> dict:
    """What the page shows of the frontiers of a world."""
    from palate.recipes.hulls import standings

    shown: dict = {}
    for method in ("dpo", "ppo", "ppo_true"):
        for seed in seeds:
            for p in ends(found, method, seed):
                one = {name: p[name] for name in ("seed", "kl", "reward", "seconds")}
                shown.setdefault(method, {}).setdefault(p["setting"], []).append(one)
    last = [p for seed in seeds for method in NAMES for p in ends(found, method, seed)]
    return {
        "data": world,
        "seed": ", ".join(map(str, seeds)),
        "table": standings(found["points"], found["at"], {one["seed"]: one["curve"] for one in found["exact"]}),
        "failed": {cell["name"]: cell["error"] for cell in found["cells"] if cell["error"]},
        "points": len(found["points"]),
        "ends": shown,
        "checks": {text: [bool(check(found, seed)) for seed in seeds] for text, check in CHECKS[world].items()},
        "shares": {
            method: [share(found, seed, 1.0, method) for seed in seeds]
            for method in ("dpo", "ppo", "best_of_n")
            if found["exact"]
        },
        "seconds": sum(p["seconds"] for p in last),
    }


def show(rows) -> str:
    """The section of the page."""
    lines = [
        "## Reward against KL",
        "",
        *wrap(ABOUT["all"], 118),
        "",
    ]
    for row in rows:
        lines += [
            *TITLES[row["data"]],
            *wrap(ABOUT[row["data"]], 118),
            "",
            f"![reward against KL](frontier-{row['data']}.svg)",
            "",
        ]
        kls = list(row["table"][0]["reward"])
        lines.append(
            "| method | " + " | ".join(f"KL {kl}" for kl in kls) + " | hull | seeds | runs | seconds | samples |"
        )
        lines.append("|---" * (len(kls) + 6) + "|")
        for one in row["table"]:
            spent = ["" if one[name] is None else f"{one[name]:,.0f}" for name in ("seconds", "samples")]
            cells = [NAMES[one["method"]], *(spread(one["reward"][kl]) for kl in kls), spread(one["hull"])]
            lines.append("| " + " | ".join([*cells, str(one["seeds"]), str(one["runs"] or ""), *spent]) + " |")
        lines += ["", f"{row['points']} points. Where runs ended, on each seed:", ""]
        lines += ["| run | KL | reward | seconds |", "|---|---|---|---|"]
        for method, settings in row["ends"].items():
            for setting, found in settings.items():
                values = [", ".join(f"{p[name]:{how}}" for p in found) for name, how in HOW.items()]
                lines.append(
                    f"| {NAMES[method]}, {setting.replace('_', ' ').replace('=', ' ')} | {' | '.join(values)} |"
                )
        if row["shares"]:
            parts = [
                f"{NAMES[name]} {', '.join(f'{one:.0%}' for one in row['shares'][name])}" for name in row["shares"]
            ]
            lines += ["", f"Of what any policy can gain within KL 1, on each seed: {'; '.join(parts)}."]
        lines += [*(["", f"Failed: {row['failed']}."] if row["failed"] else []), "", *told(row), ""]
    return "\n".join(lines)


HOW = {"kl": ".2f", "reward": ".2f", "seconds": ".0f"}
TITLES = {"enumerable": ["### The world that can be listed", ""], "reviews": ["### The built-in reviews", ""]}
ABOUT = {
    "all": "`palate frontier` shows what Figure 2 (left) of the DPO paper does. From one reference a seed pairs are "
    "drawn and labelled by the reward that counts; on these learn DPO, Unlikelihood, Preferred-FT (the chosen side "
    "alone) and the reward model, which PPO, RLOO and best-of-N then follow; *PPO, true reward* follows what counts. "
    "Every evaluated checkpoint is a point; the tables say what the upper hull of a method's points, the reference "
    "among them, reaches within a KL: mean of the seeds [lowest, highest]. *hull*: its mean up to the largest of these "
    "KLs. Seconds and samples: of a run, in the mean, with all that it needs (pairs, reward model, scores of the "
    "reference), without measuring.",
    "enumerable": "`python examples/frontier.py enumerable`: 7,776 completions of 4 prompts, a Llama of 33 thousand "
    "weights; reward and KL are by enumeration, and no policy gets more than the *exact frontier*. Each seed draws "
    "another language and another reward (mean 0, deviation 1 over all completions). 6,144 pairs, labelled with noise "
    "after Bradley and Terry at temperature 1; DPO and its kin take 24 steps of 256 pairs, PPO 12 rollouts of 64 "
    "episodes, 4 passes.",
    "reviews": "`python examples/frontier.py reviews`: `builtin:tiny`, the world's rule as reward (from -17 to 3), "
    "measured on one sample of each of 100 held-out prompts at temperature 1 (standard error about 0.2). Pairs: 4 "
    "samples of each of 150 prompts, 640 pairs of them that differ in reward, the better one chosen. DPO and its kin "
    "take 20 steps of 32 pairs (one pass), the reward model 40 (two passes), PPO 6 rollouts of 64 episodes, 4 passes, "
    "its critic a head on the policy: a small budget for all, on two shared cores. The KL of best-of-N is its bound. "
    "On the pilot seed, with 20 steps of 64 pairs out of 1,567, DPO at beta 0.5 gained 1.25 at KL 2.4, PPO with the "
    "true reward 0.70 at KL 0.9.",
}


def spread(found: dict) -> str:
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def told(row: dict) -> list[str]:
    """What was written down after the pilot seed and before these seeds, and whether it came out so."""
    lines = ["Written down after the pilot seed (100) and before these seeds, and how it came out:", ""]
    for text, found in row["checks"].items():
        lines.append(f"- {text}: {'yes' if all(found) else 'no' if not any(found) else 'not always'} "
                     f"({sum(found)} of {len(found)} seeds).")  # fmt: skip
    return lines


def main() -> int:
    """One world."""
    import real_input

    from palate.recipes.hulls import draw

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=SETTINGS)
    parser.add_argument("--work", type=Path, required=True, help="folder for the frontiers")
    parser.add_argument(
        "--seeds", nargs="*", type=int, default=[0, 1, 2], help="one after another; a pilot has its own"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="page to write; rows lie beside it")
    args = parser.parse_args()
    args.quick = False
    found = frontier(args.world, args.work, args.seeds)
    exact = {one["seed"]: one["curve"] for one in found["exact"]}
    draw(args.out.parent / f"frontier-{args.world}.svg", found["points"], exact, max(found["at"]))
    real_input.keeper(args, "frontier")(row_of(args.world, found, args.seeds))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
