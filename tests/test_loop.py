"""The loop: homework's truth, recipes, statistics, resume after kill -9, refusals, and every program at smoke size."""
import ast
import contextlib
import importlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import dpo
import loop
from critic import Countdown, Homework, Question, calculate, parse, value
from loop import Config
from mcts import Forest
from model import Sampler, read_safetensors

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ["--preset", "smoke", "--recipe", "self_explore"]


def program(*arguments, cwd, timeout=120):
    """Run one of the five files as a user does; returns the finished process."""
    environment = {**os.environ, "PYTHONPATH": "", "GOMP_SPINCOUNT": "2000"}
    return subprocess.run([sys.executable, str(ROOT / arguments[0]), *map(str, arguments[1:])], cwd=cwd,
                          timeout=timeout, capture_output=True, text=True, env=environment)


def inside(file, *arguments, cwd):
    """The same in this process, without two seconds of imports; returns what `program` does."""
    here, out, err = os.getcwd(), io.StringIO(), io.StringIO()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main = importlib.import_module(file.removesuffix(".py")).main
            code = main() if file in ("critic.py", "dpo.py") else main([*map(str, arguments)])
    finally:
        os.chdir(here)
    return subprocess.CompletedProcess(arguments, code or 0, out.getvalue(), err.getvalue())


# -- homework ---------------------------------------------------------------------------------------------
def test_value_by_precedence():
    """`value` equals Python's own evaluation on 3,000 random expressions, and is None iff a partial result leaves
    0..99 (checked by an independent walk)."""
    rng = random.Random(0)
    for _ in range(3000):
        x = [rng.randint(1, 30)]
        for _ in range(rng.randint(1, 5)):
            x += [rng.choice("+-*"), rng.randint(1, 9)]
        exact = 0
        for sign, term in re.findall(r"([+-]?)([^+-]+)", "".join(map(str, x))):
            product = int(np.prod([int(f) for f in term.split("*")]))
            exact += -product if sign == "-" else product
        assert value(x, bounded=False) == exact
        y, inside = list(x), True
        while len(y) > 1:
            i = y.index("*") if "*" in y else 1
            y[i - 1:i + 2] = [calculate(*y[i - 1:i + 2])]
            inside &= 0 <= y[i - 1] <= 99
        assert (value(x) is None) == (not inside)


def test_homework_split_and_streams():
    """Held-out questions never occur in a training stream; a round's questions depend on seed and round alone."""
    task = Homework(Config(questions=200, eval_questions=300))
    held = {q.text for q in task.eval_questions()}
    trained = {q.text for q in task.train_questions(1)} | {q.text for q in task.train_questions(2)}
    stream = task.stream(5, held_out=False)
    trained |= {next(stream).text for _ in range(2000)}
    assert len(held) == 300 and not held & trained
    again = Homework(Config(questions=200, recipe="rft"))
    assert [q.text for q in again.train_questions(1)] == [q.text for q in task.train_questions(1)]
    assert [q.text for q in again.train_questions(2)] != [q.text for q in task.train_questions(1)]
    assert all(str(value(parse(q.text))) == q.answer for q in task.train_questions(1))


def test_truth_of_students():
    """`first_false_step` is None exactly for students who never ruin the value; for the careless it is the first
    line after which precedence no longer gives the answer. 500 students of each kind."""
    careful, careless = Homework(Config(careless=0.0)), Homework(Config(careless=1.0))
    rng, stream = random.Random(3), careful.stream(11, False)
    ruined = 0
    for _ in range(500):
        q = next(stream)
        assert careful.first_false_step(q, careful.solve(q, rng)) is None
        text = careless.solve(q, rng)
        found = careless.first_false_step(q, text)
        rests = [parse(line.split(" : ")[1]) for line in text.split("\n")[:-1]]
        wrong = [i for i, rest in enumerate(rests) if value(rest, bounded=False) != int(q.answer)]
        assert found == (wrong[0] if wrong else None)
        ruined += bool(wrong)
    assert 100 < ruined < 500


@pytest.mark.parametrize("text, step", [
    ("1*4=4 : 7+4-2\n7+4=11 : 11-2\n11-2=9 : 9\n#### 9", None),
    ("7+1=8 : 8*4-2\n8*4=32 : 32-2\n32-2=30 : 30\n#### 30", 0),
    ("1*4=5 : 7+5-2\n7+5=12 : 12-2\n12-2=10 : 10\n#### 10", 0),            # arithmetic
    ("1*4=4 : 7+4-3\n7+4=11 : 11-3\n11-3=8 : 8\n#### 8", 0),               # copying
    ("1*4=4 : 7+4-2\n7+4=11 : 11-2\n11-2=9 : 9\n#### 8", 3),               # answer line
    ("1*4=4 : 7+4-2\n7+4=12 : 12-2\n12-2=10 : 10\n#### 10", 1),
    ("1*4=4 : 7+4-2\nrubbish", 1), ("", 0), ("1*4=4 : 7+4-2\n#### 9", 1)])
def test_truth_table(text, step):
    """First false lines of hand-made solutions of 7+1*4-2 = 9."""
    assert Homework(Config()).first_false_step(Question("7+1*4-2", "9", 3), text) == step


# -- statistics and pairs ---------------------------------------------------------------------------------
@pytest.mark.parametrize("traps, careless", [(1, 0.85), (2, 0.8)])
def test_traps(traps, careless):
    """A student who always does the leftmost operation gets every question with traps wrong without leaving 0..99,
    worked out by Python itself; the corpus is right about as often as (1 - careless)^traps: .15 and .04, and a little
    luck."""
    task, rng = Homework(Config(traps=traps, careless=careless, questions=400)), random.Random(1)
    questions, right = task.train_questions(1), 0
    for q in questions:
        left = 0
        for sign, digit in re.findall(r"([-+*]?)([0-9])", q.text):
            left = left * int(digit) if sign == "*" else left + int(sign + digit)
            assert 0 <= left <= 99
        products = [int(np.prod([int(x) for x in part.split("*")])) for part in re.split("[-+]", q.text)]
        signs = [1, *(1 if sign == "+" else -1 for sign in re.findall("[-+]", q.text))]
        assert left != np.dot(signs, products) == int(q.answer) and q.text.count("*") >= traps
        right += sum(task.reward(q.text, task.solve(q, rng), q.answer) for _ in range(5))
    assert (1 - careless) ** traps - 0.01 < right / 2000 < (1 - careless) ** traps + 0.08


def test_wilson_and_mcnemar():
    """Known values: Wilson 95% of 81/263 (Newcombe 1998: .2553 - .3662); exact McNemar as two-sided binomial."""
    assert np.allclose(loop.wilson(81, 263), (0.2553, 0.3662), atol=5e-5)
    assert loop.wilson(0, 10)[0] == pytest.approx(0.0, abs=1e-12) and loop.wilson(10, 10)[1] == pytest.approx(1.0)
    ours, theirs = [1] * 9 + [0] * 1 + [1] * 50, [0] * 9 + [1] * 1 + [1] * 50
    assert loop.mcnemar(ours, theirs) == pytest.approx(2 * (1 + 10) / 2 ** 10)
    assert loop.mcnemar(theirs, ours) == loop.mcnemar(ours, theirs) and loop.mcnemar(ours, ours) == 1.0


def test_edit_distance():
    """Equals the textbook recursion on 300 random pairs."""
    def slow(a, b):
        table = [[max(i, j) if not i or not j else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
        for i in range(1, len(a) + 1):
            for j in range(1, len(b) + 1):
                table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1,
                                  table[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
        return table[-1][-1]
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = rng.integers(0, 4, rng.integers(0, 12)), rng.integers(0, 4, rng.integers(0, 12))
        assert loop.edit_distance(a, b) == slow(a.tolist(), b.tolist())


def hand_forest():
    """q -> a -> (b -> right, c -> wrong), q -> d -> wrong; a second, longer right end below a."""
    f = Forest(1)
    f.add(0, -1, [1, 2])
    a, d = f.add(0, 0, [3, 9]), f.add(0, 0, [4, 9])
    b, c = f.add(0, a, [5, 9]), f.add(0, a, [6, 9])
    good, bad = f.add(0, b, [7], end="eos"), f.add(0, c, [8], end="eos")
    worse, long_ = f.add(0, d, [8, 8], end="eos"), f.add(0, b, [7, 7, 7], end="eos")
    for n, right in ((good, 1), (bad, 0), (worse, 0), (long_, 1)):
        f.right[0, n] = right
    return f, a, b, c, d, good, bad, worse, long_


def test_pit_and_outcome_pairs():
    """Pit pairs: rejected = the pit step alone, chosen = the shortest right completion of the same prefix with its
    end; sides are siblings. Outcome pairs begin where the solutions part."""
    f, a, b, c, d, good, bad, worse, long_ = hand_forest()
    inner, first = loop.pit_pairs(f, 0, [{"node": c}, {"node": d}, {"node": d}, {"node": None}], 0.1)[::-1]
    assert (inner.chosen, inner.rejected, inner.smoothing) == ([b, good], [c], 0.1) or \
        (first.chosen, first.rejected) == ([b, good], [c])
    by_pit = {p.rejected[0]: p for p in (inner, first)}
    assert by_pit[c].chosen == [b, good] and by_pit[d].chosen == [a, b, good]
    for p in loop.outcome_pairs(f, 0):
        assert f.parent[0, p.chosen[0]] == f.parent[0, p.rejected[0]] and p.chosen[0] != p.rejected[0]
        assert p.chosen[-1] in (good, long_) and p.rejected[-1] in (bad, worse)
    assert len(loop.outcome_pairs(f, 0)) == 2


def test_sibling_pairs():
    """The pairs of a tree by hand: best against worst visited child, gap and least visits honoured, smoothing
    N_l / (N_w + N_l), none at .5 and beyond, along the path or at every node."""
    f, a, b, c, d, good, bad, worse, long_ = hand_forest()
    for n, visits, q in ((0, 10, .2), (a, 7, .5), (d, 3, -1), (b, 5, 1), (c, 2, -.75), (good, 4, 1), (long_, 1, 1),
                         (bad, 2, -.75),
                         (worse, 3, -1)):
        f.visits[0, n], f.value_sum[0, n] = visits, visits * q
    made = lambda **k: [(p.chosen, p.rejected, p.smoothing) for p in
                        loop.sibling_pairs(Config(**{"gap": 0.25} | k), f, 0, [0, d, worse])]
    assert made() == [([a], [d], .3), ([b], [c], 2 / 7)]
    assert made(pair_nodes="path") == [([a], [d], .3)]
    assert made(gap=1.6) == [([b], [c], 2 / 7)] and made(min_visits=3) == [([a], [d], .3)]
    f.visits[0, c] = 5
    f.value_sum[0, c] = -5
    assert made() == [([a], [d], .3)]                                   # smoothing .5: no direction


def test_countdown():
    """Rewards against a replay written again, solvability by brute force: 300 random plays and 300 damaged ones; a bare
    answer earns nothing; held-out questions are not trained on in any order of their numbers."""
    task, rng = Countdown(Config(task="countdown", questions=300, eval_questions=200)), random.Random(2)

    def legal(numbers, target, text):
        """Replay a solution with a multiset."""
        pool, lines = sorted(numbers), text.split("\n")
        for line in lines[:-1]:
            m = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+) : (\d+(?: \d+)*)", line)
            if not m or not 0 <= calculate(int(m[1]), m[2], int(m[3])) == int(m[4]) <= 99:
                return False
            for used in (int(m[1]), int(m[3])):
                if used not in pool:
                    return False
                pool.remove(used)
            pool = sorted(pool + [int(m[4])])
            if pool != sorted(map(int, m[5].split())):
                return False
        return lines[-1] == f"#### {target}" and pool == [target]

    def reaches(numbers, target):
        """Brute force: can the target still be made?"""
        return numbers == (target,) or any(reaches(left, target) for left in {
            tuple(sorted(left)) for _, left in task.moves(numbers)})
    solved = 0
    for i in range(600):
        q = task.draw(rng)
        text = task.solve(q, rng)
        if i % 2:
            k = rng.randrange(len(text))
            text = text[:k] + rng.choice("0123456789 +") + text[k + 1:]
        want = legal(task.numbers(q.text), int(q.answer), text)
        # one spelling of what is left is asked for: so a reward is a legal solution, and an untouched one is both
        assert task.reward(q.text, text, q.answer) <= want and (i % 2 or task.reward(q.text, text, q.answer) == want)
        solved += want
        assert reaches(task.numbers(q.text), int(q.answer))        # every question can be solved
    assert 5 < solved < 200
    q = Question("10 12 9 -> 7", "7", 2)
    assert task.reward(q.text, "12-9=3 : 10 3\n10-3=7 : 7\n#### 7", "7") and not task.reward(q.text, "#### 7", "7")
    assert not reaches((9, 22), 7) and reaches((2, 9), 7)
    held = {task.key(q) for q in task.eval_questions()}
    assert len(held) > 100 and not held & {task.key(q) for q in task.train_questions(1)}


def test_too_few_questions(tmp_path):
    """A task that has not so many different questions says so instead of searching for ever."""
    with pytest.raises(loop.BadInput, match="different questions"):
        Countdown(Config(task="countdown", numbers=2, eval_questions=5000)).eval_questions()
    refused("different questions", "loop.py", *SMOKE, "--task", "countdown", "--numbers", 2, "--eval-questions",
            5000, cwd=tmp_path)
    assert not [*tmp_path.glob("runs/base_*")]                          # said before any training


def test_calculations_make_distinct():
    """Other words with the same calculations are the same solution; other calculations are another."""
    same = loop.calculations("She has 3 + 4 = 7 apples.\n#### 7"), loop.calculations("So 3+4=7 in all.\n#### 7")
    assert same[0] == same[1] != loop.calculations("4+3=7\n#### 7")


# -- whole runs -------------------------------------------------------------------------------------------
def comparable(folder: Path) -> dict:
    """What must be equal byte for byte (log rows without seconds and rates)."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*"))
             if p.is_file() and p.name not in ("lock", "log.jsonl", "config.json")
             or p.parent.name.startswith("round_")}
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    files["log"] = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
    return files


def test_run_leaves_what_it_says(smoke):
    """Folders round_0..2, trees, pairs, per-question results, log keys; nothing of work/ is left; every sampled
    token is encoded at most once; the budget binds within a wave; tree files load and their pits are labelled."""
    folder, out = smoke
    run = folder / "runs" / "a"
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["round"] for r in rows] == [0, 1, 2] and not (run / "work").exists()
    for r in rows:
        assert {"recipe", "round", "seed", "accuracy", "accuracy_low", "accuracy_high", "questions", "sampled_tokens",
                "seconds", "no_answer", "never_ends", "accuracy_by_steps", "distinct_answers", "processed_tokens",
                "trained_tokens"} <= set(r)
        assert r["processed_tokens"] <= r["prompt_tokens"] + r["sampled_tokens"]
        assert r["sampling_seconds"] + r["train_seconds"] + r["eval_seconds"] <= r["seconds"]
        assert len((run / f"eval_{r['round']:02d}.jsonl").read_text().splitlines()) == r["questions"] == 32
    assert rows[1]["sampled_tokens"] > 0.5 * 16 * 300 and rows[0]["sampled_tokens"] == 0
    both = loop.two_stages({"tokens": 3, "train_seconds": 1.5, "loss": 9}, {"tokens": 4, "train_seconds": 2, "loss": 1})
    assert both == {"tokens": 7, "train_seconds": 3.5, "loss": 1}       # round 1 imitates first: both trainings count
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert all((run / f"round_{k}" / name).exists() for k in range(3))
    pairs = [json.loads(line) for line in (run / "pairs_01.jsonl").read_text().splitlines()]
    assert all(set(p) == {"prompt", "chosen", "rejected", "tree", "chosen_nodes", "rejected_nodes"} for p in pairs)
    assert "round 2   accuracy" in out and "Ask it:" in out


def test_finished_run_called_again(smoke):
    """The same command on a finished run trains nothing, changes no file and prints the same table."""
    folder, out = smoke
    before = comparable(folder / "runs" / "a")
    again = inside("loop.py", *SMOKE, "--rounds", 2, "--out", "runs/a", cwd=folder)
    assert again.returncode == 0 and comparable(folder / "runs" / "a") == before
    assert out[out.index("A question of round 1"):] == again.stdout[again.stdout.index("A question of round 1"):]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_run_ends_in_the_same_bytes(smoke, killed):
    """kill -9 again and again, at growing times, then the same command: weights, optimizer, pairs, trees and
    per-question files equal those of the run that was left alone (the base is trained anew here, too)."""
    assert int(killed[1].split()[-1]) >= 1
    assert comparable(killed[0] / "runs" / "a") == comparable(smoke[0] / "runs" / "a")
    base = [next(f.glob("runs/base_*/done/model.safetensors")).read_bytes() for f in (killed[0], smoke[0])]
    assert base[0] == base[1]


def test_interrupt_says_how_to_go_on(tmp_path):
    """Ctrl-C: exit code 130, one line, no traceback."""
    process = subprocess.Popen([sys.executable, str(ROOT / "loop.py"), *SMOKE, "--base-steps", "100000"], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "training the base" in process.stdout.readline() + process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "the same command goes on" in err and "Traceback" not in err


def test_compare_and_other_recipes(compared):
    """--compare runs sft, rft, outcome_dpo, mcts_dpo and combined on the cached base and prints one row each; called
    again it prints the same table. All but sft, which samples none, spend the budget; trees are what they should be."""
    folder, first, flags = compared
    names, again = flags[flags.index("--compare") + 1].split(","), inside("loop.py", *flags, cwd=folder)
    assert again.returncode == 0, again.stderr[-2000:]
    row = re.compile(rf"\| ({'|'.join(names)}) \|")
    first, second = ([line for line in out.splitlines() if row.match(line)] for out in (first, again.stdout))
    assert [row.split(" | ")[0][2:] for row in first] == names and first == second
    rows = {n: json.loads((folder / f"runs/c/{n}_seed0/log.jsonl").read_text().splitlines()[-1]) for n in names}
    assert rows["sft"]["sampled_tokens"] == 0 and rows["rft"]["sampled_tokens"] == rows["outcome_dpo"]["sampled_tokens"]
    for name in names[1:]:
        assert 0.6 * 16 * 300 < rows[name]["sampled_tokens"] < 1.3 * 16 * 300
        assert rows[name]["processed_tokens"] <= rows[name]["prompt_tokens"] + rows[name]["sampled_tokens"]
    assert rows["combined"]["sampled_tokens"] < 1.1 * 16 * 300
    assert rows["mcts_dpo"]["simulations"] > 1 and rows["mcts_dpo"]["committed_right"] is not None
    trees = [json.loads(line) for line in (folder / "runs/c/mcts_dpo_seed0/trees_01.jsonl").read_text().splitlines()]
    for t in trees:
        visits, parent = t["tree"]["visits"], t["tree"]["parent"]
        assert sum(visits[n] for n, p in enumerate(parent) if p == 0) == visits[0]
        assert t["path"][0] == 0 and t["tree"]["terminal"][t["path"][-1]]
    sampled, searched = ([json.loads(line) for line in (folder / f"runs/c/combined_seed0/{name}_01.jsonl").read_text()
                          .splitlines()] for name in ("trees", "searched"))
    right = lambda t: 1 in t["tree"]["right"]
    assert [t["question"] for t in sampled if not right(t)] == [t["question"] for t in searched] != []
    assert rows["combined"]["searched"] == len(searched)
    assert rows["combined"]["searched_solved"] == sum(map(right, searched))
    for t in searched:            # ends have their grade as score, other nodes what the critics say
        tree = t["tree"]
        rows = [*zip(*(tree[k] for k in ("terminal", "right", "score", "visits")))][1:]
        assert all(grade in (0, 1) and score == grade if end else grade == -1 and 0 <= score <= 1
                   for end, grade, score, visits in rows if visits)
    for t in sampled:             # every sample that was asked for is there
        tree = t["tree"]
        assert tree["drawn"][0] == sum(c for c, p in zip(tree["count"], tree["parent"]) if p == 0) >= 4


def questions_file(path: Path, count: int = 16) -> Path:
    """A small file of GSM8K's form from the copied real questions."""
    lines = (ROOT / "tests" / "data" / "gsm8k_300.jsonl").read_text(encoding="utf-8").splitlines()
    keep = [line for line in lines if len(json.loads(line)["question"]) < 250][:count]
    path.write_text("\n".join(keep) + "\n", encoding="utf-8")
    return path


def test_map_of_regimes(tmp_path):
    """--regimes runs every recipe in every setting and prints one map: base and cells are those of the logs, settings
    those of the regimes; a cell of a run that exists already is not run again."""
    command = ("loop.py", *SMOKE, "--compare", "sft,rft", "--regimes", "often,rare", "--seeds", 1, "--out", "m",
               "--questions",
               8, "--eval-questions", 8, "--base-steps", 3, "--steps", 1, "--threads", 1)
    first = inside(*command, cwd=tmp_path)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("m/*/*/log.jsonl")}
    second = inside(*command, cwd=tmp_path)
    assert first.returncode == 0 and len(times) == 4, first.stderr[-2000:]
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.glob("m/*/*/log.jsonl")}
    row = re.compile(r"\| (often|rare) \|")
    tables = [[line.strip("| ").split(" | ") for line in done.stdout.splitlines() if row.match(line)]
              for done in (first, second)]
    assert tables[0] == tables[1] and [row[0] for row in tables[0]] == ["often", "rare"]
    for name, *cells in tables[0]:
        logs = [[json.loads(line) for line in (tmp_path / f"m/{name}/{r}_seed0/log.jsonl").read_text().splitlines()]
                for r in ("sft", "rft")]
        settings = json.loads((tmp_path / f"m/{name}/rft_seed0/config.json").read_text())["settings"]
        assert settings["traps"] == {"often": 0, "rare": 2}[name]
        want = [f"{100 * logs[1][1]['sampled_accuracy']:.1f}", f"{100 * logs[0][0]['accuracy']:.1f}"]
        last = [f"{100 * log[-1]['accuracy']:.1f}" for log in logs]
        assert cells[:2] == want and [c.split(" ")[0] for c in cells[2:]] == last
        assert re.fullmatch(r"[0-9.]+ \[[0-9.]+, [0-9.]+, p = 1\]", cells[2]) and "p" not in cells[3]


def test_open_weights_and_real_questions(smoke, tmp_path):
    """The same loop on a model folder and files of GSM8K's form; --evaluate of the result; model.py on its folder."""
    model = smoke[0] / "runs" / "a" / "round_0"
    data = questions_file(tmp_path / "q.jsonl")
    for recipe in ("sft", "self_explore"):
        done = inside("loop.py", *SMOKE, "--model", model, "--data", data, "--eval-data", data, "--recipe", recipe,
                       "--out", f"out_{recipe}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    found = inside("loop.py", "--evaluate", "out_sft", cwd=tmp_path)
    assert found.returncode == 0 and json.loads(found.stdout)["questions"] == 16, found.stderr
    asked = inside("model.py", "--model", "out_sft/round_1", "--prompt", "Question: 1+1? Answer:", "--temperature", 0,
                    "--max-tokens", 5, cwd=tmp_path)
    assert asked.returncode == 0 and "tokens/s" in asked.stdout


# -- refusals ---------------------------------------------------------------------------------------------
def refused(words, *arguments, cwd):
    """Exit code 2, one sentence with these words, no traceback."""
    done = inside(*arguments, cwd=cwd)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr[-1500:])
    assert "Traceback" not in done.stderr and words.lower() in done.stderr.lower(), done.stderr


@pytest.mark.parametrize("words, flags", [
    ("did you mean --rounds", ["--round", "3"]), ("out of range", ["--rounds", "-1"]),
    ("out of range", ["--temperature", "0"]),
    ("invalid choice", ["--recipe", "dpo"]), ("invalid int", ["--steps", "many"]),
    ("go together", ["--model", "x", "--data", "x"]),
    ("go together", ["--model", "x", "--eval-data", "x"]), ("--sft-data needs", ["--model", "x", "--sft-data", "x"]),
    ("need --model", ["--data", "x.jsonl"]), ("below --min-operators", ["--max-operators", "2"]),
    ("unknown recipe 'ppo'", ["--compare", "rft,ppo"]), ("multiple of 8", ["--width", "30"]),
    ("--max-operators of 5", ["--traps", "4"]), ("out of range", ["--traps", "9"]),
    ("any of often", ["--regimes", "often"]),
    ("any of often", ["--compare", "rft", "--regimes", "seldom"]),
    ("--rollout-model folder", ["--model", "x", "--data", "x", "--eval-data", "x", "--rollouts", "2"])])
def test_flags_are_refused(words, flags):
    """A wrong flag is named together with what would be right."""
    with pytest.raises(loop.BadInput, match=re.compile(re.escape(words), re.I)):
        loop.parse_flags(flags)


def test_bad_files_are_refused(smoke, tmp_path):
    """Missing folder, missing file, a bad line (with its number), no question, no number, a question longer than
    the context: exit code 2 and one sentence, and no run folder with results is left."""
    model, data = smoke[0] / "runs" / "a" / "round_0", questions_file(tmp_path / "good.jsonl")
    cases = {"no.jsonl": (None, "cannot be read"), "empty.jsonl": ("\n", "no question"),
             "json.jsonl": ('{"question": 1\n', "line 1"),
             "field.jsonl": ('{"question": "a", "answer": "1"}\n{"question": "b"}\n', "line 2"),
             "number.jsonl": ('{"question": "a", "answer": "none"}\n', "no number"),
             "long.jsonl": (json.dumps({"question": "x" * 600, "answer": "1"}) + "\n", "context")}
    for name, (text, words) in cases.items():
        if text is not None:
            (tmp_path / name).write_text(text)
        done = loop.main([*SMOKE, "--model", str(model), "--data", str(tmp_path / name), "--eval-data", str(data),
                          "--out", str(tmp_path / ("out" + name))])
        assert done == 2 and not (tmp_path / ("out" + name) / "round_0").exists(), name
        with pytest.raises(loop.BadInput, match=words):
            loop.Exercises(Config(data=str(tmp_path / name), eval_data=str(data)), Homework(Config()).tokenizer, 512)
    refused("nowhere", "model.py", "--model", "nowhere", "--prompt", "x", cwd=tmp_path)


def test_open_weights_on_a_built_in_task(smoke, tmp_path):
    """--model without --data: the folder's model is fine-tuned on the task's corpus with the folder's own tokenizer,
    once for all runs beside each other, and then goes through the loop; --sft-data: on a file's solutions."""
    folder = smoke[0] / "runs" / "a" / "round_0"
    few = [*SMOKE, "--model", folder, "--base-steps", 3, "--questions", 8, "--steps", 2, "--eval-questions", 8]
    for recipe, rounds in (("rft", 1), ("sft", 0)):
        done = inside("loop.py", *few, "--recipe", recipe, "--rounds", rounds, "--out", f"runs/{recipe}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-1000:]
        assert ("from scratch" in done.stdout, f"the base from {folder}" in done.stdout) == (False, recipe == "rft")
    start, base = (read_safetensors(f / "model.safetensors")[0] for f in (folder, tmp_path / "runs/rft/round_0"))
    moved = [float((base[n] - start[n]).abs().max()) for n in start]
    assert len(base) == len(start) and 0 < max(moved) < 3e-3            # three steps at the rate of open weights
    assert len([*(tmp_path / "runs").glob("base_*")]) == 1
    data = questions_file(tmp_path / "questions.jsonl")
    done = inside("loop.py", *few, "--data", data, "--eval-data", data, "--sft-data", data, "--rounds", 0,
                  "--out", "runs/text", cwd=tmp_path)
    assert done.returncode == 0 and f"of {data}" in done.stdout, done.stderr[-1000:]
    text = read_safetensors(tmp_path / "runs/text/round_0/model.safetensors")[0]
    assert any(not torch.equal(text[n], base[n]) for n in text) and len([*(tmp_path / "runs").glob("base_*")]) == 2
    done = inside("loop.py", *few, "--data", data, "--eval-data", data, "--sft-data", data, "--rounds", 0,
                  "--template", "{question} So", "--out", "runs/other", cwd=tmp_path)
    assert done.returncode == 0 and len([*(tmp_path / "runs").glob("base_*")]) == 3         # its prompts are others
    done = inside("loop.py", "--evaluate", "runs/rft", "--eval-data", data, cwd=tmp_path)   # not the run's questions
    assert json.loads(done.stdout)["questions"] == len(data.read_text().splitlines()) != 8, done.stderr[-1000:]


def test_out_of_memory(smoke, tmp_path):
    """A device that decodes 16 rows and trains on 600 padded tokens at most: the run halves both, says so, goes on
    from what is on the disk, samples the same trees and ends with the same weights but for rounding; the sizes are
    remembered. Where nothing fits: one sentence."""
    forward, collate = Sampler._forward, dpo.collate

    def small_forward(self, slots, *rest):
        """Refuses what is too large; in the words of CUDA."""
        if len(slots) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, slots, *rest)

    def small_collate(rows, device):
        """The same; in the words of a CPU."""
        batch = collate(rows, device)
        if batch.ids.numel() > 600 and len(rows) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return batch
    base = next((smoke[0] / "runs").glob("base_*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "_forward", small_forward)
        patch.setattr(dpo, "collate", small_collate)
        done = inside("loop.py", *SMOKE, "--base", base, "--out", "runs/a", cwd=tmp_path)
        small = inside("loop.py", "--evaluate", "runs/a/round_0", "--eval-questions", "32", cwd=tmp_path)
    large = inside("loop.py", "--evaluate", "runs/a/round_0", "--eval-questions", "32", cwd=tmp_path)
    said, found = small.stdout.split("{", 1)
    assert "{" + found == large.stdout and "going on with 16 rows" in said and not large.returncode, small.stderr
    assert done.returncode == 0 and "going on with 16 rows and 512 padded tokens" in done.stdout, done.stderr[-1000:]
    about = json.loads((tmp_path / "runs/a/config.json").read_text())
    assert about["held"] == {"rows": 16, "part_tokens": 512} and about["settings"]["rows"] == 64
    trees, weights = [], []
    for where in (smoke[0], tmp_path):
        lines = (where / "runs/a/trees_01.jsonl").read_text().splitlines()
        trees.append([json.loads(line)["tree"]["ids"] for line in lines])
        weights.append(read_safetensors(where / "runs/a/round_1/model.safetensors")[0])
    assert trees[0] == trees[1] and weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=1e-4), name
    run = loop.Run(loop.parse_flags([*SMOKE, "--base", str(base), "--out", str(tmp_path / "runs/a")]))
    assert run.sampler.rows == 16 and dpo.part_tokens(run.model) == 512
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "_forward", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        refused("one solution and one tree", "loop.py", *SMOKE, "--base", base, "--out", "runs/b", cwd=tmp_path)


def test_chunk_is_part_of_a_run(smoke, tmp_path, monkeypatch):
    """The number of questions a chunk is chosen by the memory free at the first start, and kept: files of finished
    chunks depend on it."""
    flags = loop.parse_flags([*SMOKE, "--base", str(next((smoke[0] / "runs").glob("base_*"))), "--out", str(tmp_path)])
    found = []                    # 8 questions were asked for
    for free in (1 << 20, 1 << 40):
        monkeypatch.setattr(loop, "free_memory", lambda device: free)
        found.append(loop.Run(flags).chunk)
    assert found == [2, 2] and json.loads((tmp_path / "config.json").read_text())["chunk"] == 2


def test_settings_and_lock(smoke, tmp_path):
    """A resume with other settings names the difference; a second run in a folder in use is refused; the lock of a
    dead process is none."""
    refused("--steps was 4, now 5", "loop.py", *SMOKE, "--rounds", 2, "--out", "runs/a", "--steps", 5, cwd=smoke[0])
    held = loop.lock(tmp_path / "busy")
    refused("in use by another run", "loop.py", *SMOKE, "--out", "busy", cwd=tmp_path)
    held.close()
    loop.lock(tmp_path / "busy").close()


# -- the house --------------------------------------------------------------------------------------------
def test_imports_run_one_way():
    """model <- mcts <- critic <- dpo <- loop, and no other package than the card's."""
    rooms, allowed = ["model", "mcts", "critic", "dpo", "loop"], {"torch", "numpy", "tiktoken", "tqdm"}
    for i, room in enumerate(rooms):
        tree = ast.parse((ROOT / f"{room}.py").read_text(encoding="utf-8"))
        names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        for name in (n.split(".")[0] for n in names):
            assert name in rooms[:i] or name in allowed or name in sys.stdlib_module_names, (room, name)


def test_default_recipe():
    """The best of the three published methods on the built-in tasks; on files of questions one that reads all kinds."""
    files = ["--model", "m", "--data", "d", "--eval-data", "e"]
    given = [[], files, [*files, "--recipe", "rft"], ["--recipe", "rft"]]
    assert [loop.parse_flags(flags).recipe for flags in given] == ["alphallm", "self_explore", "rft", "rft"]


def test_readme_commands_and_names(smoke, tmp_path):
    """Every `python ...` command of the README is accepted by its program (parsed; those without a folder of the
    reader's own are run at smoke size), and every `file.name` in its paper map exists."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [c.split("#")[0].split() for c in re.findall(r"^(?:\$ )?python (?!-m)(.+)$", text, re.M)]
    assert len(commands) >= 8
    ran, shown = set(), {"model.py": "encoded", "mcts.py": "after 64 simulations", "critic.py": "first pit: step 1",
                         "dpo.py": "margin"}
    foreign = ("--model", "--data", "--evaluate", "--decode", "--compare")
    small = "--rounds 1 --questions 8 --steps 2 --budget 150 --base-steps 5 --eval-questions 8".split()
    for command in commands:
        name, flags = command[0], command[1:]
        if name == "loop.py":
            loop.parse_flags([f.strip('"') for f in flags])
        if not any(f in command for f in foreign) and name != "tests/bench.py":
            extra = ("--preset", "smoke", *small) if name == "loop.py" else ()
            key = (name, *[f for f in flags if f not in ("--preset", "smoke")])
            if key not in ran:
                ran.add(key)
                done = inside(name, *flags, *extra, cwd=tmp_path)
                assert done.returncode == 0, (command, done.stderr[-1000:])
                assert flags or name not in shown or shown[name] in done.stdout
    assert len(ran) >= 9 and (tmp_path / "tree.html").exists()
    modules = {n: __import__(n) for n in ("model", "mcts", "critic", "dpo", "loop")}
    names = re.findall(r"`(model|mcts|critic|dpo|loop)\.([A-Za-z_.]+)`", text)
    assert len(names) >= 15
    for module, path in names:
        if path == "py":
            continue
        thing = modules[module]
        for part in path.split("."):
            assert hasattr(thing, part), f"README names {module}.{path}"
            thing = getattr(thing, part)
