"""The page of a run on its own samples: reward, KL and health, as the files say."""

from report_kit import RESULT, SAMPLES

from palate.report.episodes import episodes
from palate.report.reading import read_run

VERDICT = "better: held-out reward -0.900 to 1.100 (rise 2.000 [1.500, 2.500]) on 40 prompts, KL 2.00 nats a completion"


def rollout(number: int, **changes) -> dict:
    """A line of a step of PPO."""
    line = {"step": number, "loss": 0.1, "tokens": 512, "seconds": 0.5, "learning_rate": 1e-4, "kl_coef": 0.05}
    line |= {"reward": -1 + 0.1 * number, "kl": 0.1 * number, "reward/total": -1 + 0.09 * number}
    line |= {"policy/clipped": 0.125, "value/explained": 0.02 * number, "ended": 0.9, "entropy": 0.8, "length": 27.0}
    return line | changes


def held(number: int) -> dict:
    reward = -0.9 + 0.1 * number
    line = {"step": number, "eval/reward": reward, "eval/reward_low": reward - 0.2, "eval/reward_high": reward + 0.2}
    return line | {"eval/kl": 0.1 * number, "eval/ended": 0.95, "eval/length": 27.0, "eval/count": 40}


LINES = [held(0), *(rollout(n) for n in range(1, 11)), held(10), *(rollout(n) for n in range(11, 21)), held(20)]
DONE = dict(verb="ppo", lines=LINES, samples=SAMPLES, result=RESULT | {"verdict": VERDICT})


def test_the_numbers_are_those_of_the_files(folder, report):
    said = "The critic explains nothing of what comes (explained variance -0.10)"
    page = report(folder(**DONE, record={"health": [said.replace("The", "the")]}))
    for words in (
        said,
        "Better Held-out reward \u22120.900 to 1.100",
        "Held-out reward 1.100 from \u22120.900",
        "KL from the start 2.00 nats a completion",
        "Score \u22120.850 0.950",
        "Score less KL \u22120.865 0.755",
        "Tokens clipped 12.5% 12.5%",
        "Explained by the critic 3% 39%",
        "Completions that end 90.0% 90.0%",
    ):
        assert words in page.text.replace("-0.9", "\u22120.9"), words
    drawn = {"Reward", "KL from the start", "Tokens clipped", "Explained by the critic", "Completions that end"}
    assert drawn <= set(page.svgs) and "KL coefficient" not in page.svgs
    assert page.text.count("held out, 95 % interval") == 1
    assert page.html.index("<h2>How it learned</h2>") < page.html.index("<h2>Is it healthy?</h2>")


def test_silence_is_no_praise(folder, report):
    assert "Nothing was flagged." in report(folder("seen", **DONE, record={"health": []})).text
    assert "Nothing was flagged." not in report(folder("unseen", **DONE)).text  # it never came to look


def test_without_a_critic_or_an_evaluation(folder, report):
    lines = [{k: v for k, v in line.items() if "value/" not in k} for line in LINES if "loss" in line]
    lines = [line | {"kl_coef": 0.05 + line["step"] / 100} for line in lines]
    page = report(folder(verb="ppo", lines=lines, samples=[], result={}))
    assert "Explained by the critic" not in page.text
    assert "KL coefficient" in page.svgs


def test_runs_on_data_have_no_such_section(folder, report):
    run = folder()
    assert episodes(read_run(run)) is None and "Is it healthy?" not in report(run).text


def test_several_runs_stand_over_each_other(folder, report, tmp_path):
    page = report(folder("a", **DONE), folder("b", **DONE), out=tmp_path / "both.html")
    assert "Reward" in page.svgs and "held-out reward 1.1000 1.1000" in page.text
