"""
The loop: a language model that improves itself on questions whose final answers can be checked.

    weights --> grow trees of solutions --> learn from them --> evaluate --> weights, next round

Without any flag a tiny GPT is trained from scratch on arithmetic homework and then improved by
three rounds of Self-Explore, in minutes on two CPU cores. With --model and --data the same loop
runs on open weights and real questions. Every recipe gets the same base, questions, and limits on
optimiser updates and *sampled tokens*.

Four choices hold the file together:
1. A recipe is two functions: how its trees grow, and what is learnt from them. Each reads like the
   algorithm box of its paper. No other code asks for a recipe's name.
2. Every stage is a function whose result is a file. `cached` calls the function only if the file is
   not there. A run can be killed at any moment, and the same command goes on where it stopped.
3. Random numbers come from the seed and, for questions and samples, from stage and place; never
   from what ran before. So a resumed run has the samples and weights of one that was left alone.
4. Trees are held to the budget of sampled tokens by one function, mcts.tokens_left.

Chapters: 1 The loop   2 Settings   3 Recipes   4 Growing   5 Learning   6 The lab   7 Tasks
          8 Evaluating, comparing, decoding   9 Pictures   10 Command line

Try:  python loop.py                             Self-Explore on homework, minutes
      python loop.py --preset smoke              all stages in seconds; it learns little
      python loop.py --recipe alphallm           or rft, outcome_dpo, mcts_dpo, combined, sft
      python loop.py --compare rft,self_explore  both on three seeds: difference and interval
      python loop.py --classes 0                 homework that is graded by its number
"""
import signal

if __name__ == "__main__":              # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import glob
import hashlib
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from html import escape
from itertools import permutations
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import critic
from critic import canonical, find_answer, grade
from dpo import (DPO_LR, SFT_LR, batches, complete_right_paths, evenness, outcome_pairs, pit_pairs,
                 pits_of, preference_loss, rate_pairs, scaled_lr, sft_loss, sibling_pairs,
                 store_reference, target_logps, text_row, train, tree_row)
from mcts import (NOTHING, RULES, StepSampler, Tree, commit_every, draw, fixed_width, from_json,
                  grow, importance_width, page, printable, record_grade, search, to_json,
                  tokens_left, until)
from model import (GPT, BadInput, Flags, GPTConfig, Request, Sampler, Tokenizer, about, field, mix,
                   need, pick_device, read_json, read_safetensors, start_console, with_newlines,
                   write_safetensors, write_text)


# --------------------------------------------------------------------------------------------------
# 1. The loop
# --------------------------------------------------------------------------------------------------
def run(s: "Settings") -> list:
    """All rounds of one recipe; round 0 is the base. Returns the log: one dict for each round."""
    lab = Lab(s)
    lab.claim_folder()
    print(lab.description(), flush=True)
    log = lab.finished_rounds()
    for r in range(len(log), s.rounds + 1):
        recipe = RECIPES[s.recipe] if r > 0 else BASE
        clock = [time.time()]
        lab.sampled_tokens = lab.rollout_tokens = 0

        # 1) grow: trees of this round's questions (round 1 of some recipes imitates first)
        questions = lab.task.train_questions(r)
        trees, notes = recipe.grow(lab, r, questions)
        clock.append(time.time())

        # 2) learn: train the model in place on what the method reads off the trees
        notes |= lab.train_or_load(f"round_{r}", lambda: recipe.learn(lab, r, trees))
        clock.append(time.time())

        # 3) evaluate: one greedy solution of every held-out question
        solutions = solve_greedily(lab, lab.task.eval_questions(), r)
        clock.append(time.time())

        log.append(report(lab, r, solutions, trees, notes, clock))
        write_lines(lab.folder / "log.jsonl", log)
        print(summary_line(log[-1]), flush=True)
    show_example(lab, log)
    write_text(lab.folder / "report.html", report_page(lab.folder, lab.task))
    return log


def cached(path: Path, make, save=None, load=None):
    """The result of make(), kept in a file or folder that appears whole or not at all.

    This is how a run resumes: a file that exists is read, and a missing one is made. A new result
    is also read back from the disk, so that an uninterrupted run continues from the same numbers
    as a resumed one. Two runs in one folder do no harm: each writes under a temporary name with its
    process id, and the first file stays. (Inside a training dpo.train saves a state of its own.)"""
    if not path.exists():
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            (save or write_lines)(temporary, make())
            if not path.exists():               # else another run was first: its file stays
                os.replace(temporary, path)
        except (OSError, BadInput):             # fine if another run has finished it meanwhile
            if not path.exists():
                raise
        finally:
            remove(temporary)
    return restored(path, load or read_lines)


def restored(path: Path, load):
    """load(path). BadInput if a file of a run does not hold what the run wrote there."""
    try:
        content = load(path)
        need(content != [], "it is empty")
        return content
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        named = isinstance(error, BadInput)     # it names the file already
        said = str(error) if named else f"{path} is damaged, or its reader fails ({error!r})"
        # a round in the log is not run again: so log.jsonl must go, too
        raise BadInput(f"{said}; move {path} away (and log.jsonl, if its round is finished), and "
                       "the same command makes it again.") from error


def write_lines(path: Path, items: list) -> None:
    """Write JSON lines, in ASCII: any sampled text, even half a character, is read back exactly."""
    write_text(path, "".join(json.dumps(item) + "\n" for item in items))


def read_lines(path: Path, text=None) -> list:
    """Read JSON lines, of a file or of its text. BadInput names file and line that is no JSON."""
    with about(path):
        text = Path(path).read_text(encoding="utf-8-sig") if text is None else text
    # split at "\n" alone: str.splitlines also splits at U+2028, which may stand in a JSON string
    return [read_json(f"{path}, line {number}", line.encode(), kind=object)
            for number, line in enumerate(text.split("\n"), 1) if line.strip()]


# --------------------------------------------------------------------------------------------------
# 2. Settings: each is a flag, --name value, and needs a comment beside it: the help of the flag.
#    For yes or no take words, as --self-evaluation does
# --------------------------------------------------------------------------------------------------
@dataclass
class Settings:
    """Rarely changed numbers are constants, below or where they are used, with their reason."""
    # what to run
    recipe: str = "self_explore"  # also sft, rft, outcome_dpo, mcts_dpo, alphallm, combined
    task: str = "homework"      # built-in task: homework or countdown; --data replaces it
    model: str = ""             # folder with open weights; empty: a tiny GPT trained from scratch
    data: str = ""              # training questions: JSON lines of GSM8K, MATH, SciQ, ARC ...
    eval_data: str = ""         # held-out questions of the same kind
    sft_data: str = ""          # reference solutions that the base is trained on in round 0
    template: str = ""          # chat prompt with {question}; \n is a newline (not in \neq, \nu)
    rounds: int = 3             # after the base; a finished run goes on when this is raised
    seed: int = 0               # of all random numbers but those of the held-out questions
    out: str = ""               # folder of the run (--compare: of all runs); empty: one in runs/
    preset: str = "default"     # or smoke: everything tiny, to see that it runs; it learns little
    device: str = ""            # cpu or cuda; empty: cuda where there is one
    threads: int = 0            # CPU threads; 0: all cores (tiny GPT: 2). A busy machine wants 1
    workers: int = 0            # most processes that sample on a CPU, one a chunk; 0: all cores
    # growing trees
    questions: int = 320        # training questions drawn for each round
    samples: int = 8            # solutions of each question that are sampled in one wave
    budget: int = 1000          # sampled tokens per question and round, whatever they are used for
    temperature: float = 1.0    # of samples (fast rollouts: 1); the papers' 0.7 is for 7B models
    max_tokens: int = 128       # of one solution
    unit: str = "line"          # what a step of a solution is: line, paragraph, or so many tokens
    chunk: int = 160            # questions whose trees grow together; a finished chunk is a file
    rows: int = 0               # solutions decoded at once; 0: tiny GPT 1024, CUDA 512, else 256
    share: float = 0.4          # part of budget for RFT or critics; at 0 alphallm learns nothing
    # pits and searches
    completions: int = 4        # k: a step is bad if k samples below it all fail (pits, critics)
    rule: str = ""              # searches visit a child by puct or uct; empty: as in the paper
    commit: int = 0             # mcts_dpo: simulations before a move to the best child; 0: no move
    self_evaluation: str = "off"    # mcts_dpo: add the policy's own verdict: off, plain, gold
    # AlphaLLM
    critic: str = "weakest"     # leaf value: weakest link of the heads, their mean, or judge
    rollouts: int = 0           # fast rollouts of each leaf by a smaller policy (paper: 4)
    rollout_model: str = ""     # its folder, trained as the base is; empty: a base with one layer
    # learning
    steps: int = 64             # optimiser updates a round, for every recipe
    batch: int = 32             # trees in one update
    epochs: int = 3             # most passes over the data; the tiny GPT imitates without a limit
    beta: float = 0.1           # DPO: how close the policy stays to the reference
    nll: float = 1.0            # weight of the negative log-likelihood (NLL) of chosen sides
    dpo_lr: float = 0.0         # learning rate of DPO; 0: 5e-5, with --model by the model's size
    sft_lr: float = 0.0         # learning rate of imitation; 0: by the model's size
    # the base and the evaluation
    base_steps: int = 850       # most updates of round 0 (corpus, --sft-data); 0: --model as it is
    traps: int = 0              # homework: at least so many lines where leftmost is wrong; 0 to 2
    classes: int = 2            # homework's answer: 0 the value, 2 odd or even, m value modulo m
    split: str = "test"         # held-out questions of built-in tasks; dev: to choose settings on
    eval_questions: int = 2000  # held-out questions

    def __post_init__(self):
        """One spelling for each path: m/ and ./m are the folder m when settings are compared."""
        for name in ("model", "data", "eval_data", "sft_data", "rollout_model"):
            if path := getattr(self, name):
                setattr(self, name, str(Path(path)))


SMOKE = dict(rounds=1, questions=16, samples=4, budget=300, completions=2, chunk=8, rows=64,
             steps=4, batch=8, base_steps=120, eval_questions=32, max_tokens=96)
TINY = dict(default=dict(hidden_size=128, layers=3), smoke=dict(hidden_size=32, layers=2))
BASE_BATCH = 32                         # solutions in one update of the base
TINY_DPO_LR = 5e-5                      # of the tiny GPT; chosen on dev among 2.3e-5, 5e-5, 1e-4
FIRST_SLOTS = 4096                      # tokens that a sampler has room for at first; it grows
TRAINED_AT_ONCE = dict(cpu=2048, cuda=8192)     # padded tokens in a forward; more is not faster
FOREIGN = 0.75  # warn above this part of ln(ids): SmolLM2 has .2 to .5, without norms .8 or more
EVALUATED_AT_ONCE = 500                 # questions of one part of an evaluation; a part is a file
FREE = {"rounds", "out", "device", "threads", "workers", "rows", "code"}  # may differ between calls
# --decode wants these as the run had them: other questions or prompts would not suit its model
OF_TASK = {"task", "traps", "classes", "split", "model", "template", "data", "eval_data"}
POSITIVE = ("questions", "samples", "budget", "max_tokens", "chunk", "completions", "steps",
            "batch", "epochs", "eval_questions")
# random numbers of a stage are made of the seed, its number here, and the place
STREAM = dict(questions=1, examples=6, writing=8, imagining=10, voting=11, searching=12)


def check(s: Settings) -> None:
    """BadInput for settings that make no sense."""
    choices = dict(recipe=RECIPES, task=TASKS, preset=TINY, rule=("", *RULES),
                   split=("test", "dev"), self_evaluation=("off", "plain", "gold"),
                   critic=("weakest", "mean", "judge"))
    for name, value in asdict(s).items():
        flag = f"--{name.replace('_', '-')} {value}"
        least = dict(temperature=0.01, beta=0.001).get(name, int(name in POSITIVE))
        if value not in choices.get(name, [value]):
            raise BadInput(f"{flag}: choose one of {', '.join(filter(None, choices[name]))}.")
        most = dict(seed=10 ** 12, threads=1024, traps=2, share=0.99).get(name, 10 ** 6)
        if not isinstance(value, str) and not least <= value <= most:
            raise BadInput(f"{flag}: give a number from {least} to {most:,}.")
    for wrong, sentence in (
            (s.classes == 1, "--classes 1: every answer would be 0; give 0, 2, 3 ..."),
            (s.sft_data and not s.data or s.data and not (s.eval_data and s.model),
             "--data needs --eval-data and --model; --sft-data needs all three."),
            (s.template and not s.eval_data, "--template needs --eval-data."),
            (s.template and (s.template.count("{question}") != 1 or "{{question}}" in s.template),
             "--template needs {question} once, in single braces, where a question goes."),
            (s.rollout_model and not s.rollouts, "--rollout-model needs --rollouts."),
            (s.rollouts and s.model and not s.rollout_model,
             "--rollouts with --model needs --rollout-model: a smaller model's folder."),
            (s.rollouts and s.critic == "judge",
             "--rollouts needs --critic weakest or mean; the judge works alone.")):
        if wrong:
            raise BadInput(sentence)


# --------------------------------------------------------------------------------------------------
# 3. Recipes: how trees grow, and what is learnt from them
#
#    grow(lab, r, questions) -> (trees, notes for the log)
#    learn(lab, r, trees) -> notes, with the key "steps" (`fit` gives it)
#    lab: model, sampler, task, folder and token counts of the run (chapter 6); r: the round
#    mcts.tokens_left shows what each recipe spends its tokens on
# --------------------------------------------------------------------------------------------------
# no_letters: refused for multiple choice, since it cannot make up questions with options
Recipe = namedtuple("Recipe", "grow learn no_letters", defaults=[False])


# sft: the control. More of what the base was trained on
def grow_nothing(lab, r, questions):
    """SFT needs no trees."""
    return [], {}


def learn_examples(lab, r, trees):
    """Train on the task's own examples: careless homework, or reference solutions."""
    s = lab.settings
    rng = random.Random(mix(s.seed, r, STREAM["examples"]))
    rows = lab.example_rows(s.steps * s.batch, rng)                     # of all passes
    return fit(lab, rows, sft_loss, lab.sft_lr, s.steps, epochs=1)


# rft: rejection-sampling fine-tuning, RFT (Yuan et al. 2023, 2308.01825)
def grow_samples(lab, r, questions):
    """Sample every question until the budget is used up."""
    return grow_forest(lab, f"trees_{r}", questions, lab.settings.budget, sample), {}


def learn_right_solutions(lab, r, trees):
    """Imitate the distinct right solutions of all rounds so far, sampled or searched for."""
    all_trees = forests_so_far(lab, r, "trees", "more", "searched")
    return imitate(lab, all_trees, partial(right_solutions, lab), lab.settings.steps)


# outcome_dpo: the control of Self-Explore. Whole solutions as pairs
def grow_explored(lab, r, questions):
    """1) Round 1: the base imitates its own right samples, as in Self-Explore.
    2) The model as it then is samples solutions. (The paper pairs samples of the base.)"""
    budget, notes = imitate_first(lab, r, questions)
    return grow_forest(lab, f"trees_{r}", questions, budget, sample), notes


def learn_outcome_pairs(lab, r, trees):
    """3) DPO on whole solutions, right against wrong. Reference: the model that sampled them."""
    return prefer(lab, r, trees, outcome_pairs)


# self_explore: Self-Explore (Hwang et al. 2024, 2404.10346)
def grow_pits(lab, r, questions):
    """1) Round 1: the base imitates its own right samples. This RFT model is the explorer.
    2) The explorer samples solutions, and completes prefixes of wrong ones to find first pits."""
    budget, notes = imitate_first(lab, r, questions)
    return grow_forest(lab, f"trees_{r}", questions, budget, partial(sample, label=True)), notes


def learn_pits(lab, r, trees):
    """3) DPO: the pit alone is rejected, a right completion of the prefix before it is chosen. The
    reference is the explorer, since that is the model as it stands now."""
    return prefer(lab, r, trees, pit_pairs)


# mcts_dpo: MCTS-DPO (Xie et al. 2024, 2405.00451)
def grow_searched(lab, r, questions):
    """1) Round 1: imitate first, as above. It stands for the SFT that the paper begins with.
    2) Search every question with the known answers, by the weights that the model has now."""
    budget, notes = imitate_first(lab, r, questions)
    notes |= dict(self_evaluation=lab.settings.self_evaluation)     # gold shows it the answers
    return grow_forest(lab, f"trees_{r}", questions, budget, search_with_answers), notes


def learn_siblings(lab, r, trees):
    """3) DPO on siblings of different Q. The NLL term is on the better steps alone, for a right
    solution may hold wrong steps."""
    return prefer(lab, r, trees, sibling_pairs)


# alphallm: AlphaLLM (Tian et al. 2024, 2404.12253)
def grow_imagined(lab, r, questions):
    """1) Sample questions with known answers. Critics learn from these samples.
    2) Make up new questions. Nobody looks up their answers.
    3) Search the new questions, with the critics in the place of the answers."""
    s = lab.settings
    trees = grow_forest(lab, f"trees_{r}", questions, s.share * s.budget, sample)
    notes = train_critics(lab, f"critic_{r}", trees)
    new = imagined_questions(lab, r, questions)
    left = s.budget * len(questions) - lab.sampled_tokens
    # at most one budget each: 22 new questions once had 14,000 tokens each, all that was left
    each = min(s.budget, left / max(1, len(new)))
    if s.budget * len(new) < left:
        print(f"{len(new)} new questions for {len(questions)} old ones, too few for the budget: "
              f"{left - each * len(new):,.0f} tokens are not spent")
    searched = grow_forest(lab, f"imagined_{r}", new, each, search_with_critic)
    return trees, notes | dict(imagined=len(new), kept=sum(bool(tree.chosen) for tree in searched))


def learn_trusted(lab, r, trees):
    """4) Imitate the searched solutions that the critics trust (tree.chosen, a path or nothing), of
    all rounds so far. The right samples are left out: some are right by luck."""
    all_trees = forests_so_far(lab, r, "imagined")
    return imitate(lab, all_trees, lambda tree: tree.chosen[-1:], lab.settings.steps)


# combined: ours. It chooses between search and samples, and between preferences and imitation
SEARCH_ABOVE = 2 / 3    # share of questions that the first samples left unsolved
PREFER_ABOVE = 1 / 2    # dpo.evenness of round 1: right rate of the worst sibling / of the best


def grow_unsolved(lab, r, questions):
    """1) Sample every question with a part of the budget.
    2) If more than two thirds are unsolved, search each of these for a right end, led by critics.
    Otherwise every question gets a second tree of samples."""
    s = lab.settings
    trees = grow_forest(lab, f"trees_{r}", questions, s.share * s.budget, sample)
    left = s.budget * len(questions) - lab.sampled_tokens
    unsolved = [tree.question for tree in trees if not tree.root.rights]
    if len(unsolved) <= SEARCH_ABOVE * len(questions):
        return trees + grow_forest(lab, f"more_{r}", questions, left / len(questions), sample), {}
    notes = train_critics(lab, f"critic_{r}", trees)
    each = left / len(unsolved)
    searched = grow_forest(lab, f"searched_{r}", unsolved, each, search_for_solution)
    return trees + searched, notes | dict(searched=len(searched))


def learn_what_helps(lab, r, trees):
    """3) If siblings are uneven, imitate right solutions, as rft does. If they end right about as
    often, imitation would copy wrong steps. Then round 1 imitates with three quarters of the
    updates and does DPO on siblings alone, since its trees are the base's. Later rounds do DPO on
    siblings and on whole solutions.
    Round 1 decides for all. Later trees look even on any task: imitation has removed bad steps."""
    notes = dict(evenness=evenness(forests_so_far(lab, 1, "trees", "more", "searched")))
    if notes["evenness"] <= PREFER_ABOVE:
        return learn_right_solutions(lab, r, trees) | notes
    if rft_updates(lab, r):                     # in round 1 alone
        notes |= imitate_right_ones(lab, r, trees)
        return prefer(lab, r, trees, rate_pairs) | notes
    return prefer(lab, r, trees, lambda tree: rate_pairs(tree) + outcome_pairs(tree)) | notes


# HACK HERE: a recipe of your own is one more line, and its two functions. Also change: the imports
# from dpo, if you write a loss
RECIPES = dict(
    sft=Recipe(grow_nothing, learn_examples),
    rft=Recipe(grow_samples, learn_right_solutions),
    outcome_dpo=Recipe(grow_explored, learn_outcome_pairs),
    self_explore=Recipe(grow_pits, learn_pits),
    mcts_dpo=Recipe(grow_searched, learn_siblings),
    alphallm=Recipe(grow_imagined, learn_trusted, no_letters=True),
    combined=Recipe(grow_unsolved, learn_what_helps),
)
BASE = Recipe(grow_nothing, lambda lab, r, trees: train_base(lab))      # round 0 of every recipe


# --------------------------------------------------------------------------------------------------
# 4. Growing: a method grows the trees of some questions until its tokens are used up
# --------------------------------------------------------------------------------------------------
def grow_forest(lab, name: str, questions: list, tokens_each: float, method) -> list:
    """One tree for each question, grown by method(lab, trees, tokens). Each finished chunk is a
    file of JSON lines, one tree a line. A tree's seed is made of (seed, name, place)."""
    def make(chunk, first):
        """The first line also tells what fast rollouts sampled for this chunk."""
        if lab.rollouts:
            lab.rollouts.forget()
        before = lab.rollouts.tokens if lab.rollouts else 0
        trees = planted(lab, chunk, zlib.crc32(name.encode()), first)
        method(lab, trees, tokens_each * len(trees))
        records = [tree_record(lab, tree) for tree in trees]
        records[0]["rollout_tokens"] = lab.rollouts.tokens - before if lab.rollouts else 0
        return records
    if tokens_each <= 0:
        return []
    grown = sampled_files(lab, lab.folder / name, questions, lab.settings.chunk, make, read_trees,
                          tokens_each * len(questions))
    lab.rollout_tokens += sum(record.get("rollout_tokens", 0) for _, record in grown)
    lab.sampled_tokens += sum(tree.tokens for tree, _ in grown)
    return [tree for tree, _ in grown]


def sampled_files(lab, folder, items: list, size: int, make, load=read_lines, tokens=0) -> list:
    """The joined lines of files, one for every `size` items: cached(path, make(items, first)). On a
    CPU --workers processes make those that are missing. Each process is a copy (fork) of this one,
    so nothing has to be sent. If a process fails or is killed, this one makes its missing files
    afterwards, and reports the error if it occurs again.

    If there are several files, and at most two threads a file, each file is made by one thread, in
    a worker or (--workers 1) here. Otherwise this process makes them with all its threads. Files
    that exist count, too: so a resumed run has the same threads, and its sums round alike.
    tokens: expected number of sampled tokens, for the progress bar."""
    jobs = {folder / f"{first:06d}.jsonl": partial(make, items[first:first + size], first)
            for first in range(0, len(items), size)}
    threads = torch.get_num_threads()
    one_thread = lab.forks and len(jobs) > 1 and 2 * len(jobs) >= threads
    todo = [job for job in jobs.items() if not job[0].exists()]
    workers = min(lab.workers, len(todo)) if one_thread else 1
    sampled = torch.zeros(max(1, workers), dtype=torch.int64).share_memory_()   # by each process
    bar = tqdm(total=int(tokens) or None, desc=folder.name, unit=" tokens", unit_scale=True,
               leave=False, disable=None)
    lab.progress = bar.update
    children = []
    try:
        torch.set_num_threads(1 if one_thread else threads)
        for i in range(workers if workers > 1 else 0):          # a single one is this process
            given = (lab, todo[i::workers], sampled[i])
            # daemon: also ends with this process if an error comes before the `finally`
            child = get_context("fork").Process(target=make_files, args=given, daemon=True)
            start(child, children)
        while any(child.is_alive() for child in children):
            time.sleep(0.02)
            bar.update(sampled.sum().item() - bar.n)
        return [item for path, make in jobs.items() for item in cached(path, make, load=load)]
    finally:
        for child in children:                  # Ctrl-C: no orphan is left
            child.kill()
            child.join()
        torch.set_num_threads(threads)
        lab.progress = None
        bar.close()


def start(child, children: list) -> None:
    """Start a process and append it to `children`. A Ctrl-C during this is raised afterwards:
    inside a fork it can get lost while Python holds a lock, and the run hangs."""
    handler = signal.getsignal(signal.SIGINT)
    pressed = []
    signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        child.start()
        children.append(child)
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        raise KeyboardInterrupt


def make_files(lab, jobs: list, sampled) -> None:
    """What a worker process does. sampled: its counter, a tensor of one number."""
    parent = os.getppid()

    def progress(tokens):
        """Count for the parent's bar. A child whose parent was killed ends, too."""
        sampled.add_(tokens)
        if os.getppid() != parent:
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout = sys.stderr = open(os.devnull, "w")     # --workers 1 shows a print()
    lab.progress = progress
    for path, make in jobs:
        cached(path, make)


def planted(lab, questions: list, stage: int, first: int = 0) -> list:
    """For each question a tree with only its root, the prompt. Slots of earlier trees are void."""
    lab.sampler.reset()
    trees = []
    for place, question in enumerate(questions, first):
        ids = lab.task.prompt_ids(question)
        seed = mix(lab.settings.seed, stage, place)
        trees.append(Tree(question, seed, ids, lab.sampler.prompt(ids)))
    return trees


def tree_record(lab, tree: Tree) -> dict:
    """A tree as a line of a file: question, nodes, and what a viewer wants to show."""
    texts = [tree.question.text] + [lab.decode(node.ids) for node in tree.nodes[1:]]
    shown = dict(step_texts=texts, pits=sorted(node.index for node in pits_of(tree)))
    return asdict(tree.question) | to_json(tree) | shown


def read_trees(path: Path) -> list:
    """[(tree, its record)] of a file that grow_forest wrote. ValueError: it is damaged."""
    saved = []
    for record in read_lines(path):
        tree = from_json(record, Question(record["text"], record["answer"]))
        need(len(record["step_texts"]) == len(tree.nodes), "a tree needs one text for each node")
        saved.append((tree, record))
    return saved


def forests_so_far(lab, r: int, *kinds) -> list:
    """The trees of these kinds of rounds 1 to r, from their files."""
    folders = [lab.folder / f"{kind}_{i}" for i in range(1, r + 1) for kind in kinds]
    files = [file for folder in folders for file in sorted(folder.glob("*.jsonl"))]
    return [tree for file in files for tree, _ in restored(file, read_trees)]


def grade_ends(lab, ends: list) -> None:
    """Record of each sampled end whether it is right, by the task's own rule."""
    for end in ends:
        cut = end.ended == "length"
        record_grade(end, lab.task.reward(end.tree.question, lab.text(end), cut))


def sample(lab, trees: list, tokens: float, label: bool = False) -> None:
    """Waves of whole solutions until the budget is used up. With `label` (Self-Explore) label_pits
    follows each wave but the first. Its completions of prefixes are branches, too.

    The first wave is one sample of each question. It tells what a sample costs, and later waves are
    made to fit: 1, 7, 8, 8, ... samples while the budget pays for them."""
    s, left = lab.settings, tokens_left(trees, tokens)

    def grow_graded(wants):
        """Sample below nodes, wants = [(node, how many)], and grade the new ends."""
        grade_ends(lab, grow(lab.sampler, wants, s.max_tokens, s.temperature, lab.progress))
    wave, taken = 1, 0
    while wave > 0:
        grow_graded([(tree.root, wave) for tree in trees])
        taken += wave
        if label and taken > 1:
            ends = [end for tree in trees for end in tree.ends()]
            critic.label_pits(ends, grow_graded, s.completions, left)
        cost = sum(tree.tokens for tree in trees) / taken       # of a wave of 1, with its labels
        wave = min(s.samples - taken % s.samples, int(left() / cost))


def search_with_answers(lab, trees: list, tokens: float) -> None:
    """MCTS-DPO's search: a simulation goes on to an end and returns +1 or -1, plus, if asked for,
    the policy's own judgement of the solution in [0, 1] (--self-evaluation)."""
    s, each = lab.settings, tokens / len(trees)

    def returns(ends):
        """One number for each end; its grade is recorded in the tree."""
        grade_ends(lab, ends)
        verdicts = [0] * len(ends)
        if s.self_evaluation != "off":
            # "gold" shows the judge the answer, a leak: AUC 74.7 with it, 62.0 without (paper)
            shown = (lambda end: end.tree.question.answer) if s.self_evaluation == "gold" else ""
            verdicts = critic.self_evaluation(ends, lab.sampler, shown=shown)
        return [verdict + (1.0 if end.right else -1.0) for end, verdict in zip(ends, verdicts)]
    go_on = commit_every(s.commit, each) if s.commit else until(SIMULATIONS, each)
    search(trees, lab.step_sampler(), returns, go_on, RULES[s.rule or "puct"], fixed_width(5, 3))


SIMULATIONS = 1000      # of one tree at most; the token budget nearly always ends the search before
KEEP = 0.5              # a solution is imitated if the outcome head gives it at least this chance


def search_with_critic(lab, trees: list, tokens: float) -> None:
    """AlphaLLM's eta-MCTS: critics in the place of answers, UCT, adaptive width; lines with the
    same calculation are one node. A tree is done when 16 simulations in a row sampled nothing.

    The chosen path is kept if the outcome head says at least KEEP, as in the paper. The weakest
    link cannot be a threshold (critic.leaf_values says why)."""
    s = lab.settings
    known = {}                                          # node -> what the heads said of it
    outcome = critic.HEADS.index("outcome")
    values = partial(lab.leaf_values, combine=s.critic, known=known)
    steps = lab.step_sampler(key=lambda ids: calculations(lab.decode(ids)))
    go_on = until(SIMULATIONS, tokens / len(trees), patience=16)
    search(trees, steps, values, go_on, RULES[s.rule or "uct"], importance_width, to_end=False)
    for tree in trees:
        end = trusted_end(lab, tree)
        if end is not None and lab.critic.trusted[outcome] and known[end][outcome] >= KEEP:
            tree.chosen = end.path()


# HACK HERE: which solution a search without answers stands for. Also change: nothing
def trusted_end(lab, tree: Tree):
    """Take the answer whose ends have the largest sum of returns; return its best-scored end. None
    if no end states an answer, or if this answer has less than half the visits of such ends."""
    groups = by_answer(lab, [end for end in tree.ends() if end.visits])
    winner = max(groups, key=lambda group: sum(end.value_sum for end in group), default=[])
    visits = sum(end.visits for group in groups for end in group)
    if 2 * sum(end.visits for end in winner) < visits:
        return None
    return max(winner, key=lambda end: end.score, default=None)


def by_answer(lab, ends: list) -> list:
    """Groups of ends that state the same value: 18, 18.0 and $18.00 are one answer. An end that
    states none, or that was cut at the length limit, is in no group."""
    groups = {}
    for end in ends:
        answer = lab.task.answer(lab.text(end)) if end.ended != "length" else None
        if answer is not None:
            groups.setdefault(answer, []).append(end)
    return list(groups.values())


def search_for_solution(lab, trees: list, tokens: float) -> None:
    """The search of `combined`: an end is worth its grade, 1 or 0, any other leaf the mean of the
    critics' heads. A node has one step sampled, and one more after every 8 visits: mostly deep."""
    def values(nodes):
        """One number in [0, 1] for each node."""
        grade_ends(lab, [node for node in nodes if node.ended])
        guesses = lab.leaf_values(nodes, "mean")
        return [float(node.right) if node.ended else guess for node, guess in zip(nodes, guesses)]
    more = until(SIMULATIONS, tokens / len(trees), patience=64)
    search(trees, lab.step_sampler(), values, lambda tree: not tree.root.rights and more(tree),
           RULES[lab.settings.rule or "uct"], fixed_width(1, 1), to_end=False)


EXPRESSION = re.compile(r"[(\d.][\d.()%]*(?:[-+*/=]+[\d.()%]*[\d)%])+|"       # 2+3=5
                        r"\d\D*=[-+(\d.]")                  # 3 boxes * 6 pens = 18 pens
VARIABLE = re.compile(r"\\|\b(?![aAI]\b)[A-Za-z]\b")          # x + 3 = 7, or LaTeX


def calculations(text: str) -> str:
    """The calculations of lines or a solution, without the words. Equal ones are not distinct.
    A line of words keeps its numbers and signs if it holds a calculation, else nothing. A line
    without words, or with variables, stays whole. If nothing is left, the text itself is returned.

        "So 2 + 3 + 4 = $9 in all" -> "2+3+4=9"        "12-9=3 : 10 3" -> "12-9=3:10 3"
        "5% of 40 = 2 so" -> "5% 40=2"                 "Then x + 3 = 7" -> "Then x+3=7"
        "3 boxes * 6 pens = 18 pens" -> "3*6=18" """
    kept = []
    for line in critic.tidy(re.sub(r"\\times|\\cdot", "*", text)).split("\n"):
        line = re.sub(r"(?<=\d),(?=\d{3})", "", line)
        line = re.sub(r"(?<=[\d)]) *x *(?=[\d(])", "*", line)
        line = re.sub(r" *([-+*/=():]) *", r"\1", line).strip()
        if re.search("[A-Za-z]", line) and not VARIABLE.search(line):
            pieces = re.split(r"[^-+*/=()^<>%.\d]+", line) if EXPRESSION.search(line) else []
            line = " ".join(piece.strip(".") for piece in pieces if re.search(r"\d", piece))
            line = re.sub(" (?=[-+*/=])", "", line)         # 3 *6 =18
        kept.append(line)
    return " ".join(filter(None, kept)) or " ".join(text.split())


# --------------------------------------------------------------------------------------------------
# 5. Learning: rows of trees, two ways to train on them, the base, the critics
# --------------------------------------------------------------------------------------------------
def fit(lab, rows: list, loss_fn, lr: float, updates: int, epochs: float) -> dict:
    """Train the policy on rows, in place, in at most `epochs` passes (dpo.batches); notes."""
    s = lab.settings
    if not rows:
        what = "solution to imitate" if loss_fn is sft_loss else "pair to learn from"
        print(f"no {what} was found, so this training is left out (see solved, pits, kept and "
              "critic in log.jsonl): raise --budget; with solved near 0 give easier questions, "
              "near 1 harder ones")
        return dict(passes=0, steps=0)
    plan = batches(rows, s.batch, updates, s.seed, epochs)
    stats = lab.train(plan, loss_fn, lr, state=lab.folder / "training_state.safetensors")
    return dict(passes=sum(map(len, plan)) / len(rows)) | stats


def imitate(lab, trees: list, solutions, updates: int) -> dict:
    """SFT on solutions(tree), a list of ends, of each tree. Real weights soon memorise them: after
    six passes the loss of Qwen2.5-Coder-0.5B on its own solutions was .06 nats a token (.49 on
    references), and GSM8K fell by 6 points: so --epochs holds. The tiny GPT takes no harm."""
    rows = [tree_row(solutions=ends) for tree in trees if (ends := solutions(tree))]
    epochs = lab.settings.epochs if lab.settings.model else float("inf")
    return fit(lab, rows, sft_loss, lab.sft_lr, updates, epochs)


def prefer(lab, r: int, trees: list, pairs) -> dict:
    """DPO on pairs(tree), a list of dpo.Pair, of each tree. The reference is the model as it is
    now; its log-probs are stored before training. The pairs are written for other trainers, too."""
    s, records = lab.settings, []
    rows = [tree_row(tree_pairs) for tree in trees if (tree_pairs := pairs(tree))]
    store_reference(lab.model, rows, lab.part_tokens)
    text = lambda side: lab.decode(np.concatenate([node.ids for node in side]))
    for pair in (pair for row in rows for pair in row.pairs):
        above = pair.chosen[0].parent
        prompt = lab.task.prompt(above.tree.question) + lab.text(above)
        records.append(dict(prompt=prompt, chosen=text(pair.chosen), rejected=text(pair.rejected)))
    write_lines(lab.folder / f"pairs_{r}.jsonl", records)
    loss = partial(preference_loss, beta=s.beta, nll=s.nll)
    lr = s.dpo_lr or (scaled_lr(lab.model, DPO_LR) if s.model else TINY_DPO_LR)
    updates = s.steps - rft_updates(lab, r)
    return dict(pairs=len(records)) | fit(lab, rows, loss, lr, updates, s.epochs)


def right_solutions(lab, tree: Tree, most: int = 8) -> list:
    """Right ends that differ in their calculations; the same ones in other words teach nothing new.
    (At most 8, as in Self-Explore.) A solution that was cut at the length limit is not imitated."""
    distinct = {}
    for path in complete_right_paths(tree):
        distinct.setdefault(calculations(lab.text(path[-1])), path[-1])
    return list(distinct.values())[:most]


RFT_PART = 3 / 4        # of the updates of round 1, where imitation comes before DPO


def imitate_first(lab, r: int, questions: list) -> tuple:
    """Round 1 of the three DPO methods: plain samples, whose right ones the model imitates (RFT).
    Returns the tokens per question that are left for the method itself, and notes.

    So DPO starts from the model that grew the trees. On trees of the base it would unlearn steps
    that the RFT model hardly takes any more, and many such updates do harm."""
    s = lab.settings
    if r > 1 or not s.share:
        return s.budget, {}
    trees = grow_forest(lab, "first_1", questions, s.share * s.budget, sample)
    notes = imitate_right_ones(lab, r, trees)
    # so far this round has sampled these trees alone
    return s.budget - lab.sampled_tokens / len(questions), notes


def imitate_right_ones(lab, r: int, trees: list) -> dict:
    """RFT before DPO; returns notes. Saved in rft/, so that a killed DPO does not repeat it."""
    make = lambda: imitate(lab, trees, partial(right_solutions, lab), rft_updates(lab, r))
    stats = lab.train_or_load("rft", make)
    return dict(rft_steps=stats["steps"], rft_tokens=stats.get("trained_tokens", 0))


def rft_updates(lab, r: int) -> int:
    """How many of a round's optimiser updates RFT has before DPO. DPO has the others."""
    s = lab.settings
    return int(s.steps * RFT_PART) if r == 1 and s.share else 0


def train_base(lab) -> dict:
    """Round 0: SFT on the task's own examples, careless homework or --sft-data.
    The base is kept beside the runs; its name is a hash of settings and examples. So all recipes of
    a seed share it. Delete it if you change the code of training or the weights of --model."""
    s = lab.settings
    if not s.base_steps or not lab.task.has_examples:
        return dict(steps=0)
    corpus = lab.task.examples(64, random.Random(s.seed))       # changes when the task's code does
    lr = lab.sft_lr if s.model else 6e-3                # from random weights, with Muon
    made_of = [s.seed, s.base_steps, s.preset, s.model, lab.model.config.raw, s.traps, s.classes,
               lr, corpus, file_hash(s.sft_data), s.epochs if s.sft_data else 0, lab.part_tokens]
    name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:10]
    folder = lab.bases / f"base_{name}"

    def make():
        """Train the model in place; returns what dpo.train does."""
        rows = lab.example_rows(s.base_steps * BASE_BATCH, random.Random(s.seed))
        plan = by_like_length(rows, BASE_BATCH, s.seed)
        state = folder.with_suffix(".state")
        going_on = ", going on from a saved state" if state.exists() else ""
        print(f"training the base, {len(plan)} updates{going_on}", flush=True)
        return lab.train(plan, sft_loss, lr, label="base", muon=not s.model, warmup=50,
                         state=state)
    return lab.train_or_load(folder, make)


def by_like_length(rows: list, size: int, seed: int) -> list:
    """Batches of rows of like length, in random order: 1% of their tokens are padding, not 8%."""
    rng = random.Random(seed)
    shuffled = []
    for block in parts(rows, 16 * size):
        block.sort(key=lambda row: len(row.packed.ids))
        alike = parts(block, size)
        shuffled += rng.sample(alike, len(alike))
    return shuffled


def parts(items: list, size: int) -> list:
    """Lists of `size` items, the last one shorter: 1 2 3 4 5 in parts of 2 are 1 2, 3 4 and 5."""
    return [items[first:first + size] for first in range(0, len(items), size)]


def train_critics(lab, name: str, trees: list) -> dict:
    """Set the lab's critic and fast rollouts; returns notes. They are trained anew in every round:
    a static critic falls behind the policy, a limit that AlphaLLM's authors name."""
    s = lab.settings
    if s.critic == "judge":
        lab.critic = critic.Judge()
        return {}
    lab.critic, heads = train_critic(lab, name, trees)
    for head, measured in heads.items():
        if measured["note"]:
            print(f"{name}: the {head} head is not used: {measured['note']}")
    if not s.rollouts:
        return dict(critic=heads)
    # the smaller policy has a lab of its own; its critic learns from its own samples
    threads = torch.get_num_threads()
    small = Lab(replace(s, model=s.rollout_model, out=str(lab.folder / "small")), layers=1)
    torch.set_num_threads(threads)              # those that suit the larger model
    small.bases = lab.bases
    small.train_or_load("round_0", lambda: train_base(small))
    questions = [tree.question for tree in trees]
    own = grow_forest(small, f"trees_{name}", questions, s.share * s.budget, sample)
    small.critic, small_heads = train_critic(small, name, own)
    encode = lambda node: (small.tokenizer.encode_more(lab.decode(node.ids)) if node.parent else
                           small.task.prompt_ids(node.tree.question))
    lab.rollouts = critic.Rollouts(small.sampler, small.critic, s.rollouts, s.max_tokens, encode)
    lab.rollout_tokens += small.sampled_tokens
    return dict(critic=heads, rollout_critic=small_heads)


def train_critic(lab, name: str, trees: list) -> tuple:
    """(Critic, report) from graded trees. One question in five is kept out, for the report."""
    s, size, device = lab.settings, lab.model.config.hidden_size, lab.model.device

    def make():
        """(Critic, report) from all labelled nodes. The trees are encoded once more for this."""
        x, rows = [torch.zeros(0, size + 4, device=device)], []
        for group in parts(trees, s.chunk):
            encode_again(group, lab.sampler)
            new = [row for tree in group for row in critic.critic_labels(tree, s.completions)]
            x.append(critic.features([node for node, _, _ in new], lab.sampler))
            rows += new
        tensor = partial(torch.tensor, dtype=torch.float32, device=device)
        labels = tensor([label for _, label, _ in rows]).reshape(-1, len(critic.HEADS))
        weights = tensor([weight for _, _, weight in rows])
        texts = [node.tree.question.text.encode("utf-8", "replace") for node, _, _ in rows]
        held_out = tensor([zlib.crc32(text) % 5 == 0 for text in texts]).bool()
        updates = 40 if s.preset == "smoke" else 600
        return critic.fit_critic(torch.cat(x), labels, weights, held_out, updates, s.seed)

    def save(path, made):
        """Write the weights, and the report in the header of the file."""
        write_safetensors(path, made[0].state_dict(), {"report": json.dumps(made[1])})

    def load(path):
        """(Critic, report) from the file that save wrote; ValueError if the weights do not fit."""
        tensors, header = read_safetensors(path)
        loaded = critic.Critic(size).to(device)
        shapes = {name: weight.shape for name, weight in loaded.state_dict().items()}
        need({name: x.shape for name, x in tensors.items()} == shapes, "its weights do not fit")
        loaded.load_state_dict(tensors)
        return loaded, json.loads(header["report"])
    return cached(lab.folder / f"{name}.safetensors", make, save, load)


def encode_again(trees: list, sampler) -> None:
    """Give trees from a file a place in a sampler's store, and encode them there."""
    sampler.reset()
    for node in (node for tree in trees for node in tree.nodes):
        above = node.parent.slots_from_root() if node.parent else NOTHING
        node.slots = sampler.follow(above, node.ids)[len(above):]
    sampler.encode([end.slots_from_root() for tree in trees for end in tree.ends()])


def imagined_questions(lab, r: int, old: list) -> list:
    """AlphaLLM's made-up questions of a round. The tokens in which the policy wrote them count."""
    s, counts = lab.settings, lab.sampler.counts
    write = partial(continuations, lab, temperature=s.temperature, over=lambda line: True, stage=r)

    def make():
        """The questions, and the tokens in a last line."""
        before = counts["sampled"]
        rng = random.Random(mix(s.seed, r, STREAM["imagining"]))
        new = [asdict(question) for question in lab.task.imagine(old, rng, write)]
        return new + [dict(tokens=counts["sampled"] - before)]

    def load(path):
        """(questions, tokens) from the lines of make."""
        *rows, last = read_lines(path)
        return [Question(row["text"], row["answer"]) for row in rows], field(last, "tokens", int)
    new, tokens = cached(lab.folder / f"questions_{r}.jsonl", make, load=load)
    lab.sampled_tokens += tokens
    return new


def continuations(lab, prompts: list, temperature: float = 0, over=None, stage=0) -> list:
    """(text, continuation) for each list of ids. over(line): does this line end the text? Without
    it the task says when a solution is over. Another stage draws other random numbers."""
    s = lab.settings
    lab.sampler.reset()
    seeds = [mix(s.seed, stage, i, STREAM["writing"]) for i in range(len(prompts))]
    requests = [Request(lab.sampler.prompt(ids), seed, s.max_tokens)
                for ids, seed in zip(prompts, seeds)]
    lab.sampler.finished = over or lab.task.over
    written = lab.sampler.extend(requests, temperature, progress=lab.progress)
    lab.sampler.finished = lab.task.over
    return [(lab.decode(one.ids), one) for one in written]


# --------------------------------------------------------------------------------------------------
# 6. The lab: model, sampler, task and folder of a run
# --------------------------------------------------------------------------------------------------
class Lab:
    """What every stage needs. Weights and critics change from round to round; all else stays.

    file of a run      made by          read by
    settings.json      claim_folder     the same command, given again: other settings are refused
    first_1/           imitate_first    RFT of round 1
    trees_1/           grow_forest      learning, critics, `python mcts.py --show`. Likewise:
                                        imagined_1/ (AlphaLLM), more_1/, searched_1/ (combined)
    critic_1...        train_critic     the search
    questions_1.jsonl  AlphaLLM         the same round: the questions that it made up
    small/             train_critics    fast rollouts: the lab of the smaller policy
    decode_1/          --decode 1       the same command
    training_state...  dpo.train        the same training, after a kill
    ../base_.../       train_base       all runs with the same base
    round_1/, rft/     train_or_load    the next stage; any tool that opens HF folders
    pairs_1.jsonl      prefer           you, and other DPO trainers
    eval_1.jsonl       solve_greedily   report
    log.jsonl          run              you: one row for each round
    report.html        run              you: the log, the critics and three trees as a page"""

    def __init__(self, s: Settings, **shape):
        check(s)
        device = pick_device(s.device)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.threads = s.threads or cores
        # the tiny GPT's matrices are too small to split: each of two threads takes half the batch
        self.shares = 2 if device.type == "cpu" and not s.model else 1
        torch.set_num_threads(1 if self.shares > 1 else self.threads)
        self.workers = s.workers or cores
        # a forked process cannot go on with a GPU, nor safely with the libraries of macOS
        self.forks = device.type == "cpu" and sys.platform == "linux"
        self.settings, self.folder = s, Path(s.out or default_folder(s))
        self.bases = self.folder.absolute().parent
        rows = s.rows or (1024 if not s.model else 512 if device.type == "cuda" else 256)
        self.part_tokens = min(16 * rows, TRAINED_AT_ONCE[device.type])
        self.critic = self.rollouts = None      # of these weights, by train_critics
        self.progress = None                    # called with the number of tokens just sampled
        self.sampled_tokens = self.rollout_tokens = 0   # of a round: by the policy, by rollouts
        if s.model:
            self.tokenizer = Tokenizer.from_pretrained(s.model)
            self.model = GPT.from_pretrained(s.model, device)
        else:
            self.tokenizer = Tokenizer.bytes_only()
            config = GPTConfig.tiny(self.tokenizer.n_ids, **TINY[s.preset] | shape)
            self.model = GPT(config).initialise(s.seed).to(device)
        self.sft_lr = s.sft_lr or scaled_lr(self.model, SFT_LR)         # of imitation
        task = FileTask if s.eval_data else TASKS[s.task]
        self.task = task(s, self.tokenizer, self.model.config.max_positions)
        if RECIPES[s.recipe].no_letters and self.task.letters:
            raise BadInput(f"--recipe {s.recipe} cannot make up questions with options: take rft, "
                           "self_explore, mcts_dpo or combined.")
        self.sampler = Sampler(self.model, self.tokenizer, FIRST_SLOTS, rows, self.task.over,
                               s.unit)
        self.sampler.prompt(self.task.prompt_ids(self.task.eval_questions()[0]))    # or BadInput

    def claim_folder(self) -> None:
        """Write settings.json, or compare with the one that is there. This comes last, so that a
        refused command leaves no folder behind. BadInput: begun with other settings or files."""
        mine = asdict(self.settings)
        if small := mine["rollout_model"]:      # it is used hours later
            GPT.from_pretrained(small, "cpu").bind(Tokenizer.from_pretrained(small))
        self.task.train_questions(1)            # are there enough?
        for name in ("data", "eval_data", "sft_data"):
            mine[name + "_hash"] = file_hash(mine[name])
        names = ("model.py", "mcts.py", "critic.py", "dpo.py", "loop.py")
        mine["code"] = [file_hash(Path(__file__).with_name(name)) for name in names]
        with about(f"give another --out, for no folder can be made at {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
        cached(self.folder / "settings.json", lambda: [mine])
        begun = same_settings(self.folder, mine, mine.keys() - FREE,
                              "give the old ones, move this folder away or, for a new run, give "
                              "another --out.")
        if begun.get("code") != mine["code"]:
            print("the code has changed since this run began, and finished files are used again: "
                  "to see what an edit does, give a new --out")
        sweep(self.folder, "**/*.[0-9]*.tmp")
        sweep(self.bases, "base_*.[0-9]*.tmp")

    def description(self) -> str:
        """What the model, training and a sampled token take; the first prompt; its likelihood."""
        c, width = self.model.config, self.model.dtype.itemsize
        count = sum(p.numel() for p in self.model.parameters())
        # a gradient and its fp32 sum for each share; AdamW's two moments; fp32 masters below fp32
        training = count * (self.shares * (width + 4) + 8 + 4 * (width < 4))
        token = width * (2 * c.layers * c.kv_heads * c.head_dim + c.hidden_size)
        size = (f"{count:,} parameters on {self.model.device}: weights {count * width >> 20:,} MiB,"
                f" training {training >> 20:,} MiB more, {token / 1024:.1f} KiB a sampled token")
        prompt = repr(self.task.prompt(self.task.eval_questions()[0]))
        likely = f"\n{self.likelihood_of_prompts()}" if self.settings.model else ""
        return f"{size}\nprompt: {prompt[:300]}{'...' * (len(prompt) > 300)}{likely}"

    @torch.no_grad()
    def likelihood_of_prompts(self) -> str:
        """How probable the model finds the first four held-out prompts, in words."""
        logps = []
        for question in self.task.eval_questions()[:4]:
            ids = torch.tensor(self.task.prompt_ids(question), device=self.model.device)
            hidden = self.model(ids[None])[0]                           # (T, C)
            logps.append(target_logps(self.model, hidden[:-1], ids[1:]))
        nats, most = -torch.cat(logps).mean().item(), math.log(self.tokenizer.n_ids)
        warning = "" if nats < FOREIGN * most else (
            "\nwarning: weights, config.json and tokenizer.json may not belong together")
        return f"prompts: {nats:.1f} nats a token (random weights: {most:.1f}){warning}"

    def finished_rounds(self) -> list:
        """The log of the rounds that are done; the weights of the last one are loaded."""
        def load(path):
            """The rows, each shown as when its round was finished."""
            rows = read_lines(path)[:self.settings.rounds + 1]
            rounds = [row["round"] for row in rows if "questions" in row]
            need(rounds == [*range(len(rows))], "its rows are not those of rounds 0, 1, 2 ...")
            print("\n".join(map(summary_line, rows)))
            return rows
        path = self.folder / "log.jsonl"
        log = restored(path, load) if path.exists() else []
        if log:
            restored(self.folder / f"round_{len(log) - 1}", self.load)
        return log

    def train(self, plan: list, loss_fn, lr: float, **options) -> dict:
        """dpo.train. On a CPU an update of the tiny GPT is two shares, each on its own thread."""
        with ThreadPoolExecutor(self.threads) as pool:
            map_fn = pool.map if self.shares > 1 else map
            return train(self.model, plan, loss_fn, lr, tokens=self.part_tokens,
                         shares=self.shares, map_fn=map_fn, **options)

    def train_or_load(self, name, make) -> dict:
        """Train by make(), save the model as a folder that other tools open, and return make()'s
        statistics. A folder that is there is only loaded. Saved in fp32, for bf16 would round an
        update of 1e-6 away. name: a folder of this run, or an absolute path (the base)."""
        def save(folder, stats):
            """Write what `load` and other tools read."""
            need("steps" in stats, "what a recipe's `learn` returns needs the key 'steps'")
            self.model.save_pretrained(folder, torch.float32)
            self.tokenizer.save(folder)
            write_lines(folder / "training.json", [stats])
        # frees memory for the training; `load` makes a new store. Critics fit the old weights only
        self.sampler.reset(1)
        self.critic = self.rollouts = None
        return cached(self.folder / name, make, save, self.load)

    def load(self, folder: Path) -> dict:
        """Take over the weights of a folder that `train_or_load` wrote; returns its statistics."""
        self.model.load_weights(folder)
        self.sampler.reset(FIRST_SLOTS)         # its keys and values are those of other weights
        stats = read_lines(folder / "training.json")[0]
        need("steps" in stats, "training.json has no key 'steps'")
        return stats

    def step_sampler(self, key=None) -> StepSampler:
        """Samples single steps for a search."""
        s = self.settings
        return StepSampler(self.sampler, s.max_tokens, s.temperature, key, self.progress)

    def leaf_values(self, nodes: list, combine: str, known=None) -> list:
        """What nodes are worth by the critic of this round, and by fast rollouts if there are."""
        return critic.leaf_values(nodes, self.critic, self.sampler, combine, self.rollouts, known)

    def example_rows(self, count: int, rng) -> list:
        """Rows for SFT, each with the end-of-text at which sampling stops."""
        end = [] if self.model.end_id is None else [self.model.end_id]
        examples = self.task.examples(count, rng)
        return [text_row(prompt, solution + end) for prompt, solution in examples]

    def text(self, node) -> str:
        """The solution down to a node, without question and end-of-text."""
        return self.decode(node.solution())

    def decode(self, ids) -> str:
        """Ids -> text, without end-of-text."""
        return self.tokenizer.decode_more(int(i) for i in ids if i not in self.model.stop_ids)


def same_settings(folder: Path, mine: dict, names, mend: str) -> dict:
    """The settings that the run in a folder was begun with. BadInput unless `mine` are the same."""
    saved = restored(folder / "settings.json", lambda path: dict(read_lines(path)[0]))
    said = {}                                           # flag -> what is wrong with it
    for name in [name for name in mine if name in names and saved.get(name) != mine[name]]:
        flag = "--" + name.removesuffix("_hash").replace("_", "-")
        changed = name.endswith("_hash") and saved.get(name)
        said.setdefault(flag, f"the file of {flag} has changed" if changed else
                        f"{flag} was {saved.get(name)!r}")
    if said:
        raise BadInput(f"{folder} was begun with other settings or files "
                       f"({'; '.join(said.values())}): {mend}")
    return saved


def default_folder(s: Settings) -> str:
    """runs/TASK_RECIPE_seedS; smoke and a model come before TASK, traps and classes behind it."""
    smoke = "smoke" if s.preset == "smoke" else ""
    model = Path(s.model).resolve().name if s.model else ""
    questions = Path(s.eval_data).stem if s.eval_data else s.task
    kind = [f"{name}{getattr(s, name)}" for name in ("traps", "classes")
            if getattr(s, name) != getattr(Settings, name)]
    names = [smoke, model, questions, *kind, s.recipe, f"seed{s.seed}"]
    return "runs/" + "_".join(filter(None, names))


def sweep(folder: Path, pattern: str) -> None:
    """Remove what killed processes were writing: NAME.PID.tmp, if no process has this number."""
    for name in glob.glob(pattern, root_dir=folder, recursive=True):
        path, number = folder / name, name.split(".")[-2]
        if Path("/proc/self").exists() and not Path("/proc", number).exists():
            remove(path)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def file_hash(path: str) -> str:
    """The contents of a file as a short hash; "" for no file."""
    with about(path):
        return path and hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# 7. Tasks: where questions come from, and what a right answer is
# --------------------------------------------------------------------------------------------------
@dataclass
class Question:
    """answer: what `reward` compares with; of a file a whole reference solution; "": unknown."""
    text: str
    answer: str


# HACK HERE: a built-in task of your own is a class with draw, vary and solve, and a line in TASKS.
# (draw gives Question(text, answer), both str. Give the corpus errors with a pattern: if all are
# random, greedy solutions have little to gain.)
# Also change: `reward` if a right number is not enough, `key` if two texts can be one question,
# `first_false` if lines can be checked: it gives `sound`.
class Task:
    """An endless stream of questions, split in three by a hash, and a corpus for the base."""
    letters = False                     # are questions answered by the letter of an option?
    has_examples = True                 # is there a corpus for the base?
    before, after = "", "?"             # what stands around a question in its prompt
    reader = staticmethod(critic.read_number)

    def __init__(self, s: Settings, tokenizer, context: int = 512):
        self.settings, self.tokenizer, self.context = s, tokenizer, context

    def prompt(self, question) -> str:
        """What the model reads, as text."""
        return self.before + question.text + self.after

    def prompt_ids(self, question) -> list:
        """What the model reads, as ids."""
        return self.tokenizer.encode_prompt(self.prompt(question))

    def over(self, line: str) -> bool:
        """Does this line end a solution?"""
        return "####" in line

    def answer(self, text: str) -> str | None:
        """What a solution answers, in one spelling for equal values; None if it states none."""
        stated = find_answer(text, self.reader)[0]
        return None if stated is None else canonical(stated)

    def reward(self, question, text: str, cut: bool = False) -> bool:
        """Is the solution right? By its final answer alone. cut: it ran into the length limit."""
        return grade(text, question.answer, cut, question.text)

    def first_false(self, question, text: str) -> int | None:
        """How many lines are true before the first false one; all, if none is. None: unknown."""
        return None

    def sound(self, question, text: str) -> bool | None:
        """Is every line of the solution true? None: nobody can say."""
        place = self.first_false(question, text)
        return None if place is None else place == len(text.rstrip("\n").split("\n"))

    def key(self, text: str) -> str:
        """Two questions with one key are the same question."""
        return text

    def split(self, question) -> str:
        """One question in eight is kept for tests, and one in sixteen (dev) for choosing learning
        rates and the like. Neither is ever trained on."""
        place = hashlib.sha256(self.key(question.text).encode()).digest()[0]
        return "test" if place < 32 else "dev" if place < 48 else "train"

    def distinct(self, draw, count: int, split: str, known=()) -> list:
        """`count` questions of a split, or all that draw() finds. known: keys to avoid."""
        questions = {}
        in_vain = 0                             # draws since the last new question
        while len(questions) < count and in_vain < 5_000:
            question = draw()
            key = self.key(question.text)
            in_vain += 1
            if self.split(question) == split and key not in questions and key not in known:
                questions[key] = question
                in_vain = 0
        return list(questions.values())

    def train_questions(self, r: int) -> list:
        """The questions of a round, the same for all recipes of a seed."""
        s = self.settings
        rng = random.Random(mix(s.seed, r, STREAM["questions"]))
        questions = self.distinct(lambda: self.draw(rng), s.questions, "train")
        if len(questions) < s.questions:
            raise BadInput(f"--questions {s.questions}: {s.task} has {len(questions)}; ask for "
                           "fewer.")
        return questions

    @cache
    def eval_questions(self) -> list:
        """The held-out questions, the same for all seeds and recipes; drawn once."""
        s, rng = self.settings, random.Random(99)
        questions = self.distinct(lambda: self.draw(rng), s.eval_questions, s.split)
        if len(questions) < s.eval_questions:
            print(f"{s.task} has only {len(questions)} held-out questions")
        return questions

    def examples(self, count: int, rng) -> list:
        """[(ids of a prompt, ids of somebody's solution)] for SFT."""
        solved = []
        while len(solved) < count:
            question = self.draw(rng)
            if self.split(question) == "train":
                solution = self.tokenizer.encode_more(self.solve(question, rng))
                solved.append((self.prompt_ids(question), solution))
        return solved

    def imagine(self, old: list, rng, write) -> list:
        """AlphaLLM's first step: as many new questions, each an old one with one thing changed.
        Nobody works out their answers. (write(prompts) asks the policy; it is not needed here.)"""
        vary = lambda: Question(self.vary(rng.choice(old).text, rng), "")
        known = {self.key(question.text) for question in old}
        return self.distinct(vary, len(old), "train", known)


class Homework(Task):
    """Expressions, worked off one operation a line:   7+1*4-2?1*4=4 : 7+4-2
                                                               7+4=11 : 11-2
                                                               11-2=9 : 9
                                                               #### odd
    The corpus is the homework of a careless class. On four lines of five a student takes the
    leftmost operation, although precedence may ask for another one. So the base can do every step
    and chooses wrongly, and more of the same corpus does not help. Seven of ten solutions with a
    wrong line end in the right answer, by luck. (With --classes 0 the answer is 9: none does.)"""
    careless = 0.8
    # only what stands behind #### is an answer
    reader = staticmethod(lambda piece, mark: mark == "####" and critic.read_words(piece, mark))

    def claim(self, number: int) -> str:
        """What the last line says of a value."""
        m = self.settings.classes
        if m == 2:
            return ("even", "odd")[number % 2]
        return str(number % m if m else number)

    def draw(self, rng) -> Question:
        """A random expression; every value on the right way lies in 0..99."""
        least = self.settings.traps
        operators = ("+-", "+-**", "+-**" if least else "+-*")
        while True:
            x = [rng.randint(1, 9)]
            for i in range(rng.randint(3, 4)):
                op = rng.choice(operators[min(i, 2)])
                x += [op, rng.randint(2 if op == "*" else 1, 9)]
            # the cheap test comes first: with two traps most drafts fail it
            if x.count("*") >= least and value(x) is not None and traps(x) >= least:
                return Question("".join(map(str, x)), self.claim(value(x)))

    def vary(self, text: str, rng) -> str:
        """Draw one number or one operator anew; behind a `*` a 1 becomes 2. The result may have
        fewer traps than --traps asks for, and values that leave 0..99."""
        x = parse(text)
        i = rng.randrange(len(x))
        if i % 2:
            x[i] = rng.choice("+-" if i == 1 else "+-*")
        else:
            x[i] = rng.randint(1, 9)
        for j in range(1, len(x), 2):
            x[j + 1] = max(x[j + 1], 2 if x[j] == "*" else 1)
        return "".join(map(str, x))

    def solve(self, question, rng) -> str:
        """A student's solution. If a value leaves 0..99 he starts over; the 21st time with care."""
        for attempt in range(21):
            x, lines = parse(question.text), []
            while len(x) > 1 and all(0 <= number <= 99 for number in x[::2]):
                careless = attempt < 20 and rng.random() < self.careless
                i = 1 if careless else due(x)
                lines.append(line_of(x, i))
                x = work_off(x, i)
            if len(x) == 1 and 0 <= x[0] <= 99:
                break
        return "\n".join([*lines, f"#### {self.claim(x[0])}"])

    def reward(self, question, text: str, cut: bool = False) -> bool:
        """Only what stands behind #### is an answer: a text that is just "odd" is none."""
        return "####" in text and super().reward(question, text, cut)

    def first_false(self, question, text: str) -> int | None:
        """A line is true if it works off one operation and keeps the value by precedence. None: the
        question is a made-up one that has no value in 0..99."""
        x = parse(question.text)
        number = value(x)
        lines = text.rstrip("\n").split("\n")
        if number is None:
            return None
        for place, line in enumerate(lines[:-1]):
            ways = {line_of(x, i): work_off(x, i) for i in range(1, len(x), 2)}
            x = ways.get(line, [])
            if not x or value(x) != number:
                return place
        done = x == [number] and lines[-1] == f"#### {self.claim(number)}"
        return len(lines) - (not done)


def parse(text: str) -> list:
    """'17+1*4' -> [17, '+', 1, '*', 4]"""
    return [token if token in "+-*" else int(token) for token in re.findall(r"[0-9]+|[-+*]", text)]


def work_off(x: list, i: int) -> list:
    """The operation at place i worked off: [17, '+', 1, '*', 4], 3 -> [17, '+', 4]."""
    a, op, b = x[i - 1:i + 2]
    result = a + b if op == "+" else a - b if op == "-" else a * b
    return x[:i - 1] + [result] + x[i + 2:]


def line_of(x: list, i: int) -> str:
    """The line that works off the operation at place i: '1*4=4 : 17+4'."""
    rest = work_off(x, i)
    return f"{''.join(map(str, x[i - 1:i + 2]))}={rest[i - 1]} : {''.join(map(str, rest))}"


def due(x: list) -> int:
    """The place of the operation that precedence asks for: the first `*`, else the first."""
    return x.index("*") if "*" in x else 1


def value(x: list, order=due) -> int | None:
    """The value of an expression; None when a value on the way leaves 0..99."""
    while len(x) > 1:
        i = order(x)
        x = work_off(x, i)
        if not 0 <= x[i - 1] <= 99:
            return None
    return x[0]


def traps(x: list) -> int:
    """On how many lines precedence asks for another operation than the leftmost one: 7+1*4 has one
    trap, 7*1+4 none. (It need not be a mistake to begin with 1+2 in 1+2+3*4, but it has a trap,
    too.) 0 if working leftmost throughout gives the right value, or leaves 0..99."""
    if value(x, order=lambda rest: 1) in (None, value(x)):
        return 0
    count = 0
    while len(x) > 1:
        count += due(x) != 1
        x = work_off(x, due(x))
    return count


class Countdown(Task):
    """Combine all numbers into the target:   10 12 9 -> 7?12-9=3 : 10 3
                                                           10-3=7 : 7
                                                           #### 7
    The corpus is random legal play: the base knows the rules and no strategy. Every line is
    checked, so that a right-looking last line alone earns nothing."""

    def numbers(self, text: str) -> tuple:
        """'10 12 9 -> 7' -> (10, 12, 9)"""
        return tuple(map(int, text.split(" -> ")[0].split()))

    def moves(self, numbers: tuple) -> list:
        """All legal moves: [(line, numbers left)]."""
        legal = []
        for i, j in permutations(range(len(numbers)), 2):
            rest = tuple(number for k, number in enumerate(numbers) if k not in (i, j))
            for op in "+-*":
                result, = work_off([numbers[i], op, numbers[j]], 1)
                left = rest + (result,)
                line = f"{numbers[i]}{op}{numbers[j]}={result} : {' '.join(map(str, left))}"
                if 0 <= result <= 99:
                    legal.append((line, left))
        return legal

    def play(self, numbers: tuple, rng) -> tuple:
        """Random legal play to the end: (its lines, the last number)."""
        lines = ""
        while len(numbers) > 1:
            line, numbers = rng.choice(self.moves(numbers))
            lines += line + "\n"
        return lines, numbers[0]

    def draw(self, rng) -> Question:
        """Three numbers and a target that some play reaches."""
        numbers = tuple(rng.randint(1, 12) for _ in range(3))
        target = self.play(numbers, rng)[1]
        return Question(f"{' '.join(map(str, numbers))} -> {target}", str(target))

    def key(self, text: str) -> str:
        """The numbers in any order are the same question."""
        return f"{sorted(self.numbers(text))} -> {text.partition(' -> ')[2]}"

    def vary(self, text: str, rng) -> str:
        """One number is another one. The new question may have no solution."""
        numbers = list(self.numbers(text))
        numbers[rng.randrange(len(numbers))] = rng.randint(1, 12)
        return f"{' '.join(map(str, numbers))} -> {text.partition(' -> ')[2]}"

    def solve(self, question, rng) -> str:
        """A play that does not look at the target."""
        lines, last = self.play(self.numbers(question.text), rng)
        return lines + f"#### {last}"

    def answer(self, text: str) -> str | None:
        """Many plays reach a target, so each text is an answer of its own: no vote joins them."""
        return text if "####" in text else None

    def reward(self, question, text: str, cut: bool = False) -> bool:
        """Every line a legal move, the last number the target."""
        numbers = self.numbers(question.text)
        *lines, last = text.rstrip("\n").split("\n")
        for line in lines:
            numbers = dict(self.moves(numbers)).get(line, ())       # () after an illegal one
        return numbers == (int(question.answer),) and last == f"#### {question.answer}"

    def sound(self, question, text: str) -> bool | None:
        """A right solution has no wrong line. (A made-up question has no answer to compare.)"""
        return self.reward(question, text) if question.answer else None


TASKS = dict(homework=Homework, countdown=Countdown)


# HACK HERE: a data set of your own is a line in KINDS and a reader: item -> (question, reference).
# ValueError in a reader becomes a sentence that names file and line. Also change: nothing.
def read_gsm8k(item: dict) -> tuple:
    """GSM8K, and whatever ends in #### and a number. Calculator marks <<48/2=24>> are taken out."""
    hidden = {"choices", "options", "body", "passage", "context"} & {k for k in item if item[k]}
    need(not hidden, f"the field {min(hidden, default='')} would be shown to nobody: write it into "
         "question, or give question, choices (a list of label and text) and answerKey")
    number = type(item["answer"]) in (int, float)
    answer = f"#### {item['answer']}" if number else field(item, "answer", str)
    return field(item, "question", str), re.sub(r"<<[^<>]*>>", "", answer)


def read_math(item: dict) -> tuple:
    r"""MATH: the solution ends in \boxed{...}."""
    solution = field(item, "solution", str)
    if not critic.last_box(solution) and type(item.get("answer")) in (int, float, str):
        solution += rf" \boxed{{{item['answer']}}}"
    need(critic.last_box(solution), r"the solution has no answer in a \boxed{...}")
    return field(item, "problem", str), solution


def read_sciq(item: dict) -> tuple:
    """SciQ, closed book: the support is imitated as a rationale and not shown."""
    names = ("correct_answer", "distractor1", "distractor2", "distractor3")
    options = [field(item, name, str) for name in names]
    return lettered(field(item, "question", str), options, 0, field(item, "support", str, ""))


def read_arc(item: dict) -> tuple:
    """ARC and CommonsenseQA, in the nested form they were published in, and as tables."""
    question = item["question"]
    inner = question if isinstance(question, dict) else item | {"stem": question}
    choices = inner.get("choices")
    if isinstance(choices, dict):               # a table: two lists, not a list of pairs
        labels, texts = field(choices, "label", list), field(choices, "text", list)
        need(len(labels) == len(texts), f"{len(labels)} labels for {len(texts)} texts")
        choices = [dict(label=label, text=text) for label, text in zip(labels, texts)]
    listed = isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices)
    need(listed, "choices must be a list of objects, or a table, with label and text")
    labels, texts = ([field(choice, key, str) for choice in choices] for key in ("label", "text"))
    need(len({*labels}) == len(labels), f"a label stands twice: {labels}")
    need(item["answerKey"] in labels, f"answerKey {item['answerKey']!r} is no label of the choices")
    return lettered(field(inner, "stem", str), texts, labels.index(item["answerKey"]))


OWN_LETTER = re.compile(r"\s*(?:\(([A-Za-z])\)|([A-Za-z])(?:\)|[.:](?=\s)))\s*")     # (a) 1  B. 1
OF_OPTIONS = re.compile(r"(?i:\b(?:all|both|either|neither|none|some|any|two)\b.*\b(?:above|below|"
                        r"these|those|them|options|choices|answers)\b)|"      # none of the above
                        r"\b[A-H]\)?(?: ?[,&] ?| and | or | nor )+\(?[A-H]\b")     # both A and B


def lettered(question: str, options: list, right: int, rationale: str = "") -> tuple:
    """Options as lines (A), (B), ... in an order that depends on the texts alone, since in some
    files the right one always comes first. If an option speaks of others, the order of the file
    stays. If all carry letters of their own, in order, these are taken off."""
    options = [" ".join(option.split()) for option in options]          # one line each
    own = [OWN_LETTER.match(option) for option in options]
    letters = "".join((match[1] or match[2]).upper() if match else "-" for match in own)
    if letters == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:len(options)]:
        options = [option[match.end():] for option, match in zip(options, own)]
    cited = any(map(OF_OPTIONS.search, options))
    shown = options if cited else [*dict.fromkeys(options)]     # each once; CommonsenseQA repeats
    right = right if cited else shown.index(options[right])
    need(2 <= len(shown) <= 26 and all(shown), "2 to 26 options are needed, none of them empty")
    digest = lambda i: hashlib.sha256((question + shown[i]).encode("utf-8", "replace")).digest()
    order = [*range(len(shown))]
    if not cited:
        order.sort(key=digest)
    lines = [f"\n({chr(65 + place)}) {shown[i]}" for place, i in enumerate(order)]
    return question + "".join(lines), f"{rationale}\n#### {chr(65 + order.index(right))}".strip()


# the fields by which an item is recognised, its reader, the reader of answers
KINDS = [
    (("question", "correct_answer"), read_sciq, critic.read_letter),
    (("question", "answerKey"), read_arc, critic.read_letter),
    (("problem", "solution"), read_math, critic.read_formula),
    (("question", "answer"), read_gsm8k, critic.read_number),
]

# a text up to its question mark, a whole one such as "Find $3x$.", or nothing
ASKED = re.compile(r"[^?]*\?|(?=.*\b(?:Calculate|Compute|Determine|Evaluate|Express|Find|How|"
                   r"Simplify|Solve|What)\b).*\.$|")


class FileTask(Task):
    """Questions from files of JSON lines (or one JSON array), all of one of the KINDS."""

    def __init__(self, s: Settings, tokenizer, context: int):
        super().__init__(s, tokenizer, context)
        self.reader = None
        template = with_newlines(s.template) or "Question: {question}\nAnswer:"
        self.before, _, self.after = template.partition("{question}")
        self.test = self.read(s.eval_data)
        self.train = self.read(s.data)
        self.references = self.train if s.sft_data == s.data else self.read(s.sft_data)
        self.has_examples, self.letters = bool(self.references), self.reader is critic.read_letter
        held_out = {question.text for question in self.test}
        for file, questions in {s.data: self.train, s.sft_data: self.references}.items():
            both = sum(question.text in held_out for question in questions)
            if both:
                print(f"{both} questions are in both {file} and {s.eval_data}: on these, accuracy "
                      "does not measure what was learnt")
        if s.data and len(self.train) < s.questions:
            print(f"{s.data} has {len(self.train)} questions, and --questions asks for "
                  f"{s.questions}: a round takes some more than once")

    def read(self, file: str) -> list:
        """All questions of a file, none for "". BadInput names the item that is not one. Questions
        that leave no room for an answer are skipped, and counted in one line."""
        if not file:
            return []
        try:
            with about(file):
                text = Path(file).read_text(encoding="utf-8-sig")
            array = text.lstrip().startswith("[")       # one JSON array in place of lines
            items = read_json(file, text.encode(), list) if array else read_lines(file, text)
        except BadInput as error:
            raise BadInput(f"{error}; data must be a file of JSON lines or one JSON array (from the"
                           " Hub: datasets.load_dataset(...)[...].to_json(FILE)).") from error
        questions = []
        for number, item in enumerate(items, 1):
            with about(f"{file}, item {number}"):
                text, reference = self.read_item(item)
                need(text, "the question is empty")
                need(self.answer(reference) is not None and grade(reference, reference),
                     r"the reference holds no answer to grade by, such as #### 18 or \boxed{18}")
            question = Question(text, reference)
            if len(self.prompt_ids(question)) < self.context:
                questions.append(question)
        if len(questions) < len(items):
            print(f"{file}: {len(items) - len(questions)} questions skipped, since each fills the "
                  f"model's context of {self.context} tokens")
        if not questions:
            raise BadInput(f"{file} holds no question{' that fits the model' if items else ''}; "
                           "give another file.")
        return questions

    def read_item(self, item) -> tuple:
        """(question, reference), by the first of KINDS whose fields the item has. ValueError."""
        need(isinstance(item, dict), "expected an object")
        for names, read, reader in KINDS:
            if {*names} <= item.keys():
                need(self.reader in (None, reader), "its kind of answer is not that of the items "
                     "before it, or of --eval-data: a run reads one kind")
                self.reader = reader
                question, reference = read(item)
                return question.strip(), reference.strip()
        forms = ", or ".join(" + ".join(names) for names, _, _ in KINDS)
        raise ValueError(f"expected the fields {forms}, and found {', '.join(item) or 'none'}")

    def prompt_ids(self, question) -> list:
        """Special tokens are such where the template writes them, never where a question does."""
        data = (len(self.before), len(self.before) + len(question.text))
        return self.tokenizer.encode_prompt(self.prompt(question), data)

    def over(self, line: str) -> bool:
        """Does this line end a solution? A base model goes on with the next question after it."""
        marks = ("####",) if self.reader is critic.read_number else ("####", "boxed", "phrase")
        # with a line below it, "#### Step 1: count" is a heading and no answer
        mark = find_answer(line + "\n.", self.reader)[1]
        return bool(re.match(r"Question:|Q:.*\?", line)) or mark in marks

    def train_questions(self, r: int) -> list:
        """The next ones of the shuffled file; every question once before any comes again."""
        s, order = self.settings, []
        while len(order) < r * s.questions:
            rng = random.Random(mix(s.seed, len(order), STREAM["questions"]))
            order += rng.sample(self.train, len(self.train))
        return order[(r - 1) * s.questions:r * s.questions]

    def eval_questions(self) -> list:
        """The first ones of the held-out file."""
        return self.test[:self.settings.eval_questions]

    def examples(self, count: int, rng) -> list:
        """Questions with their reference solutions, in shuffled passes over all, at most --epochs.
        One that does not fit the context is left out: cut, it would teach to stop halfway."""
        given = self.references or self.train
        fitting = []
        order = [question for _ in range(self.settings.epochs)
                 for question in rng.sample(given, len(given))][:count]
        for question in order:
            prompt = self.prompt_ids(question)
            gap = "" if self.after[-1:].isspace() else " "
            solution = self.tokenizer.encode_more(gap + question.answer)
            if len(prompt) + len(solution) < self.context:
                fitting.append((prompt, solution))
        if not fitting:
            raise BadInput("None of the reference solutions fits the model's context of "
                           f"{self.context} tokens; give shorter ones.")
        if len(fitting) < len(order):
            print(f"{len(order) - len(fitting)} of {len(order)} reference solutions exceed the "
                  f"model's context of {self.context} tokens and are left out")
        return fitting

    def imagine(self, old: list, rng, write) -> list:
        """The policy sees three questions and writes one more. It is cut at its question mark, as
        many models go on with a solution. It is kept if it asks something (ASKED) with a digit, and
        shares fewer than half of its word triples with each known question."""
        def triples(text):
            """All runs of three words; of a shorter text the text itself."""
            words = text.split()
            return {*zip(words, words[1:], words[2:])} or {text}
        prompts = []
        for _ in old:
            three = rng.sample(old, min(3, len(old)))
            shown = "".join(f"Question: {question.text}\n\n" for question in three) + "Question:"
            prompts.append(self.tokenizer.encode_prompt(shown, data=(0, len(shown))))
        known, kept = defaultdict(set), []              # known: triple -> questions that have it
        for question in self.train + self.test:
            for triple in triples(question.text):
                known[triple].add(question.text)
        for text, _ in write([ids for ids in prompts if len(ids) < self.context // 2]):
            asked = ASKED.match(text.strip())[0]
            new = triples(asked)
            shared = Counter(other for triple in new for other in known[triple])
            if re.search("[0-9]", asked) and 2 * max(shared.values(), default=0) < len(new):
                kept.append(Question(asked, ""))
                for triple in new:
                    known[triple].add(asked)
        return kept


# --------------------------------------------------------------------------------------------------
# 8. Evaluating, comparing, decoding
# --------------------------------------------------------------------------------------------------
def solve_greedily(lab, questions: list, r: int) -> list:
    """A record of each question: its greedy solution, and whether it is right."""
    def make(part, first):
        """A record for each question of one file."""
        prompts = [lab.task.prompt_ids(question) for question in part]
        return [asdict(question) | dict(
            solution=text, why=one.why, right=lab.task.reward(question, text, one.why == "length"),
            tokens=len(one.ids), sound=lab.task.sound(question, text))
            for question, (text, one) in zip(part, continuations(lab, prompts))]
    folder = lab.folder / f"eval_{r}"
    joined = lambda: sampled_files(lab, folder, questions, EVALUATED_AT_ONCE, make)
    load = partial(read_solutions, count=len(questions))
    solutions = cached(folder.with_suffix(".jsonl"), joined, load=load)
    remove(folder)                              # the parts, which are joined now
    return solutions


def read_solutions(path: Path, count: int) -> list:
    """The records of a file that solve_greedily wrote. ValueError: not `count`, or a key lacks."""
    rows, names = read_lines(path), {"solution", "why", "right", "tokens", "sound"}
    need(len(rows) == count, f"it has {len(rows)} lines, not {count}")
    need(all(names <= row.keys() for row in rows), f"each line needs {', '.join(sorted(names))}")
    return rows


def score(task, solutions: list) -> dict:
    """How good solutions of held-out questions are (README: every key)."""
    count, right = len(solutions), sum(row["right"] for row in solutions)
    low, high = critic.wilson(right, count)
    sound = by_luck = None
    if solutions[0]["sound"] is not None:
        both = sum(row["right"] and row["sound"] for row in solutions)
        sound = both / count
        by_luck = 1 - both / right if right else None
    marks = [find_answer(row["solution"], task.reader)[1] for row in solutions]
    strict = sum(row["right"] and mark in ("####", "boxed") for row, mark in zip(solutions, marks))
    tokens = sum(row["tokens"] for row in solutions)
    return dict(
        accuracy=right / count, accuracy_low=low, accuracy_high=high, questions=count,
        strict=strict / count, sound=sound, by_luck=by_luck,
        no_answer=sum(task.answer(row["solution"]) is None for row in solutions) / count,
        never_ends=sum(row["why"] == "length" for row in solutions) / count,
        mean_tokens=tokens / count, eval_tokens=tokens)


def report(lab, r: int, solutions: list, trees: list, notes: dict, clock: list) -> dict:
    """One row of log.jsonl (README: every key). clock: when the three stages began, and the end."""
    s = lab.settings
    budget = s.budget * s.questions if lab.sampled_tokens else 0
    if lab.sampled_tokens > 1.1 * budget:
        print(f"round {r} sampled {lab.sampled_tokens:,} tokens, more than its --budget of "
              f"{budget:,}: every stage begins with one sample or simulation of each question")
    asked = {tree.question.text for tree in trees}
    solved = {tree.question.text for tree in trees if tree.root.rights}
    # a search or a look for pits draws more below some nodes than below others: no rate of samples
    steered = any(node.tried or node.visits for tree in trees for node in tree.nodes)
    rights = sum(tree.root.rights for tree in trees)
    graded = rights + sum(tree.root.wrongs for tree in trees)
    stages = dict(zip(("grow_seconds", "learn_seconds", "eval_seconds"), np.diff(clock).tolist()))
    return dict(
        recipe=s.recipe, round=r, seed=s.seed, **score(lab.task, solutions),
        sampled_tokens=lab.sampled_tokens, budget_tokens=budget, rollout_tokens=lab.rollout_tokens,
        solved=len(solved) / len(asked) if asked else None,
        sampled_accuracy=rights / graded if graded and not steered else None,
        answers=np.mean([len(by_answer(lab, one.ends())) for one in trees]) if trees else None,
        pits=sum(len(pits_of(tree)) for tree in trees),
        **notes, **stages, seconds=clock[-1] - clock[0])


def summary_line(row: dict) -> str:
    """One line about one round."""
    low, high = 100 * row["accuracy_low"], 100 * row["accuracy_high"]
    accuracy = f"accuracy {100 * row['accuracy']:5.1f}%  [{low:.1f}, {high:.1f}]"
    sound = "" if row["sound"] is None else f"   sound {100 * row['sound']:5.1f}%"
    sampled = f"sampled {row['sampled_tokens']:>9,} tokens"
    return f"round {row['round']}   {accuracy}{sound}   {sampled}   {row['seconds']:6.1f} s"


def show_example(lab, log: list) -> None:
    """A question of round 1 before, during and after: the base's solution, the tree, the last
    model's solution. If possible, the base errs on it and the last model does not."""
    if lab.settings.preset == "smoke":
        print("A smoke run only shows that everything works; it learns little.")
    trees, r = first_trees(lab.folder)[:100], log[-1]["round"]
    if not trees:                               # sft grows none
        return
    questions = [tree.question for tree, _ in trees]
    prompts = [lab.task.prompt_ids(question) for question in questions]

    def answers(number):
        """[(verdict, solution)] of the model of a round."""
        restored(lab.folder / f"round_{number}", lab.load)
        return [(verdict(lab.task, question, text, one.why == "length"), text)
                for question, (text, one) in zip(questions, continuations(lab, prompts))]
    before, after = answers(0), answers(r)
    place = next((place for place, (old, new) in enumerate(zip(before, after))
                  if old[0] not in ("", "right") and new[0] == "right"), 0)

    def show(title, told, solution):
        """Print a solution below what is known of it."""
        told = told or "nobody knows whether it is right"
        print(f"\n{title}: {told}\n")
        print("\n".join("   " + printable(line) for line in solution.split("\n")))
    show("A question of round 1. The base writes", *before[place])
    print("\nWhat was tried in round 1:\n\n" + picture(*trees[place]))
    show(f"The model of round {r} writes", *after[place])
    print(f"\nAll files are in {lab.folder}; report.html shows the run. Ask the model yourself:\n"
          f"python model.py --model {shlex.quote(str(lab.folder / f'round_{r}'))} "
          f"--prompt {shlex.quote(lab.task.prompt(questions[place]))} --temperature 0")


def verdict(task, question, text: str, cut: bool) -> str:
    """What is known of a solution, in words; "" if nothing is. cut: at the length limit."""
    right = task.reward(question, text, cut) if question.answer else None
    sound, line = task.sound(question, text), task.first_false(question, text)
    if sound is False and line is not None:
        return "right by luck, " * bool(right) + f"line {line + 1} is false"
    if sound is None and right is None:
        return ""
    return "right" if sound or right else "wrong"


def first_trees(folder: Path) -> list:
    """read_trees of round 1; first those with a pit or a chosen path that fit a screen."""
    files = sorted(folder.glob("*_1/*.jsonl"))
    # first_1: samples of RFT, not the method's trees; eval_1: another process may be evaluating
    files = [file for file in files if file.parent.name not in ("first_1", "eval_1")]
    trees = [one for file in files for one in restored(file, read_trees)]
    plain = lambda tree: not pits_of(tree) and not tree.chosen
    distance = lambda tree: abs(len(tree.nodes) - 10)   # from a size that is easy to read
    return sorted(trees, key=lambda one: (plain(one[0]), distance(one[0])))


def picture(tree: Tree, record: dict, width: float = 56) -> str:
    """A saved tree as text, its steps cut at `width` columns."""
    return draw(tree, lambda node: record["step_texts"][node.index], pits_of(tree), width=width)


def compare(s: Settings, names: list, seeds: int) -> None:
    """Run or resume every recipe on every seed, then print a table. A seed is one observation, so
    the difference to the first recipe has a t interval over seeds. With one seed there is only
    McNemar's test on its questions, and it says nothing about other seeds."""
    if seeds < 1:
        raise BadInput(f"--seeds {seeds}: give a number from 1 on.")
    if len(set(names)) < len(names):
        raise BadInput(f"--compare {','.join(names)}: name each recipe once.")
    runs = [replace(s, recipe=name, seed=s.seed + i) for i in range(seeds) for name in names]
    for one in runs:                            # BadInput now, not after the first recipe's rounds
        one.out = str(Path(s.out, f"{one.recipe}_seed{one.seed}")) if s.out else default_folder(one)
        check(one)
        if RECIPES[one.recipe].no_letters and s.data and one.seed == s.seed:
            Lab(one)
        if Path(one.out, "settings.json").exists():
            same_settings(Path(one.out), asdict(one), asdict(one).keys() - FREE,
                          "give the old ones or another --out.")
    rows = []
    hits = defaultdict(list)    # (recipe, measure): for each seed whether each question counts
    for one in runs:
        print(f"\n{one.recipe}, seed {one.seed}", flush=True)
        rows += run(one)
        load = partial(read_solutions, count=rows[-1]["questions"])
        solutions = restored(Path(one.out, f"eval_{s.rounds}.jsonl"), load)
        hits[one.recipe, "accuracy"].append([row["right"] for row in solutions])
        hits[one.recipe, "sound"].append([row["right"] and row["sound"] for row in solutions])
    pictures = Path(s.out or "runs", "compare.html")
    write_text(pictures, compare_page(rows))
    measures = [key for key in ("accuracy", "sound") if rows[0][key] is not None]
    titles = [f"{measure} | less {names[0]} | 95% interval | seeds" for measure in measures]
    titles += ["sampled tokens", "trained tokens", "minutes", "sampled tokens a point"]
    print(f"\n| {' | '.join(['recipe', *titles])} |")
    print("| --- " * (5 + 4 * len(measures)) + "|")
    for name in names:
        cells = [compared(hits[name, measure], hits[names[0], measure]) for measure in measures]
        cells.append(costs([row for row in rows if row["recipe"] == name], seeds))
        print(f"| {' | '.join([name, *cells])} |")
    print(f"\nAll rounds as curves: {pictures}")


def compared(ours: list, theirs: list) -> str:
    """Four cells of a table: our mean, less theirs, interval of the difference, our seeds."""
    each = 100 * np.mean(ours, axis=1)                                          # (seeds,)
    gain = each - 100 * np.mean(theirs, axis=1)                                 # (seeds,)
    interval = "-"
    if ours is not theirs and len(ours) > 1:
        interval = "{1:+.1f} to {2:+.1f}".format(*critic.t_interval(gain))
    elif ours is not theirs:
        interval = f"McNemar p = {critic.mcnemar(ours[0], theirs[0]):.2g}"
    seeds = " ".join(f"{rate:.1f}" for rate in each)
    return f"{each.mean():.1f} | {gain.mean():+.1f} | {interval} | {seeds}"


def costs(rows: list, seeds: int) -> str:
    """Four cells of a table: what all rounds of a recipe took, as means over seeds, and how many
    sampled tokens bought one point of accuracy over the base ("-" if there is no gain)."""
    of_round = lambda r: np.mean([row["accuracy"] for row in rows if row["round"] == r])
    total = lambda key: sum(row.get(key) or 0 for row in rows if row["round"]) / seeds
    sampled, trained = total("sampled_tokens"), total("rft_tokens") + total("trained_tokens")
    gain = 100 * (of_round(rows[-1]["round"]) - of_round(0))
    point = f"{sampled / gain:,.0f}" if gain > 0 else "-"
    return f"{sampled:,.0f} | {trained:,.0f} | {total('seconds') / 60:.1f} | {point}"


def evaluate(s: Settings) -> None:
    """--evaluate: greedy accuracy of a model folder on held-out questions, as one JSON object."""
    # what is said of files is no JSON: it goes to stderr
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        if Path(s.model, "../settings.json").exists():  # its run taught it a form of answer
            same_settings(Path(s.model).parent, asdict(s), {"classes", "template"}, "give it, too.")
        lab, start = Lab(replace(s, out=folder)), time.time()
        print(lab.likelihood_of_prompts())
        solutions = solve_greedily(lab, lab.task.eval_questions(), 0)
    row = dict(model=s.model, questions_of=s.eval_data or s.task) | score(lab.task, solutions)
    print(json.dumps(row | dict(eval_seconds=time.time() - start), indent=1))


def decode(s: Settings, r: int, n: int = 16) -> None:
    """--decode R: what search with critics buys at test time, for the model of round R of a run.
    (Give the flags of the run, too.) All methods but greedy get the tokens of n sampled solutions;
    the three votes choose among the same samples. Critics learn from fresh samples of the model."""
    lab = Lab(s)
    folder = lab.folder / f"round_{r}"
    lab.folder = lab.folder / f"decode_{r}"
    if not folder.exists():
        raise BadInput(f"--decode {r}: there is no {folder}; give a run's flags, and its round.")
    same_settings(folder.parent, asdict(s), OF_TASK, "give the run's own flags, too.")
    lab.load(folder)
    lab.claim_folder()                          # other flags need another folder than decode_R
    graded = grow_forest(lab, "samples", lab.task.train_questions(1), s.share * s.budget, sample)
    train_critics(lab, "critic", graded)
    questions = lab.task.eval_questions()[:300]
    print("| method | tokens | accuracy | 95% interval | sound |\n|---|---|---|---|---|")

    def show(method, trees, ends):
        """One row of the table; `ends` are those that a method chose for the trees, or None."""
        right, sound = [], []
        tokens = sum(tree.tokens for tree in trees)
        for question, end in zip(questions, ends):
            text = lab.text(end) if end else ""
            right.append(bool(end) and lab.task.reward(question, text, end.ended == "length"))
            sound.append(lab.task.sound(question, text))
        low, high = critic.wilson(sum(right), len(right))
        cell = "-" if None in sound else f"{100 * np.mean(np.logical_and(right, sound)):.1f}"
        print(f"| {method} | {tokens / len(right):,.0f} | {100 * np.mean(right):.1f} "
              f"| {100 * low:.1f} - {100 * high:.1f} | {cell} |", flush=True)

    trees = planted(lab, questions, STREAM["voting"])
    show("greedy", trees, grow(lab.sampler, [(tree.root, 1) for tree in trees], s.max_tokens, 0))
    trees = planted(lab, questions, STREAM["voting"])
    ends = grow(lab.sampler, [(tree.root, n) for tree in trees], s.max_tokens, s.temperature)
    score_of = dict(zip(ends, lab.leaf_values(ends, s.critic)))
    groups = [by_answer(lab, samples) for samples in parts(ends, n)]
    for method in ("majority", "best of n", "weighted vote"):
        show(method, trees, [vote(group, score_of, method) for group in groups])
    tokens = sum(tree.tokens for tree in trees)
    trees = planted(lab, questions, STREAM["searching"])
    search_with_critic(lab, trees, tokens)
    show("MCTS", trees, [trusted_end(lab, tree) for tree in trees])


def vote(groups: list, score_of: dict, method: str):
    """The end that a question's samples stand for. Of 7 (score .2), 7 (.3), 9 (.6): majority says
    7, the weighted vote 9 (.6 against .5), best of n 9. None if no sample states an answer. Of the
    winning group majority takes the first sample (it knows no critic), the others the best one."""
    weights = {"majority": len, "best of n": lambda group: max(map(score_of.get, group)),
               "weighted vote": lambda group: sum(map(score_of.get, group))}
    winner = max(groups, key=weights[method], default=[])
    if method == "majority":
        return next(iter(winner), None)
    return max(winner, key=score_of.get, default=None)


# --------------------------------------------------------------------------------------------------
# 9. Pictures: report.html. A cell of its tables carries the key and the exact value of the log
# --------------------------------------------------------------------------------------------------
def report_page(folder: Path, task) -> str:
    """A run as a page: its log, what its last critics said of themselves, three trees of round 1.
    Round 0 trains the base; its tokens and seconds would dwarf those of the others."""
    log, heads = read_lines(folder / "log.jsonl"), {}
    scores = ("auc", "brier", "constant")
    for row in log:
        heads = row.get("critic") or heads
        for head, measured in row.get("critic", {}).items():
            row |= {f"critic.{head}.{score}": measured[score] for score in scores}
        if row.get("sound") is not None:
            hits = row["sound"] * row["questions"]
            row["sound_low"], row["sound_high"] = critic.wilson(hits, row["questions"])
    work = log[1:] or log
    pieces = [
        "<p>Thick lines are 95% intervals. If there is a second curve, the gap is luck: right "
        "answers after a false line.</p>", plot(log, ["accuracy", "sound"]),
        "<h2>Tokens</h2><p>What a round samples, learns from, and writes in its test.</p>",
        plot(work, ["sampled_tokens", "rollout_tokens", "rft_tokens", "trained_tokens",
                    "eval_tokens"]),
        "<h2>Seconds</h2><p>The highest curve is the phase that is worth making faster.</p>",
        plot(work, ["grow_seconds", "learn_seconds", "eval_seconds"])]
    for head, measured in heads.items():
        key, cells = f"critic.{head}.calibration", []
        for said, true, count in measured["calibration"]:
            low, high = critic.wilson(true * count, count)
            cells.append({"said": said, key: true, f"{key}_low": low, f"{key}_high": high})
        pieces += [
            f"<h2>The {head} head of the critic</h2><p>Where the curves meet, what it said came "
            "true as often as it said. It knows something if brier is below constant.</p>",
            plot(cells, ["said", key], x="said"),
            plot(work, [f"critic.{head}.{score}" for score in scores])]
    return page(folder.name, pieces + unfolding_trees(folder, task))


def unfolding_trees(folder: Path, task) -> list:
    """HTML of three trees of round 1: a small one, one with an error, one at random."""
    trees = first_trees(folder)
    if not trees:
        return []
    erred = max(trees, key=lambda one: fault(task, *one)[0])
    shown = {"A small tree": trees[0], "An error: " + fault(task, *erred)[1]: erred,
             "A random one": random.Random(task.settings.seed).choice(trees)}
    pieces = ["<h2>Three trees of round 1</h2>"]
    for title, one in shown.items():
        summary = f"<summary>{escape(printable(title))}</summary>"
        drawn = escape(picture(*one, math.inf))
        pieces.append(f"<details>{summary}<pre>{drawn}</pre></details>")
    return pieces


def fault(task, tree: Tree, record: dict) -> tuple:
    """Where the method erred on a tree, as far as the task can tell: (how telling, a sentence). It
    puts a first pit elsewhere than at the first false line, or takes a solution with a false line
    to be right (by its answer, or by the critics), or finds no solution."""
    faults = [(0, "none was found")]
    if tree.question.answer and not tree.root.rights:
        faults.append((1, "nothing ended right, so there was nothing to learn"))
    texts = record["step_texts"]
    text = lambda node: "".join(texts[step.index] for step in node.path()[1:])
    for end in tree.ends():
        lines = text(end).rstrip("\n").split("\n")
        place = task.first_false(tree.question, text(end))
        if place is None or place == len(lines):
            continue
        pit, false = critic.pit(end), f"{lines[place]} is the first false line"
        looked = any(step.tried for step in end.path())
        if end.right or end in tree.chosen:
            faults.append((2, f"{false} of a solution that was taken to be right"))
        if pit and looked and text(pit.parent).count("\n") != place:
            faults.append((3, f"{false}, but another one was called the first pit"))
    return max(faults)


def compare_page(rows: list) -> str:
    """--compare as a page: means over seeds and differences to the first recipe, with Student's
    intervals from two seeds on. A curve is a recipe. rows: the logs of all runs."""
    pieces = ["<p>Thick lines are 95% intervals over seeds. A difference whose line spans zero "
              "shows nothing.</p>"]
    first = rows[0]["recipe"]
    for key in [key for key in ("accuracy", "sound") if rows[0].get(key) is not None]:
        rates = defaultdict(list)                       # (round, recipe) -> one rate a seed
        for row in rows:
            rates[row["round"], row["recipe"]].append(row[key])
        for title, zero in ((key, 0), (f"{key}, less {first}", 1)):
            table = [dict(round=r) for r in range(rows[-1]["round"] + 1)]
            for (r, name), ours in rates.items():
                values = np.array(ours) - zero * np.array(rates[r, first])         # (seeds,)
                mean, low, high = critic.t_interval(values)
                table[r][name] = mean
                if len(ours) > 1:
                    table[r] |= {f"{name}_low": max(-1, low), f"{name}_high": min(1, high)}
            pieces += [f"<h2>{title}</h2>", plot(table, [name for r, name in rates if r == 0])]
    return page("Recipes compared", pieces)


def plot(rows: list, keys: list, x: str = "round") -> str:
    """A chart of some keys over x, and a table of their numbers. rows are those of the log, or like
    them; key_low and key_high are the ends of an interval. Keys without a value are left out."""
    form = dict(seconds=",.1f", tokens=",.0f").get(keys[0].split("_")[-1], ".1%")
    curves = {}
    for key in keys:
        ends = lambda row: [row.get(key + part, row[key]) for part in ("", "_low", "_high")]
        curve = [(row[x], *ends(row)) for row in rows if row.get(key) is not None]
        if curve:
            curves[key] = curve
    if not curves:
        return ""
    table = [f"<tr><th>{x}", *(f"<td>{row[x]:.2g}" for row in rows)]
    for key in [key for key in curves if key != x]:
        table.append(f"<tr><th><code>{key}</code>")
        for row in rows:
            value = row.get(key)
            words = "-" if value is None else format(value, form)
            where = f'data-key="{key}" data-{x}="{row[x]}"'
            table.append(f'<td><data value="{json.dumps(value)}" {where}>{words}</data>')
    return f"<section>{chart(curves, form)}<div><table>{''.join(table)}</table></div></section>"


def chart(curves: dict, form: str) -> str:
    """SVG of curves = {key: [(x, y, low, high)]}: a line with its name, intervals low to high."""
    points = [point for curve in curves.values() for point in curve]
    xs = sorted({x for x, *_ in points})
    ys = [y for _, *rest in points for y in rest]
    unit = 10 ** math.floor(math.log10(max(ys) - min(ys) or 1))     # .1 if ys go from .48 to .95
    low = math.floor(min(ys) / unit) * unit
    high = math.ceil(max(ys) / unit) * unit
    x_of = lambda x: round(60 + 190 * (x - xs[0]) / (xs[-1] - xs[0] or 1), 1)
    y_of = lambda y: round(175 - 165 * (y - low) / (high - low or 1), 1)
    out = ['<svg viewBox="0 0 375 200">']
    for y in (low, (low + high) / 2, high):
        out.append(f'<path class="grid" d="M60 {y_of(y)}h190"/>')
        out.append(f'<text y="{y_of(y) + 4}">{format(y, form).replace(".0", "")}</text>')
    for x in xs[::len(xs) // 6 + 1]:
        out.append(f'<text x="{x_of(x) - 4}" y="195">{x:.2g}</text>')
    free = -99                                  # names go down from the highest, 14 apart at least
    for key in sorted(curves, key=lambda key: -curves[key][-1][1]):
        place = list(curves).index(key)
        # 3 * place to the right: no interval hides another
        ends = [(x_of(x) + 3 * place, *map(y_of, rest)) for x, *rest in curves[key]]
        line = "L".join(f"{x} {y}" for x, y, *_ in ends)
        thick = "".join(f"M{x} {a}V{b}" for x, _, a, b in ends)
        free = max(free + 14, ends[-1][1] + 4)
        out.append(f'<g style="--hue:{215 + 137 * place}">'
                   f'<path d="M{line}"/><path class="ends" d="{thick}"/>'
                   f'<text x="278" y="{free}">{key.split(".")[-1]}</text></g>')
    return "".join([*out, "</svg>"])


# --------------------------------------------------------------------------------------------------
# 10. Command line
# --------------------------------------------------------------------------------------------------
def flags() -> Flags:
    """A flag for each setting; its help is the comment beside the field."""
    parser = Flags(description="Train a model on its own solutions.", allow_abbrev=False)
    group, default = parser, asdict(Settings())
    source = Path(__file__).read_text(encoding="utf-8")
    for line in re.search(r"class Settings:.*?def ", source, re.DOTALL)[0].split("\n"):
        if title := re.fullmatch(r"    # (.*)", line):
            group = parser.add_argument_group(title[1])
        elif setting := re.fullmatch(r"    (\w+): \w+ = \S+ +# (.*)", line):
            name, text = setting[1], setting[2].replace("%", "%%")
            group.add_argument("--" + name.replace("_", "-"), type=type(default[name]),
                               help=f"{text} (default: {default[name]!r})", metavar="X")
    group = parser.add_argument_group("instead of a run")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--evaluate", type=Path, metavar="FOLDER", help="accuracy of a model folder")
    one.add_argument("--decode", type=int, metavar="R", help="search at test time, after round R")
    one.add_argument("--compare", metavar="RECIPES", help="recipes to run, joined by commas")
    group.add_argument("--seeds", type=int, help="number of seeds of --compare (default: 3)")
    return parser


def main(arguments: list) -> int:
    """Exit code 0; 2 for bad input, with one sentence; 130 when interrupted."""
    start_console()
    try:
        parsed, rest = flags().parse_known_args(arguments)
        if rest:
            meant = f"did you mean --recipe {rest[0]}?" if rest[0] in RECIPES else "see --help."
            raise BadInput(f"{rest[0]} is no flag of this program: {meant}")
        given = {name: value for name in asdict(Settings())
                 if (value := getattr(parsed, name)) is not None}
        preset = SMOKE if parsed.preset == "smoke" else {}
        s = Settings(**preset | given)          # a flag that is given counts more than the preset
        if parsed.seeds is not None and parsed.compare is None:
            raise BadInput("--seeds needs --compare; the seed of one run is --seed.")
        if parsed.evaluate is not None:
            evaluate(replace(s, model=parsed.evaluate, rollouts=0, rollout_model=""))
        elif s.eval_data and not s.data:
            raise BadInput("--eval-data without --data: give a file of training questions, too.")
        elif parsed.decode is not None:
            decode(s, parsed.decode)
        elif parsed.compare is not None:
            names = [name.strip() for name in parsed.compare.split(",")]
            compare(s, names, 3 if parsed.seeds is None else parsed.seeds)
        else:
            run(s)
        return 0
    except SystemExit:                          # --help
        return 0
    except KeyboardInterrupt:
        resumes = "" if "--evaluate" in arguments else "; the same command goes on where it stopped"
        print(f"\nstopped{resumes}", file=sys.stderr)
        return 130
    except BadInput as error:
        message = error
    except OSError as error:
        message = (f"{error.filename or 'the output'}: {error.strerror or error}; mend it, and the "
                   "same command goes on where it stopped")
    except (MemoryError, RuntimeError) as error:    # known by its text; MemoryError may have none
        if not re.search("allocate|of memory|ALLOC_FAILED|^$", str(error)):
            raise
        message = ("out of memory; finished work is kept: give the same command with a lower "
                   "--rows, or start a new --out with a lower --chunk")
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
