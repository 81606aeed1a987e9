"""What tests of whole runs share: a tiny model's folder, data files, and the command line called in this process."""

import json
from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}Reply: {{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}Reply: {% endif %}"
)
COLOURS = ("red", "blue", "green", "small", "large", "old", "new", "warm")
WORDS = (*COLOURS, "cold", "quick", "slow", "bright", "dark", "soft", "loud", "calm")

# a module of judges, one of which only compares
JUDGES = """
def like(prompt, completion):
    return len(completion)

def dislike(prompt, completion):
    return -len(completion)

def same(prompt, completion):
    return 3

def longer(prompt, first, second):
    return 0.5 + (len(first) > len(second)) / 2 - (len(first) < len(second)) / 2
"""


def save_model(folder: Path, model, tokenizer, template: str | None = None) -> Path:
    """The model and tokenizer in a folder, as transformers writes them."""
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    if template is not None:
        tokenizer.chat_template = template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(count: int = 24):
    """Pairs whose chosen side is longer and of other words; each prompt once."""
    for n in range(count):
        a, b = WORDS[n % 16], WORDS[(7 * n + 3) % 16]
        yield {"prompt": f"Say {a} {n}:", "chosen": f" yes {a} {b}", "rejected": f" no {b}"}


def chats(count: int = 24):
    for row in pairs(count):
        turn = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
        prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["prompt"]}]
        yield {"prompt": prompt, "chosen": turn(row["chosen"].strip()), "rejected": turn(row["rejected"].strip())}


def rankings(count: int = 12):
    for n, row in enumerate(pairs(count)):
        yield {
            "prompt": row["prompt"],
            "completions": [row["chosen"], row["rejected"], f" maybe {WORDS[n % 16]}"][: 2 + n % 2],
        }


def feedbacks(count: int = 24):
    for n, row in enumerate(pairs(count)):
        good = n % 2 == 0
        yield {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}


def demonstrations(count: int = 24):
    for row in pairs(count):
        yield {"prompt": row["prompt"], "completion": row["chosen"]}


def conversations(count: int = 24):
    for row in pairs(count):
        yield {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["chosen"].strip()},
                {"role": "user", "content": "And again?"},
                {"role": "assistant", "content": row["rejected"].strip()},
            ]
        }


def texts(count: int = 24):
    for row in pairs(count):
        yield {"text": row["prompt"] + row["chosen"]}


def flags(**options) -> list[str]:
    """`train__tokens=64` as `--train.tokens 64`, `lora_rank=4` as `--lora-rank 4`, True as a bare flag."""
    out = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        out.append("--" + name.replace("__", ".").replace("_", "-"))
        if value is not True:
            out.append(str(value))
    return out


class Command:
    """`palate VERB ...` in this process: exit code, the JSON object, what was said on stderr."""

    def __init__(self, capsys):
        self.capsys = capsys

    def __call__(self, verb: str, *operands: str, **options):
        from palate.cli import main

        self.capsys.readouterr()
        self.code = main([verb, *map(str, operands), *flags(**options), "--json"])
        out, self.said = self.capsys.readouterr()
        self.result = json.loads(out.splitlines()[-1]) if out.strip() else {}
        assert self.code == self.result.get("exit_code"), (self.code, out, self.said)
        return self.result

    def ok(self, *arguments, **options):
        result = self(*arguments, **options)
        assert self.code == 0, self.said
        return result


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


TIMES = ("time", "seconds", "tokens_per_second")


def metrics(run: Path) -> list[dict]:
    """metrics.jsonl without times."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines(Path(run) / "metrics.jsonl")]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
