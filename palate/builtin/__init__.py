"""What comes with the package: data files that the worlds wrote, and two small models trained on them.

`python -m palate.worlds.files FOLDER` writes the data again, examples/make_builtin.py trains the models again.
"""

from difflib import get_close_matches
from pathlib import Path

from palate.errors import NotThereError

PREFIX = "builtin:"
DATA = {
    "reviews": "2,400 preference pairs: reviews of places, labelled by a rule with some noise",
    "reviews/heldout": "300 pairs on other requests",
    "demonstrations": "3,000 conversations to imitate: reviews, instructions; the last 200 are for held-out use",
    "prompts": "600 requests on which none of the others trains",
    "seed": "1,600 conversations: 400 answers to imitate, then 1,200 true judgements of reviews, four to a request",
}
MODELS = {
    "base": "pre-trained on texts of the world of reviews",
    "tiny": "base, fine-tuned on builtin:demonstrations[:2800]",
}


def data_file(name: str) -> Path:
    """The JSONL file of a built-in data set, with or without "builtin:". Raises NotThereError (E101)."""
    return _there(name, DATA, "data", "E101") / f"{name.removeprefix(PREFIX).replace('/', '-')}.jsonl"


def model_folder(name: str) -> Path:
    """The folder of a built-in model, with or without "builtin:". Raises NotThereError (E401)."""
    return _there(name, MODELS, "model", "E401") / name.removeprefix(PREFIX)


def _there(name: str, known: dict[str, str], what: str, code: str) -> Path:
    short = name.removeprefix(PREFIX)
    if short not in known:
        near = get_close_matches(short, known, 1)
        names = ", ".join(PREFIX + one for one in known)
        hint = f"did you mean {PREFIX}{near[0]}" if near else f"use one of {names}"
        raise NotThereError(f"there is no built-in {what} of this name", where=name[:200], code=code, next=hint)
    return Path(__file__).parent
