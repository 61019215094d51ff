"""Learning from step preferences: DPO on whole trees, and imitation (SFT) as the same loop with another loss.

The textbook idea (Rafailov et al. 2023, 2305.18290). Of two continuations of one prefix, raise the log-prob of
the better and lower that of the worse, both measured against a frozen reference:

    h = (log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))
    loss = -log sigmoid(beta h)

What is different here
  1. A row is a tree: all pairs of a question share one forward; shared prefixes are computed once (mcts.pack).
  2. The reference is a number stored with each pair before training; there is never a second model in memory.
  3. Log-probs are taken over the tokenizer's ids only, as the sampler records them, and (T, V) logits are never
     held whole for a large vocabulary.
  4. An NLL term on the chosen side is on by default (Iterative RPO, 2404.19733): without it DPO may lower both
     sides and the text degenerates. An alarm says when the chosen log-prob falls all the same.
  5. Gradients are sums, divided once by the weight of the whole batch: 1 x 8 rows = 8 x 1 row exactly.

Chapters: 1 Rows and batches   2 Log-probs of packed trees   3 Losses   4 Training   5 Demo
Try:  python dpo.py         (moves one preference pair of a tiny random model; 2 seconds)
"""
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from critic import log_prob_features
from mcts import Forest, Packed, pack
from model import GPT, BadInput, GPTConfig, Tokenizer, read_safetensors, write_safetensors

# ----------------------------------------------------------------------------------------------------------
# 1 · Rows and batches       B rows, T tokens, n packed nodes, M tokens that a loss looks at, J pairs
# ----------------------------------------------------------------------------------------------------------
@dataclass
class Pair:
    """Two branches of one node. Nodes are those of the forest, in order, below the shared prefix."""
    chosen: list
    rejected: list
    smoothing: float = 0.0                    # chance that the label is wrong (conservative DPO)
    ref_chosen: float = math.nan              # reference log-probs, stored before training
    ref_rejected: float = math.nan


@dataclass
class Row:
    """A packed tree with what to learn from it: preference pairs, and nodes to imitate with a weight each."""
    packed: Packed
    pairs: list = field(default_factory=list)
    imitate: dict = field(default_factory=dict)                         # forest node -> weight of its tokens
    solutions: int = 0                                                  # imitated, each of weight 1 in all


def tree_row(forest: Forest, b: int, pairs=(), paths=(), each: bool = False) -> Row:
    """The row of tree b that holds these pairs and solutions to imitate (leaves; steps that several share count
    several times, as in separate rows). each: a solution weighs 1 however long it is, else each token does. Pairs
    with smoothing .5 carry no direction and are dropped; an empty or shared side raises ValueError, because its loss
    would be about nothing."""
    pairs = [p for p in pairs if p.smoothing < 0.5]
    for p in pairs:
        if not p.chosen or not p.rejected or p.chosen[0] == p.rejected[0] \
                or forest.parent[b, p.chosen[0]] != forest.parent[b, p.rejected[0]]:
            raise ValueError(f"tree {b}: sides of a pair must be different branches of one node: {p}")
    imitate = {}
    for leaf in paths:
        weight = 1 / len(forest.path_of(b, leaf, "ids", root=False)) if each else 1.0
        for n in forest.path(b, leaf)[1:]:
            imitate[n] = imitate.get(n, 0.0) + weight
    packed = pack(forest, b, [n for p in pairs for n in p.chosen + p.rejected] + list(paths))
    return Row(packed, pairs, imitate, len(paths) if each else 0)


def text_row(prompt_ids, solution_ids) -> Row:
    """A row with one branch, for plain SFT: root = prompt, node 1 = solution, imitated."""
    ids = np.concatenate((prompt_ids, solution_ids))
    at = np.arange(len(ids))
    return Row(Packed(ids, at, at - 1, (at >= len(prompt_ids)).astype(np.int64), np.array([[1, 0], [1, 1]], bool),
                      {0: 0, 1: 1}), imitate={1: 1.0})


@dataclass
class Batch:
    """Rows padded to one length, on the device. Masks go by length, never by token value."""
    rows: list
    ids: torch.Tensor             # (B, T)
    position: torch.Tensor        # (B, T)
    before: torch.Tensor          # (B, T) column that predicts the token
    node: torch.Tensor            # (B, T) packed node of the token
    mask: torch.Tensor            # (B, T, T) bool
    wanted: torch.Tensor          # (B, T) bool: tokens a loss looks at
    imitate: torch.Tensor         # (B, T) weight of the token in the imitation term
    nodes: int                    # n
    sides: tuple                  # two tensors (3, entries): pair, row, packed node of chosen / rejected sides


def collate(rows: list, device) -> Batch:
    """Pad rows on the right and build the ancestor mask: token s is seen by t when node(t) sees node(s) and s is
    not to the right of t. Padding sees itself only (a softmax over nothing would be NaN)."""
    B, T, n = len(rows), max(len(r.packed.ids) for r in rows), max(len(r.packed.sees) for r in rows)
    ids, position, before, node = (np.zeros((B, T), np.int64) for _ in range(4))
    wanted, imitate, sees = np.zeros((B, n), bool), np.zeros((B, n), np.float32), np.zeros((B, n, n), bool)
    real, sides, j = np.zeros((B, T), bool), ([], []), 0
    for b, r in enumerate(rows):
        p, size = r.packed, len(r.packed.ids)
        ids[b, :size], position[b, :size], node[b, :size] = p.ids, p.position, p.node
        before[b, :size], real[b, :size] = np.maximum(p.before, 0), True
        sees[b, :len(p.sees), :len(p.sees)] = p.sees
        for m, weight in r.imitate.items():
            imitate[b, p.place[m]], wanted[b, p.place[m]] = weight, True
        for pair in r.pairs:
            for side, entries in zip((pair.chosen, pair.rejected), sides):
                entries += [(j, b, p.place[m]) for m in side]
            j += 1
        for m in {m for pair in r.pairs for m in pair.chosen + pair.rejected}:
            wanted[b, p.place[m]] = True
    to = lambda a: torch.from_numpy(a).to(device)
    ids, position, before, node, real, sees = map(to, (ids, position, before, node, real, sees))
    row = torch.arange(B, device=device)[:, None, None]
    mask = sees[row, node[:, :, None], node[:, None, :]] & real[:, None, :]                  # (B, T, T)
    mask = mask.tril_() | torch.eye(T, dtype=torch.bool, device=device)
    at = lambda a: to(a).gather(1, node) * real
    sides = tuple(torch.tensor(e, dtype=torch.int64, device=device).view(-1, 3).T for e in sides)
    return Batch(rows, ids, position, before, node, mask, at(wanted), at(imitate), n, sides)


# ----------------------------------------------------------------------------------------------------------
# 2 · Log-probs of packed trees
# ----------------------------------------------------------------------------------------------------------
LOGITS_AT_ONCE = 1 << 24      # entries of one slice of logits: 64 MiB in fp32


def token_log_probs(model: GPT, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) over the tokenizer's ids: hidden (M, C), targets (M,) -> (M,) fp32. The (M, V) logits are
    made slice by slice and recomputed in the backward pass when they would not fit in one slice."""
    def one(h, t):
        """One slice: (m, C), (m,) -> (m,)."""
        logits = model.token_logits(h)
        return logits.gather(-1, t[:, None]).squeeze(-1) - logits.logsumexp(-1)
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    if len(targets) <= size:
        return one(hidden, targets)
    slices = zip(hidden.split(size), targets.split(size))
    return torch.cat([recompute(one, h, t, use_reentrant=False) for h, t in slices])


def tree_log_probs(model: GPT, batch: Batch, with_hidden: bool = False):
    """(B, T) log-prob of each wanted token given its ancestors, 0 elsewhere. A node's first token is predicted
    from its parent's last token (`before`), not from the column on its left. with_hidden: also the (B, T, C) states."""
    hidden = model(batch.ids, batch.position, batch.mask)               # (B, T, C)
    b, t = batch.wanted.nonzero(as_tuple=True)                          # (M,)
    # subtle: index_select, not hidden[b, before]: branches share a parent's last token, and on a CPU the backward
    # of the latter adds such duplicates from several threads in any order: other bytes at every run
    parents = hidden.flatten(0, 1).index_select(0, b * batch.ids.shape[1] + batch.before[b, t])      # (M, C)
    logps = token_log_probs(model, parents, batch.ids[b, t])
    logps = torch.zeros(batch.ids.shape, device=logps.device).index_put((b, t), logps)
    return (logps, hidden) if with_hidden else logps


def side_sums(batch: Batch, logps: torch.Tensor) -> tuple:
    """Sum of (B, T) values over the chosen and over the rejected side of each pair: two tensors (J,)."""
    per_node = torch.zeros(len(batch.rows), batch.nodes, device=logps.device).scatter_add(1, batch.node, logps)
    count = sum(len(r.pairs) for r in batch.rows)
    return tuple(torch.zeros(count, device=logps.device).index_add(0, pair, per_node[row, node])
                 for pair, row, node in batch.sides)


@torch.no_grad()
def store_reference(model: GPT, rows: list) -> None:
    """Write the model's log-probs of both sides into every pair: the model as it is now is the reference."""
    for group in by_length(rows, part_tokens(model)):
        batch = collate(group, model.device)
        sums = side_sums(batch, tree_log_probs(model, batch))
        pairs = [p for r in group for p in r.pairs]
        for pair, chosen, rejected in zip(pairs, *(s.tolist() for s in sums)):
            pair.ref_chosen, pair.ref_rejected = chosen, rejected


@torch.no_grad()
def node_features(model: GPT, rows: list) -> list:
    """What critics read: for each row (packed nodes, C + 4), the hidden states from which the last token of each node
    is drawn and numbers about its path's log-probs, as `critic.critic_features` finds them while sampling."""
    found = {}
    for group in by_length(rows, part_tokens(model)):
        batch = collate(group, model.device)
        batch.wanted = torch.ones_like(batch.wanted)
        logps, hidden = tree_log_probs(model, batch, with_hidden=True)  # (B, T), (B, T, C)
        for i, row in enumerate(group):
            p, own = row.packed, logps[i, :len(row.packed.ids)].cpu().numpy()
            steps = np.split(own, np.flatnonzero(np.diff(p.node)) + 1)  # log-probs of each node's tokens
            numbers = [log_prob_features([steps[m] for m in np.flatnonzero(sees)[1:]]) for sees in p.sees]
            last = np.cumsum([len(s) for s in steps]) - 1
            states = hidden[i, np.maximum(p.before[last], 0)].float()
            found[id(row)] = torch.cat((states, torch.tensor(numbers, device=states.device)), 1)
    return [found[id(row)] for row in rows]


PART_TOKENS = {"cpu": 2048, "cuda": 16384}    # measured on a CPU: 1 to 2 times as fast as 8,192


def part_tokens(model) -> int:
    """Padded tokens of one forward pass over packed rows: by device, or what is set on the model."""
    return getattr(model, "part_tokens", 0) or PART_TOKENS.get(model.device.type, 2048)


def by_length(rows: list, tokens: int) -> list:
    """Split rows into groups of at most `tokens` padded tokens, like lengths together. The order within the
    batch does not matter: gradients are summed."""
    groups, rows = [], sorted(rows, key=lambda r: len(r.packed.ids))
    for row in rows:
        if groups and (len(groups[-1]) + 1) * len(row.packed.ids) <= tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


# ----------------------------------------------------------------------------------------------------------
# 3 · Losses
# ----------------------------------------------------------------------------------------------------------
# HACK HERE: the loss of a pair
def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0, kind="sigmoid"):
    """DPO on log-probs of whole sides, all (B,) -> (loss, chosen_reward, rejected_reward), each (B,).

    sigmoid (DPO, 2305.18290 eq. 7; with label_smoothing a > 0, a float or (B,), conservative DPO as in MCTS-DPO,
    2405.00451): -(1-a) log sig(beta h) - a log sig(-beta h). ipo (2310.12036 eq. 17): (h - 1/(2 beta))^2; smoothing
    does not apply. Rewards are beta (log p - log p_ref), detached. At policy = reference: ln 2, and 1/(4 beta^2)."""
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    if kind == "sigmoid":
        loss = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    elif kind == "ipo":
        loss = (h - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"kind = {kind!r}: expected 'sigmoid' or 'ipo'")
    return loss, (beta * (chosen - ref_chosen)).detach(), (beta * (rejected - ref_rejected)).detach()


def preference_loss(beta: float = 0.1, nll: float = 1.0, kind: str = "sigmoid", on_solutions: bool = False):
    """A loss for `train`: dpo_loss + nll * mean negative log-prob per chosen token (Iterative RPO eq. 2), summed
    over pairs. on_solutions: the second term is instead the mean per token of each whole solution that the rows
    imitate (MCTS-DPO's steps alone never show how a solution ends); a row may then have no pair.
    -> f(model, batch) = (sum, weight = pairs, or pairs + solutions; statistics summed over pairs, their number)."""
    def loss_fn(model, batch):
        """Sum over the batch; see above."""
        device, pairs = batch.ids.device, [p for r in batch.rows for p in r.pairs]
        logps = tree_log_probs(model, batch)
        chosen, rejected = side_sums(batch, logps)
        lengths = side_sums(batch, torch.ones_like(batch.ids, dtype=torch.float32) * batch.wanted)
        number = lambda name: torch.tensor([getattr(p, name) for p in pairs], device=device, dtype=torch.float32)
        ref_chosen, ref_rejected = number("ref_chosen"), number("ref_rejected")
        losses, good, bad = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, number("smoothing"), kind)
        stats = dict(dpo=losses, margin=good - bad, preference_accuracy=(good > bad).float(),
                     chosen_shift=(chosen - ref_chosen) / lengths[0], chosen_length=lengths[0],
                     rejected_shift=(rejected - ref_rejected) / lengths[1], rejected_length=lengths[1])
        stats = {k: v.sum().item() for k, v in stats.items()} | {"pairs": len(pairs)}
        if not on_solutions:
            return (losses - nll * chosen / lengths[0]).sum(), len(pairs), stats
        total = losses.sum() - nll * (logps * batch.imitate).sum()
        return total, len(pairs) + sum(r.solutions for r in batch.rows), stats
    return loss_fn


def sft_loss(model: GPT, batch: Batch):
    """Imitation for `train`: -(sum of weighted log-probs of the solutions' tokens), weight = their number."""
    weight = batch.imitate.sum()
    loss = -(tree_log_probs(model, batch) * batch.imitate).sum()
    return loss, weight.item(), {}


# ----------------------------------------------------------------------------------------------------------
# 4 · Training: one loop for every loss
# ----------------------------------------------------------------------------------------------------------
def default_lr(model: GPT, kind: str) -> float:
    """Learning rate by size: the papers' 1e-6 (DPO) and 1e-5 (SFT) at 7B grow with parameters^-1/3; at 0.56M that is
    2.3e-5 and 2.3e-4. Measured there: DPO at 1e-4 or more pushes pit steps so far down (-0.4 nats a token and beyond)
    that good lines which look like them go with them, and accuracy falls by 3 to 18 points. SFT on the model's own
    right solutions at 1e-3 mends its choices, too, but wears off arithmetic it had learnt: README, "Results"."""
    return {"dpo": 1e-6, "sft": 1e-5}[kind] * (7e9 / sum(p.numel() for p in model.parameters())) ** (1 / 3)


class Muon(torch.optim.Optimizer):
    """Momentum, then each matrix's update replaced by the nearest orthogonal one, by five Newton-Schulz steps
    (Jordan et al. 2024, kellerjordan.github.io/posts/muon), scaled to the size of an AdamW step (2502.16982).
    torch.optim.Muon does the same in bf16, one matrix at a time; here in fp32, matrices of one shape together:
    on a CPU without bf16 units that third of a training step becomes a few per cent."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr, momentum=0.95))

    @torch.no_grad()
    def step(self):
        """One update; the state of a matrix is its `momentum_buffer`."""
        group, shapes = self.param_groups[0], {}
        for p in group["params"]:
            if p.grad is not None:
                shapes.setdefault(p.shape, []).append(p)
        for shape, params in shapes.items():
            for p in params:
                self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
            x = torch.stack([p.grad.lerp(self.state[p]["momentum_buffer"], group["momentum"]) for p in params])
            x = x.mT if shape[0] > shape[1] else x                      # (matrices, small side, large side)
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):                                          # singular values -> about 1
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.mT if shape[0] > shape[1] else x
            for p, update in zip(params, x):
                p.add_(update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def make_optimizers(params: dict, lr: float, muon: bool) -> list:
    """AdamW; with `muon` (training from scratch) Muon for the hidden matrices and AdamW for the rest. Muon's steps
    are scaled to AdamW's size, so one learning rate serves both. fused: one pass over memory; on a CPU, too, 3 to 5
    times faster (at 135M parameters .2 s a step instead of .9)."""
    matrix = [p for n, p in params.items() if muon and p.dim() == 2 and ".layers." in n]
    rest = [p for n, p in params.items() if not (muon and p.dim() == 2 and ".layers." in n)]
    adamw = torch.optim.AdamW(rest, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [adamw] + ([Muon(matrix, lr)] if matrix else [])


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate: linear up over `warmup` steps, then linear down to nearly 0 at the end."""
    return min((step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup), 1.0)


def train(model: GPT, batches, loss_fn, lr: float, muon: bool = False, warmup: int = 5, clip: float = 1.0,
          state=None, save_seconds: float = 20.0, label: str = "train", split=None) -> dict:
    """Train in place: one optimiser step per batch.

    batches: a sequence (len, [i]) of lists of rows. loss_fn(model, batch) -> (sum to minimise, weight, sums of
    statistics): gradients of the parts (`part_tokens` bounds memory; it does not change the result beyond rounding) are
    added and divided once by the whole weight. state: a file the weights, moments and history are kept in every
    save_seconds, or more rarely, so that saving takes at most a twentieth of the time; when it is there, training goes
    on from it. split(rows, tokens, device) -> [(batch for loss_fn, its tokens)], when rows are no packed trees.
    Weights that are not fp32 have fp32 masters. A step whose loss or gradient is not finite is skipped and counted;
    after ten in a row BadInput. Returns means over the last quarter, and what was alarming."""
    params = dict(model.named_parameters())
    masters = _masters(model, params)
    optimizers = make_optimizers(masters, lr, muon)
    step, history = _load_state(state, masters, params, optimizers)
    started = saved = time.time()
    pause = save_seconds
    bar = tqdm(total=len(batches), initial=step, desc=label, unit="step", leave=False)
    skipped, model_tokens = 0, 0
    while step < len(batches):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr * schedule(step, len(batches), warmup)
        stats = _gradients(model, batches[step], loss_fn, params, masters, split)
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), clip).item()
        if math.isfinite(stats["loss"]) and math.isfinite(norm):
            for optimizer in optimizers:
                optimizer.step()
            skipped = 0
        else:
            skipped += 1
            if skipped >= 10:
                raise BadInput(f"{label}: the loss was not finite ten steps in a row (step {step}); lower the learning "
                               "rate (--dpo-lr, --sft-lr, --base-lr), in a new --out.")
        for n, p in params.items():
            if masters[n] is not p:
                p.data.copy_(masters[n].data)
        step += 1
        model_tokens += stats["tokens"]
        history.append(stats | {"grad_norm": norm, "skipped": float(skipped > 0)})
        bar.update()
        rate = model_tokens / (time.time() - started)
        bar.set_postfix_str(f"loss {stats['loss']:.4f}, {rate:,.0f} tokens/s", refresh=False)
        if state is not None and time.time() - saved > pause and step < len(batches):
            begun = time.time()
            save_state(state, masters, optimizers, step, history)
            saved = time.time()
            pause = max(save_seconds, 20 * (saved - begun))             # 135M parameters are 1.6 GB a time
    bar.close()
    if state is not None:
        save_state(state, masters, optimizers, step, history)
    for p in masters.values():
        p.grad = None
    return _summary(history) | {"train_seconds": time.time() - started}


def _masters(model, params):
    """fp32 copies of weights that are not fp32, kept on the model across rounds: an update of 1e-6 is far below
    the rounding of bf16 and would be lost."""
    if model.dtype == torch.float32:
        return params
    if getattr(model, "masters", None) is None:
        model.masters = {n: p.detach().float().requires_grad_() for n, p in params.items()}
    return model.masters


@torch.no_grad()
def load_weights(model: GPT, weights: dict, exact=None) -> None:
    """Put weights (name -> tensor) into the model; exact: a file of `save_state`, whose fp32 weights then win. A
    model that is not fp32 gets them as masters too."""
    if exact is not None:
        kept, _ = read_safetensors(exact, lambda n: n.startswith("weight."))
        weights = {n.removeprefix("weight."): t for n, t in kept.items()}
    for n, p in model.named_parameters():
        p.copy_(weights[n])
    model.masters = None
    if model.dtype != torch.float32:
        # in the model's own order: a gradient norm summed in another order rounds otherwise
        model.masters = {n: weights[n].detach().float().to(model.device).requires_grad_()
                         for n, _ in model.named_parameters()}


def packed_parts(rows: list, tokens: int, device) -> list:
    """A batch of packed trees in parts of at most `tokens` padded tokens: (Batch, tokens), made as they are asked."""
    return ((collate(part, device), sum(len(r.packed.ids) for r in part)) for part in by_length(rows, tokens))


def _gradients(model, rows, loss_fn, params, masters, split=None):
    """Accumulate the gradient of one batch in the masters; returns its statistics, all per unit of weight."""
    for p in masters.values():
        p.grad = None
    total, weight, sums, count = 0.0, 0.0, {}, 0
    for batch, size in (split or packed_parts)(rows, part_tokens(model), model.device):
        loss, w, stats = loss_fn(model, batch)
        loss.backward()
        for n, p in params.items():
            if masters[n] is not p and p.grad is not None:              # parts are added in fp32
                masters[n].grad = p.grad.float() if masters[n].grad is None else masters[n].grad + p.grad
                p.grad = None
        total, weight, count = total + loss.item(), weight + w, count + size
        for k, v in stats.items():
            sums[k] = sums.get(k, 0.0) + v
    for p in masters.values():
        if p.grad is not None:
            p.grad /= weight
    pairs = sums.pop("pairs", 0)
    return {"loss": total / weight, "tokens": count} | ({k: v / pairs for k, v in sums.items()} if pairs else {})


def save_state(file, masters: dict, optimizers: list, step: int, history: list) -> None:
    """Weights (fp32), moments and history of an unfinished (or finished) training, in one atomic write."""
    tensors = {f"weight.{n}": p.data for n, p in masters.items()}
    names = {id(p): n for n, p in masters.items()}
    for optimizer in optimizers:
        for p, moments in optimizer.state.items():
            tensors |= {f"{key}/{names[id(p)]}": value for key, value in moments.items()}
    tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    write_safetensors(file, tensors, {"step": str(step), "history": json.dumps(history)})


def _load_state(file, masters, params, optimizers):
    """(step, history) of a state file; (0, []) when there is none. Fills weights and moments."""
    if file is None or not Path(file).exists():
        return 0, []
    tensors, about = read_safetensors(file)
    for n, p in masters.items():
        p.data.copy_(tensors[f"weight.{n}"])
        params[n].data.copy_(p.data)
    owner = {n: o for o in optimizers for g in o.param_groups for n, p in masters.items()
             if any(p is q for q in g["params"])}
    for name, tensor in tensors.items():
        key, _, n = name.partition("/")
        if n:
            owner[n].state[masters[n]][key] = tensor.to(masters[n].device)                      # steps, too: fused
    return int(about["step"]), json.loads(about["history"])


def _summary(history):
    """Means over the last quarter of the steps; tokens and skipped steps summed over all. An `alarm` when the
    chosen side's log-prob fell against the reference: the known way in which DPO ruins a model."""
    last = history[-max(1, len(history) // 4):]
    keys = {k: None for h in last for k in h}           # a dict: in order; a batch without pairs has fewer
    out = {k: round(float(np.mean([h[k] for h in last if k in h])), 6) for k in keys}
    out |= {"tokens": sum(h["tokens"] for h in history), "steps": len(history),
            "skipped": int(sum(h["skipped"] for h in history))}
    if out.get("chosen_shift", 0.0) < -0.05:
        out["alarm"] = (f"chosen log-prob fell by {-out['chosen_shift']:.3f} nats a token below the reference: "
                        "lower --dpo-lr or raise --nll")
    return out


# ----------------------------------------------------------------------------------------------------------
# 5 · Demo
# ----------------------------------------------------------------------------------------------------------
def main() -> None:
    """One question, a right and a wrong first step: train on the pair and watch the two log-probs part."""
    tokenizer = Tokenizer.bytes_only()
    model = GPT(GPTConfig.tiny(tokenizer.n_ids, hidden_size=64, layers=2)).initialise(seed=0).bind(tokenizer)
    forest = Forest(1)
    root = forest.add(0, -1, tokenizer.encode("7+1*4?"))
    good = forest.add(0, root, tokenizer.encode("1*4=4 : 7+4\n"))
    bad = forest.add(0, root, tokenizer.encode("7+1=8 : 8*4\n"))
    rows = [tree_row(forest, 0, [Pair([good], [bad])])]
    store_reference(model, rows)
    print("prefix 7+1*4?   chosen '1*4=4 : 7+4'   rejected '7+1=8 : 8*4'   one packed row of "
          f"{len(rows[0].packed.ids)} tokens")
    for steps in (0, 5, 20, 40):
        torch.manual_seed(0)
        if steps:
            train(model, [rows] * steps, preference_loss(beta=0.1, nll=0.0), lr=1e-3, label="demo")
        with torch.no_grad():
            batch = collate(rows, model.device)
            chosen, rejected = side_sums(batch, tree_log_probs(model, batch))
        h = (chosen - rejected).item() - rows[0].pairs[0].ref_chosen + rows[0].pairs[0].ref_rejected
        print(f"{steps:3d} more steps of DPO: log p(chosen) {chosen.item():8.2f}   log p(rejected) "
              f"{rejected.item():8.2f}   margin {0.1 * h:6.2f}")


if __name__ == "__main__":
    main()
