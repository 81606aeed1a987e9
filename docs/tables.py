"""Writes docs/losses.md and docs/options.md from the registries: `make docs`. A test compares them."""

from pathlib import Path

from palate import losses
from palate.cli import VERBS, default_text
from palate.config import describe, leaves


def losses_page() -> str:
    """One row per registered loss: its options, what it needs, where it stands in the literature."""
    lines = [
        "# Losses",
        "",
        "Written by `make docs` from the registry; the mathematics stands in each function's docstring.",
        "`palate dpo --loss NAME --loss-options.OPTION VALUE`; losses of single feedback run under `palate kto`,",
        "`completion_nll` is what `palate sft` trains, `bradley_terry` what `palate reward` does.",
        "",
        "| loss | learns from | options and defaults | reference | unit | source |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(losses.LOSSES):
        info = losses.info(name)
        options = ", ".join(
            f"`{key}={value!r}` {info.ranges.get(key, '')}".strip() for key, value in info.options.items()
        )
        unit = "mean a token" if info.normalised else "sum"
        source = ", ".join(part for part in (info.paper, info.equation) if part)
        reads = "yes" if info.reference else "no"
        lines.append(f"| `{name}` | {info.kind} | {options or '-'} | {reads} | {unit} | {source} |")
    return "\n".join(lines) + "\n"


def options_page() -> str:
    """Every option of every verb, as `--help` shows them."""
    lines = [
        "# Options",
        "",
        "Written by `make docs` from the config types. Each option is a flag, a key of the YAML file given by `-c`",
        "(`train.warmup_steps` stands under `train:`) and an environment variable (`PALATE_TRAIN__WARMUP_STEPS`).",
        "Flags overrule variables, variables the file, the file the default. `--json` and `-c` belong to every verb.",
    ]
    for name, verb in VERBS.items():
        if not verb.exists:
            continue
        lines += [
            "",
            f"## palate {name}",
            "",
            verb.help,
            *(["", f"Beside every option of {', '.join(verb.of)}, whichever is named:"] if verb.of else []),
            "",
            "| option | takes | default | meaning |",
            "|---|---|---|---|",
        ]
        for leaf in leaves(verb.load()[0]).values():
            takes = describe(leaf.field.annotation)[0].replace("|", "/")
            meaning = (leaf.field.description or "").replace("|", "/")
            lines.append(f"| `{leaf.flag}` | {takes} | {default_text(leaf.field) or '-'} | {meaning} |")
    return "\n".join(lines) + "\n"


PAGES = {"losses.md": losses_page, "options.md": options_page}

if __name__ == "__main__":
    for page, text in PAGES.items():
        (Path(__file__).parent / page).write_text(text(), encoding="utf-8")
