"""Writes pairs.jsonl and heldout.jsonl: 60 preference pairs each, from a small grammar. The taste: kind, to the point.

    python examples/make_pairs.py

The pairs are in the public domain (CC0). Both replies give the same advice; the chosen one is friendly, the rejected
one is rude or empty talk. They are about equally long, so length alone does not tell them apart.
"""

import json
import random
from pathlib import Path

ADVICE = {
    "boil an egg": "put it in boiling water for eight minutes",
    "stop hiccups": "hold your breath and swallow twice",
    "clean a window": "wipe it with water and a little vinegar",
    "keep bread fresh": "wrap it in a cloth and keep it dry",
    "learn a poem": "read one line aloud until it stays, then add the next",
    "fall asleep faster": "put the phone away an hour before bed",
    "grow basil": "give it sun, warmth and a little water every day",
    "sharpen a knife": "draw it slowly along a wet stone, both sides alike",
    "dry wet shoes": "fill them with newspaper overnight",
    "thank a neighbour": "say it in person and bring something small",
    "remember names": "say the name back when you hear it",
    "cool a hot room": "open windows on both sides after sunset",
}
HELD_OUT = {
    "peel garlic": "press it under the flat of a knife first",
    "save water": "turn the tap off while you brush your teeth",
    "wake up early": "open the curtains before you go to bed",
    "fold a shirt": "lay it face down and fold the sleeves in",
    "calm a dog": "sit down beside it and speak softly",
    "store apples": "keep them cool, dark and apart from each other",
    "wrap a gift": "cut the paper a little larger than you think",
    "read more": "leave a book where you usually leave the phone",
    "cook rice": "use two cups of water for one of rice",
    "oil a hinge": "put one drop on top and move the door",
    "light a fire": "start with dry twigs and leave room for air",
    "find north": "look for the pole star above the great bear",
}
ASKED = [
    "How do I {}?",
    "What is a good way to {}?",
    "Can you tell me how to {}?",
    "I would like to {}. Any advice?",
    "Please help me {}.",
]
KIND = [
    "Gladly: {}. Tell me how it goes!",
    "Sure, {}. It works well for many people.",
    "Good question: {}. Enjoy!",
    "Of course, {}. You will do fine.",
    "Happy to help: {}. Take your time.",
]
RUDE = [
    "Everyone knows that: {}. Do not ask again.",
    "What a silly question. Fine, {}.",
    "Look it up next time. {}, whatever.",
    "Ugh, {}. Why must I explain this?",
    "It depends, one might say. Some {}, some do not.",
]


def pairs(advice: dict[str, str] = ADVICE, seed: int = 0) -> list[dict[str, str]]:
    """60 pairs, each with a prompt of its own; which wordings meet is drawn from `seed`."""
    draw = random.Random(seed)
    rows = []
    for asked in ASKED:
        for wish, answer in advice.items():
            chosen, rejected = draw.choice(KIND).format(answer), draw.choice(RUDE).format(answer)
            rows.append(
                {
                    "prompt": f"Question: {asked.format(wish)}\nAnswer:",
                    "chosen": " " + chosen,
                    "rejected": " " + rejected,
                }
            )
    return rows


def text(advice: dict[str, str], seed: int) -> str:
    return "".join(json.dumps(row) + "\n" for row in pairs(advice, seed))


if __name__ == "__main__":
    folder = Path(__file__).parent
    (folder / "pairs.jsonl").write_text(text(ADVICE, 0), encoding="utf-8")
    (folder / "heldout.jsonl").write_text(text(HELD_OUT, 1), encoding="utf-8")
