"""The built-in data and models, made again: `python examples/make_builtin.py --out FOLDER`.

Writes the world's files, trains a tokenizer on its texts, pre-trains `base` on them and fine-tunes `tiny` on the
demonstrations, all by palate's own verbs (about 8 minutes on two cores). Then it holds the held-out losses against
those of the models that the package ships: rounding and threads move them, by less than 0.02 nats a token, or it ends
with 1. `--install` puts data and models into the package instead.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "builtin"
CONTROL = ("<|system|>", "<|user|>", "<|assistant|>")
MOST = 0.02  # nats a token between the package's models and those made again
CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
tags: [palate]
---
`builtin:{name}` of palate: {what}.
A Llama of {parameters:,} parameters for demonstrations and tests: it knows some two hundred English words and nothing of
the world. Held-out loss: {loss:.4f} nats a token, over {tokens:,} tokens.

Made by `python examples/make_builtin.py` out of texts that a grammar wrote (palate/worlds/reviews.py); no other data.
"""  # noqa: E501


def palate(*argv: object) -> dict:
    """The result of a verb, as --json prints it. Ends the script where the verb fails."""
    import contextlib
    import io

    from palate.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main([*map(str, argv), "--json"])
    if code:
        sys.exit(code)
    return json.loads(said.getvalue().splitlines()[-1])


def start(folder: Path) -> Path:
    """A folder for `--model new:`: the config, and a tokenizer trained on every kind of text that the world writes."""
    from palate.model.load import train_tokenizer

    new = folder / "new"
    new.mkdir()
    shutil.copy(CONFIGS / "config.json", new)
    vocabulary = json.loads((new / "config.json").read_text())["vocab_size"]
    with (folder / "text.jsonl").open(encoding="utf-8") as rows:
        tokenizer = train_tokenizer((json.loads(row)["text"] for row in rows), vocabulary, CONTROL)
    tokenizer.chat_template = (CONFIGS / "chat_template.jinja").read_text()
    tokenizer.save_pretrained(new)
    return new


def loss(model: object, data: object) -> float:
    """Nats a token of the model on every row of the data, in conversations those of the replies."""
    import palate as library
    from palate.evaluation.preference import evaluate

    loaded = library.load(str(model))
    groups = [library.tokenize(record, loaded.tokenizer) for record in library.read_demonstrations(str(data))]
    return evaluate(loaded.model, groups, library.completion_nll())["eval/loss"]


def install(name: str, run: Path, result: dict, package: Path) -> None:
    """The run's model in the package, with its card."""
    import palate as library
    from palate import builtin
    from palate.model.load import save

    loaded = library.load(str(run))
    card = CARD.format(
        name=name,
        what=builtin.MODELS[name],
        parameters=loaded.model.num_parameters(),
        loss=result["after"]["eval/loss"],
        tokens=int(result["after"]["eval/count"]),
    )
    shutil.rmtree(package / name, ignore_errors=True)
    save(loaded.model, loaded.tokenizer, package / name, card=card)


def main() -> int:
    """Everything, in order; 1 where a model is not the one that ships."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for data, runs and models")
    parser.add_argument("--install", action="store_true", help="put the result into the package")
    args = parser.parse_args()

    from palate import builtin
    from palate.worlds import files

    args.out.mkdir(parents=True)
    files.main(str(args.out))
    package, text = Path(builtin.__file__).parent, args.out / "text.jsonl"
    if args.install:  # fine-tuning reads the package's demonstrations
        for name in files.SHIPPED:
            shutil.copy(args.out / f"{name}.jsonl", package)
    held = {"base": args.out / "text-heldout.jsonl", "tiny": "builtin:demonstrations[2800:]"}
    runs = {name: args.out / name for name in held}
    new = ["--model", f"new:{start(args.out)}", "--data", text, "--eval", held["base"]]
    results = {
        "base": palate("pretrain", "-c", CONFIGS / "base.yaml", *new, "--out", runs["base"]),
        "tiny": palate("sft", "-c", CONFIGS / "tiny.yaml", "--model", runs["base"], "--out", runs["tiny"]),
    }
    same = True
    for name, result in results.items():
        if args.install:
            install(name, runs[name], result, package)
        made, ships = result["after"]["eval/loss"], loss(f"builtin:{name}", held[name])
        near = abs(made - ships) < MOST
        print(f"{name}: {made:.4f} nats a token, the package's {ships:.4f}, {'same' if near else 'ANOTHER'}")
        same &= near
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
