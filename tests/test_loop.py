"""The loop: whole runs, stopped and resumed runs, laws between the files of a run, refusals.

Runs work on a toy task. A solution is a few lines "+", "-" or "*" and a last line "=0" or "=1"; it
is right if it has no "*" and ends in 0. The toy policy is a Markov chain over bytes, written by
hand into the weights of a one-layer GPT: right and wrong samples exist without any training."""
import ast
import contextlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, namedtuple
from dataclasses import fields
from functools import cache
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import critic
import loop
from mcts import NOTHING, Tree
from model import GPT, GPTConfig, Tokenizer

ROOT = Path(__file__).resolve().parent.parent
# a byte of the key is followed by a random one of the value; "$" stands for the end of the text
CHAIN = {"?": "++-*", "+": "\n", "-": "\n", "*": "\n", "\n": "+-*===", "=": "0001", "0": "$",
         "1": "$", ":": "+-*="}
SMALL = dict(recipe="alphallm", preset="smoke", threads=1, workers=1, task="coins", rounds=2,
             questions=8, samples=4, budget=60, steps=4, batch=4, eval_questions=8, base_steps=2,
             max_tokens=16)


class Coins(loop.Task):
    """The toy task. To ask whether a solution of a made-up question is right is an error."""
    draw = lambda self, rng: loop.Question(str(rng.randrange(10_000)), "0")
    vary = lambda self, text, rng: str((int(text) + rng.randint(1, 9)) % 10_000)
    solve = lambda self, question, rng: rng.choice("+-*") + "\n=" + rng.choice("01")
    answer = lambda self, text: text.rpartition("=")[2] or None

    def reward(self, question, text, cut=False):
        assert question.answer != "", "nobody knows the answer of a made-up question"
        return not cut and "*" not in text and text.endswith("=0")


loop.TASKS["coins"] = Coins
loop.flags = cache(loop.flags)          # it parses the source of loop.py: a fifth of a second


def write_chain(folder):
    """The toy policy as a model folder. The norm makes a one-hot of 32 numbers sqrt(32) large."""
    tokenizer = Tokenizer.bytes_only()
    model = GPT(GPTConfig.tiny(tokenizer.n_ids, 32, 1)).initialise(0)
    weights = model.state_dict()                            # shares its memory with the model
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    for name in weights:
        if "o_proj" in name or "down_proj" in name:
            weights[name].zero_()
    embedding.zero_()
    head.fill_(-20 / math.sqrt(32))
    for place, (byte, followers) in enumerate(CHAIN.items()):
        embedding[ord(byte), place] = 1
        for follower in followers:
            chance = followers.count(follower) / len(followers)
            row = tokenizer.n_ids - 1 if follower == "$" else ord(follower)
            head[row, place] = math.log(chance) / math.sqrt(32)
    model.save_pretrained(folder)
    tokenizer.save(folder)


def go(*arguments, **settings):
    """loop.main in this process: (exit code, what it printed, what it said on stderr)."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = loop.main([*map(str, arguments), *flags])
    return code, out.getvalue(), err.getvalue()


def small(home, **settings):
    """The settings of a small run of the toy policy."""
    return SMALL | dict(model=str(home / "m")) | settings


def trees(folder, name):
    """The trees of one stage, as they stand in its files."""
    return [tree for file in sorted(folder.glob(f"{name}/*")) for tree in loop.read_lines(file)]


def contents(folder):
    """What must be equal in two runs: the bytes of each file, without times and settings."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name in ("log.jsonl", "training.json"):
            found[name] = [{key: value for key, value in row.items() if "seconds" not in key}
                           for row in loop.read_lines(path)]
        elif path.is_file() and name not in ("settings.json", "report.html"):
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with the toy policy in m/."""
    folder = tmp_path_factory.mktemp("home")
    write_chain(folder / "m")
    return folder


@pytest.fixture(scope="session")
def run_of(home):
    """A function: recipe -> folder of its finished run of two rounds. Each runs once, and writes
    nothing to stderr: there is no progress bar where stderr is no terminal."""
    @cache
    def run(recipe):
        folder = home / "runs" / recipe
        code, _, err = go(**small(home, recipe=recipe, out=folder))
        assert (code, err) == (0, "")
        return folder
    return run


# -- whole runs ------------------------------------------------------------------------------------
def test_a_run_leaves_what_it_says(run_of):
    """Log keys, evaluations, model folders that open, and pairs that are text of the trees."""
    folder = run_of("self_explore")
    keys = "recipe round seed accuracy accuracy_low accuracy_high questions sampled_tokens seconds"
    log, pairs = loop.read_lines(folder / "log.jsonl"), 0
    assert [row["round"] for row in log] == [0, 1, 2]
    for r, row in enumerate(log):
        solved = loop.read_lines(folder / f"eval_{r}.jsonl")
        assert set(keys.split()) <= row.keys() and len(solved) == row["questions"] == 8
        assert statistics.mean(one["right"] for one in solved) == row["accuracy"]
        tokenizer = Tokenizer.from_pretrained(folder / f"round_{r}")
        assert GPT.from_pretrained(folder / f"round_{r}").config.vocab_size == tokenizer.n_ids
        texts = set()
        for file in folder.glob(f"trees_{r}/*"):
            for tree, record in loop.read_trees(file):
                steps = [record["text"] + "?", *record["step_texts"][1:]]
                for node in tree.nodes:
                    texts.add("".join(steps[one.index] for one in node.path()))
        for pair in loop.read_lines(folder / f"pairs_{r}.jsonl") if r else []:
            assert pair.keys() == {"prompt", "chosen", "rejected"} and "" not in pair.values()
            assert {pair["prompt"] + pair[side] for side in ("chosen", "rejected")} <= texts
            pairs += 1
    assert pairs == log[1]["pairs"] + log[2]["pairs"] > 4


def test_stages_have_their_own_seeds(run_of):
    """No two trees of two rounds share a seed."""
    found = [tree["seed"] for r in (1, 2) for tree in trees(run_of("rft"), f"trees_{r}")]
    assert len({*found}) == len(found) == 16


def test_examples_end(home, tmp_path):
    """Each example has the end-of-text at which sampling stops."""
    lab = loop.Lab(loop.Settings(**small(home, out=str(tmp_path / "run"))))
    row, = lab.example_rows(1, random.Random(0))
    assert row.packed.ids[-1] == lab.model.end_id and row.learn[-1]


@pytest.mark.parametrize("real", (False, True))
def test_how_the_base_is_trained(real, home, tmp_path, monkeypatch):
    """The tiny GPT from scratch by Muon at 6e-3, real weights by AdamW at --sft-lr."""
    monkeypatch.setattr(loop, "train", train := Mock(return_value=dict(steps=1)))
    model = home / "m" if real else ""
    assert go(**small(home, model=model, sft_lr=0.5, rounds=0, out=tmp_path / "run"))[0] == 0
    (_, _, _, lr), how = train.call_args
    assert (lr, how["muon"], how["warmup"]) == (0.5 if real else 6e-3, not real, 50)


def test_cut_answers_do_not_count(home, tmp_path):
    """A held-out solution that is right as far as it goes and ran into the limit is wrong."""
    assert go(**small(home, recipe="rft", rounds=0, max_tokens=4, out=tmp_path / "run"))[0] == 0
    row, = loop.read_lines(tmp_path / "run" / "log.jsonl")
    solved = loop.read_lines(tmp_path / "run" / "eval_0.jsonl")
    assert {one["solution"] for one in solved} == {"+\n=0"}
    assert (row["accuracy"], row["never_ends"]) == (0, 1)


def test_the_lab_lists_the_files(run_of):
    """The names in Lab's docstring are those in the folders of the seven recipes."""
    stem = lambda name: re.sub(r"_\d+", "", name.partition(".")[0])
    listed = re.findall(r"[a-z]+_1|settings|log|rft|report", loop.Lab.__doc__)
    listed = {stem(name) for name in listed} - {"decode"}
    found = {stem(path.name) for recipe in loop.RECIPES for path in run_of(recipe).iterdir()}
    assert found <= listed and listed - found <= {"more", "searched"}


@pytest.mark.parametrize("recipe", loop.RECIPES)
def test_recipes_keep_to_the_budget(recipe, run_of):
    """The log's tokens are those of the trees, and within 1.1 budgets; the weights move."""
    folder = run_of(recipe)
    for row in loop.read_lines(folder / "log.jsonl")[1:]:
        r, tokens = row["round"], 0
        for kind in ("first", "trees", "more", "imagined", "searched"):
            tokens += sum(tree["tokens"] for tree in trees(folder, f"{kind}_{r}"))
        assert row["sampled_tokens"] == tokens <= 1.1 * 60 * 8
        assert (tokens > 0.5 * 60 * 8) == (recipe != "sft")
        assert 0 < row["steps"] + row.get("rft_steps", 0) <= 4
        old, new = (folder / f"round_{i}" / "model.safetensors" for i in (r - 1, r))
        assert old.read_bytes() != new.read_bytes()


@pytest.mark.parametrize("recipe", ("outcome_dpo", "self_explore"))
def test_the_explorer_is_the_rft_model(recipe, home, tmp_path):
    """Log-probs in trees_1 are those of rft/, not of round_0. The RFT samples and the trees that
    pairs are read off share one budget."""
    gaps = dict(rft=[], round_0=[])
    settings = small(home, recipe=recipe, rounds=1, sft_lr=0.05, out=tmp_path)
    assert go(**settings)[0] == 0
    for name in gaps:
        model = GPT.from_pretrained(tmp_path / name)
        model.bind(Tokenizer.from_pretrained(tmp_path / name))
        for tree, _ in loop.read_trees(tmp_path / "trees_1" / "000000.jsonl"):
            for end in tree.ends():
                ids = torch.tensor([[*tree.root.ids, *end.solution()]])
                with torch.no_grad():
                    logps = model.all_logps(model(ids))
                said = logps[0, :-1].gather(-1, ids[0, 1:, None])[len(tree.root.ids) - 1:, 0]
                gap = said - torch.tensor(end.solution("logps"))
                gaps[name].append(float(gap.abs().max()))
    assert max(gaps["rft"]) < 1e-3 and max(gaps["round_0"]) > 0.1
    spent = [tree["tokens"] for name in ("first_1", "trees_1") for tree in trees(tmp_path, name)]
    assert len(spent) == 2 * 8 and sum(spent) <= 1.1 * 60 * 8


@pytest.mark.parametrize("settings", [
    dict(recipe="mcts_dpo", self_evaluation="gold", commit=5), dict(recipe="combined", share=0.9),
    dict(recipe="mcts_dpo", self_evaluation="plain", rule="uct"), dict(critic="judge", rule="puct"),
    dict(recipe="outcome_dpo", unit="3"), dict(chunk=3, unit="paragraph"),
    dict(critic="mean", rollouts=1), dict(recipe="self_explore", share=0), dict(questions=1)])
def test_switches(settings, home, tmp_path):
    """Each part of a method that a flag chooses runs through, and the budget holds."""
    rollout_model = home / "m" if "rollouts" in settings else ""
    settings = dict(rounds=1, rollout_model=rollout_model, out=tmp_path / "run") | settings
    code, _, err = go(**small(home, **settings))
    assert code == 0, err
    row = loop.read_lines(tmp_path / "run" / "log.jsonl")[1]
    assert 0 < row["sampled_tokens"] <= 1.1 * row["budget_tokens"]
    assert (row["rollout_tokens"] > 0) == ("rollouts" in settings)


def test_questions_are_written_as_lines(home, tmp_path):
    """Whatever a step is, a made-up question is one line; another stage writes other ones."""
    lab = loop.Lab(loop.Settings(**small(home, unit="3", out=str(tmp_path / "run"))))
    write = lambda stage: [text for text, _ in loop.continuations(
        lab, [lab.tokenizer.encode("3")] * 40, 1.0, lambda line: True, stage)]
    texts = write(0)
    assert all("\n" not in text[:-1] for text in texts) and max(map(len, texts)) > 3
    assert texts == write(0) != write(1) and lab.sampler.finished == lab.task.over


def test_files_of_questions(home, tmp_path):
    """Open weights, real questions and reference solutions: a run of each kind of recipe. AlphaLLM
    refuses letters, and leaves no folder."""
    numbers, letters = tmp_path / "numbers", tmp_path / "letters"
    loop.write_lines(numbers, [dict(question=f"{i}+1?", answer=f"#### {i + 1}") for i in range(9)])
    choices = dict(text=["yes", "no"], label=["A", "B"])
    loop.write_lines(letters, [dict(question="1?", answerKey="A", choices=choices)])
    for file, recipe, wanted in (
            (numbers, "sft", 0), (numbers, "alphallm", 0), (letters, "mcts_dpo", 0),
            (letters, "combined", 0), (letters, "alphallm", 2)):
        out = tmp_path / f"{file.name}_{recipe}"
        files = dict(data=file, eval_data=file, sft_data=file, template="{question}:", out=out)
        code, _, err = go(**small(home, recipe=recipe, rounds=1, questions=4, **files))
        assert code == wanted and out.exists() == (wanted == 0), err


# -- resuming --------------------------------------------------------------------------------------
def start_child(settings):
    """A forked process that runs loop.main; its exit code is main's."""
    child = os.fork()
    if child == 0:
        os._exit(go(**settings)[0])
    return child


def kill_and_resume(settings):
    """Kill a run with SIGKILL at growing times until it comes to its end: the number of kills."""
    wait, kills = 0.03, 0
    while True:
        child = start_child(settings)
        over, done, status = time.monotonic() + wait, 0, 0
        while time.monotonic() < over and not done:
            time.sleep(0.005)
            done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return kills if status == 0 else -1
        os.kill(child, 9)
        os.waitpid(child, 0)
        wait, kills = 1.5 * wait, kills + 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_and_doubled_runs(home, run_of, tmp_path):
    """Killed at least three times, or started twice at once: the bytes of a run that was left
    alone, its base included."""
    program = """if True:
        import json, os, sys
        sys.path[:0] = sys.argv[1:3]
        import test_loop as t, torch._dynamo        # else each child imports it in its training
        killed, doubled = map(json.loads, sys.argv[3:])
        children = [t.start_child(doubled) for _ in range(2)]
        codes = [os.waitpid(child, 0)[1] for child in children]
        print(json.dumps([t.kill_and_resume(killed), codes]))
        """
    folders = [tmp_path / name / "run" for name in ("killed", "doubled")]
    settings = [json.dumps(small(home, recipe="self_explore", out=str(path))) for path in folders]
    done = subprocess.run([sys.executable, "-c", program, ROOT, ROOT / "tests", *settings],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    kills, codes = json.loads(done.stdout)
    assert kills >= 3 and codes == [0, 0]
    alone = contents(run_of("self_explore"))
    for folder in folders:
        assert contents(folder) == alone
        base = next(folder.parent.glob("base_*[0-9a-f]/model.safetensors"))
        assert base.read_bytes() == alone["round_0/model.safetensors"]


def test_nothing_to_tell(tmp_path):
    """A recipe may return no notes; an empty file is damaged."""
    first = lambda path: loop.read_lines(path)[0]
    assert loop.cached(tmp_path / "notes", lambda: [{}], load=first) == {}
    with pytest.raises(loop.BadInput, match="it is empty"):
        loop.cached(tmp_path / "trees", lambda: [])


def test_another_run_is_faster(tmp_path):
    """Two runs in one folder: of the slower one the parts of an evaluation may vanish while it
    works on them, and it may be evaluating still while the other one writes its report."""
    path = tmp_path / "eval_1.jsonl"

    def make():
        loop.write_lines(path, ["theirs"])
        return loop.read_lines(tmp_path / "eval_1" / "000000.jsonl")    # which they have removed
    assert loop.cached(path, make) == ["theirs"] and os.listdir(tmp_path) == [path.name]
    path.unlink()

    def slow():
        """Another run, with other settings perhaps, finishes the file first: its file stays."""
        loop.write_lines(path, ["theirs"])
        return ["ours"]
    assert loop.cached(path, slow) == ["theirs"] and os.listdir(tmp_path) == [path.name]
    loop.write_lines(tmp_path / "eval_1" / "000000.jsonl", [dict(right=True)])
    assert loop.first_trees(tmp_path) == []


def test_a_shortened_evaluation(tmp_path):
    """Lines that are missing at its end would give another accuracy: the file is refused."""
    row = dict(solution="", why="eos", right=True, tokens=1, sound=None)
    loop.write_lines(tmp_path / "eval_1.jsonl", [row] * 3)
    assert loop.read_solutions(tmp_path / "eval_1.jsonl", 3) == [row] * 3
    with pytest.raises(ValueError, match="3 lines, not 4"):
        loop.read_solutions(tmp_path / "eval_1.jsonl", 4)


class Stop(BaseException):
    """What the next test raises inside a run."""


@pytest.mark.parametrize("recipe", ["alphallm", "mcts_dpo"])
def test_stopped_at_every_stage(recipe, home, run_of, tmp_path, monkeypatch):
    """A run that is stopped before and after every result is saved ends in the same bytes."""
    real, stops, code, alone = loop.cached, 0, None, contents(run_of(recipe))

    def stopping(path, make, *how, **more):
        """loop.cached with a stop: before the result is saved if `stops` is even, else after."""
        fresh = not path.exists()

        def stopped():
            result = make()
            if stops % 2 == 0:
                raise Stop
            return result
        found = real(path, stopped, *how, **more)
        if fresh:
            raise Stop
        return found
    monkeypatch.setattr(loop, "cached", stopping)
    while code is None:
        try:
            code = go(**small(home, recipe=recipe, out=tmp_path / "run"))[0]
        except Stop:
            stops += 1
    assert stops >= 2 * 8 and contents(tmp_path / "run") == alone


@pytest.mark.parametrize("name, key", [
    ("log.jsonl", "sound"), ("round_2/training.json", ""), ("round_2/model.safetensors", ""),
    ("trees_1/000000.jsonl", ""), ("settings.json", ""), ("eval_1.jsonl", ""),
    ("eval_1.jsonl", "right"), ("trees_1/000000.jsonl", "step_texts"),
    ("trees_1/000000.jsonl", "seed"), ("log.jsonl", "questions"),
    ("round_2/training.json", "steps"),
    ("questions_1.jsonl", "tokens"), ("critic_1.safetensors", "report"),
    ("critic_1.safetensors", "mean")])
def test_a_damaged_file_of_a_run(name, key, run_of, home, tmp_path):
    """Its end is missing, or a key: one sentence that says what to move away, and that mends it."""
    whole, folder, file = run_of("alphallm"), tmp_path / "run", tmp_path / "run" / name
    shutil.copytree(whole, folder)
    raw = file.read_bytes()
    damaged = raw.replace(f'"{key}'.encode(), f'"{key[:-1]}_'.encode()) if key else raw[:-2]
    file.write_bytes(damaged)
    if name.startswith(("eval", "questions", "critic")):    # while their round is not logged
        (folder / "log.jsonl").unlink()
    command = small(home, recipe="alphallm", out=folder)
    code, _, err = go(**command)
    path = Path(re.search("move (.*) away", err)[1])
    assert code == 2 and err.count("\n") == 1 and path in (file, file.parent) and path != folder
    loop.remove(path)
    (folder / "log.jsonl").unlink(missing_ok=True)
    assert go(**command)[0] == 0 and contents(folder) == contents(whole)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
@pytest.mark.parametrize("recipe, dies", (("self_explore", False), ("alphallm", True)))
def test_workers_make_the_same_files(recipe, dies, home, tmp_path, monkeypatch):
    """Two processes write the bytes of one, also if each of them fails at its second file."""
    parent, cached, done = os.getpid(), loop.cached, []

    def make_one(path, *rest, **how):
        if dies and os.getpid() != parent and path.suffix == ".jsonl" and len(done) > 0:
            raise RuntimeError("killed")
        done.append(path)
        return cached(path, *rest, **how)
    monkeypatch.setattr(loop, "cached", make_one)
    monkeypatch.setattr(loop, "EVALUATED_AT_ONCE", 3)
    settings = small(home, recipe=recipe, out=tmp_path / "run", chunk=3)
    one = small(home, recipe=recipe, out=tmp_path / "one", chunk=3)
    assert go(**one | dict(workers=1))[0] == 0
    assert go(**settings | dict(workers=2))[0] == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "one")


def test_threads_train_the_same_base(tmp_path):
    """Two threads share an update of the tiny GPT and write the bytes of one."""
    for threads in (1, 2):
        sizes = dict(preset="smoke", base_steps=3, rounds=0, eval_questions=2, threads=threads)
        assert go(**sizes, out=tmp_path / str(threads) / "run")[0] == 0
    one, two = (contents(base) for base in sorted(tmp_path.glob("*/base_*")))
    assert one == two and "model.safetensors" in one


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_no_worker_outlives_the_run(home, tmp_path, monkeypatch):
    """Ctrl-C while two processes sample: one line, and both have ended."""
    def stopped(seconds):
        raise KeyboardInterrupt
    monkeypatch.setattr(loop.time, "sleep", stopped)
    settings = small(home, recipe="rft", out=tmp_path / "run", chunk=4, workers=2)
    code, _, err = go(**settings | dict(questions=400))
    assert code == 130 and err.strip().count("\n") == 0
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_called_again(home, run_of, tmp_path):
    """A finished run goes on with more --rounds, to the end of a run of two rounds. Other settings
    and changed files are refused and change nothing; another spelling of a path is no change. After
    an edit of the code the same command says that finished files are used."""
    run = small(home, recipe="rft", out=tmp_path / "run")
    assert go(**run | dict(rounds=1))[0] == 0
    first = contents(tmp_path / "run")
    assert go(**run)[0] == 0
    both = contents(tmp_path / "run")
    assert both == contents(run_of("rft")) and both["log.jsonl"][:2] == first.pop("log.jsonl")
    assert first.items() <= both.items()
    for other in (dict(steps=5), dict(seed=1), dict(recipe="sft"), dict(max_tokens=17)):
        code, _, err = go(**run | other)
        assert code == 2 and "--" + [*other][0].replace("_", "-") in err
    code, out, _ = go(**run | dict(model=f"{home / 'm'}/"))
    assert code == 0 and contents(tmp_path / "run") == both and "the code has changed" not in out
    path = tmp_path / "run" / "settings.json"
    saved = loop.read_lines(path)[0]
    loop.write_lines(path, [saved | dict(code=["", *saved["code"][1:]])])   # as by another model.py
    assert "the code has changed" in go(**run)[1]
    data = tmp_path / "q.jsonl"
    for number, code in ((2, 0), (3, 2)):
        loop.write_lines(data, [dict(question=f"1+{number}", answer=f"#### {number}")])
        files = dict(data=data, eval_data=data, rounds=0, out=tmp_path / "files")
        assert go(**run | files)[0] == code


# -- AlphaLLM, votes, distinct solutions -----------------------------------------------------------
def test_what_the_outcome_head_trusts_is_kept(home, tmp_path, monkeypatch):
    """Searched trees have no grades. A tree's chosen path is kept just if the outcome head, asked
    again, says at least loop.KEEP. Kept paths are imitated, and nothing else."""
    monkeypatch.setattr(critic, "LEAST_AUC", 0.0)          # every head is trusted
    settings = small(home, recipe="alphallm", rounds=1, questions=16, out=str(tmp_path / "run"))
    assert go(**settings)[0] == 0
    lab = loop.Lab(loop.Settings(**settings))
    lab.load(tmp_path / "run" / "round_0")
    loop.train_critics(lab, "critic_1", [])
    searched, kept = loop.forests_so_far(lab, 1, "imagined"), 0
    assert all(node.right is None for tree in searched for node in tree.nodes)
    loop.encode_again(searched, lab.sampler)
    for tree in searched:
        end = loop.trusted_end(lab, tree)
        said = lab.critic.read([end], lab.sampler)[0, critic.HEADS.index("outcome")] if end else 0
        assert tree.chosen == (end.path() if said >= loop.KEEP else [])
        kept += bool(tree.chosen)
    assert 0 < kept == loop.read_lines(tmp_path / "run" / "log.jsonl")[1]["kept"] < len(searched)
    monkeypatch.setattr(loop, "fit", lambda lab, rows, *_: rows)
    rows = loop.learn_trusted(lab, 1, [])
    paths = [[node.index for node in tree.chosen] for tree in searched if tree.chosen]
    assert [[node.index for node in row.packed.span] for row in rows] == paths
    assert all(len(row.imitate) == 1 and not row.pairs for row in rows)


def test_mcts_dpo_imitates_no_solution(home, tmp_path, monkeypatch):
    """Each of its rows holds pairs and nothing else."""
    settings = small(home, recipe="mcts_dpo", rounds=1, budget=300, out=str(tmp_path / "run"))
    assert go(**settings)[0] == 0
    lab = loop.Lab(loop.Settings(**settings))
    monkeypatch.setattr(loop, "fit", fit := Mock(return_value={}))
    loop.learn_siblings(lab, 1, loop.forests_so_far(lab, 1, "trees"))
    rows = fit.call_args.args[1]
    assert rows and all(row.pairs and not len(row.imitate) for row in rows)


@pytest.mark.parametrize("model, passes", [("folder", 2), ("", 4)])
def test_real_weights_imitate_at_most_so_often(model, passes, monkeypatch):
    """3 rows, 2 epochs, 6 updates of 2 rows: real weights see a row twice, the tiny GPT 4 times."""
    lab = SimpleNamespace(settings=loop.Settings(model=model, epochs=2, batch=2), sft_lr=1.0,
                          train=lambda plan, *_, **__: dict(plan=plan), folder=Path())
    monkeypatch.setattr(loop, "tree_row", lambda solutions: solutions)
    notes = loop.imitate(lab, "abc", lambda tree: tree, 6)
    plan = notes["plan"]
    assert notes["passes"] == passes and len(plan) == 6
    assert Counter(chain(*plan)) == dict.fromkeys("abc", passes)


@pytest.mark.parametrize("even, called", [(0.5, "imitates"), (0.6, "prefers")])
def test_combined_asks_the_first_round(even, called, monkeypatch):
    """In every round the evenness of the first round's trees decides."""
    monkeypatch.setattr(loop, "forests_so_far", lambda lab, r, *kinds: [f"trees of {r}"])
    monkeypatch.setattr(loop, "evenness", lambda trees: even * (trees == ["trees of 1"]))
    monkeypatch.setattr(loop, "learn_right_solutions", lambda *_: dict(it="imitates"))
    monkeypatch.setattr(loop, "prefer", lambda *_: dict(it="prefers"))
    lab = SimpleNamespace(settings=loop.Settings())
    assert loop.learn_what_helps(lab, 3, []) == dict(evenness=even, it=called)


End = namedtuple("End", "text score visits value_sum ended", defaults=(1, 0.5, "eos"))


def test_votes_count_values():
    """18, 18.0 and $18.00 are one answer. Ends without an answer and cut ends are in no group. A
    search stands for an answer with half of the visits, and for its end of highest score."""
    task = loop.Homework(loop.Settings(classes=0), Tokenizer.bytes_only())
    lab = SimpleNamespace(task=task, text=lambda end: end.text)
    said = zip(["#### 18", "#### 7", "#### $18.00", "well", "#### 18.0", "#### 5"],
               [.1, .3, .2, .9, .15, .4])
    ends = [End(*pair) for pair in said] + [End("#### 7", .9, 9, 9, "length")]
    groups = loop.by_answer(lab, ends)
    assert groups == [[ends[0], ends[2], ends[4]], [ends[1]], [ends[5]]]
    scores = {end: end.score for end in ends}
    for method, winner in (("majority", 0), ("best of n", 5), ("weighted vote", 2)):
        assert loop.vote(groups, scores, method) is ends[winner]
    assert loop.vote([], scores, "majority") is None
    found = lambda *some: loop.trusted_end(lab, SimpleNamespace(ends=lambda: list(some)))
    assert found(*ends) is ends[2] and found(ends[3], ends[6]) is None
    assert found(End("#### 1", .5), End("#### 2", .4), End("#### 3", .4)) is None
    assert found(End("#### 1", .5, 5, 2.5), End("#### 2", .9, 2, 1.8)).text == "#### 1"
    assert found(End("#### 1", .9, 0, 0), ends[3]) is None              # no simulation ended there


def test_right_solutions_differ_in_calculations():
    """All operands and results count; words, $, commas and spelling do not. None is cut."""
    groups = [["So 2 + 3 + 4 = $9 in all", "2+3+4=9"], ["3 x 4 = 12", "3 \u00d7 4 = 12", "3*4=12"],
              ["That is $1,200 / 4 = $300.", "1200/4=300"], ["So (2+3)*4=20.", "(2 + 3) * 4 = 20"],
              ["2+3+5=10"], ["2+3+4=10"], ["3+2=5"], ["12-9=3 : 10 3"], ["12-9=3 : 3 10"],
              ["5% of 40 = 2 so"], ["10% of 40 = 2 so"], ["Then x + 3 = 7"], ["Then x - 3 = 7"],
              [r"So $3 \times 5 = 15$", "So 3 \u00b7 5 = 15"], [r"So $1 \times 5 = 15$"],
              ["so 10\u22123=7 are left", "10-3=7"], ["so 12\u22123=7 are left"],
              ["3 and 1/2 * 2 = 7"], ["4 and 1/2 * 2 = 7"],
              ["So 3 boxes * 6 pens/box = 18 pens", "3*6 = 18"], ["9 boxes * 2 pens/box = 18 pens"],
              ["8 apples - 4 apples = 4 apples"], ["It is $8 for Tom - $4 for Ann = $5"],
              ["Tom = 5"], ["Ann = 5"]]
    keys = [{loop.calculations(text) for text in group} for group in groups]
    assert [len(group) for group in keys] == [1] * 25 and len(set.union(*keys)) == 25
    ending = "\nThat is all.\n#### 18"          # a line with units counts among others, too
    assert len({loop.calculations(group[0] + ending) for group in groups[19:21]}) == 2
    tree = Tree(None, 0, [1])
    for i, text in enumerate(["So 2+3=5", "We get 2 + 3 = $5", "3+2=5", "2+2=4", "1+4=5"]):
        end = tree.add(tree.root, [i], [-1.0], NOTHING, "length" if i == 4 else "eos")
        end.text, end.right = text, i != 3
    found = loop.right_solutions(SimpleNamespace(text=lambda end: end.text), tree)
    assert [end.text for end in found] == ["So 2+3=5", "3+2=5"]


# -- comparing, evaluating, decoding ---------------------------------------------------------------
def table(out):
    """The rows of a printed table, without its head."""
    lines = [line.strip("| ").split(" | ") for line in out.split("\n") if line[:2] == "| "]
    return {line[0]: line[1:] for line in lines[1:]}


def test_report_by_hand():
    """The shares of a round's held-out solutions."""
    settings = loop.Settings(classes=0)
    lab = SimpleNamespace(settings=settings, task=loop.Homework(settings, None), sampled_tokens=0,
                          rollout_tokens=0)
    rows = [("1*4=4 : 7+4-2\n#### 9", True, True, "eos"), ("#### 9", True, False, "eos"),
            ("so 9", True, False, "eos"), ("#### 8", False, False, "eos"),
            ("no end", False, False, "length")]
    solved = [dict(solution=solution, right=right, sound=sound, why=why, tokens=len(solution))
              for solution, right, sound, why in rows]
    row = loop.report(lab, 1, solved, [], {}, [0, 1, 3, 6])
    assert (row["accuracy"], row["strict"], row["sound"]) == (0.6, 0.4, 0.2)
    assert row["by_luck"] == pytest.approx(2 / 3)
    assert (row["no_answer"], row["never_ends"], row["mean_tokens"]) == (0.4, 0.2, 8.4)
    assert [row[f"{stage}_seconds"] for stage in ("grow", "learn", "eval")] == [1, 2, 3]


def test_report_of_trees(run_of):
    """Solved questions, right samples and different answers, by hand from the trees' files."""
    row, forest = loop.read_lines(run_of("rft") / "log.jsonl")[1], trees(run_of("rft"), "trees_1")
    roots = [tree["nodes"][0] for tree in forest]
    rights = sum(root["rights"] for root in roots)
    samples = rights + sum(root["wrongs"] for root in roots)
    assert row["solved"] == statistics.mean(root["rights"] > 0 for root in roots)
    assert row["sampled_accuracy"] == rights / samples and 0 < rights < samples
    answers = [{text.rpartition("=")[2] for node, text in zip(tree["nodes"], tree["step_texts"])
                if node["end"] not in ("", "length")} for tree in forest]
    assert row["answers"] == statistics.mean(map(len, answers)) > 1


def test_compare(home, tmp_path, monkeypatch):
    """Means, differences, t interval over seeds and each seed, worked out by hand from the files of
    the runs. One seed: an exact McNemar test on its questions."""
    def random_grades(lab, questions, r):
        rng = random.Random(f"{lab.settings.recipe} {lab.settings.seed}")
        row = lambda: dict(right=rng.random() < 0.6, sound=rng.random() < 0.5, why="eos", tokens=1,
                           solution="")
        make = lambda: [row() for _ in questions]
        return loop.cached(lab.folder / f"eval_{r}.jsonl", make)
    monkeypatch.setattr(loop, "solve_greedily", random_grades)
    monkeypatch.setattr(loop, "show_example", lambda *arguments: None)
    names = ("sft", "self_explore")
    settings = small(home, rounds=1, steps=2, questions=2, eval_questions=40, out=tmp_path)
    assert go(**settings, compare="sft,self_explore", seeds=3)[0] == 0
    found = table(go(**settings, compare="sft,self_explore", seeds=3)[1])
    one = table(go(**settings, compare="sft,self_explore", seeds=1)[1])["self_explore"]
    # four cells for accuracy, four for the share of sound and right solutions
    for cells, counts in (slice(0, 4), lambda row: row["right"]), \
                         (slice(4, 8), lambda row: row["right"] and row["sound"]):
        hits = {name: [[*map(counts, loop.read_lines(file))] for file in
                       sorted(tmp_path.glob(f"{name}_seed*/eval_1.jsonl"))] for name in names}
        each = {name: [100 * statistics.mean(seed) for seed in hits[name]] for name in names}
        gains = [ours - theirs for ours, theirs in zip(each["self_explore"], each["sft"])]
        gain, half = statistics.mean(gains), 4.30265 * statistics.stdev(gains) / math.sqrt(3)
        for name in names:
            values = " ".join(f"{value:.1f}" for value in each[name])
            assert found[name][cells][::3] == [f"{statistics.mean(each[name]):.1f}", values]
        interval = f"{gain - half:+.1f} to {gain + half:+.1f}"
        assert found["self_explore"][cells][1:3] == [f"{gain:+.1f}", interval]
        p = critic.mcnemar(hits["self_explore"][0], hits["sft"][0])
        assert one[cells][2:] == [f"McNemar p = {p:.2g}", f"{each['self_explore'][0]:.1f}"]
        last = table(go(**settings, compare="sft,self_explore", seed=2, seeds=1)[1])["self_explore"]
        assert last[cells][3] == f"{each['self_explore'][2]:.1f}"
    for name in names:                                      # what the rounds cost
        logs = [loop.read_lines(file) for file in sorted(tmp_path.glob(f"{name}_seed*/log.jsonl"))]
        sampled, last, rft, seconds = (
            statistics.mean(log[1].get(key, 0) for log in logs)
            for key in ("sampled_tokens", "trained_tokens", "rft_tokens", "seconds"))
        gain = 100 * statistics.mean(log[1]["accuracy"] - log[0]["accuracy"] for log in logs)
        *costs, point = found[name][8:]
        assert costs == [f"{sampled:,.0f}", f"{last + rft:,.0f}", f"{seconds / 60:.1f}"]
        assert (rft > 0) == (name == "self_explore")
        assert point == (f"{sampled / gain:,.0f}" if gain > 0 else "-")
    # the run of another seed that was begun with other settings is refused before any run begins
    code, out, err = go(**settings | dict(steps=1), compare="self_explore,sft", seed=2, seeds=2)
    assert code == 2 and "--steps was 2" in err and "seed" not in out


def test_weights_that_do_not_know_such_texts(home):
    """To the toy policy its prompts, plain numbers, are noise. It knows its solutions: the chances
    of ?+, a newline, = and 0 are 1/2, 1, 1/2 and 3/4, a mean of .42 nats."""
    assert "warning: " in go(**small(home, evaluate=home / "m"))[2]
    lab = loop.Lab(loop.Settings(task="coins", model=str(home / "m")))
    lab.task.prompt_ids = lambda question: lab.tokenizer.encode("?+\n=0")
    assert lab.likelihood_of_prompts() == "prompts: 0.4 nats a token (random weights: 5.5)"


def test_evaluate_and_decode(home, run_of, monkeypatch):
    """--evaluate gives the run's own accuracy of that round. --decode prints one row a method: the
    votes choose among the same samples, the search spends no more tokens; greedy is the run's."""
    folder = run_of("rft")
    code, out, _ = go(**small(home, evaluate=folder / "round_2"))
    said, row = json.loads(out), loop.read_lines(folder / "log.jsonl")[2]
    keys = ("accuracy", "accuracy_low", "accuracy_high", "questions", "mean_tokens")
    assert code == 0 and all(said[key] == row[key] for key in keys)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "check", lambda s: print("a note"))
        code, out, err = go(**small(home, evaluate=folder / "round_2"))
    assert json.loads(out).keys() == said.keys() and err.startswith("a note\n")
    settings = small(home, recipe="rft", out=folder)
    monkeypatch.setattr(Coins, "sound", lambda self, question, text: int(question.text) % 2 == 1)
    code, out, _ = go(**settings, decode=1)
    assert code == 0 and go(**settings, decode=1)[1] == out and go(**settings, decode=7)[0] == 2
    assert [*table(out)] == ["greedy", "majority", "best of n", "weighted vote", "MCTS"]
    solved = loop.read_lines(folder / "eval_1.jsonl")[:300]
    right = [row for row in solved if row["right"]]
    counts = len(right), sum(int(row["text"]) % 2 for row in right)
    greedy = [f"{100 * count / len(solved):.1f}" for count in counts]
    assert table(out)["greedy"][1::2] == greedy and counts[0] > counts[1] > 0
    spent = [float(cells[0].replace(",", "")) for cells in table(out).values()]
    assert 0 < spent[0] < spent[1] == spent[2] == spent[3] and 0 < spent[4] <= 1.1 * spent[1]
    code, _, err = go(**settings | dict(decode=1, traps=1))
    assert code == 2 and "--traps was 0" in err, err        # another task than the run's
    code, _, err = go(**small(home, evaluate=folder / "round_2", classes=7))
    assert code == 2 and "--classes was 2" in err, err      # the model answers in another form


# -- the command line, files, source ---------------------------------------------------------------
GOOD = '{"question": "1+1", "answer": "#### 2"}\n'
FILES = "--model m --data {} --eval-data {}"


@pytest.mark.parametrize("words, flags", [
    ("--recipe rft", "rft"), ("--recipe", "--recipe ppo"), ("--task", "--task chess"),
    ("--round", "--round 3"), ("--steps", "--steps many"), ("--questions", "--questions 0"),
    ("--share", "--share 2"), ("nowhere", "--model nowhere"), ("cuda", "--device cuda"),
    ("--eval-data", "--data good --model m"), ("none.jsonl", FILES.format("none.jsonl", "good")),
    ("damaged, line 1", FILES.format("damaged", "good")), ("empty", FILES.format("good", "empty")),
    ("{question}", FILES.format("good", "good") + " --template Q:"), ("--decode", "--decode 1"),
    ("single", FILES.format("good", "good") + " --template {{question}}"),
    ("xyz", "--compare rft,xyz"), ("nowhere", "--evaluate nowhere"), ("once", "--compare rft,rft"),
    ("nobody", "--recipe alphallm --rollouts 1 --rollout-model nobody"),
    ("1,024", f"--threads {10 ** 10}"), ("1,000,000,000,000.", f"--seed {10 ** 20}"),
    ("from 1 to 1,000,000.", f"--questions {10 ** 10}"),
    ("from 0 to 2", "--traps 3"), ("--classes 1", "--classes 1"), ("--compare", "--seeds 2"),
    ("from 0.01 to", "--temperature 0"), ("from 0.001 to", "--beta 0"),
    ("the judge works alone", "--recipe alphallm --rollouts 1 --critic judge"),
    ("another encoding", FILES.format("latin", "good")),
    ("make up", FILES.format("letters", "letters") + " --questions 1 --compare rft,alphallm"),
    ("ask for fewer", "--task coins --questions 9999"), ("--rollouts", "--rollout-model m"),
    ("--eval-data", "--template {question}"),
    ("--seeds", "--compare rft --seeds 0"), ("--out", "--questions 2")])
def test_bad_input_is_one_sentence(words, flags, home, tmp_path, monkeypatch):
    """Exit code 2, one line that names what is wrong, and no run folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").symlink_to(home / "m")
    letters = json.dumps(dict(question="1?", correct_answer="a", support="") |
                         {f"distractor{i}": str(i) for i in (1, 2, 3)})
    for name, text in dict(good=GOOD, damaged=GOOD[:-2] + "\n", empty="", letters=letters).items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin").write_text(GOOD.replace("1+1", "\xe9?"), encoding="latin-1")
    out = "good" if words == "--out" else "runs/a"          # a file is no folder
    sizes = dict(preset="smoke", threads=1, base_steps=1, rounds=0, out=out)
    code, _, err = go(*(f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()),
                      *flags.split())
    assert code == 2 and words in err and "Traceback" not in err, err
    assert not (tmp_path / "runs").exists() and err.strip().count("\n") == 0, err
    assert ".tmp" not in err


def test_interrupt_is_one_line(home, tmp_path, monkeypatch):
    """Ctrl-C during training: exit code 130, and one line without a traceback."""
    monkeypatch.setattr(loop, "train", Mock(side_effect=KeyboardInterrupt))
    code, _, err = go(**small(home, out=tmp_path / "run"))
    assert code == 130 and err.strip().count("\n") == 0 and "Traceback" not in err


@pytest.mark.parametrize("error, code", [
    (MemoryError(), 2), (torch.OutOfMemoryError("CUDA out of memory."), 2), (RuntimeError("x"), 0),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 2)])
def test_out_of_memory(error, code, monkeypatch):
    """On a CPU and on a GPU: a sentence that names the flag. Any other error stays what it is."""
    monkeypatch.setattr(loop, "run", Mock(side_effect=error))
    with contextlib.nullcontext() if code else pytest.raises(RuntimeError, match="x"):
        found, _, err = go()
        assert found == code and "--rows" in err and err.count("\n") == 1


def test_flags_are_settings():
    """At most 46 flags, each with help: the fields of Settings, and four more."""
    actions = [action for action in loop.flags()._actions if action.dest != "help"]
    extra = {"evaluate", "decode", "compare", "seeds"}
    assert len(actions) <= 46 and all(action.help for action in actions) and go("--help")[0] == 0
    assert {action.dest for action in actions} - extra == {f.name for f in fields(loop.Settings)}


def test_lines_are_read_back(tmp_path):
    """The identity for every code point: half characters, U+2028 and U+0085, too."""
    order = range(0x10ffff, -1, -1)             # downwards: two halves never make one character
    items = [dict(text="".join(map(chr, order[i:i + 4096]))) for i in range(0, len(order), 4096)]
    loop.write_lines(tmp_path / "a", items)
    assert loop.read_lines(tmp_path / "a") == items
    line = '{"a": "1\u2028 2\u2029 3\x85"}\n\n'
    (tmp_path / "b").write_text(line, encoding="utf-8")
    assert loop.read_lines(tmp_path / "b") == [dict(a="1\u2028 2\u2029 3\x85")]


def test_imports_run_one_way():
    """model <- mcts <- critic <- dpo <- loop, and only the packages of requirements.txt."""
    names, packages = "model mcts critic dpo loop".split(), "torch numpy tiktoken regex tqdm"
    for i, name in enumerate(names):
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))):
            used = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            used += [node.module] if isinstance(node, ast.ImportFrom) else []
            for package in {module.split(".")[0] for module in used} - {*names[:i]}:
                assert package in [*packages.split(), *sys.stdlib_module_names], (name, package)


def test_no_code_asks_for_a_name():
    """loop.py compares nothing with the name of a recipe or of a task."""
    names = "|".join([*loop.RECIPES, "homework", "countdown"])
    asked = rf"""(==|!=|\bin\b)[ ([{{]*["']({names})["']|["']({names})["']\)? *(==|!=|in\b)"""
    source = (ROOT / "loop.py").read_text(encoding="utf-8")
    assert not re.search(asked + r"|\b(recipe|task) *(==|!=)|isinstance\([^)]*task", source)


def test_interrupted_while_a_process_starts():
    """The interrupt waits until the process is in the list, from which it can be killed."""
    child = SimpleNamespace(start=lambda: os.kill(os.getpid(), signal.SIGINT))
    children, before = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        loop.start(child, children)
    assert children == [child] and signal.getsignal(signal.SIGINT) is before
