"""The README: its commands run, its names exist, its keys are those of log.jsonl."""
import importlib
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

import dpo
import loop
from mcts import NOTHING, Tree
from model import GPT, GPTConfig

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
LINES = README.splitlines()
BLOCKS = [line for line in LINES if line.startswith("    python ")]
COMMANDS = [shlex.split(line, comments=True)[1:] for line in BLOCKS]
ELSEWHERE = {"--model", "--evaluate", "--decode", "--show"}        # these need files of the user
TINY = """--preset smoke --threads 1 --questions 2 --samples 2 --budget 30 --max-tokens 8 --batch 2
          --steps 1 --base-steps 1 --eval-questions 2 --completions 1""".split()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] != "-m"], ids=" ".join)
def test_command(command, tmp_path, monkeypatch):
    """The flags are known; a command that needs no files of the user ends well at smoke size."""
    monkeypatch.chdir(tmp_path)
    file, *flags = command
    if file == "loop.py":
        loop.flags().parse_args(flags)
        flags = flags + TINY + ["--seeds", "1"] * ("--compare" in flags)
    code = importlib.import_module(file.removesuffix(".py")).main(flags)
    assert code == (2 if ELSEWHERE & {*flags} else 0)


def test_names():
    """Every `file.name` that the README mentions exists, methods included."""
    names = set(re.findall(r"`(model|mcts|critic|dpo|loop)\.(?!py\b)([\w.]+)", README))
    assert len(names) > 40
    for file, name in names:
        found = importlib.import_module(file)
        for part in name.split("."):
            found = getattr(found, part)


def keys_of_preferences() -> set:
    """What a training on one pair reports, and the alarm of one that went wrong."""
    model = GPT(GPTConfig.tiny(8, hidden_size=16, layers=1)).initialise(0)
    tree = Tree(None, 0, [1, 2])
    good, bad = (tree.add(tree.root, [token], NOTHING, NOTHING) for token in (3, 4))
    row = dpo.tree_row([dpo.Pair([good], [bad])])
    dpo.store_reference(model, [row])
    report = dpo.train(model, [[row]], dpo.preference_loss, 1e-4, label="")
    return {*report, *dpo.summary({}, Counter(chosen_shift=-1.0, weight=1))}


def test_keys_of_the_log(tmp_path, monkeypatch):
    """The table of keys and the rows of three recipes, which have all keys: the same names."""
    monkeypatch.chdir(tmp_path)
    for recipe in ("mcts_dpo", "combined", "alphallm --rollouts 1"):
        assert loop.main(TINY + ["--recipe", *recipe.split()]) == 0
    logs = [loop.read_lines(path) for path in tmp_path.rglob("log.jsonl")]
    table = README.partition("| key |")[2].partition("\n\n")[0].split("\n")[2:]
    told = {key for row in table for key in row.split("|")[1].strip().split(", ")}
    assert told == keys_of_preferences().union(*sum(logs, []))


def test_size():
    """At most 300 lines, and of at most 100 columns, but for tables."""
    assert len(LINES) <= 300 and all(len(line) <= 100 or line[0] == "|" for line in LINES)
