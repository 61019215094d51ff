"""The whole loop: a language model that improves itself on questions whose final answers are known.

    base --> sample trees of solutions --> grade the ends --> find first pits --> train on pairs --+
              ^                                                                                    |
              `------------------------------- next round <----------------------------------------'

With no flag it trains a tiny GPT from scratch on a built-in task, *homework*, and improves it with AlphaLLM
(2404.12253) in minutes on two CPU cores. With --model and --data the same loop runs on open weights and real
questions. What is different from the published codes is said at the top of model.py, mcts.py, critic.py
and dpo.py; here it is that every recipe gets the same base, the same questions, the same optimiser steps and the
same number of *sampled tokens*, so that their accuracies can be compared at all.

Chapters: 1 Config   2 Files of a run   3 One chunk of questions   4 Evaluation   5 Recipes   6 The loop
          7 Comparing   8 Search at test time   9 Program
Try:  python loop.py                              AlphaLLM on homework: questions nobody has the answer to, searched
      python loop.py --preset smoke               the same in seconds, too small to learn anything
      python loop.py --recipe rft --seed 1        another method
      python loop.py --recipe self_explore        first pits, and pairs of them
      python loop.py --recipe combined            ours: rft, and a search for what samples do not find
      python loop.py --compare rft,self_explore --seeds 3
      python loop.py --decode RUN                 search with critics at test time, at equal sampled tokens
"""
import argparse
import difflib
import gc
import hashlib
import json
import os
import random
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from critic import HEADS, LEAST_AUC, LOG_PROB_FEATURES, TASKS, Builtin, Countdown, Critic, Exercises, Homework, Judge
from critic import Question, Rollouts, auc, calculations, confidence, critic_labels, critic_loss, critic_report
from critic import critic_values, label_pits, mcnemar, self_evaluation, wilson
from dpo import LOGITS_AT_ONCE, PART_TOKENS, Pair, Row, default_lr, load_weights, node_features, part_tokens
from dpo import preference_loss, sft_loss, store_reference, text_row, train, tree_row
from mcts import Forest, Steps, draw, expand, fixed_width, grow, importance_width, length_prior, pack, plant
from mcts import printable, search, uct
from model import GPT, BadInput, GPTConfig, Request, Sampler, Tokenizer, mix, read_json, read_safetensors
from model import step_rule, write_safetensors, write_text

# ----------------------------------------------------------------------------------------------------------
# 1 · Config: every setting of a run, one flag each
# ----------------------------------------------------------------------------------------------------------
@dataclass
class Config:
    """Settings; `--name value` on the command line. Those of `FREE` may change between two starts of a run."""
    task: str = "homework"        # the built-in task; ignored when --data is given
    model: str = ""               # folder with open weights (HF format); empty: train the tiny base from scratch
    data: str = ""                # training questions for --model: JSON lines, one of critic.KINDS
    eval_data: str = ""           # held-out questions, same form; without both --model works on the built-in task
    sft_data: str = ""            # --model is first fine-tuned on the solutions of this file, as in all three papers
    template: str = ""            # prompt with {question} in it, for chat models; empty: Question: ... Answer:
    recipe: str = "alphallm"      # of RECIPES; with --data, unless one is named, self_explore
    rounds: int = 3
    seed: int = 0
    out: str = ""                 # folder of the run; default runs/TASK_RECIPE_seedS, or runs/MODEL_DATA_RECIPE_seedS
    preset: str = "default"       # default, or smoke: the whole loop in seconds
    device: str = "auto"          # auto: CUDA when there is one
    dtype: str = "auto"           # auto, float32 or bfloat16; auto measures on a CPU (open weights only)
    threads: int = 0              # CPU threads; 0 measures which is faster, one or all
    # -- sampling
    questions: int = 320          # new questions a round
    samples: int = 8              # first samples a question
    budget: int = 1000            # sampled tokens per question and round, labelling included: what binds a round
    completions: int = 4          # k of Self-Explore: completions per prefix; good ones look false with (1-p)^k
    pit_search: str = "linear"    # linear (the paper) or bisect
    temperature: float = 1.0      # the published 0.7 suits 7B models; a tiny one is not diverse enough there
    max_tokens: int = 128         # of one solution
    step: str = "line"            # what trees branch at: a line, a paragraph (with a formula), or a number of tokens
    chunk: int = 200              # questions worked together; results are saved after each chunk
    rows: int = 256               # solutions (steps, in a search) decoded at once
    # -- search (mcts_dpo)
    simulations: int = 1000       # K, at most: of a tree; with --commit 1 before each commitment (paper: 5)
    commit: int = 0               # 1: after K the best child becomes the root, until an end; 0: all from the root
    root_width: int = 5           # b1: steps sampled at the root (paper: 5)
    width_below: int = 3          # b2: below it (paper: 3)
    widen: int = 8                # draw b1 or b2 more steps at a node after each so many visits; 0: never (the paper)
    c_puct: float = 1.0           # exploration
    greedy_child: int = 0         # 1: the first step of each expansion is the argmax
    self_eval: str = "off"        # C(s) at the ends: off, logp (the sampler's confidence) or judge (asks the model)
    judge_sees_answer: int = 0    # 1: the judge is shown the reference solution: a gold leak
    pair_nodes: str = "all"       # path: pairs along the committed path (the paper); all: at every node
    min_visits: int = 1           # of both sides of a pair
    gap: float = 0.25             # least difference of their Q
    imitate: float = 0.75         # share of a round's steps that imitate the solutions found before DPO begins
    imitate_rounds: int = 1       # the first so many rounds do
    reference: str = "round"      # of mcts_dpo: the model that DPO starts from (after --imitate), or the base
    # -- critics (alphallm, combined, --decode)
    critic_share: float = 0.4     # of the budget: samples, which the critics learn from; the rest is searched
    critic_steps: int = 600       # optimiser steps of the heads; 32 trees each
    imagined: int = 0             # synthesised questions a round; 0: as many as training questions
    alpha: float = 10.0           # adaptive width: 1 never widens, 10 uses the whole range (1, most_width)
    most_width: int = 10          # c_max below the root (four times that at the root)
    c_uct: float = 0.1            # exploration of UCT; returns lie in [0, 1]
    critic: str = "heads"         # heads on the policy's states, or judge: the policy is asked (open weights that can)
    value_weight: float = 1.0     # b_v of a leaf's score; by the weakest link: 0 leaves that head out
    process_weight: float = 1.0   # b_prm
    rollouts: int = 0             # fast rollouts of each leaf by a smaller policy (the paper); 0: none
    rollout_weight: float = 1.0   # b_orm of their mean outcome
    rollout_model: str = ""       # the smaller policy's folder; empty, built-in task: a base of one layer
    leaf_score: str = "weakest"   # alphallm, --decode: weakest link of the path, or sum (the paper; combined, always)
    critic_window: int = 3        # critics learn from the forests of the last so many rounds
    merge: int = 1                # 1: steps with the same calculation are one child
    keep: float = 0.5             # a trajectory is imitated from this score on, if its answer has half of the visits
    save_seconds: float = 20.0    # how often an unfinished training is saved
    # -- learning
    steps: int = 64               # optimiser steps a round, the same for every recipe
    batch: int = 32               # trees (questions) per step
    part_tokens: int = 0          # padded tokens of one forward in training; 0: 2,048 on a CPU, 16,384 on CUDA
    beta: float = 0.1             # DPO: how far from the reference (2305.18290)
    nll: float = 1.0              # weight of the NLL term on chosen sides
    loss: str = "sigmoid"         # sigmoid or ipo
    smoothing: float = 0.0        # conservative DPO: chance that a pit is false
    dpo_lr: float = 0.0           # 0: by model size, dpo.default_lr
    sft_lr: float = 0.0
    # -- the base: the tiny one from scratch, or open weights fine-tuned on the task's corpus or on --sft-data
    width: int = 128
    layers: int = 3
    base_steps: int = 1050
    base_batch: int = 32
    base_lr: float = 0.0          # 0: 4e-3 from scratch; open weights: dpo.default_lr
    careless: float = 0.8         # share of lines on which a student of the corpus ignores precedence
    min_operators: int = 3        # of a homework question
    max_operators: int = 4
    traps: int = 0                # lines of a homework question, at least, on which the leftmost operation is wrong
    numbers: int = 3              # of a countdown question
    # -- evaluation
    eval_questions: int = 2000
    base: str = ""                # folder of the cached base; default next to the run, named by its settings
    compare: str = ""             # recipes to run or resume and compare: rft,self_explore,...
    seeds: int = 3                # seeds of --compare: 0, 1, ...
    regimes: str = ""             # with --compare: on each of these settings: often,some,rare,countdown
    decode: str = ""              # only compare search at test time with votes, on this run's first and last model
    decode_questions: int = 300   # held-out questions for it
    evaluate: str = ""            # only evaluate this model folder or the last round of this run


FREE = ("out", "base", "compare", "seeds", "regimes", "evaluate", "decode", "decode_questions", "preset",
        "save_seconds", "part_tokens")          # not part of a run's identity
SEARCH_FLAGS = ("alpha", "most_width", "c_uct", "critic", "value_weight", "process_weight", "rollouts",
                "rollout_weight", "rollout_model", "leaf_score", "merge", "widen", "root_width", "critic_steps",
                "critic_window", "chunk")       # --decode takes these from its flags
SMOKE = dict(rounds=1, questions=16, samples=4, budget=300, completions=2, chunk=8, rows=64, steps=4, batch=8,
             width=32, layers=2, base_steps=40, base_batch=16, eval_questions=32, max_tokens=96, critic_steps=30,
             threads=1, save_seconds=0.1)
RANGES = dict(rounds=(0, 1000), questions=(1, 10**7), samples=(1, 1024), budget=(1, 10**7), completions=(1, 1024),
              temperature=(0.01, 10.0), max_tokens=(4, 10**6), chunk=(1, 4096), rows=(1, 65536), steps=(1, 10**6),
              batch=(1, 4096), part_tokens=(0, 1 << 24), beta=(1e-6, 100.0), nll=(0.0, 100.0), smoothing=(0.0, 0.499),
              dpo_lr=(0.0, 1.0), sft_lr=(0.0, 1.0), width=(8, 4096), layers=(1, 64), base_steps=(1, 10**7),
              base_batch=(1, 4096), base_lr=(0.0, 1.0), careless=(0.0, 1.0), min_operators=(1, 8),
              max_operators=(1, 8), traps=(0, 7), numbers=(2, 5), simulations=(1, 10**6), commit=(0, 1),
              root_width=(1, 256), width_below=(1, 256), widen=(0, 10**6), c_puct=(0.0, 1000.0), greedy_child=(0, 1),
              judge_sees_answer=(0, 1), min_visits=(1, 10**6), gap=(0.0, 10.0), imitate=(0.0, 0.99),
              imitate_rounds=(0, 1000), critic_share=(0.05, 0.95), critic_steps=(1, 10**6), critic_window=(1, 1000),
              imagined=(0, 10**7), alpha=(0.0, 1e6), most_width=(1, 256), c_uct=(0.0, 1000.0), keep=(0.0, 1.0),
              value_weight=(0.0, 1000.0), process_weight=(0.0, 1000.0), rollouts=(0, 1024),
              rollout_weight=(0.0, 1000.0), merge=(0, 1), decode_questions=(1, 10**7), eval_questions=(1, 10**7),
              threads=(0, 1024), seed=(0, 2**31), seeds=(1, 100), save_seconds=(0.0, 1e9))
HELP = dict(data="training questions: JSON lines of GSM8K, MATH, SciQ, ARC or CommonsenseQA; ",
            eval_data="held-out questions, graded as those of --data; ",
            template="the prompt, with {question} in it; \\n is a newline, special tokens count as such; ")
CHOICES = dict(task=tuple(TASKS), preset=("default", "smoke"), pit_search=("linear", "bisect"),
               loss=("sigmoid", "ipo"),        # recipe: the names of RECIPES, below
               dtype=("auto", "float32", "bfloat16"), self_eval=("off", "logp", "judge"), pair_nodes=("path", "all"),
               reference=("round", "base"), leaf_score=("weakest", "sum"), critic=("heads", "judge"))


def parse_flags(arguments: list) -> Config:
    """Flags -> Config. Unknown flags name close ones; values out of range are refused with the range."""
    parser = argparse.ArgumentParser(prog="loop.py", allow_abbrev=False, add_help=bool({"-h", "--help"} & {*arguments}),
                                     description=__doc__.split("\n\n")[0], exit_on_error=False)
    for f in fields(Config):
        parser.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), default=None,
                            help=f"{HELP.get(f.name, '')}default {f.default!r}", choices=CHOICES.get(f.name))
    try:
        given, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise BadInput(f"{error}.") from error
    if unknown:
        names = ["--" + f.name.replace("_", "-") for f in fields(Config)]
        close = difflib.get_close_matches(unknown[0].split("=")[0], names, 3)
        raise BadInput(f"Unknown flag {unknown[0]}; " + (f"did you mean {' or '.join(close)}?" if close else
                                                         "python loop.py --help lists all."))
    given = {k: v for k, v in vars(given).items() if v is not None}
    if given.get("data"):                               # where `alphallm` was never measured, and letters it refuses
        given = {"recipe": "self_explore"} | given
    return check_config(replace(Config(), **((SMOKE if given.get("preset") == "smoke" else {}) | given)))


def check_config(c: Config) -> Config:
    """Ranges and combinations. Raises BadInput naming the flag."""
    for name, (low, high) in RANGES.items():
        if not low <= getattr(c, name) <= high:
            raise BadInput(f"--{name.replace('_', '-')} = {getattr(c, name)} is out of range: {low} to {high}.")
    if c.max_operators < c.min_operators:
        raise BadInput(f"--max-operators = {c.max_operators} is below --min-operators = {c.min_operators}.")
    if c.template and (not (c.model and c.data or c.evaluate) or c.template.count("{question}") != 1):
        raise BadInput("--template needs --model FOLDER and --data (or --evaluate), and in its text {question} exactly "
                       "once; a built-in task has a prompt of its own.")
    if not c.model and (c.data or c.eval_data and not c.evaluate):
        raise BadInput("--data and --eval-data need --model FOLDER: the tiny base only knows the built-in task.")
    if bool(c.data) != bool(c.eval_data) and not c.evaluate:
        raise BadInput("--data FILE.jsonl (training questions) and --eval-data FILE.jsonl (held-out) go together; "
                       "without both --model works on the built-in --task.")
    if c.sft_data and not c.data:
        raise BadInput("--sft-data needs --data and --eval-data; a built-in task has a corpus of its own.")
    step_rule(c.step, Tokenizer.bytes_only())
    if c.rollouts and c.model and not c.rollout_model:
        raise BadInput("--rollouts with --model needs --rollout-model FOLDER: a smaller model with the same tokenizer.")
    if c.traps >= c.max_operators:
        raise BadInput(f"--traps = {c.traps} needs --max-operators of {c.traps + 1} or more: the first is no product.")
    for regime in filter(None, c.regimes.split(",")):
        if regime not in REGIMES or c.model or not c.compare:
            raise BadInput(f"--regimes {c.regimes}: with --compare and a built-in task, any of {', '.join(REGIMES)}.")
    if c.width % 8:
        raise BadInput(f"--width = {c.width} must be a multiple of 8 (four heads of an even width).")
    for recipe in filter(None, c.compare.split(",")):
        if recipe not in CHOICES["recipe"]:
            raise BadInput(f"--compare: unknown recipe {recipe!r}; there are {', '.join(CHOICES['recipe'])}.")
    return c


# ----------------------------------------------------------------------------------------------------------
# 2 · Files of a run
# ----------------------------------------------------------------------------------------------------------
def lock(folder: Path, wait: bool = False):
    """Hold `folder` for this process; the system lets go when the process dies, so a lock is never stale.
    Raises BadInput when another process holds it (wait: stand in line instead)."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = open(folder / "lock", "w", encoding="utf-8")
    try:
        import fcntl
    except ImportError:           # Windows: no advisory locks; two runs in one folder are the user's to avoid
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        raise BadInput(f"{folder} is in use by another run; wait for it, stop it, or choose another --out.") from error
    return handle


def write_lines(path: Path, items: list) -> None:
    """JSON lines, in one atomic write."""
    write_text(path, "".join(json.dumps(i, ensure_ascii=False) + "\n" for i in items))


def read_lines(path: Path) -> list:
    """JSON lines written by ourselves. Raises BadInput when damaged."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged ({error}); delete it and run the same command again.") from error


def publish(temporary: Path, final: Path) -> None:
    """Make a finished folder visible under its name in one step."""
    if final.exists():            # killed between these two lines: the folder is written anew by the next start
        shutil.rmtree(final)
    os.rename(temporary, final)


def run_dir(c: Config) -> Path:
    """The folder of a run."""
    return Path(c.out or f"runs/{source(c)}_{c.recipe}_seed{c.seed}")


def source(c: Config) -> str:
    """What a run works on, for names of folders: homework, FOLDER_homework, FOLDER_train."""
    return "_".join(filter(None, (Path(c.model).name, Path(c.data).stem or c.task)))


class Run:
    """What all stages of one run share: settings, folder, task, model, sampler."""

    fast = None                   # critic.Rollouts, when the search has a smaller policy at hand

    def __init__(self, config: Config):
        self.c, self.dir = config, run_dir(config)
        self.work, self.near = self.dir / "work", self.dir.parent
        self.lock = lock(self.dir)
        self.settings()
        self.work.mkdir(exist_ok=True)
        torch.set_num_threads(self.c.threads)
        model, self.tokenizer = None, None
        if self.c.model:
            model = GPT.from_pretrained(self.c.model, self.c.device, getattr(torch, self.c.dtype))
            self.tokenizer = Tokenizer.from_pretrained(self.c.model)
            model.bind(self.tokenizer)
        if self.c.data:
            self.task = Exercises(self.c, self.tokenizer, model.config.max_positions)
            print(self.task.describe())
        else:
            self.task = TASKS[self.c.task](self.c, self.tokenizer)
            self.tokenizer = self.task.tokenizer
            self.task.eval_questions()                  # too few are refused before minutes of training
            if self.c.recipe != "sft":
                self.task.train_questions(1)
        trained = not self.c.data or self.c.sft_data
        self.model = base_model(self.c, self.task, self.near, self.round_dir(0).exists(), model) if trained else model
        self.model.part_tokens = self.c.part_tokens
        self.sampler = Sampler(self.model, self.tokenizer, 4096, self.c.rows, self.task.over, self.c.step)
        self.chunk = self.plan()

    def settings(self) -> None:
        """Measure what is left to measure at the first start; afterwards compare with the settings saved then."""
        # what is "auto" or 0 is measured once, at the first start, and holds for the run: a second measurement could
        # choose another dtype or number of threads, and the run would not end in the same bytes
        file, mine = self.dir / "config.json", {k: v for k, v in asdict(self.c).items() if k not in FREE}
        if file.exists():
            saved = read_json(file)["settings"]
            asked = {k: v for k, v in mine.items() if not (k in ("device", "dtype") and v == "auto") and
                     not (k == "threads" and v == 0)}
            saved = {k: v for k, v in asdict(Config()).items() if k not in FREE} | saved        # of an older version
            wrong = [f"--{k.replace('_', '-')} was {saved[k]!r}, now {v!r}" for k, v in asked.items() if saved[k] != v]
            if wrong:
                raise BadInput(f"{self.dir} was begun with other settings: {'; '.join(wrong)}. "
                               "Repeat the old flags, or choose another --out.")
        else:
            saved = mine | measured(self.c)
            write_text(file, json.dumps({"settings": saved}, indent=1) + "\n")
        held, asked = read_json(file).get("held", {}), self.c.part_tokens                       # see `halve`
        self.c = replace(self.c, **(saved | held))
        self.c.part_tokens = min(asked or 1 << 24, self.c.part_tokens or 1 << 24) % (1 << 24)
        default = asdict(Config())
        print(f"{self.dir}: " + (", ".join(f"{k} {v}" for k, v in saved.items() if v != default[k]) or "defaults"))

    def plan(self) -> int:
        """Print what will lie in memory, but for activations. -> questions per chunk: as asked, halved until keys and
        values of a chunk fit half of the free memory. Chosen at the first start: files of chunks depend on it."""
        file, free, mib = self.dir / "config.json", free_memory(self.model.device), 2 ** 20
        # note: only keys and values grow with the chunk; twice the budget, as the last wave of a chunk may overshoot
        per_question = self.sampler.bytes_per_slot(self.model) * (2 * self.c.budget + self.c.max_tokens)
        chunk = read_json(file).get("chunk") or self.c.chunk
        while chunk > 1 and chunk * per_question > free / 2 and "chunk" not in read_json(file):
            chunk //= 2
        write_text(file, json.dumps(read_json(file) | {"chunk": chunk}, indent=1) + "\n")
        size = sum(p.numel() for p in self.model.parameters())
        half = self.model.dtype != torch.float32                        # then fp32 masters and their gradients, too
        plan = dict(weights=size * self.model.dtype.itemsize, masters=4 * size * half,
                    gradients=size * (4 + 2 * half), optimiser=8 * size,
                    logits=8 * min(LOGITS_AT_ONCE, part_tokens(self.model) * self.model.config.vocab_size))
        print("memory: " + ", ".join(f"{k} {v / mib:,.0f}" for k, v in plan.items() if v) + " MiB; keys and values of "
              f"a chunk of {chunk} questions up to {chunk * per_question / mib:,.0f} MiB; "
              f"{free / 2 ** 30:.1f} GiB free")
        print(f"{self.c.device}, {self.c.dtype}, {self.c.threads} threads")
        return chunk

    def log(self) -> list:
        """Rows so far."""
        return read_lines(self.dir / "log.jsonl") if (self.dir / "log.jsonl").exists() else []

    def round_dir(self, round_: int) -> Path:
        """HF-format folder of the model after a round."""
        return self.dir / f"round_{round_}"

    def load(self, round_: int) -> None:
        """Put the weights of a finished round into the model: those of the folder, then the fp32 masters."""
        saved = GPT.from_pretrained(self.round_dir(round_), "cpu", torch.float32)
        exact = self.round_dir(round_) / "optimizer.safetensors"
        load_weights(self.model, dict(saved.named_parameters()), exact if exact.exists() else None)

    def save(self, round_: int, state: Path | None) -> None:
        """Write the model as round_K, atomically; state: the training file that becomes its optimizer state."""
        temporary = self.dir / f"round_{round_}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        self.model.save_pretrained(temporary)
        self.tokenizer.save(temporary)
        if state is not None:
            shutil.copyfile(state, temporary / "optimizer.safetensors")
        publish(temporary, self.round_dir(round_))


def free_memory(device: torch.device) -> int:
    """Bytes free on the device, as far as the system tells."""
    if device.type == "cuda":
        torch.cuda.empty_cache()                        # what torch keeps for later counts as free
        return torch.cuda.mem_get_info(device)[0]
    names = getattr(os, "sysconf_names", {})
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_AVPHYS_PAGES" in names else 4 << 30


def measured(c: Config) -> dict:
    """Device, dtype and threads where the config leaves them open: timed on (4096, 512) by (512, 512) products."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if c.device == "auto" else c.device
    dtype = c.dtype

    def seconds(kind, threads):
        """Best of 5 products in this dtype on so many threads."""
        torch.set_num_threads(threads)
        x, w = torch.randn(4096, 512, dtype=kind), torch.randn(512, 512, dtype=kind)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            (x @ w).relu_().sum()
            times.append(time.perf_counter() - start)
        return min(times)
    # all cores only where they are a tenth faster: on a small model's products two threads often lose to one
    every = os.cpu_count() or 1
    threads = c.threads or (1 if seconds(torch.float32, 1) < 1.1 * seconds(torch.float32, every) else every)
    if dtype == "auto":           # from scratch stays fp32; open weights: bf16 where its products are faster
        faster = c.model and device == "cpu" and \
            seconds(torch.bfloat16, threads) * 1.5 < seconds(torch.float32, threads)
        dtype = "bfloat16" if faster or (c.model and device == "cuda") else "float32"
    return dict(device=device, dtype=dtype, threads=threads)


def base_model(c: Config, task, near: Path, begun: bool = False, model: GPT | None = None) -> GPT:
    """The base, trained once per settings and seed and kept for all runs in `near`: the tiny one from scratch on the
    built-in task's corpus; an open `model` fine-tuned on that corpus, or on --sft-data (rationales: all three papers
    do so first). begun: the run has weights of its own, which `Run.load` fills in."""
    # footgun: a setting that changes the base and is not named here would make two different bases share one folder
    names = ("task", "seed", "width", "layers", "base_steps", "base_batch", "base_lr", "careless", "min_operators",
             "max_operators", "traps", "numbers", "threads", "device", "dtype", "model", "template")
    about = {n: getattr(c, n) for n in names}
    about["sft_data"] = hashlib.sha256(Path(c.sft_data).read_bytes()).hexdigest() if c.sft_data else ""
    about = json.dumps(about | {"model": str(Path(c.model).resolve()) if c.model else ""})
    folder = Path(c.base) if c.base else near / f"base_{hashlib.sha256(about.encode()).hexdigest()[:10]}"
    scratch = model is None
    if scratch:
        model = GPT(GPTConfig.tiny(task.tokenizer.n_ids, c.width, c.layers)).initialise(c.seed).to(c.device)
        model.bind(task.tokenizer)
    if begun:
        return model
    model.part_tokens = c.part_tokens
    # two runs started together: one trains the base, the other waits here and then finds it
    held = lock(folder, wait=True)
    if not (folder / "done" / "model.safetensors").exists():
        print(f"training the base {'from scratch' if scratch else f'from {c.model}'}: "
              f"{sum(p.numel() for p in model.parameters()):,} parameters, {c.base_steps * c.base_batch:,} solutions "
              f"{f'of {c.sft_data}' if c.sft_data else 'by careless students'} (kept in {folder})")
        state, corpus = folder / "training.safetensors", Corpus(task, c)
        if c.sft_data:
            rng = random.Random(c.seed)
            corpus = Batches([text_row(*task.example(q, rng)) for q in task.rationales], c.base_batch,
                             c.base_steps, mix(c.seed, 7))
        lr = c.base_lr or (4e-3 if scratch else default_lr(model, "sft"))
        report = train(model, corpus, sft_loss, lr, muon=scratch, warmup=min(50, c.base_steps // 10), state=state,
                       save_seconds=c.save_seconds, label="base")
        shutil.rmtree(folder / "tmp", ignore_errors=True)
        model.save_pretrained(folder / "tmp")
        task.tokenizer.save(folder / "tmp")
        write_text(folder / "tmp" / "training.json", json.dumps(report) + "\n")
        publish(folder / "tmp", folder / "done")
        state.unlink()
    held.close()
    load_weights(model, dict(GPT.from_pretrained(folder / "done", "cpu", torch.float32).named_parameters()))
    return model


class Corpus:
    """Batches of the base's corpus, each solution seen once; batch i is a function of (seed, i) alone."""

    def __init__(self, task, c: Config):
        self.task, self.c, self.block = task, c, (-1, [])

    def __len__(self):
        return self.c.base_steps

    def __getitem__(self, i):
        # sixteen batches are drawn together and cut by length: a fifth less padding
        if self.block[0] != i // 16:
            rng = random.Random(mix(self.c.seed, i // 16, 7))
            stream = self.task.stream(mix(self.c.seed, i // 16, 8), held_out=False)
            rows = [text_row(*self.task.example(next(stream), rng)) for _ in range(16 * self.c.base_batch)]
            rows.sort(key=lambda r: len(r.packed.ids))
            batches = [rows[j:j + self.c.base_batch] for j in range(0, len(rows), self.c.base_batch)]
            rng.shuffle(batches)
            self.block = (i // 16, batches)
        return self.block[1][i % 16]


class Batches:
    """`steps` batches of `batch` rows: shuffled epochs over the rows, a function of the seed alone."""

    def __init__(self, rows: list, batch: int, steps: int, seed: int):
        # no row comes again before all have come: with few pairs and many steps this is what memorising looks like
        order, rng = [], random.Random(seed)
        while len(order) < batch * steps:
            order += rng.sample(range(len(rows)), len(rows))
        self.batches = [[rows[j] for j in order[i * batch:(i + 1) * batch]] for i in range(steps)]

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        return self.batches[i]


# ----------------------------------------------------------------------------------------------------------
# 3 · One chunk of questions: sample, grade, label, until the token budget is spent
# ----------------------------------------------------------------------------------------------------------
def grade_leaves(run: Run, questions: list, forest: Forest, leaves) -> None:
    """Set forest.right of (tree, leaf) pairs."""
    for b, leaf in leaves:
        if forest.right[b, leaf] < 0:
            text = forest.text(b, leaf, run.tokenizer, run.model.stop_ids)
            forest.right[b, leaf] = run.task.reward(questions[b].text, text, questions[b].answer)


@dataclass
class Worked:
    """A question with what the round made of it."""
    question: Question
    forest: Forest
    b: int                        # its tree in the forest
    pits: list                    # self_explore: [{leaf, step, node, probes}]
    path: list                    # mcts_dpo: nodes the search committed to


def work_chunk(run: Run, round_: int, first: int, questions: list, how, bar) -> tuple:
    """Trees of one chunk, whatever ran before it: -> (Forest, labels, paths, counts). All recipes are bound by the same
    number of sampled tokens per question (within the rounding of the last wave)."""
    # subtle: seeds come from the question's place in the round and the store starts empty, so a chunk gives the same
    # trees after a restart as in a run that was never stopped
    forest, seeds = Forest(len(questions)), [mix(run.c.seed, round_, first + b, 3) for b in range(len(questions))]
    run.sampler.reset()
    before, fast = dict(run.sampler.counts), run.fast and (run.fast.sampler.counts["sampled"], run.fast.seconds)
    for b, q in enumerate(questions):
        plant(forest, b, run.sampler, run.task.prompt_ids(q))
    labels, paths = how(run, questions, forest, seeds, bar.update)
    counts = {k: run.sampler.counts[k] - v for k, v in before.items()}
    if fast:                      # tokens of the smaller policy are counted apart
        counts |= dict(rollout=run.fast.sampler.counts["sampled"] - fast[0], rollout_seconds=run.fast.seconds - fast[1])
    return forest, labels, paths, counts


def sample_trees(run: Run, questions: list, forest: Forest, seeds: list, progress) -> tuple:
    """Waves of whole samples; with self_explore each wave's wrong solutions are labelled before the next."""
    c, sampler, pits, seen = run.c, run.sampler, [], set()
    start = sampler.counts["sampled"]

    def spent():
        """Tokens sampled for this chunk so far."""
        return sampler.counts["sampled"] - start

    def sample(wants):
        """Grow and grade; -> [(tree, leaf)]."""
        leaves = grow(forest, sampler, wants, seeds, c.max_tokens, c.temperature, progress)
        ends = [(b, n) for (b, _, _), found in zip(wants, leaves) for n in found]
        grade_leaves(run, questions, forest, ends)
        return ends

    def complete(wants):
        """The same for labels; -> tokens."""
        was = spent()
        sample(wants)
        return spent() - was
    share = c.critic_share if c.recipe == "alphallm" else 1             # the rest is for synthesised questions
    budget, count, drawn = share * c.budget * len(questions), c.samples, 0
    while count:
        # 1) a wave of whole solutions from every root; equal steps become one node with a count
        ends = sample([(b, 0, count) for b in range(len(questions))])
        drawn += count
        # 2) Self-Explore: first pits of what is newly wrong; its completions are branches like all others
        if c.recipe == "self_explore":
            wrong = [e for e in dict.fromkeys(ends) if forest.right[e] == 0 and e not in seen]
            seen.update(wrong)
            pits += label_pits(forest, wrong, complete, c.completions, c.pit_search, budget - spent())
        if c.recipe == "combined" and drawn == count:                   # keep tokens to search what is not solved
            unsolved = sum(not forest.below(b)[0] for b in range(len(questions)))
            if unsolved > SEARCH_FROM * len(questions):
                budget -= (1 - c.critic_share) * c.budget * unsolved
        # 3) as many more samples of every question as the rest of the budget pays for, at what one has cost so far
        per_sample = spent() / (drawn * len(questions))                 # labelling included
        count = max(0, min(c.samples, int((budget - spent()) / per_sample / len(questions))))
    for p in pits:                # a later branch recovered from this "pit": it was none (one of the (1-p)^k)
        if p.node is not None and forest.below(p.tree)[p.node]:
            p.step = p.node = None
    return pits, [[] for _ in questions]


# `combined` searches when so large a share of a chunk's questions has no right solution after the first wave.
# Measured on 320 questions: at 78% ("rare") the search gains 7 points in a round; searching all the same at 52%
# (countdown) and 35% ("some") loses one or two in three rounds, at 18% ("often") it gains none.
SEARCH_FROM = 2 / 3


def search_trees(run: Run, questions: list, forest: Forest, seeds: list, progress) -> tuple:
    """MCTS to terminals. The return of an end is R = O + C: O = 1 right, -1 wrong; C = self-evaluation, if any."""
    c = run.c

    def evaluate(forest, ends):
        """R of finished solutions."""
        grade_leaves(run, questions, forest, ends)
        # C lies in [0, 1], O differs by 2: the judge can only choose among ends of the same grade
        extra = self_evaluate(run, questions, forest, ends)
        return [2.0 * forest.right[e] - 1.0 + x for e, x in zip(ends, extra)]
    proposer = Steps(forest, run.sampler, seeds, c.max_tokens, c.temperature, bool(c.greedy_child), progress)
    return [], search(forest, proposer, evaluate, c.simulations, c=c.c_puct, to_terminal=True, commit=bool(c.commit),
                      width=fixed_width(c.root_width, c.width_below, c.widen), budget=c.budget)


def self_evaluate(run: Run, questions: list, forest: Forest, ends: list) -> list:
    """C of each end as --self-eval says."""
    if run.c.self_eval == "judge":
        shown = [q.answer for q in questions] if run.c.judge_sees_answer else None
        return self_evaluation(forest, ends, run.sampler, shown)
    return confidence(forest, ends) if run.c.self_eval == "logp" else [0.0] * len(ends)


def sample_round(run: Run, round_: int, questions: list, how, name: str = "trees") -> list:
    """All trees of a round, worked chunk by chunk. A chunk's file is written when the chunk is done; chunks that have
    their file are not worked again. Result: trees_RR.jsonl."""
    file = run.dir / f"{name}_{round_:02d}.jsonl"
    if not file.exists():
        chunks = range(0, len(questions), run.chunk)
        bar = tqdm(desc=f"round {round_}: {name}", unit=" tokens", unit_scale=True, leave=False,
                   total=run.c.budget * len(questions))
        parts = []
        for first in chunks:
            part = run.work / f"{name}_{round_:02d}_{first:06d}.jsonl"
            if not part.exists():
                start, group = time.time(), questions[first:first + run.chunk]
                forest, pits, paths, counts = work_chunk(run, round_, first, group, how, bar)
                rows = []
                for b, q in enumerate(group):
                    labels = [{"leaf": int(p.leaf), "step": p.step, "node": p.node, "probes": p.probes}
                              for p in pits if p.tree == b]
                    rows.append({"question": q.text, "answer": q.answer, "tree": forest.to_json(b), "pits": labels,
                                 "path": paths[b]})
                # counts first: a chunk is done when its trees are there
                write_lines(part.with_suffix(".counts"), [counts | {"seconds": time.time() - start}])
                write_lines(part, rows)
            bar.n = (first + run.chunk) * run.c.budget
            bar.refresh()
            parts.append(part)
        bar.close()
        counts = [read_lines(p.with_suffix(".counts"))[0] for p in parts]
        write_lines(run.work / f"{name}_{round_:02d}.counts", [{k: sum(x[k] for x in counts) for k in counts[0]}])
        write_lines(file, [row for p in parts for row in read_lines(p)])
    return read_trees(file, questions)


def round_counts(run: Run, round_: int, names=("trees", "searched", "questions", "imagined")) -> dict:
    """Sampler counts and seconds of all that was sampled this round, or of parts of it. note: the folder may still hold
    those of the round before, when the run was killed before it was emptied."""
    files = [run.work / f"{name}_{round_:02d}.counts" for name in names]
    counts = [read_lines(file)[0] for file in files if file.exists()]
    return {k: sum(x.get(k, 0) for x in counts) for k in {k for x in counts for k in x}}


def read_trees(file: Path, questions=None) -> list:
    """[Worked] of a trees file."""
    rows = read_lines(file)
    questions = questions or [Question(row["question"], row["answer"], 0) for row in rows]
    forest = Forest.from_json([row["tree"] for row in rows])
    return [Worked(q, forest, b, row["pits"], row["path"]) for b, (q, row) in enumerate(zip(questions, rows))]


def sampling_report(run: Run, trees: list) -> dict:
    """Log keys about the trees of a round."""
    # a label without a step: the wrong solution has no pit (a later branch recovered, or the budget ended first)
    pits = [(t, p) for t in trees for p in t.pits]
    found = [(t, p) for t, p in pits if p["step"] is not None]
    text = lambda t, n: t.forest.text(t.b, n, run.tokenizer, run.model.stop_ids)
    right, wrong = (sum(int(t.forest.below(t.b, r)[0]) for t in trees) for r in (1, 0))
    answers = [len({run.task.find_answer(text(t, n))[0] for n in t.forest.leaves(t.b)}) for t in trees]
    # homework alone knows the truth: which line of a wrong solution is the first after which the answer is out of reach
    true = [run.task.first_false_step(t.question, text(t, p["leaf"])) == p["step"] for t, p in found] \
        if isinstance(run.task, Homework) and run.c.step == "line" else []
    forest = trees[0].forest
    ends = [(t.b, n) for t in trees for n in forest.leaves(t.b) if forest.visits[t.b, n]]
    scores = [forest.score[e] - (2.0 * forest.right[e] - 1.0) for e in ends]            # C alone
    mean = lambda values: round(float(np.mean(values)), 4) if len(values) else None
    return dict(sampled_accuracy=round(right / max(1, right + wrong), 4), distinct_answers=mean(answers),
                solved=mean([t.forest.below(t.b)[0] > 0 for t in trees]), pits=len(found),
                probes=sum(p["probes"] for _, p in pits), pit_agreement=mean(true),
                simulations=mean([forest.visits[t.b, 0] for t in trees]),
                committed_right=mean([forest.right[t.b, t.path[-1]] == 1 for t in trees if t.path]),
                self_eval_auc=None if run.c.self_eval == "off" else auc(scores, [forest.right[e] == 1 for e in ends]))


# ----------------------------------------------------------------------------------------------------------
# 4 · Evaluation
# ----------------------------------------------------------------------------------------------------------
def greedy(run: Run, questions: list, progress=None) -> list:
    """One greedy solution per question: [(text, why it stopped, tokens)]."""
    run.sampler.reset()
    requests = [Request(run.sampler.prompt(run.task.prompt_ids(q)), 0, run.c.max_tokens) for q in questions]
    return [(run.tokenizer.decode_more([int(i) for i in o.ids if i not in run.model.stop_ids]), o.why, len(o.ids))
            for o in run.sampler.extend(requests, 0, progress=progress)]


def evaluate(run: Run, round_: int) -> dict:
    """Greedy accuracy on the held-out questions; per-question results in eval_RR.jsonl. Tokens sampled here are
    not counted as training tokens."""
    file, questions, size = run.dir / f"eval_{round_:02d}.jsonl", run.task.eval_questions(), 4 * run.chunk
    start = time.time()                                 # size: one greedy solution needs far less memory than a tree
    if not file.exists():
        bar = tqdm(desc=f"round {round_}: evaluating", unit=" tokens", unit_scale=True, leave=False)
        for first in range(0, len(questions), size):
            part = run.work / f"eval_{round_:02d}_{first:06d}.jsonl"
            if not part.exists():
                group = questions[first:first + size]
                solved = zip(group, greedy(run, group, bar.update))
                write_lines(part, [result(run.task, q, *found) for q, found in solved])
        bar.close()
        write_lines(file, [row for first in range(0, len(questions), size)
                           for row in read_lines(run.work / f"eval_{round_:02d}_{first:06d}.jsonl")])
    return accuracy_report(read_lines(file), run.task.form) | {"eval_seconds": time.time() - start}


def result(task, q: Question, text: str, why: str, length: int) -> dict:
    """What is kept of one evaluated question."""
    return dict(question=q.text, answer=q.answer, steps=q.steps, text=text, right=task.reward(q.text, text, q.answer),
                rule=task.find_answer(text)[1], why=why, tokens=length)


def accuracy_report(rows: list, form: str) -> dict:
    """Log keys about an evaluation. form: the rule of a strict answer."""
    n, right = len(rows), sum(r["right"] for r in rows)
    low, high = wilson(right, n)
    groups = {}
    for r in rows:
        groups.setdefault(r["steps"], []).append(r["right"])
    return dict(accuracy=right / n, accuracy_low=low, accuracy_high=high, questions=n,
                strict_accuracy=sum(r["right"] and r["rule"] == form for r in rows) / n,
                no_answer=sum(r["rule"] is None for r in rows) / n,
                never_ends=sum(r["why"] == "length" for r in rows) / n,
                mean_tokens=sum(r["tokens"] for r in rows) / n,
                accuracy_by_steps={str(k): round(float(np.mean(v)), 4) for k, v in sorted(groups.items())})


# ----------------------------------------------------------------------------------------------------------
# 5 · Recipes: what each method makes of the same forest
# ----------------------------------------------------------------------------------------------------------
def learn(run: Run, round_: int, stage: str, rows: list, loss_fn, kind: str, steps: int) -> tuple:
    """Train on rows for `steps` steps; resumable. -> (report, state file)."""
    state = run.work / f"train_{round_:02d}_{stage}.safetensors"
    if not rows:
        print(f"round {round_}: nothing to learn from (no {'pair' if kind == 'dpo' else 'right solution'}); "
              "the model stays as it is")
        return {}, None
    # a preference needs a far smaller step than an imitation: see the negative result in the README
    lr = (run.c.dpo_lr if kind == "dpo" else run.c.sft_lr) or default_lr(run.model, kind)
    run.sampler.allocate(4096)                          # its memory is the training's now
    batches = Batches(rows, run.c.batch, steps, mix(run.c.seed, round_, 5))
    return train(run.model, batches, loss_fn, lr, state=state, save_seconds=run.c.save_seconds,
                 label=f"round {round_}: {stage}"), state


def right_rows(run: Run, trees: list, most: int = 8) -> list:
    """Distinct right solutions, at most `most` a question (Self-Explore sec. 3.1), as rows to imitate."""
    rows = []
    for t in trees:
        found = solutions(run, t, most)
        if found:
            rows.append(tree_row(t.forest, t.b, paths=found))
    return rows


def solutions(run: Run, t: Worked, most: int = 8) -> list:
    """Leaves of right solutions that differ in their calculations, in order of birth."""
    # the same calculations in other words teach nothing new, and would give easy questions more weight than hard ones
    found = {}
    for n in t.forest.leaves(t.b):
        if t.forest.right[t.b, n] == 1:
            found.setdefault(calculations(t.forest.text(t.b, n, run.tokenizer, run.model.stop_ids)), n)
    return list(found.values())[:most]


def edit_distance(a: np.ndarray, b: np.ndarray) -> int:
    """Levenshtein distance of two id sequences, a row of the table at a time: of [1, 2, 3] and [1, 3, 4] it is 2."""
    row = np.arange(len(b) + 1)
    # with D the table: D[i, j] = min(D[i-1, j] + 1, D[i-1, j-1] + (a_i != b_j), D[i, j-1] + 1). The last of the three
    # looks to the left in the row itself; less j it is a running minimum, which numpy has.
    for i, x in enumerate(a, 1):
        best = np.concatenate(([i], np.minimum(row[1:] + 1, row[:-1] + (b != x))))
        row = np.minimum.accumulate(best - np.arange(len(b) + 1)) + np.arange(len(b) + 1)   # insertions
    return int(row[-1])


def outcome_pairs(forest: Forest, b: int, most: int = 8) -> list:
    """Each right solution against the wrong one most different from it (Self-Explore sec. 3.1). What both share is
    their prefix: its log-prob cancels in h, so the sides begin where they part.

        root --+- A --+- B  right            Pair([B], [C]) and Pair([D], [A, C])
               |      `- C  wrong
               `- D  right
    """
    right, wrong = ([n for n in forest.leaves(b) if forest.right[b, n] == r][:most] for r in (1, 0))
    pairs = []
    for good in right if wrong else []:
        ids = forest.path_of(b, good, "ids", root=False)
        bad = max(wrong, key=lambda n: (edit_distance(ids, forest.path_of(b, n, "ids", root=False)), -n))
        up, down = forest.path(b, good), forest.path(b, bad)
        fork = next(i for i, (x, y) in enumerate(zip(up, down)) if x != y)
        pairs.append(Pair(up[fork:], down[fork:]))
    return pairs


# HACK HERE: what is preferred to what
def pit_pairs(forest: Forest, b: int, pits: list, smoothing: float) -> list:
    """Self-Explore's step pairs: rejected = the pit step alone, chosen = the shortest right completion from the
    prefix before it, end-of-text included. One pair per pit, however many wrong solutions fell into it.

        root --+- A --+- B --- C  wrong      pit B (nothing right below it, but below A): Pair([D, E], [B])
               |      `- D --- E  right      what follows the pit, C, is left out: given B it may be without fault
               `- F  right
    """
    pairs = []
    for pit in sorted({p["node"] for p in pits if p["node"] is not None}):
        before = int(forest.parent[b, pit])
        best = None
        for leaf in forest.leaves(b):
            path = forest.path(b, leaf)
            if forest.right[b, leaf] == 1 and before in path:
                side = path[path.index(before) + 1:]
                size = sum(len(forest.ids[b][n]) for n in side)
                if best is None or size < best[0]:
                    best = (size, side)
        if best is not None:
            pairs.append(Pair(best[1], [pit], smoothing))
    return pairs


def sibling_pairs(c: Config, forest: Forest, b: int, path: list) -> list:
    """MCTS-DPO's pairs: at a node, the visited child of highest Q against that of lowest, if they differ by more than
    the gap; at the nodes of the committed path or at all. Smoothing a = N_l / (N_w + N_l): the more the search
    visited the loser, the less sure the label (2405.00451 eq. 6); .5 and more carries no direction.

        n --+- A  N 12  Q +.4                gap .25: Pair([A], [C]) with smoothing 3 / (12 + 3) = .2; B is in
            |- B  N  5  Q +.1                no pair: one a node
            `- C  N  3  Q -.6
    """
    pairs = []
    for n in path[:-1] if c.pair_nodes == "path" else range(int(forest.size[b])):
        kids = [k for k in forest.children[b][n] if forest.visits[b, k] >= c.min_visits]
        q = {k: forest.value_sum[b, k] / forest.visits[b, k] for k in kids}
        if kids and q[best := max(kids, key=q.get)] - q[worst := min(kids, key=q.get)] > c.gap:
            won, lost = int(forest.visits[b, best]), int(forest.visits[b, worst])
            pairs.append(Pair([best], [worst], min(.5, lost / (won + lost))))
    return [p for p in pairs if p.smoothing < .5]


def learn_pairs(run: Run, round_: int, trees: list, made: list, steps: int, found=None, reference=None) -> tuple:
    """DPO + NLL on the pairs made of each tree. The reference is the model as it is now, or `reference(rows)` stores
    another. found: leaves of solutions per tree; then the NLL is on these, instead of on the chosen sides."""
    found = found or [[] for _ in trees]
    rows = [tree_row(t.forest, t.b, pairs, leaves, each=True) for t, pairs, leaves in zip(trees, made, found)
            if pairs or leaves]
    text = lambda forest, b, nodes: run.tokenizer.decode_more([int(i) for n in nodes for i in forest.ids[b][n]
                                                               if i not in run.model.stop_ids])
    # the text twin of what is trained on, in the form that other trainers read
    write_lines(run.dir / f"pairs_{round_:02d}.jsonl", [
        dict(prompt=run.task.prompt(t.question)
             + t.forest.text(t.b, int(t.forest.parent[t.b, p.chosen[0]]), run.tokenizer),
             chosen=text(t.forest, t.b, p.chosen), rejected=text(t.forest, t.b, p.rejected),
             tree=t.b, chosen_nodes=p.chosen, rejected_nodes=p.rejected)
        for t, pairs in zip(trees, made) for p in pairs])
    (reference or partial(store_reference, run.model))(rows)
    loss = preference_loss(run.c.beta, run.c.nll, run.c.loss, on_solutions=any(found))
    report, state = learn(run, round_, "dpo", rows, loss, "dpo", steps)
    return report | {"pairs": sum(map(len, made))}, state


def two_stages(first: dict, second: dict) -> dict:
    """Report of a round that trains twice: what both cost adds up, all else is the second's."""
    return second | {k: first.get(k, 0) + second.get(k, 0) for k in ("tokens", "train_seconds")}


def sft(run: Run, round_: int, trees: list) -> tuple:
    """Control: the base's corpus again (real data: the reference solutions). Samples nothing."""
    rng = random.Random(mix(run.c.seed, round_, 6))
    rows = [text_row(*run.task.example(q, rng)) for q in corpus_questions(run, round_)]
    return learn(run, round_, "sft", rows, sft_loss, "sft", run.c.steps)


def corpus_questions(run: Run, round_: int) -> list:
    """As many questions as the round's steps will read, fresh ones, where the task can make them; of a file the
    round's own, again and again."""
    count = run.c.steps * run.c.batch
    if isinstance(run.task, Builtin):
        stream = run.task.stream(mix(run.c.seed, round_, 9), held_out=False)
        return [next(stream) for _ in range(count)]
    return run.task.train_questions(round_)


def rft(run: Run, round_: int, trees: list) -> tuple:
    """Rejection-sampling fine-tuning (2308.01825): imitate the distinct right solutions of all rounds so far."""
    rows = [row for _, forest in so_far(run, round_, trees) for row in right_rows(run, forest)]
    return learn(run, round_, "rft", rows, sft_loss, "sft", run.c.steps)


def so_far(run: Run, round_: int, trees: list, first: int = 1) -> list:
    """[(round, its trees)], from round `first` to this one."""
    return [(r, read_trees(run.dir / f"trees_{r:02d}.jsonl")) for r in range(max(1, first), round_)] + [(round_, trees)]


def outcome_dpo(run: Run, round_: int, trees: list) -> tuple:
    """Control: DPO on whole solutions, right against wrong, with NLL on the right one."""
    return learn_pairs(run, round_, trees, [outcome_pairs(t.forest, t.b) for t in trees], run.c.steps)


def self_explore(run: Run, round_: int, trees: list) -> tuple:
    """Self-Explore (2404.10346): DPO on first pits. Round 1 first fine-tunes the base on its right solutions, with
    three quarters of the steps; that model is start and reference. Later rounds start from the last one."""
    # all steps of all stages count: a recipe of two stages gets no more of them than one of one
    steps, report = run.c.steps, {}
    if round_ == 1:
        report, _ = learn(run, round_, "rft", right_rows(run, trees), sft_loss, "sft", steps * 3 // 4)
        steps -= steps * 3 // 4
    pairs = [pit_pairs(t.forest, t.b, t.pits, run.c.smoothing) for t in trees]
    second, state = learn_pairs(run, round_, trees, pairs, steps)
    return two_stages(report, second), state


def mcts_dpo(run: Run, round_: int, trees: list) -> tuple:
    """MCTS-DPO (2405.00451): DPO on siblings of different Q, with NLL on the solutions found. On-policy: the trees were
    grown with the latest weights. In the first --imitate-rounds, --imitate of the steps are spent on the NLL alone, at
    its own learning rate: at one for both, either DPO ruins the tiny model or it learns nothing from its solutions.
    Reference: the model DPO starts from, or the base (--reference base)."""
    def against_base(rows):
        """The base's log-probs as reference; then back to the weights of now."""
        # one model's weights are put in place of the other's: a second model would keep its memory for the whole round
        now = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        run.load(0)
        store_reference(run.model, rows)
        load_weights(run.model, now)
    found = [solutions(run, t) for t in trees]
    first = int(run.c.steps * run.c.imitate) if round_ <= run.c.imitate_rounds else 0
    rows = [tree_row(t.forest, t.b, paths=leaves) for t, leaves in zip(trees, found) if leaves]
    report = learn(run, round_, "imitate", rows, sft_loss, "sft", first)[0] if first else {}
    pairs = [sibling_pairs(run.c, t.forest, t.b, t.path) for t in trees]
    second, state = learn_pairs(run, round_, trees, pairs, run.c.steps - first, found,
                                against_base if run.c.reference == "base" else None)
    return two_stages(report, second), state


def fit_critic(run: Run, round_: int, trees: list, model: GPT | None = None, name: str = "critic") -> tuple:
    """Critics for the model as it is now (or another that reads the same trees), from graded forests: -> (Critic,
    report). One question in five, by hash, is kept for the report. Kept in NAME_RR.safetensors and NAME_RR.json."""
    file, model = run.dir / f"{name}_{round_:02d}.json", model or run.model
    if run.c.critic == "judge" and model is run.model:
        return ask_judge(run, round_, trees, file)
    critic = Critic(model.config.hidden_size + LOG_PROB_FEATURES, seed=run.c.seed).to(model.device)
    if file.exists():
        critic.load_state_dict(read_safetensors(file.with_suffix(".safetensors"))[0])
        return critic, read_json(file)
    # 1) every prefix of every solution is a label: what became of the branches below it
    labelled = [(t, *critic_labels(t.forest, t.b, run.c.completions)) for t in trees if t.forest.leaves(t.b)]
    # 2) the features of a node: the policy's state at its last token and its path's log-probs, a forward pass per tree
    packed = [Row(pack(t.forest, t.b, nodes)) for t, nodes, *_ in labelled]
    # 3) subtle: the split is by question. Nodes of one tree share prefix and end; split by node, AUC would flatter
    seen, kept = [], []
    for row, x, (t, nodes, *label) in zip(packed, node_features(model, packed), labelled):
        x = x[[row.packed.place[n] for n in nodes]]
        side = kept if for_report(t.question) else seen
        side.append((x, *(torch.from_numpy(a).to(x.device) for a in label)))
    stack = lambda rows: tuple(torch.cat([r[i] for r in rows]) for i in range(4))
    seen, kept = seen or kept, kept or seen             # a handful of questions may all fall on one side
    # 4) train on the one side, report on the other
    critic.prepare(seen)
    train(critic, Batches(seen, 32, run.c.critic_steps, mix(run.c.seed, round_, 7)), critic_loss, 3e-3,
          label=f"round {round_}: {name}",
          split=lambda rows, _, device: [(stack(rows), sum(len(r[0]) for r in rows))])
    features, *label = stack(kept)
    report = trust(round_, name, critic, critic.score(features), [a.cpu().numpy() for a in label])
    write_safetensors(file.with_suffix(".safetensors"), {k: v.cpu() for k, v in critic.state_dict().items()})
    write_text(file, json.dumps(report, indent=1) + "\n")
    return critic, report


def for_report(question: Question) -> bool:
    """Is this one of the questions that critics are not trained on, but reported on?"""
    return hashlib.sha256(question.text.encode()).digest()[1] % 5 == 0


def trust(round_: int, name: str, critic, scores: np.ndarray, label: list) -> dict:
    """The report of a critic; a head that cannot tell right from wrong (AUC below .55, or one class only) gets no
    weight and is named once."""
    # footgun: a head at chance is worse than none: added up it drowns the others, as the weakest link it rules alone
    report = critic_report(scores, *label)
    for i, head in enumerate(HEADS):
        critic.trusted[i] = report[head]["trusted"] = (report[head]["auc"] or 0) >= LEAST_AUC
        if not critic.trusted[i] and (head == "outcome" or name != "rollout_critic"):       # of which no other is used
            print(f"round {round_}: the {head} {name} is not listened to: AUC {report[head]['auc']} on "
                  f"{report[head]['nodes']} nodes it was not trained on")
    return report


JUDGED = 32                   # questions at most that the judge's report is about


def ask_judge(run: Run, round_: int, trees: list, file: Path) -> tuple:
    """The policy as its own judge (`critic.Judge`): nothing is trained, but its report decides whom to believe."""
    judge = Judge()
    if not file.exists():
        run.sampler.reset()
        scores, labels = [], []
        graded = [t for t in trees if t.forest.leaves(t.b)]
        for t in ([t for t in graded if for_report(t.question)] or graded)[:JUDGED]:
            f, b = t.forest, t.b
            for n in range(int(f.size[b])):             # trees of a file have lost their place in the sampler's store
                above = f.path_of(b, int(f.parent[b, n]), "slots").astype(np.int64) if n else np.zeros(0, np.int64)
                f.slots[b][n] = run.sampler.follow(above, f.ids[b][n])[len(above):]
            nodes, *label = critic_labels(f, b, run.c.completions)
            scores.append(judge.read(run.sampler, f, [(b, n) for n in nodes]))
            labels.append(label)
        label = [np.concatenate(parts) for parts in zip(*labels)]
        write_text(file, json.dumps(trust(round_, "judge", judge, np.concatenate(scores), label), indent=1) + "\n")
    report = read_json(file)
    judge.trusted = torch.tensor([float(report[head]["trusted"]) for head in HEADS])
    return judge, report


def fast_rollouts(run: Run, round_: int, trees: list) -> Rollouts | None:
    """AlphaLLM's smaller policy with an outcome critic of its own; None without --rollouts, or when that critic tells
    nothing. For a built-in task it is a base of one layer, trained on the same corpus."""
    c = run.c
    if not c.rollouts:
        return None
    if c.rollout_model:
        small = GPT.from_pretrained(c.rollout_model, run.model.device, run.model.dtype)
        tokenizer = Tokenizer.from_pretrained(c.rollout_model)
        if tokenizer.bytes != run.tokenizer.bytes:
            raise BadInput(f"--rollout-model {c.rollout_model} has another tokenizer than the model: its rollouts "
                           "could not go on from the policy's steps; choose a smaller model of the same family.")
        small.bind(tokenizer)
    else:
        c = replace(c, layers=1, base="", device=run.model.device.type, dtype="float32")
        small = base_model(c, run.task, run.near)
    critic, report = fit_critic(run, round_, trees, small, "rollout_critic")
    sampler = Sampler(small, run.tokenizer, 4096, c.rows, run.task.over, c.step)
    return Rollouts(critic, sampler, c.rollouts, c.max_tokens, c.temperature) if report["outcome"]["trusted"] else None


def agreement(run: Run, rollouts: Rollouts, questions: list) -> float:
    """Share of questions to which the smaller policy greedily gives the policy's own greedy answer."""
    said = []
    for sampler in (run.sampler, rollouts.sampler):
        sampler.reset()
        paths = [sampler.prompt(run.task.prompt_ids(q)) for q in questions]
        found = sampler.extend([Request(path, 0, run.c.max_tokens) for path in paths], 0)
        texts = [run.tokenizer.decode_more(i for i in f.ids if i not in run.model.stop_ids) for f in found]
        said.append([run.task.find_answer(text)[0] for text in texts])
    return float(np.mean([a == b for a, b in zip(*said)]))


def critic_search(run: Run, critic, questions: list, forest: Forest, seeds: list, progress, budget: float) -> tuple:
    """Search with critics in place of answers (AlphaLLM's eta-MCTS): UCT, adaptive width, state merge, fast rollouts if
    the run has any; returns lie in [0, 1]. -> ([], the best path of each tree)."""
    # note: a wide root (four times what is allowed below) and adaptive width are two things; --alpha 0 switches off
    # the second alone, which is how tests/ablation.py tells them apart
    c = run.c
    width = importance_width((c.root_width, 4 * c.most_width), (1, c.most_width), c.alpha, c.widen)
    proposer = Steps(forest, run.sampler, seeds, c.max_tokens, c.temperature, bool(c.greedy_child), progress)
    same = lambda ids: calculations(run.tokenizer.decode_more([int(i) for i in ids if i not in run.model.stop_ids]))
    search(forest, proposer, leaf_scores(run, critic, forest, seeds, c.leaf_score), c.simulations, uct, c.c_uct, width,
           budget=budget, patience=PATIENCE, same=same if c.merge else None)
    best = [best_trajectory(run, forest, b) for b in range(len(forest))]
    return [], [[] if leaf is None else forest.path(b, leaf) for b, leaf in enumerate(best)]


PATIENCE = 16                 # simulations in a row without a new step after which a search with critics ends


def leaf_scores(run: Run, critic, forest: Forest, seeds: list, rule: str):
    """evaluate(forest, ends) for a search of this forest, which begins here: what the critics, and fast rollouts if the
    run has any, think of ends and leaves; a node is read once."""
    known, weights = {}, (run.c.value_weight, run.c.process_weight, run.c.rollout_weight)
    if run.fast:
        run.fast.begin(forest, [mix(s, 2) for s in seeds])
    return lambda forest, ends: critic_values(critic, run.sampler, forest, ends, weights, rule, known, run.fast)


def solving_search(run: Run, critic, questions: list, forest: Forest, seeds: list, progress, pool: float) -> tuple:
    """Search *training* questions until each has a right end, with `pool` sampled tokens for all trees together.
    Critics score the leaves, the answer (known here) the ends. One right end is all that is wanted, so this search
    goes deep at once: one child a node and one more after each eight visits. Measured on homework with two traps, 251
    questions that 8 samples each had not solved, 640 tokens a question: 135 solved (8 more samples each: 29); as wide
    as `critic_search` 80; by the weakest link in place of the sum 114. No state merge: a slip with the same
    calculation would hide the right line for good."""
    # note: the pool is one for all trees, so what an easy question leaves goes to hard ones
    c, guess, start = run.c, leaf_scores(run, critic, forest, seeds, "sum"), run.sampler.counts["sampled"]
    solved, asked = [False] * len(questions), [0.0]

    def evaluate(forest, ends):
        """Grades of ends, scores of leaves; both in [0, 1]."""
        closed, open_ = [e for e in ends if forest.terminal[e]], [e for e in ends if not forest.terminal[e]]
        grade_leaves(run, questions, forest, closed)
        for b, n in closed:
            solved[b] |= forest.right[b, n] == 1
        # subtle: a wrong end counts 0 on its way back, so branches that the critics overrate are left by themselves
        scores = dict(zip(open_, guess(forest, open_) if open_ else []))
        asked[0] = len(questions) / int(forest.drawn.sum())             # what is at work: a step of each tree
        return [scores.get(e, float(forest.right[e])) for e in ends]

    def enough(b):
        """Solved, or what is sampled and asked for uses the pool up."""
        return solved[b] or (run.sampler.counts["sampled"] - start) * (1 + asked[0]) >= pool
    proposer = Steps(forest, run.sampler, seeds, c.max_tokens, c.temperature, progress=progress)
    search(forest, proposer, evaluate, c.simulations, uct, c.c_uct, fixed_width(1, 1, 8), patience=4 * PATIENCE,
           enough=enough)                               # patience: a node is asked again after 8 visits, so wait longer
    return [], [[] for _ in questions]


# HACK HERE: when a search without answers is believed
def best_trajectory(run: Run, forest: Forest, b: int, keep: float = 0.0) -> int | None:
    """The leaf a searched tree stands for: of the answer with most visit-weighted score, the end of highest score. None
    when no end was reached; with keep > 0 also when that answer has not half of the visits at ends (the search is not
    consistent), or the score is below `keep`."""
    # subtle: an end that was drawn but never visited has no score yet and no say
    votes, ends = {}, [n for n in forest.leaves(b) if forest.visits[b, n]]
    for n in ends:
        answer = answer_of(run, forest, b, n)
        votes[answer] = votes.get(answer, 0.0) + forest.value_sum[b, n]
    if not ends:
        return None
    # a vote weighted by value is the robust choice of an answer; the highest score only chooses among its solutions
    best = max(votes, key=votes.get)
    mine = [n for n in ends if answer_of(run, forest, b, n) == best]
    leaf = max(mine, key=lambda n: (forest.score[b, n], -n))
    sure = 2 * forest.visits[b, mine].sum() >= forest.visits[b, ends].sum() and forest.score[b, leaf] >= keep
    return leaf if sure or not keep else None


def answer_of(run: Run, forest: Forest, b: int, n: int) -> str | None:
    """The answer an end gives. note: all ends of countdown claim the target, so there a solution is its own answer."""
    text = forest.text(b, n, run.tokenizer, run.model.stop_ids)
    return text if isinstance(run.task, Countdown) else run.task.find_answer(text)[0]


def imagine(run: Run, round_: int) -> list:
    """New questions from this round's training questions; kept in questions_RR.jsonl."""
    file, counts = run.work / f"questions_{round_:02d}.jsonl", dict.fromkeys(run.sampler.counts, 0)

    def write(prompts):
        """The line the model goes on with behind each prompt."""
        sampler = Sampler(run.model, run.tokenizer, 4096, run.c.rows)   # its steps are lines, whatever --step says
        paths = [sampler.prompt(run.tokenizer.encode_prompt(p)) for p in prompts]
        requests = [Request(path, mix(run.c.seed, round_, i, 8), run.c.max_tokens) for i, path in enumerate(paths)]
        found = sampler.extend(requests, run.c.temperature, to_end=False)
        # a sampler of its own, whose tokens count all the same: equal budgets are what recipes are compared by
        counts.update({k: v + sampler.counts[k] for k, v in counts.items()})
        return [run.tokenizer.decode_more(o.ids) for o in found]
    if not file.exists():
        old = run.task.train_questions(round_)
        new = run.task.imagine(old, run.c.imagined or len(old), random.Random(mix(run.c.seed, round_, 10)), write)
        write_lines(file.with_suffix(".counts"), [counts])
        write_lines(file, [asdict(q) for q in new])
    return [Question(**row) for row in read_lines(file)]


def budget_left(run: Run, round_: int, *spent: str) -> int:
    """Sampled tokens of the round's budget that these parts of it (as in `round_counts`) left."""
    return run.c.budget * run.c.questions - round_counts(run, round_, spent)["sampled"]


def round_critics(run: Run, round_: int, trees: list) -> tuple:
    """Critics, and fast rollouts if the run has any, from the forests of the last --critic-window rounds, this one's
    included: (critic, what the log says of it)."""
    # older trees were drawn by older weights; `fit_critic` reads them with today's, whose states the heads will see
    earlier = so_far(run, round_, trees, round_ - run.c.critic_window + 1)[:-1]
    trees = trees + [t for _, forest in earlier for t in forest]
    critic, report = fit_critic(run, round_, trees)
    run.fast = fast_rollouts(run, round_, trees)
    return critic, {"critic_auc": {head: report[head]["auc"] for head in HEADS}}


def alphallm(run: Run, round_: int, trees: list) -> tuple:
    """AlphaLLM (2404.12253): synthesise questions, search them with critics, imitate the best trajectories. The critics
    learn from forests of the training questions, whose answers are known; no answer of a synthesised question is ever
    looked up. Imitated too: the right solutions of those forests, and all of earlier rounds."""
    # 1) critics from questions with answers; 2) questions without; 3) a search of these for the rest of the budget
    critic, report = round_critics(run, round_, trees)
    new = imagine(run, round_) if budget_left(run, round_, "trees") > 0 else []
    left, rows, kept, same = budget_left(run, round_, "trees", "questions"), [], [], None
    how = lambda run, questions, forest, seeds, progress: critic_search(
        run, critic, questions, forest, [mix(s, 1) for s in seeds], progress, left / len(new))
    if new and left > 0:
        sample_round(run, round_, new, how, "imagined")
    if run.fast:
        same, run.fast = agreement(run, run.fast, run.task.train_questions(round_)[:64]), None
    # 4) imitate: right solutions of training questions, and of synthesised ones what the critics are sure of
    for r, forest in so_far(run, round_, trees):
        rows += right_rows(run, forest)
        file = run.dir / f"imagined_{r:02d}.jsonl"
        for t in read_trees(file) if file.exists() else []:
            leaf = best_trajectory(run, t.forest, t.b, run.c.keep)
            kept += [leaf is not None] * (r == round_)
            rows += [tree_row(t.forest, t.b, paths=[leaf])] if leaf is not None else []
    learnt, state = learn(run, round_, "alphallm", rows, sft_loss, "sft", run.c.steps)
    return learnt | report | {"imagined": len(new), "imagined_kept": sum(kept), "rollout_agreement": same}, state


def combined(run: Run, round_: int, trees: list) -> tuple:
    """Ours: rft, and where it has next to nothing to imitate, a search for it. A preference chooses among what a model
    does already; where it is hardly ever right, right solutions are what it lacks. Plain samples solve the easy
    questions and teach the critics; these lead a search through the rest, for which `sample_trees` has left tokens."""
    unsolved, rows, report = [t.question for t in trees if not t.forest.below(t.b)[0]], [], {}
    left, samples = budget_left(run, round_, "trees"), np.mean([t.forest.drawn[t.b, 0] for t in trees])
    if unsolved and left > (run.c.budget * run.c.questions - left) / samples:   # than one more sample of each takes
        critic, report = round_critics(run, round_, trees)
        each = min(run.c.budget, left / len(unsolved))
        how = lambda run, questions, forest, seeds, progress: solving_search(
            run, critic, questions, forest, [mix(s, 4) for s in seeds], progress, each * len(questions))
        found = sample_round(run, round_, unsolved, how, "searched")
        report |= {"searched": len(found), "searched_solved": sum(bool(t.forest.below(t.b)[0]) for t in found)}
        run.fast = None
    for r, forest in so_far(run, round_, trees):        # an unsolved tree gives no row, its search at most one
        rows += right_rows(run, forest)
        file = run.dir / f"searched_{r:02d}.jsonl"
        rows += right_rows(run, read_trees(file)) if file.exists() else []
    learnt, state = learn(run, round_, "combined", rows, sft_loss, "sft", run.c.steps)
    return learnt | report, state


# HACK HERE: add a recipe of your own
# (run, round, [Worked]) -> (report for the log, state file of the training or None); the model is trained in place
RECIPES = dict(sft=sft, rft=rft, outcome_dpo=outcome_dpo, self_explore=self_explore, mcts_dpo=mcts_dpo,
               alphallm=alphallm, combined=combined)
CHOICES["recipe"] = tuple(RECIPES)


# ----------------------------------------------------------------------------------------------------------
# 6 · The loop
# ----------------------------------------------------------------------------------------------------------
def finish_round(run: Run, round_: int, start: float, report: dict, sampled: dict) -> dict:
    """Evaluate, write the log row and say one line."""
    # every key is defined in the README with what to do if it looks wrong; what a recipe does not have is null or 0
    found = evaluate(run, round_)
    rows = run.log()
    row = dict(recipe=run.c.recipe, round=round_, seed=run.c.seed, **found,
               sampled_tokens=sampled.get("sampled", 0), prompt_tokens=sampled.get("prompt", 0),
               processed_tokens=sampled.get("processed", 0), trained_tokens=report.get("tokens", 0),
               occupancy=round(sampled["live"] / sampled["room"], 4) if sampled.get("room") else None,
               sampled_tokens_total=sampled.get("sampled", 0) + (rows[-1]["sampled_tokens_total"] if rows else 0),
               **{k: sampled.get(k) for k in ("sampled_accuracy", "distinct_answers", "solved", "pits", "probes",
                                              "pit_agreement", "simulations", "committed_right", "self_eval_auc")},
               **{k: report.get(k) for k in ("pairs", "steps", "loss", "dpo", "margin", "preference_accuracy",
                                             "chosen_shift", "rejected_shift", "chosen_length", "rejected_length",
                                             "grad_norm", "skipped", "searched", "searched_solved", "imagined",
                                             "imagined_kept", "critic_auc", "rollout_agreement")},
               rollout_tokens=sampled.get("rollout"), rollout_seconds=sampled.get("rollout_seconds"),
               sampling_seconds=sampled.get("seconds", 0.0), train_seconds=report.get("train_seconds", 0.0),
               seconds=time.time() - start)
    write_lines(run.dir / "log.jsonl", rows + [row])
    print(line(row), flush=True)
    if report.get("alarm"):
        print(f"  alarm: {report['alarm']}")
    return row


def line(row: dict) -> str:
    """One line about one round."""
    return (f"round {row['round']}   accuracy {100 * row['accuracy']:5.1f}%  [{100 * row['accuracy_low']:.1f}, "
            f"{100 * row['accuracy_high']:.1f}]   sampled {row['sampled_tokens']:>9,} tokens   {row['seconds']:6.1f} s")


def run_loop(config: Config) -> list:
    """Run or resume one run to its end; returns its log rows. Where memory ends, with half as much at once (`halve`).
    The mathematics stays the same up to rounding: gradients are sums over rows, and no row's samples depend on
    another's. (Only where `combined` searches, trees share a pool of tokens: which it cuts off depends on the rows.)"""
    return fitting(all_rounds, config, halve)


def fitting(work, config: Config, less):
    """work(config); when the device runs out of memory, again from what is on the disk with config = less(config)."""
    while True:
        try:
            return work(config)
        except RuntimeError as error:                   # on a CPU torch says it in words only
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
        # subtle: behind the except block: inside it the error still refers to all that has to go
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        config = less(config)


def half(rows: int, part_tokens: int) -> dict:
    """Half as much at once. Raises BadInput when there is nothing left to halve."""
    if max(rows, part_tokens // 64) <= 1:
        raise BadInput("Out of memory with one solution and one tree at a time: lower --chunk, --budget or "
                       "--max-tokens (a run: in a new --out), or take a smaller model.")
    held = dict(rows=max(1, rows // 2), part_tokens=max(64, part_tokens // 2))
    print(f"out of memory: going on with {held['rows']} rows and {held['part_tokens']:,} padded tokens at once")
    return held


def halve(config: Config) -> Config:
    """Note in the run's config.json that half as much fits in memory: every later start begins with it."""
    file = run_dir(config) / "config.json"
    about = read_json(file)
    held = dict(rows=about["settings"]["rows"], part_tokens=config.part_tokens or
                PART_TOKENS.get(about["settings"]["device"], 2048)) | about.get("held", {})
    write_text(file, json.dumps(about | {"held": half(**held)}, indent=1) + "\n")
    return config


def halve_flags(config: Config) -> Config:
    """The same for what writes no run's folder: --evaluate, --decode. Fewer questions at once, too."""
    # what `Run.settings` finds in config.json must be asked for here: these commands write none
    device = torch.device("cuda" if config.device == "auto" and torch.cuda.is_available() else
                          config.device.replace("auto", "cpu"))
    held = half(config.rows, config.part_tokens or PART_TOKENS.get(device.type, 2048))
    return replace(config, chunk=max(1, config.chunk // 2), **held)


def all_rounds(config: Config) -> list:
    """`run_loop` without a second try. Every stage skips what is already on the disk."""
    run = Run(config)
    done = len(run.log())
    for row in run.log():
        print(line(row))
    for round_ in range(done, run.c.rounds + 1):        # round 0: the base is saved and evaluated
        start, trees, sampled, report, state = time.time(), [], {}, {}, None
        if round_:
            run.load(round_ - 1)
            if run.c.recipe != "sft":
                # 1) trees of this round's questions, by the weights of the last round
                how = search_trees if run.c.recipe == "mcts_dpo" else sample_trees
                trees = sample_round(run, round_, run.task.train_questions(round_), how)
                sampled = sampling_report(run, trees)
            run.sampler.allocate(4096)                  # from here on trees come from files: memory for the training
            # 2) what the method makes of them; the model is trained in place
            report, state = RECIPES[run.c.recipe](run, round_, trees)
            sampled |= round_counts(run, round_)
        elif run.round_dir(0).exists():
            run.load(0)
        # 3) subtle: folder, log row, then the work files: killed between two of them, no training is lost
        run.save(round_, state)
        finish_round(run, round_, start, report, sampled)
        (run.round_dir(round_ - 1) / "optimizer.safetensors").unlink(missing_ok=True)
        shutil.rmtree(run.work)
        run.work.mkdir()
    shutil.rmtree(run.work)
    summary(run)
    return run.log()


def example(run: Run) -> tuple:
    """The tree that `summary` shows and what it is: one in which the method can be seen, if there is such."""
    # a root with one child shows no choice; a trajectory that was not kept shows a search nobody believed
    searched = run.dir / "imagined_01.jsonl"
    for t in read_trees(searched) if searched.exists() else []:
        if len(t.forest.children[t.b][0]) > 1 and best_trajectory(run, t.forest, t.b, run.c.keep) is not None:
            return t, "made up by the run, as the critics searched it (nobody looks up its answer)"
    trees = read_trees(run.dir / "trees_01.jsonl", run.task.train_questions(1))
    t = next((t for t in trees if t.forest.below(t.b)[0] and (t.path or any(p["node"] for p in t.pits))), trees[0])
    answer = t.question.answer                          # of a file: the whole reference
    return t, f"as the base sampled it (answer {run.task.find_answer(answer)[0] or answer})"


def summary(run: Run) -> None:
    """The table, one question before and after, and where everything lies."""
    print("\nround  accuracy   95% interval    sampled    trained  pairs  seconds")
    for r in run.log():
        low, high = 100 * r["accuracy_low"], 100 * r["accuracy_high"]
        print(f"{r['round']:>5} {100 * r['accuracy']:>8.1f}% {low:>6.1f} - {high:>5.1f} {r['sampled_tokens']:>10,} "
              f"{r['trained_tokens']:>10,} {r['pairs'] or 0:>6} {r['seconds']:>8.1f}")
    if (run.dir / "trees_01.jsonl").exists():
        run.load(len(run.log()) - 1)
        t, about = example(run)
        print(f"\nA question of round 1, {about}:\n")
        print(draw(t.forest, t.b, run.tokenizer, {p["node"] for p in t.pits if p["node"]}, run.model.stop_ids, limit=14,
                   chosen=t.path))
        answer = greedy(run, [t.question])[0][0].split("\n")
        print("\nand as the improved model answers it:\n\n" + "\n".join("   " + printable(line) for line in answer))
        ask = run.task.prompt(t.question)
        print(f"\nEverything lies in {run.dir}: log.jsonl, trees_, pairs_, eval_ and a model folder per round.")
        if not (run.c.template or "\\" in ask):         # model.py reads special tokens as text, \n as a newline
            ask = ask.replace("\n", "\\n")
            ask = shlex.quote(ask) if {*ask} & {*'$`!"'} else f'"{ask}"'
            folder = run.round_dir(len(run.log()) - 1)
            print(f"Ask it:  python model.py --model {folder} --prompt {ask} --temperature 0")


# ----------------------------------------------------------------------------------------------------------
# 7 · Comparing
# ----------------------------------------------------------------------------------------------------------
REGIMES = dict(often=dict(), some=dict(traps=1, careless=0.85), rare=dict(traps=2),
               countdown=dict(task="countdown", sft_lr=1e-3))           # unless --sft-lr says otherwise


def compare(config: Config) -> None:
    """--compare: run or resume every recipe on every seed, then one table: mean accuracy after the last round with a
    Wilson interval over all questions, and an exact McNemar test against rft (or the first recipe) on the same ones.
    With --regimes the same on each of these settings, and one map of them all after every seed."""
    names, regimes = config.compare.split(","), [r for r in config.regimes.split(",") if r] or [""]
    root, rows, hits = Path(config.out or f"runs/compare_{config.regimes and 'regimes' or source(config)}"), {}, {}
    for seed in range(config.seeds):                    # outermost: after the first seed a whole table is there
        for regime in regimes:
            for name in names:
                folder = root / regime / f"{name}_seed{seed}"
                print(f"\n== {regime} {name}, seed {seed}")
                settings = REGIMES.get(regime, {}) | ({"sft_lr": config.sft_lr} if config.sft_lr else {})
                settings |= dict(recipe=name, seed=seed, out=str(folder), compare="")
                log = run_loop(replace(config, **settings))
                rows.setdefault((regime, name), []).append(log)
                last = read_lines(folder / f"eval_{log[-1]['round']:02d}.jsonl")
                hits.setdefault((regime, name), []).extend(r["right"] for r in last)
        if config.regimes:
            print_map(names, regimes, rows, hits)
    if not config.regimes:
        print_table(names, {n: rows["", n] for n in names}, {n: hits["", n] for n in names})


def against_rft(names: list, hits: dict, name: str) -> str:
    """McNemar's p of a recipe against rft, or the first one, as text."""
    against = "rft" if "rft" in names else names[0]
    p = mcnemar(hits[name], hits[against])
    return "-" if name == against else f"p = {p:.2g}" if p > 1e-99 else "p < 1e-99"


def print_table(names: list, logs: dict, hits: dict) -> None:
    """A line per recipe. logs: {recipe: [log rows of each seed]}, hits: {recipe: [right? of every question]}."""
    print(f"\n| recipe | accuracy, mean of {len(logs[names[0]])} seeds | 95% interval | each seed | sampled tokens "
          f"| minutes | McNemar against {'rft' if 'rft' in names else names[0]} |\n|---|---|---|---|---|---|---|")
    for name in names:
        low, high = wilson(sum(hits[name]), len(hits[name]))
        each = " ".join(f"{100 * rows[-1]['accuracy']:.1f}" for rows in logs[name])
        tokens = np.mean([rows[-1]["sampled_tokens_total"] for rows in logs[name]])
        minutes = np.mean([sum(r["seconds"] for r in rows) for rows in logs[name]]) / 60
        print(f"| {name} | {100 * np.mean(hits[name]):.1f} | {100 * low:.1f} - {100 * high:.1f} | {each} "
              f"| {tokens:,.0f} | {minutes:.1f} | {against_rft(names, hits, name)} |")
    base = np.mean([rows[0]["accuracy"] for rows in logs[names[0]]])
    print(f"\nbase: {100 * base:.1f}% (mean of the seeds), same base and questions for all recipes of a seed")


def print_map(names: list, regimes: list, rows: dict, hits: dict) -> None:
    """The map of regimes: a line per regime, a column per recipe; keys of rows and hits: (regime, recipe)."""
    print(f"\n| regime | base, sampled | base, greedy | {' | '.join(names)} |\n|{'---|' * (3 + len(names))}")
    for regime in regimes:
        logs, mine = [log for n in names for log in rows[regime, n]], {n: hits[regime, n] for n in names}
        # of recipes whose round 1 holds plain samples alone: labels and searches sample more where it is hard
        base = [100 * log[0]["accuracy"] for log in logs]
        plain = [log[1] for log in logs if log[1:] and log[0]["recipe"] not in ("sft", "self_explore", "mcts_dpo")]
        sampled = [100 * row["sampled_accuracy"] for row in plain]
        cells = []
        for n in names:
            low, high = wilson(sum(mine[n]), len(mine[n]))
            p = "" if against_rft(names, mine, n) == "-" else f", {against_rft(names, mine, n)}"
            cells.append(f"{100 * np.mean(mine[n]):.1f} [{100 * low:.1f}, {100 * high:.1f}{p}]")
        sampled = f"{np.mean(sampled):.1f}" if sampled else "-"
        print(f"| {regime} | {sampled} | {np.mean(base):.1f} | {' | '.join(cells)} |")
    print(f"seeds: {len(rows[regimes[0], names[0]])}", flush=True)


def bare_run(config: Config, folder: Path, round_: int | None = None) -> Run:
    """A model folder, or a round (the last) of a run with that run's settings, ready to sample; nothing is written."""
    run = object.__new__(Run)
    run.dir, run.work, run.near = folder, folder / "work", folder.parent
    if (folder / "log.jsonl").exists():
        # the run says what the model is and how it is asked; the flags say where, how many questions, which search
        saved = read_json(folder / "config.json")["settings"]
        drop = {*FREE, "device", "dtype", "threads", "eval_questions", "rows", *(SEARCH_FLAGS if config.decode else ())}
        drop |= {k for k in ("eval_data", "template") if getattr(config, k)}
        config = replace(config, **{k: v for k, v in saved.items() if k not in drop})
        last = len(read_lines(folder / "log.jsonl")) - 1
        folder = folder / f"round_{last if round_ is None else round_}"
    run.c, run.chunk = config, config.chunk
    if config.threads:
        torch.set_num_threads(config.threads)
    device, dtype = (None if x == "auto" else x for x in (config.device, config.dtype))
    run.model = GPT.from_pretrained(folder, device, dtype and getattr(torch, dtype))
    run.tokenizer = Tokenizer.from_pretrained(folder)
    run.model.bind(run.tokenizer)
    run.model.part_tokens = config.part_tokens
    run.task = TASKS[config.task](config, run.tokenizer)
    if config.eval_data:
        run.task = Exercises(replace(config, data="", sft_data=""), run.tokenizer, run.model.config.max_positions)
    run.sampler = Sampler(run.model, run.tokenizer, 4096, config.rows, run.task.over, config.step)
    return run


def evaluate_folder(config: Config) -> None:
    """--evaluate: greedy accuracy of a model folder, or of the last round of a run, on the held-out questions."""
    run = bare_run(config, Path(config.evaluate))
    questions, rows = run.task.eval_questions(), []
    for first in tqdm(range(0, len(questions), config.rows), desc="evaluating", leave=False):
        group = questions[first:first + config.rows]
        rows += [result(run.task, q, *found) for q, found in zip(group, greedy(run, group))]
    print(json.dumps({"folder": config.evaluate} | accuracy_report(rows, run.task.form), indent=1))


# ----------------------------------------------------------------------------------------------------------
# 8 · Search at test time
# ----------------------------------------------------------------------------------------------------------
SOLUTIONS = (8, 16, 32, 64)   # budgets, in sampled solutions' worth of tokens
VOTES = ("majority", "best_of_n", "weighted_vote")


def vote(samples: list, method: str) -> dict | None:
    """The sample a question's samples [{answer, right, score}] stand for: of the answer given most often (majority) or
    with the largest sum of scores (weighted_vote), the one of highest score; best_of_n: of highest score at all. Ties
    go to the earlier one; samples without an answer have no vote.

    Of 7 (score .2), 7 (.3), 9 (.6): majority 7, weighted_vote 9 (.6 against .5), best_of_n 9."""
    # note: no method sees `right`; it is carried along for the table alone
    samples, weight = [s for s in samples if s["answer"] is not None], {}
    for s in samples:
        weight[s["answer"]] = weight.get(s["answer"], 0) + (1 if method == "majority" else s["score"])
    winner = max(weight, key=weight.get, default=None)
    mine = samples if method == "best_of_n" else [s for s in samples if s["answer"] == winner]
    return max(mine, key=lambda s: s["score"], default=None)


def end_row(run: Run, forest: Forest, questions: list, b: int, leaf: int, score: float) -> dict:
    """What decoding keeps of an end; whether it is right is looked up for the table alone."""
    text = forest.text(b, leaf, run.tokenizer, run.model.stop_ids)
    return dict(answer=answer_of(run, forest, b, leaf), score=float(score),
                right=bool(run.task.reward(questions[b].text, text, questions[b].answer)),
                tokens=len(forest.path_of(b, leaf, "ids", root=False)))


def sampled_ends(run: Run, critic: Critic, questions: list, forest: Forest, seeds: list, progress) -> list:
    """SOLUTIONS[-1] plain samples of each question, in order: [[row]]."""
    leaves = grow(forest, run.sampler, [(b, 0, SOLUTIONS[-1]) for b in range(len(questions))], seeds, run.c.max_tokens,
                  run.c.temperature, progress)
    ends = [(b, n) for b, found in enumerate(leaves) for n in found]
    scores = critic_values(critic, run.sampler, forest, ends, rule=run.c.leaf_score)
    rows = [end_row(run, forest, questions, *e, score) for e, score in zip(ends, scores)]
    return [rows[i:i + SOLUTIONS[-1]] for i in range(0, len(rows), SOLUTIONS[-1])]


def beam(run: Run, critic: Critic, questions: list, forest: Forest, seeds: list, progress, n: int) -> list:
    """Step beam by the critics: n steps a level, shared by the n / 4 best prefixes -> [leaf of highest score, or
    None]."""
    proposer = Steps(forest, run.sampler, seeds, run.c.max_tokens, run.c.temperature, progress=progress)
    # the n / 4 of a level is not tuned: a beam of n would sample one step of each prefix and choose nothing
    open_, seen, known = {b: [0] for b in range(len(questions))}, [{0} for _ in questions], {}
    while open_:
        wants = [(b, m, max(1, n // len(nodes))) for b, nodes in open_.items() for m in nodes]
        proposer.submit(wants)
        waiting = len(wants)
        while waiting:
            for b, m, found in proposer.poll():
                expand(forest, b, m, found, length_prior)
                waiting -= 1
        new = [(b, m) for b in open_ for m in range(int(forest.size[b])) if m not in seen[b]]
        for e, score in zip(new, critic_values(critic, run.sampler, forest, new, rule=run.c.leaf_score,
                                                known=known)):
            forest.score[e] = score
            seen[e[0]].add(e[1])
        # ended solutions keep their score and leave the beam; the best prefixes go on, wherever they branched off
        go_on = {b: [] for b in open_}
        for b, m in sorted(new, key=lambda e: -forest.score[e]):
            if not forest.terminal[b, m] and len(go_on[b]) < max(1, n // 4):
                go_on[b].append(m)
        open_ = {b: nodes for b, nodes in go_on.items() if nodes}
    return [max(forest.leaves(b), key=lambda m: forest.score[b, m], default=None) for b in range(len(questions))]


def decode_cell(run: Run, critic: Critic, questions: list, round_: int, method: str, n: int, budget: float) -> list:
    """Rows of one method at one budget, one a question (method samples: a list of rows a question); kept in run.dir."""
    file = run.dir / f"{round_:02d}_{method}_{n}.jsonl"
    if not file.exists():
        rows = []
        bar = tqdm(desc=f"round {round_}: {method} {n}", unit=" tokens", unit_scale=True, leave=False)
        for first in range(0, len(questions), run.chunk):
            group = questions[first:first + run.chunk]
            forest, seeds = Forest(len(group)), [mix(run.c.seed, 11, first + b) for b in range(len(group))]
            run.sampler.reset()
            for b, q in enumerate(group):
                plant(forest, b, run.sampler, run.task.prompt_ids(q))
            if method == "samples":
                rows += sampled_ends(run, critic, group, forest, seeds, bar.update)
                continue
            before = run.sampler.counts["sampled"]
            if method == "mcts":
                paths = critic_search(run, critic, group, forest, seeds, bar.update, budget)[1]
                leaves = [path[-1] if path else None for path in paths]
            else:
                leaves = beam(run, critic, group, forest, seeds, bar.update, n)
            tokens = (run.sampler.counts["sampled"] - before) / len(group)
            rows += [dict(right=False, tokens=tokens) if leaf is None else
                     end_row(run, forest, group, b, leaf, 0.0) | {"tokens": tokens} for b, leaf in enumerate(leaves)]
        bar.close()
        write_lines(file, rows)
    return read_lines(file)


def decode(config: Config) -> None:
    """--decode RUN: what search with critics buys at test time, at equal sampled tokens, for the first and the last
    model of a run: accuracy on held-out questions, intervals, McNemar tests against best-of-n of the same budget.
    Every cell is kept in RUN/decode_HASH (of the settings), so a killed table goes on where it stopped."""
    folder, table = Path(config.decode), []
    if not [*folder.glob("trees_*.jsonl")] or not (folder / "log.jsonl").exists():
        raise BadInput(f"--decode {folder}: no run with trees is there; give the folder of a run of any recipe but "
                       "sft: the critics learn from its trees.")
    last = len(read_lines(folder / "log.jsonl")) - 1
    settings = {k: getattr(config, k) for k in (*SEARCH_FLAGS, "decode_questions") if k != "chunk"}
    settings["budgets"] = SOLUTIONS                     # no tree depends on those worked beside it: not on --chunk
    kept = folder / f"decode_{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"
    kept.mkdir(exist_ok=True)
    write_text(kept / "settings.json", json.dumps(settings, indent=1) + "\n")
    for round_ in sorted({0, last}):
        run = bare_run(config, folder, round_)
        run.dir = kept
        files = sorted(folder.glob("trees_*.jsonl"))
        files = files[-run.c.critic_window:] if round_ else files[:1]   # the base's own, or the last ones
        trees = [t for file in files for t in read_trees(file)]
        critic, _ = fit_critic(run, round_, trees)
        run.fast = fast_rollouts(run, round_, trees)
        questions = run.task.eval_questions()[:run.c.decode_questions]
        # one set of samples serves all votes: a budget of n is its first n
        samples = decode_cell(run, critic, questions, round_, "samples", SOLUTIONS[-1], 0)
        each = float(np.mean([s["tokens"] for row in samples for s in row]))
        right = [result(run.task, q, *found)["right"] for q, found in zip(questions, greedy(run, questions))]
        table.append((round_, "greedy", 1, right, each, right))
        for n in SOLUTIONS:
            cells = {m: [(vote(row[:n], m) or {"right": False})["right"] for row in samples] for m in VOTES}
            spent = dict.fromkeys(VOTES, each * n)
            for m in ("beam", "mcts"):
                rows = decode_cell(run, critic, questions, round_, m, n, each * n)
                cells[m], spent[m] = [r["right"] for r in rows], np.mean([r["tokens"] for r in rows])
            table += [(round_, m, n, hits, spent[m], cells["best_of_n"]) for m, hits in cells.items()]
    print("| model | method | solutions' worth | tokens | accuracy | 95% interval | McNemar against best_of_n |\n"
          "|---|---|---|---|---|---|---|")
    for round_, method, n, hits, tokens, against in table:
        low, high = wilson(sum(hits), len(hits))
        p = "-" if hits is against else f"p = {mcnemar(hits, against):.2g}"
        print(f"| round {round_} | {method} | {n} | {tokens:,.0f} | {100 * np.mean(hits):.1f} "
              f"| {100 * low:.1f} - {100 * high:.1f} | {p} |")


# ----------------------------------------------------------------------------------------------------------
# 9 · Program
# ----------------------------------------------------------------------------------------------------------
def main(arguments: list) -> int:
    """Exit code 0, 2 for bad input (one sentence), 130 when interrupted (the same command goes on)."""
    try:
        config = parse_flags(arguments)
        other = evaluate_folder if config.evaluate else decode if config.decode else None
        if other:
            fitting(other, config, halve_flags)
        else:
            (compare if config.compare else run_loop)(config)
        return 0
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:      # disk full, no permission, ...: what was finished is on the disk
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}; mend it and run the same command again",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
