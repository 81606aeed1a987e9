"""People judge: a verb stops with their ballots, and once these are filled in it ends as with a judge that says so."""

import json
import sys
from pathlib import Path

import pytest
from faults import Crash, disk
from runs_kit import JUDGES, lines, tree, write_rows

from palate.errors import AwaitsVotes
from palate.recipes.pairs import PairsConfig, run
from palate.sampling.pairing import unfit

RULE = """
from palate.data.records import Message
from palate.worlds.reviews import judge

def better(prompt, first, second):
    asked = tuple(Message(**turn) for turn in prompt)
    one, two = judge(asked, first, True), judge(asked, second, True)
    return 0.5 + (one > two) / 2 - (one < two) / 2
"""
WORDS = {1.0: "first", 0.5: "tie", 0.0: "second"}


def longer(prompt, first, second) -> float:
    """What the judge `liking:longer` says."""
    return 0.5 + (len(first) > len(second)) / 2 - (len(first) < len(second)) / 2


def fill(file: str, says=longer) -> int:
    """A person: votes on every open ballot; how many there were."""
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").split("\n") if line]
    count = sum(row["vote"] is None for row in rows)
    filled = [row | {"vote": row["vote"] or WORDS[says(row["prompt"], row["first"], row["second"])]} for row in rows]
    write_rows(Path(file), filled)
    return count


def go(palate, verb, *operands, says=longer, most=9, **options) -> list[int]:
    """Goes on, with a person's votes whenever it stops for them, to the end; the ballots of every stop."""
    counts: list[int] = []
    while len(counts) <= most:
        resume = {"resume": True} if counts else {}
        palate(verb, *operands, **options | resume, judge="people:votes.jsonl")
        if palate.code == 0:
            return counts
        assert palate.code == 6 and palate.result["error_code"] == "E605", palate.said
        counts.append(fill("votes.jsonl", says))
        waiting = "1 pair waits" if counts[-1] == 1 else f"{counts[-1]} pairs wait"
        assert f"votes.jsonl: {waiting} for a vote" in palate.said and "--resume" in palate.said
    raise AssertionError(counts)


@pytest.fixture
def prompts(tmp_path) -> Path:
    (tmp_path / "liking.py").write_text(JUDGES)
    return write_rows(tmp_path / "p.jsonl", [{"prompt": f"Say {n}:"} for n in range(12)])


def test_two_models_and_their_text_is_kept_while_people_vote(palate, tmp_path):
    """On the built-in world, by a person who knows its rule."""
    (tmp_path / "liking.py").write_text(RULE)
    sys.path.insert(0, str(tmp_path))
    try:
        from liking import better
    finally:
        sys.path.remove(str(tmp_path))
    sides = ("builtin:tiny", "builtin:base")
    options = dict(data="builtin:prompts[:5]", max_tokens=48, device="cpu", samples=2)
    whole = palate.ok("compare", *sides, out="whole", judge="liking:better", **options)
    palate("compare", *sides, judge="people:votes.jsonl", **options)
    assert palate.code == 2 and "needs --out" in palate.said and not Path("votes.jsonl").exists()
    assert go(palate, "compare", *sides, says=better, out="out", **options) == [10]
    assert palate.result | {"out": 0, "judge": 0, "best": 0} == whole | {"out": 0, "judge": 0, "best": 0}
    assert {"first", "second"} <= {row["vote"] for row in lines(Path("votes.jsonl"))}
    assert {row["first"] for row in lines(Path("votes.jsonl"))} & {
        row["completion"] for row in lines(Path("out/1-builtin-tiny.jsonl"))
    }
    one, two = tree(Path("whole")), tree(Path("out"))
    assert one.keys() == two.keys() and "waiting.json" not in two
    assert {n: d.replace(b"liking:better", b"people:votes.jsonl") for n, d in one.items()} == two


def test_three_files_are_put_to_people_at_once(palate, prompts):
    for name in "abc":
        write_rows(Path(f"{name}.jsonl"), [{"prompt": f"Say {n}:", "completion": name * (n + 1)} for n in range(12)])
    files = ("a.jsonl", "b.jsonl", "c.jsonl")
    palate("compare", *files, data=prompts, judge="people:votes.jsonl")
    assert palate.code == 6 and "the same command again" in palate.said
    assert fill("votes.jsonl", lambda prompt, first, second: float(first < second)) == 36
    found = palate.ok("compare", *files, data=prompts, judge="people:votes.jsonl")
    assert [match["wins"] for match in found["matches"]] == [12, 12, 12]


def test_completions_wait_for_votes_on_the_same_prompts_alone(palate, prompts, tiny, ending):
    options = dict(data=prompts, max_tokens=4, device="cpu", judge="people:votes.jsonl", out="out")
    palate("compare", tiny, ending, resume=True, **options)
    assert palate.code == 2 and "holds no completions that wait" in palate.said
    palate("compare", tiny, ending, **options)
    palate("compare", tiny, ending, **options)
    assert palate.code == 2 and "add --resume" in palate.said
    palate("compare", tiny, ending, resume=True, **options | {"max_tokens": 5})
    assert palate.code == 3 and "other max_tokens" in palate.said
    write_rows(prompts, [{"prompt": f"Say {n}:"} for n in range(11)])
    palate("compare", tiny, ending, resume=True, **options)
    assert palate.code == 3 and "other prompts" in palate.said


def test_a_preference_file_by_votes_of_all_chunks_at_once(palate, prompts, ending):
    options = dict(model=ending, data=prompts, candidates=3, max_tokens=12, chunk=5, device="cpu")
    palate.ok("pairs", judge="liking:longer", out="whole.jsonl", **options)
    (count,) = go(palate, "pairs", out="out.jsonl", **options)
    drawn = [row for n in range(3) for row in lines(Path(f"out.run/samples/{n:03d}.jsonl"))]
    there = [row for row in drawn if unfit(row["completion"], row["finished"]) is None]  # nobody is asked in vain
    texts = [{row["completion"] for row in there if row["prompt"] == n} for n in range(12)]
    assert count == sum(len(one) * (len(one) - 1) // 2 for one in texts) > 15 and len(there) < len(drawn)
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    Path("votes.jsonl").write_text('{"prompt": "p", "first": "a", "second": "b", "vote": "better"}\n')
    palate("pairs", out="other.jsonl", judge="people:votes.jsonl", **options)
    assert palate.code == 3 and 'votes.jsonl:1: field "vote": unknown vote "better"' in palate.said
    assert not Path("other.run").exists()


def test_judged_chunks_are_kept_and_parts_ask_for_their_own(palate, prompts, ending):
    options = dict(model=ending, data=prompts, candidates=2, max_tokens=12, chunk=4, device="cpu")
    palate.ok("pairs", judge="liking:longer", out="whole.jsonl", **options)
    options |= {"judge": "people:votes.jsonl", "out": "out.jsonl"}
    for part in ("1/2", "2/2"):  # the first can only sample: the others' samples are missing
        palate("pairs", part=part, **options)
    assert palate.code == 6 and "--part 2/2" in palate.said
    fill("votes.jsonl")
    assert not palate.ok("pairs", part="2/2", **options)["done"]
    judged = {path.name for path in Path("out.run/judged").glob("0*.jsonl")}
    assert judged == {"001.jsonl"}
    palate("pairs", resume=True, **options)
    assert palate.code == 6 and {path.name for path in Path("out.run/judged").glob("0*.jsonl")} == judged
    fill("votes.jsonl")
    palate.ok("pairs", resume=True, **options)
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_rounds_wait_for_votes_on_samples_and_on_models(palate, prompts, ending, tmp_path):
    """Self-Rewarding whose samples people judge, and whose rounds they compare."""
    seed = [{"prompt": f"Say {n}:", "completion": f" yes {n}"} for n in range(12)]
    options = dict(model=ending, data=write_rows(tmp_path / "seed.jsonl", seed), new_prompts=prompts, batch=4, steps=1,
                   rounds=2, max_tokens=12, chunk=5, samples=0, device="cpu", lr=3e-4, candidates=2,
                   temperature=1, prompts_per_round=6, eval="none")  # fmt: skip
    options["prompts"] = write_rows(tmp_path / "c.jsonl", [{"prompt": f"Tell {n}:"} for n in range(8)])
    options |= {"start.steps": 1, "start.batch": 4}
    palate.ok("self-reward", out="whole", judge="liking:longer", eval_judge="liking:longer", **options)
    counts = go(palate, "self-reward", out="run", eval_judge="people:votes.jsonl", **options)
    assert len(counts) == 4  # samples and models of either round
    for number in ("01", "02"):
        for name in ("pairs.jsonl", "model/model.safetensors"):
            assert (Path(f"run/rounds/{number}/{name}").read_bytes()
                    == Path(f"whole/rounds/{number}/{name}").read_bytes())  # fmt: skip
    rows = [json.loads(Path(f"{out}/rounds.json").read_text())["rounds"] for out in ("whole", "run")]
    for key in ("win_rate", "win_previous", "pairs", "ties", "kl"):
        assert [row[key] for row in rows[0]] == [row[key] for row in rows[1]]
    palate("report", "run")
    assert palate.code == 0 and "people:votes.jsonl" in Path("run/report.html").read_text()


def test_online_steps_wait_for_votes_and_none_is_taken_twice(palate, prompts, ending):
    options = dict(model=ending, data=prompts, eval="none", batch=4, steps=3, max_tokens=12, samples=0, device="cpu",
                   lr=3e-4, chunk=4, save_every=3)  # fmt: skip
    palate.ok("online-dpo", out="whole", judge="liking:longer", **options)
    counts = go(palate, "online-dpo", out="run", **options)
    rounds = json.loads(Path("run/rounds.json").read_text())["rounds"]
    assert len(counts) == len(rounds) >= 3 and "resume: from run/checkpoints/step-000002" in palate.said
    assert Path("run/model/model.safetensors").read_bytes() == Path("whole/model/model.safetensors").read_bytes()
    steps = [[(line["step"], line["loss"]) for line in lines(Path(f"{out}/metrics.jsonl")) if "loss" in line]
             for out in ("whole", "run")]  # fmt: skip
    assert steps[0] == steps[1] and len(steps[0]) == 3


def test_dead_at_any_place_the_same_bytes_and_no_vote_is_lost(palate, prompts, ending):
    """The disk gone while it samples, writes ballots, judges or pairs; a person votes in between."""
    given = dict(model=str(ending), data=str(prompts), candidates=2, max_tokens=12, chunk=5, device="cpu")
    palate.ok("pairs", judge="liking:longer", out="whole.jsonl", **given)

    def make(**more):
        return run(PairsConfig(judge="people:votes.jsonl", out="out.jsonl", **given, **more), say=lambda text="": None)

    stops = []
    while not Path("out.jsonl").exists():
        before = Path("votes.jsonl").read_text() if Path("votes.jsonl").exists() else ""
        try:
            with disk(at=3 + 7 * len(stops)):
                make(resume=Path("out.run").is_dir() and any(Path("out.run").iterdir()))
        except (AwaitsVotes, Crash) as stop:
            stops.append(type(stop))
        if Path("votes.jsonl").exists():
            assert Path("votes.jsonl").read_text().startswith(before)
            fill("votes.jsonl")
    assert stops.count(Crash) > 4 and AwaitsVotes in stops
    make(resume=True)
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
