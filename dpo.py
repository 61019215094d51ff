"""
Learning from preferences: DPO on whole trees. Imitation (SFT) is the same loop with another loss.

The idea (Rafailov et al. 2023, 2305.18290). Take two continuations of one prefix, a better and a
worse one. Raise the log-prob of the better, lower that of the worse, against a fixed reference:

    h    = (log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))
    loss = -log sigmoid(beta h)

What is different from the published codes:
1. A row is a tree: all pairs of a question share one forward pass (mcts.pack).
2. The reference is two numbers kept with each pair. There is never a second model in memory.
3. An NLL term keeps the chosen side likely (2404.19733). DPO alone may make both sides unlikely.
4. Gradients are sums, divided once by the weight of the batch, however it is cut into parts.

The reference is always the model as it stands when DPO begins: in round 1 the model that has
imitated (RFT; with --share 0 the base), then the last round's. It has also grown the trees, except
in round 1 of `combined`, where the base grew them.

The loss of a pit pair sums over the right completion up to its end (chosen), and over the pit
alone, one step (rejected). The sides differ in length, which the loss could exploit; the log
therefore has the mean length of each.

Chapters: 1 Pairs   2 Rows   3 Log-probs   4 Losses   5 Batches and optimisers   6 Training
Try:  python dpo.py      trains a tiny random model on one preference pair; three seconds
"""
import signal

if __name__ == "__main__":              # Ctrl-C and `| head` end the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(getattr(signal, "SIGPIPE", signal.SIGINT), signal.SIG_DFL)    # not on Windows

import json
import math
import random
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from critic import pit
from mcts import Packed, Tree, pack
from model import GPT, BadInput, GPTConfig, Tokenizer, need, read_safetensors, write_safetensors

# B rows of a batch   T tokens of a row   J pairs of a row   S imitated solutions of a row
# M learnt tokens of a batch   C hidden size   V ids of the vocabulary


# --------------------------------------------------------------------------------------------------
# 1. Pairs: two branches of one node, the better and the worse
# --------------------------------------------------------------------------------------------------
@dataclass
class Pair:
    """The sides: nodes in order, below a prefix that both share. The log-prob of the prefix is the
    same in both sides, so it would cancel in h."""
    chosen: list
    rejected: list
    smoothing: float = 0.0              # probability that the label is wrong (conservative DPO)
    ref_chosen: float = math.nan        # log-probs under the reference; nan until store_reference
    ref_rejected: float = math.nan      # is called: before that, every update is skipped


# HACK HERE: what is preferred to what. Also change: the recipe in loop.py that calls it.
def pit_pairs(tree: Tree, most: int = 8) -> list:
    """Self-Explore (2404.10346): rejected is the first pit alone, chosen the shortest right
    completion of the prefix before it. Steps after the pit are in neither side: they may be right.
    A pit that is the last step keeps its end-of-text, which the paper strips.
        root --+- A --+- B --- C  wrong     B is the pit:  Pair([D, E], [B])
               |      `- D --- E  right
               `- F  right"""
    right = complete_right_paths(tree)
    pairs = []
    for bad in pits_of(tree):
        options = [parted(path, bad.path()) for path in right]
        options = [pair for pair in options if pair and pair.rejected == [bad]]
        if options:
            pairs.append(min(options, key=lambda pair: sum(len(node.ids) for node in pair.chosen)))
    return pairs[:most]


def pits_of(tree: Tree) -> list:
    """All first pits. Without completions: wrong ends below the root or a node with a right end."""
    return list(filter(None, dict.fromkeys(map(pit, tree.ends()))))     # each once, in order


def complete_right_paths(tree: Tree) -> list:
    """Paths of right ends. One that was cut at the length limit is left out: the NLL term would
    make the model imitate a text without an end."""
    return [end.path() for end in tree.ends() if end.right and end.ended != "length"]


def outcome_pairs(tree: Tree, most: int = 8) -> list:
    """The control of the Self-Explore paper: each right solution is paired with one wrong solution.
    Of the wrong ones that were used least often so far, the one with the most steps that differ
    is taken (the paper: the largest edit distance). That favours long ones: on GSM8K chosen sides
    had 66 tokens, rejected ones 91, and a 0.5B model learnt to stop early."""
    right = complete_right_paths(tree)[:most]
    wrong = [end.path() for end in tree.ends() if end.right is False][:most]
    pairs, taken = [], Counter()            # taken: wrong end -> pairs that it is in
    for good in right:
        options = [pair for bad in wrong if (pair := parted(good, bad))]
        steps = lambda pair: len(pair.chosen + pair.rejected)
        if options:
            best = min(options, key=lambda pair: (taken[pair.rejected[-1]], -steps(pair)))
            taken[best.rejected[-1]] += 1
            pairs.append(best)
    return pairs


def sibling_pairs(tree: Tree, gap: float = 0.25, least_visits: int = 2) -> list:
    """MCTS-DPO (2405.00451): at every node the child of highest Q against that of lowest, if they
    differ by more than `gap`. Smoothing is N(loser) / N(both) (eq. 6): the more often the search
    went to the loser, the less sure is the label. With .5 or more the loss does not prefer the
    winner, and the pair is dropped. (So is a winner that was cut at the length limit.)
        n --+- A  N 12  Q +.4       Pair([A], [C], smoothing = 3 / (12 + 3) = .2)
            |- B  N  5  Q +.1
            |- C  N  3  Q -.6
            `- D  N  1  Q  -1       fewer than `least_visits`: in no pair"""
    pairs = []
    for node in tree.nodes:
        visited = [child for child in node.children if child.visits >= least_visits]
        if len(visited) > 1:
            winner = max(visited, key=lambda child: child.q)
            loser = min(visited, key=lambda child: child.q)
            smoothing = loser.visits / (winner.visits + loser.visits)
            sure = winner.q - loser.q > gap and smoothing < 0.5
            if sure and winner.ended != "length" and apart([winner], [loser]):
                pairs.append(Pair([winner], [loser], smoothing))
    return pairs


def rate_pairs(tree: Tree, gap: float = 0.3) -> list:
    """Siblings by their rate, the share of samples below them that are right: the best child
    against each one that is `gap` worse (for `combined`; from no paper).
        n --+- A  4 of 5 right      rates .8 .5 .5: Pair([A], [B]) and Pair([A], [C])
            |- B  1 of 2
            |- C  2 of 4
            `- D  0 of 1            one sample: in no pair"""
    pairs = []
    for (best_rate, best), *others in filter(None, map(by_rate, tree.nodes)):
        for rate, child in others:
            worse = best_rate - rate > gap - 1e-9       # as a float .7 - .4 is below .3
            if worse and best.ended != "length" and apart([best], [child]):
                pairs.append(Pair([best], [child]))
    return pairs


def by_rate(node) -> list:
    """[(rate, child)], the best first, of a node's children with two graded samples or more."""
    samples = {child: child.rights + child.wrongs for child in node.children}
    rates = [(child.rights / count, child) for child, count in samples.items() if count > 1]
    return sorted(rates, key=lambda pair: pair[0], reverse=True)


def evenness(trees: list) -> float:
    """Do siblings end right about equally often? Mean of worst rate / best rate over all nodes with
    two or more children in `by_rate` and a best rate above 0; .5 / .8 in the picture of rate_pairs.
    On homework: .1 if a number is graded, .7 if odd or even. It is also high, without any luck,
    where most steps can be written in several right ways: two such siblings give 1.

    0 if there is less than one such node for every 20 trees: too few to judge by. (Homework has one
    for every 2 to 11 trees. GSM8K had one in 512 trees, because few steps were drawn twice.)"""
    forks = [by_rate(node) for tree in trees for node in tree.nodes]
    forks = [ranked for ranked in forks if len(ranked) > 1 and ranked[0][0] > 0]
    ratios = [ranked[-1][0] / ranked[0][0] for ranked in forks]         # the worst by the best
    return sum(ratios) / len(ratios) if ratios and 20 * len(ratios) >= len(trees) else 0.0


def parted(one: list, other: list) -> Pair | None:
    """Two paths, from where they part:  [root A B], [root A C D]  ->  Pair([B], [C D])."""
    shared = sum(a is b for a, b in zip(one, other))
    chosen, rejected = one[shared:], other[shared:]
    return Pair(chosen, rejected) if apart(chosen, rejected) else None


def apart(one: list, other: list) -> bool:
    """Do both sides start below one parent, with different ids? (Equal ids: one was cut short.)"""
    if not one or not other or one[0].parent is not other[0].parent:
        return False
    return one[0].ids.tolist() != other[0].ids.tolist()


# --------------------------------------------------------------------------------------------------
# 2. Rows: a tree with what is learnt from it
# --------------------------------------------------------------------------------------------------
@dataclass
class Row:
    """A packed tree with masks over its tokens, so that one matrix product sums the log-probs of
    all sides. With Packed's picture, one pair (a chosen, b rejected), and a is also imitated:
        ids       q1 q2 a1 a2 b1        chosen     0  0  1  1  0
        learn      0  0  1  1  1        rejected   0  0  0  0  1
                                        imitate    0  0  1  1  0"""
    packed: Packed
    chosen: torch.Tensor                # (J, T) 1 at the tokens of pair j's chosen side
    rejected: torch.Tensor              # (J, T)
    imitate: torch.Tensor               # (S, T)
    learn: torch.Tensor                 # (T,) bool: the tokens whose log-probs are computed
    pairs: list                         # J


def tree_row(pairs=(), solutions=(), also=()) -> Row:
    """The row of one tree. solutions: ends, to be imitated. also: nodes whose log-probs your own
    loss needs. ValueError: the sides of a pair are empty or equal, or have different parents."""
    for pair in pairs:
        need(apart(pair.chosen, pair.rejected), "a pair needs two different branches of one node")
    groups = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    groups += [end.path() for end in solutions] + [also]
    packed = pack([node for group in groups for node in group])
    masks = torch.zeros(len(groups), len(packed.ids))
    for mask, group in zip(masks, groups):
        for node in group:
            mask[packed.span[node]] = node.parent is not None           # the root is the question
    parts = masks.split([len(pairs), len(pairs), len(solutions), 1])
    return Row(packed, *parts[:3], masks.any(0), list(pairs))


def text_row(prompt_ids, solution_ids) -> Row:
    """A question and one solution, for plain SFT: a tree with one branch."""
    tree = Tree(None, 0, prompt_ids)
    return tree_row(solutions=[tree.add(tree.root, solution_ids, ended="eos")])


def by_length(rows: list, tokens: int) -> list:
    """Groups of like length, each of at most `tokens` padded tokens (a longer row goes alone).
    Gradients are sums, so grouping changes nothing. With 10, lengths 3 9 4 5 give [3 4] [5] [9]."""
    groups = []
    for row in sorted(rows, key=lambda row: len(row.learn)):
        if not groups or (len(groups[-1]) + 1) * len(row.learn) > tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


def equal_shares(rows: list, most: int) -> list:
    """At most `most` groups of rows of like length, with about equally many padded tokens, so that
    threads end together. The token limit of by_length grows by 2% at a time until its groups are
    few enough. With most = 2 the lengths 3 4 5 9 9 give [3 4 5], [9 9]."""
    tokens = sum(len(row.learn) for row in rows) / most
    while len(groups := by_length(rows, tokens)) > most:
        tokens *= 1.02
    return groups


# --------------------------------------------------------------------------------------------------
# 3. Log-probs of packed trees
# --------------------------------------------------------------------------------------------------
def log_probs(model: GPT, rows: list) -> list:
    """For each row the log-probs (T,) of its learnt tokens, on the CPU, 0 at the others. In the
    picture of mcts.Packed columns 1, 2 and 1 (`before`) predict the learnt a1, a2 and b1."""
    columns = []
    for row in rows:
        own = row.packed
        arrays = own.ids, own.position, own.before, own.unseen, row.learn
        columns.append(torch.from_numpy(np.stack(arrays, axis=1)))      # (T, 5)
    padded = torch.nn.utils.rnn.pad_sequence(columns, batch_first=True)  # (B, T, 5), 0 on the right
    ids, position, before, unseen, learn = padded.to(model.device).unbind(-1)    # (B, T)
    B, T = ids.shape
    # the token in column t sees column s if s <= t < unseen[s] (mcts.Packed shows it). Made here:
    # a mask for each of thousands of rows would fill memory
    s = torch.arange(T, device=ids.device)
    t = s[:, None]
    sees = (s <= t) & (t < unseen[:, None])                              # (B, T, T)
    sees |= s == t                      # padding sees itself: no softmax is NaN
    hidden = model(ids, position, sees)                                 # (B, T, C)
    learn = learn > 0
    b, column = learn.nonzero(as_tuple=True)                            # (M,) row and column
    # index_select, not hidden[b, before]: branches share a parent, and on a CPU the gradient of
    # indexing adds shared entries in an undefined order, so that two runs would differ
    parents = hidden.flatten(0, 1).index_select(0, b * T + before[b, column])       # (M, C)
    logps = target_logps(model, parents, ids[b, column])                # (M,)
    whole = torch.zeros_like(learn, dtype=logps.dtype).masked_scatter(learn, logps).cpu()   # (B, T)
    return [whole[i, :len(row.learn)] for i, row in enumerate(rows)]


def target_logps(model: GPT, hidden, targets, at_once: int = 1 << 27):
    """log p(target) over the tokenizer's ids: (M, C), (M,) -> (M,). Logits (M, V) of more than
    `at_once` entries (1,046 tokens of 128,256 ids: .5 GB) are made in slices, in backward again."""
    def of_slice(hidden, targets):
        """The log-probs (m,) of m of the M tokens."""
        return -F.nll_loss(model.all_logps(hidden), targets, reduction="none")
    size = max(1, at_once // model.config.vocab_size)
    if len(targets) <= size:
        return of_slice(hidden, targets)
    slices = zip(hidden.split(size), targets.split(size))
    return torch.cat([recompute(of_slice, *one, use_reentrant=False) for one in slices])


@torch.no_grad()
def store_reference(model: GPT, rows: list, tokens: int = 2048) -> None:
    """The model as it is becomes the reference of these rows' pairs."""
    for group in by_length(rows, tokens):
        for row, logps in zip(group, log_probs(model, group)):
            for pair, chosen, rejected in zip(row.pairs, row.chosen, row.rejected):
                pair.ref_chosen = (chosen @ logps).item()
                pair.ref_rejected = (rejected @ logps).item()


# --------------------------------------------------------------------------------------------------
# 4. Losses: loss(model, rows) -> (sum, weight to divide it by, {statistic: sum})
# --------------------------------------------------------------------------------------------------
# HACK HERE: the loss of a pair. For a loss on tokens (GRPO) make rows by tree_row(also=nodes);
# row.packed.span[node] are the columns of a node, node.logps its log-probs when it was sampled.
def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0,
             kind="sigmoid"):
    """DPO on log-probs of whole sides, all (J,) -> (J,) loss, chosen_reward and rejected_reward.
    sigmoid  DPO (2305.18290 eq. 7); with label_smoothing a, a number or (J,), conservative DPO as
             in MCTS-DPO: -(1 - a) log sigmoid(beta h) - a log sigmoid(-beta h)
    ipo      (h - 1 / (2 beta))^2 (2310.12036 eq. 17), without smoothing. Call it with log-probs per
             token, as preference_loss does
    Where the policy is the reference the loss is ln 2, or 1 / (4 beta^2). ValueError: unknown kind.
    """
    need(kind in ("sigmoid", "ipo"), f"kind = {kind!r}: expected 'sigmoid' or 'ipo'")
    chosen_gain = chosen - ref_chosen
    rejected_gain = rejected - ref_rejected
    h = chosen_gain - rejected_gain
    if kind == "sigmoid":
        right, wrong = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
        loss = -(1 - label_smoothing) * right - label_smoothing * wrong
    else:
        loss = (h - 1 / (2 * beta)) ** 2
    return loss, (beta * chosen_gain).detach(), (beta * rejected_gain).detach()


def preference_loss(model: GPT, rows: list, beta=0.1, nll=1.0, kind="sigmoid") -> tuple:
    """DPO on all pairs of some trees, plus `nll` times the NLL per token of the chosen sides.
    IPO takes log-probs per token: its target for h is one number, whether a side has 5 tokens or
    100. The statistics are sums over pairs; `summary` divides them."""
    each = list(zip(rows, log_probs(model, rows)))
    chosen = torch.cat([row.chosen @ logps for row, logps in each])     # (J,), all rows' pairs
    rejected = torch.cat([row.rejected @ logps for row, logps in each])
    chosen_tokens = torch.cat([row.chosen.sum(1) for row in rows])
    rejected_tokens = torch.cat([row.rejected.sum(1) for row in rows])
    numbers = [(pair.ref_chosen, pair.ref_rejected, pair.smoothing)
               for row in rows for pair in row.pairs]
    ref_chosen, ref_rejected, smoothing = torch.tensor(numbers).reshape(-1, 3).T
    sides = [chosen, rejected, ref_chosen, ref_rejected]
    if kind == "ipo":
        sides = [side / size for side, size in zip(sides, [chosen_tokens, rejected_tokens] * 2)]
    loss, chosen_reward, rejected_reward = dpo_loss(*sides, beta, smoothing, kind)
    total = (loss - nll * chosen / chosen_tokens).sum()
    of_pairs = dict(
        dpo=loss, margin=chosen_reward - rejected_reward, agree=chosen_reward > rejected_reward,
        chosen_shift=(chosen - ref_chosen) / chosen_tokens,             # nats a token
        rejected_shift=(rejected - ref_rejected) / rejected_tokens,
        chosen_tokens=chosen_tokens, rejected_tokens=rejected_tokens)
    sums = {name: value.sum().item() for name, value in of_pairs.items()}
    return total, len(loss), sums


def sft_loss(model: GPT, rows: list) -> tuple:
    """Imitation: the NLL of the solutions' tokens; the weight is their number."""
    each = zip(rows, log_probs(model, rows))
    total = sum((row.imitate @ logps).sum() for row, logps in each)
    tokens = sum(row.imitate.sum().item() for row in rows)
    return -total, tokens, {}


# --------------------------------------------------------------------------------------------------
# 5. Batches and optimisers
# --------------------------------------------------------------------------------------------------
DPO_LR, SFT_LR = 1e-6, 1e-5             # the papers' learning rates, at 7B parameters

def scaled_lr(model: GPT, lr_at_7b: float) -> float:
    """A learning rate for 7B parameters -> one for this model: 1/8 the size has twice the rate.
    SFT of the tiny GPT (.56M) gets 2.3e-4, SFT of a model with .5B 2.4e-5."""
    return lr_at_7b * (7e9 / sum(p.numel() for p in model.parameters())) ** (1 / 3)


def batches(rows: list, size: int, updates: int, seed: int, epochs: float = math.inf) -> list:
    """Lists of `size` rows, one an update, in shuffled epochs. At most `epochs` passes (3 in the
    papers' DPO; 13 did harm): if the rows do not suffice for all updates, the lists are shorter.
    10 rows, size 8, 7 updates, 3 epochs -> lists of 4 4 4 5 4 4 5 rows; 64 updates -> 30 of 1."""
    rng, order = random.Random(seed), []
    wanted = int(min(size * updates, epochs * len(rows))) if rows else 0
    while len(order) < wanted:
        order += rng.sample(rows, len(rows))
    count = min(updates, wanted)
    return [order[i * wanted // count:(i + 1) * wanted // count] for i in range(count)]


def schedule(update: int, updates: int, warmup: int) -> float:
    """Factor on the learning rate: a line up over the warm-up, then a line down to nearly 0. In a
    training that is no longer than the warm-up it only rises."""
    up = (update + 1) / max(1, warmup)
    down = (updates - update) / max(1, updates - warmup)
    return min(up, down, 1.0)


class Muon(torch.optim.Optimizer):
    """Momentum; then each matrix's update is replaced by the nearest orthogonal one (Jordan et al.
    2024), scaled to the usual size of an AdamW update. After 1,050 updates at 4e-3 from scratch a
    tiny llama had a loss of .75 nats a homework solution with Muon, 3.1 with AdamW."""
    @torch.no_grad()
    def step(self):
        """One update."""
        for p in self.param_groups[0]["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            x = p.grad.lerp(momentum, 0.95)                             # Nesterov
            tall = x.shape[0] > x.shape[1]
            x = x.T if tall else x                                      # the small side first
            x = x / (x.norm() + 1e-7)
            for _ in range(5):              # Newton-Schulz: all singular values go to about 1
                a = x @ x.T             # x <- 3.4445 x + (-4.7750 a + 2.0315 a a) x, in two calls
                b = torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315)
                x = torch.addmm(x, b, x, beta=3.4445)
            size = self.param_groups[0]["lr"] * 0.2 * max(p.shape) ** 0.5
            p.sub_(x.T if tall else x, alpha=size)


def make_optimizers(masters: dict, lr: float, muon: bool, shares: int) -> list:
    """AdamW (fused: 3 to 5 times as fast). With `muon`, Muon trains the matrices of the layers: as
    `shares` optimisers, each with a part of the matrices, so that threads can step them."""
    matrices = {n: p for n, p in masters.items() if muon and p.dim() == 2 and ".layers." in n}
    others = [p for name, p in masters.items() if name not in matrices]
    adamw = torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    cut = [list(matrices.values())[i::shares] for i in range(shares)]
    return [adamw] + [Muon(share, dict(lr=lr)) for share in cut if share]


# --------------------------------------------------------------------------------------------------
# 6. Training: one loop for every loss
# --------------------------------------------------------------------------------------------------
SAVE_EVERY = 30             # seconds of training between two writes of the state file; 30 times as
                            # long as a write takes, if that is more (guess at first: 1 s a GB)

def train(model: GPT, batches, loss_fn, lr: float, muon=False, warmup=5, tokens=2048, label="train",
          state=None, shares=1, map_fn=map) -> dict:
    """Train in place, one update a batch (a list of rows), by a loss of chapter 4 or your own.
    label   names the progress bar; "" for none
    tokens  padded tokens of one forward pass; fewer save memory, and results differ by rounding
    shares  into how many parts the rows of an update are cut (equal_shares). map_fn works them off:
            `map` in turn, the map of a ThreadPoolExecutor at the same time; both give equal bytes
    state   a file: the exact state is written to it (SAVE_EVERY). A training that finds it goes on
            from there and ends in the same bytes. It is removed at the end. It does not know the
            loss: remove it yourself if you change that
    An update whose loss or gradient is not finite is skipped; BadInput if half of them are. Returns
    steps (updates made), skipped, trained_tokens (of their rows, without padding) and, as means
    over the last quarter of the updates, loss, norm (of the gradient) and the loss's statistics."""
    masters = model.masters()           # fp32: bf16 would round most of an update away
    optimizers = make_optimizers(masters, lr, muon, shares)
    # a state with another key, that is of other rows or rates, belongs to another stage
    ids = b"".join(row.packed.ids.tobytes() for rows in batches for row in rows)
    key = json.dumps([zlib.crc32(ids), len(batches), lr, muon, warmup, tokens, shares])
    counts, sums = load_state(state, key, masters, optimizers)
    model.from_masters()
    gigabytes = 12e-9 * sum(p.numel() for p in masters.values())        # weights and two moments
    save_at = time.monotonic() + SAVE_EVERY * max(1.0, gigabytes)
    bar = tqdm(range(counts["steps"] + counts["skipped"], len(batches)), desc=label, unit="update",
               leave=False, disable=None if label else True)    # None: a bar only in a terminal
    for update in bar:
        rows = batches[update]
        batch_sums = add_gradients(model, masters, rows, loss_fn, tokens, shares, map_fn)
        norm = torch.nn.utils.clip_grad_norm_([*masters.values()], 1.0).item()
        if math.isfinite(batch_sums["loss"] + norm):
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = lr * schedule(update, len(batches), warmup)
            list(map_fn(lambda optimizer: optimizer.step(), optimizers))
            model.from_masters()
            # the report is on the last quarter; before that, on the newest finite update alone
            if update <= len(batches) * 3 // 4:
                sums.clear()
            sums.update(batch_sums, norm=norm, finite=1)        # a Counter: update() adds
            counts["steps"] += 1
            counts["trained_tokens"] += sum(len(row.learn) for row in rows)
        else:
            counts["skipped"] += 1
        if 2 * counts["skipped"] >= len(batches):
            raise BadInput(f"{label or 'training'}: in half of the updates the loss or gradient "
                           "was not finite; lower the learning rate (--sft-lr, --dpo-lr), or "
                           "call store_reference first.")
        mean = batch_sums["loss"] / (batch_sums["weight"] or 1)         # no weight: it was skipped
        bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)
        if state and (began := time.monotonic()) >= save_at:
            save_state(state, key, masters, optimizers, counts, sums)
            done = time.monotonic()
            save_at = done + SAVE_EVERY * max(1.0, done - began)
    if state:
        Path(state).unlink(missing_ok=True)
    return summary(counts, sums)


def add_gradients(model: GPT, masters: dict, rows: list, loss_fn, tokens, shares, map_fn):
    """The gradient of a batch's mean loss, left in the masters' .grad; returns the batch's sums."""
    def gradient(share: list) -> tuple:
        """The gradient of the loss summed over some of the rows, in fp32, and their sums."""
        totals = [torch.zeros_like(p) for p in masters.values()]
        sums = Counter()
        for part in by_length(share, tokens):
            loss, weight, statistics = loss_fn(model, part)
            # materialize_grads: 0 for what a loss of your own does not use
            own = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
            for total, g in zip(totals, own):
                total += g
            sums.update(statistics, loss=loss.item(), weight=weight)
        return totals, sums
    for p in masters.values():
        p.grad = None                           # frees that of the last update
    gradients, of_shares = zip(*map_fn(gradient, equal_shares(rows, shares)))
    sums = Counter()
    for own in of_shares:
        sums.update(own)                        # adds; `+` would drop negative sums
    for p, first, *others in zip(masters.values(), *gradients):
        for other in others:
            first += other
        p.grad = first.div_(sums["weight"])
    return sums


def summary(counts: dict, sums: dict) -> dict:
    """What `train` returns. Sums are divided by the weight: for DPO, the number of pairs."""
    stats = dict(counts)
    for name in sums:
        if name not in ("weight", "finite"):
            stats[name] = sums[name] / sums["finite" if name == "norm" else "weight"]
    if stats.get("chosen_shift", 0.0) < -0.05:
        stats["alarm"] = (f"the chosen side fell by {-stats['chosen_shift']:.3f} nats a token: "
                          "lower --dpo-lr or raise --nll")
        print("alarm:", stats["alarm"])
    return stats


def save_state(path, key: str, masters: dict, optimizers: list, counts: dict, sums: dict) -> None:
    """Write weights, moments and sums of an unfinished training, in one atomic write."""
    tensors = {f"weight/{name}/0": p for name, p in masters.items()}
    for number, optimizer in enumerate(optimizers):
        for name, p in masters.items():
            for kind, moment in optimizer.state.get(p, {}).items():
                tensors[f"{kind}/{name}/{number}"] = moment
    write_safetensors(path, tensors, dict(key=key, sums=json.dumps([counts, sums])))


@torch.no_grad()
def load_state(path, key: str, masters: dict, optimizers: list) -> list:
    """Read it back; returns [counts, sums], those of a start if there is no file of this key."""
    tensors, about = read_safetensors(path) if path and Path(path).exists() else ({}, {})
    if about.get("key") != key:
        return [Counter(steps=0, skipped=0, trained_tokens=0), Counter()]
    for place, tensor in tensors.items():
        kind, name, number = place.split("/")
        p = masters[name]
        if kind == "weight":
            p.copy_(tensor)
        else:
            optimizers[int(number)].state[p][kind] = tensor.to(p.device)
    return [Counter(kept) for kept in json.loads(about["sums"])]


def demo() -> None:
    """One question, a right and a wrong first step: DPO pulls their log-probs apart."""
    tokenizer = Tokenizer.bytes_only()
    model = GPT(GPTConfig.tiny(tokenizer.n_ids, hidden_size=64, layers=2)).initialise(seed=0)
    tree = Tree(None, 0, tokenizer.encode("7+1*4?"))
    steps = "1*4=4 : 7+4", "7+1=8 : 8*4"
    good, bad = (tree.add(tree.root, tokenizer.encode(step)) for step in steps)
    row = tree_row([Pair([good], [bad])])
    store_reference(model, [row])
    print("7+1*4? goes on with 1*4=4 : 7+4 (chosen) or 7+1=8 : 8*4 (rejected). Their log-probs:")
    for updates in (0, 5, 20, 40):
        train(model, [[row]] * updates, preference_loss, lr=1e-3, label="")
        logps = log_probs(model, [row])[0].detach()
        sides = (row.chosen @ logps).item(), (row.rejected @ logps).item()
        print(f"{updates:2d} more updates: %8.2f %8.2f" % sides)


if __name__ == "__main__":
    demo()
