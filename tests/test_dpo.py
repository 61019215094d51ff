"""Losses, packed rows and the training loop: against hand numbers, plain rows and finite differences.

Oracles: log-probs of plain texts (one causal row per side), formulas written a second time, central
differences with the whole model in float64, a textbook Muon, and the same training done in another way
(one part or many, at once or interrupted). Seeds are fixed; what is left is rounding, and every tolerance
is above ten times what rounding gives here. No statistical test, so no false alarms."""
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dpo  # noqa: E402
from dpo import (Muon, Pair, by_length, collate, default_lr, dpo_loss, load_weights, schedule,  # noqa: E402
                 preference_loss, sft_loss, side_sums, store_reference, text_row, token_log_probs, train,
                 tree_log_probs, tree_row)
from mcts import Forest, grow, plant  # noqa: E402
from model import GPT, BadInput, GPTConfig, Sampler, Tokenizer  # noqa: E402

V = 40                                          # ids of the models made here; the last one ends a text


def tiny(seed=0, hidden=32, vocab=V, dtype=torch.float32):
    return GPT(GPTConfig.tiny(vocab, hidden, layers=2, max_positions=128)).initialise(seed).to(dtype)


def forest_of(seeds, prompt=None, ids=V):
    """A tree per seed, of random steps:   root 0 +- a 1 +- b 2 - c 3 (end)      all steps of one to four
                                                  |      `- d 4 - e 5 (end)      tokens
                                                  `- f 6 - g 7 (end)"""
    forest = Forest(len(seeds), 2)
    for b, seed in enumerate(seeds):
        rng = np.random.default_rng(seed)
        forest.add(b, -1, rng.integers(0, ids, 3 + b % 4) if prompt is None else prompt)
        for parent, end in ((0, ""), (1, ""), (2, "eos"), (1, ""), (4, "eos"), (0, ""), (6, "eos")):
            forest.add(b, parent, rng.integers(0, ids, rng.integers(1, 5)), end=end)
    assert (forest.size == 8).all()             # no two steps happened to be equal
    return forest


def pairs_of(rng=None):
    """One step against one, a long side against a short one, and a pair at the root; random references."""
    pairs = [Pair([2], [4], 0.1), Pair([4, 5], [2, 3]), Pair([6, 7], [1], 0.3), Pair([1, 2, 3], [6])]
    for p in pairs if rng else ():
        p.ref_chosen, p.ref_rejected = -20 * rng.random(), -20 * rng.random()
    return pairs


def rows_of(seeds, forest=None):
    """Rows with all pairs and two solutions that share a step, and the forest they came from."""
    forest, rng = forest or forest_of(seeds), np.random.default_rng(1)
    return forest, [tree_row(forest, b, pairs_of(rng), [3, 5]) for b in range(len(seeds))]


def side(model, forest, b, nodes):
    """Sum of log-probs of the tokens of `nodes` after their prefix: one plain causal row, and their
    number."""
    before = forest.path_of(b, int(forest.parent[b, nodes[0]]), "ids")
    ids = np.concatenate((before, *(forest.ids[b][n] for n in nodes)))
    logps = torch.log_softmax(model.logits(model(torch.from_numpy(ids)[None]))[0], -1)
    at = range(len(before), len(ids))
    return sum(logps[t - 1, ids[t]] for t in at), len(at)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_near(one, two, tolerance):
    assert one.keys() == two.keys()
    for n in one:
        scale = max(1.0, two[n].abs().max().item())
        assert (one[n] - two[n]).abs().max().item() <= tolerance * scale, n


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# ----------------------------------------------------------------------------------------------------------
# dpo_loss
# ----------------------------------------------------------------------------------------------------------
BETAS, SMOOTHINGS = (0.01, 0.1, 0.5, 5.0), (0.0, 0.1, 0.3, 0.5)


@pytest.mark.parametrize("beta", BETAS)
def test_policy_is_the_reference(beta):
    """At policy = reference, whatever the log-probs: the loss is ln 2 for every beta and smoothing a, its
    slope in h is -beta (1 - 2a) / 2, IPO is 1 / (4 beta^2) with slope -1 / beta; both rewards are 0."""
    ref = torch.tensor([[-3.0, -70.0, -0.01], [-4.0, -1.0, -90.0]], dtype=torch.float64)
    for kind, a in [("sigmoid", a) for a in SMOOTHINGS] + [("ipo", 0.0)]:
        chosen, rejected = (r.clone().requires_grad_() for r in ref)
        loss, good, bad = dpo_loss(chosen, rejected, *ref, beta=beta, label_smoothing=a, kind=kind)
        want, slope = math.log(2), -beta * (1 - 2 * a) / 2
        if kind == "ipo":
            want, slope = 1 / (4 * beta ** 2), -1 / beta
        assert loss.detach().tolist() == pytest.approx([want] * 3, rel=1e-12)
        loss.sum().backward()
        assert chosen.grad.tolist() == pytest.approx([slope] * 3, rel=1e-12)
        assert rejected.grad.tolist() == pytest.approx([-slope] * 3, rel=1e-12)
        assert good.tolist() == bad.tolist() == [0] * 3


def test_loss_by_hand():
    """h = (-10 + 11) - (-12 + 11.5) = 1.5, beta .5: -ln sigmoid(.75) = .386871, with smoothing .25 (a tensor,
    one per pair) .386871 + .25 * .75; IPO (1.5 - 1)^2. The second pair has h = -2: ln(1 + e) = 1.313262, and
    1.313262 - .1; IPO 9. Rewards .5 and -.25, -.5 and .5, and they carry no gradient. Defaults: beta .1, no
    smoothing, sigmoid."""
    args = torch.tensor([[-10.0, -5.0], [-12.0, -7.0], [-11.0, -4.0], [-11.5, -8.0]], requires_grad=True)
    loss, good, bad = dpo_loss(*args, beta=0.5)
    assert loss.shape == (2,) and loss.tolist() == pytest.approx([0.386871, 1.313262], abs=1e-6)
    assert good.tolist() == [0.5, -0.5] and bad.tolist() == [-0.25, 0.5]
    assert loss.requires_grad and not good.requires_grad and not bad.requires_grad
    smooth = dpo_loss(*args, 0.5, torch.tensor([0.25, 0.1]))[0]
    assert smooth.tolist() == pytest.approx([0.386871 + 0.1875, 1.313262 - 0.1], abs=1e-6)
    assert dpo_loss(*args, beta=0.5, kind="ipo")[0].tolist() == [0.25, 9.0]
    default = [math.log1p(math.exp(-0.15)), math.log1p(math.exp(0.2))]
    assert dpo_loss(*args)[0].tolist() == pytest.approx(default)
    with pytest.raises(ValueError, match="hinge"):
        dpo_loss(*args, kind="hinge")


def test_swap_and_constants():
    """Swapping the sides flips h: rewards change places, loss(a) becomes loss(1 - a), the two sigmoid
    losses differ by beta h and the roots of the two IPO losses add up to 1 / beta. A constant added to both
    reference log-probs, or one to both of a side, changes no loss. Far from the reference nothing
    overflows: the loss is -beta h there, or 0. Random pairs in float64."""
    rng = torch.Generator().manual_seed(0)
    c, r, rc, rr = -30 * torch.rand(4, 50, generator=rng, dtype=torch.float64)
    h, near = (c - rc) - (r - rr), lambda x, y: torch.allclose(x, y, rtol=0, atol=1e-9)
    for beta in BETAS:
        for a in SMOOTHINGS:
            loss, good, bad = dpo_loss(c, r, rc, rr, beta, a)
            other, good2, bad2 = dpo_loss(r, c, rr, rc, beta, a)
            assert near(good, bad2) and near(bad, good2)
            assert near(other, dpo_loss(c, r, rc, rr, beta, 1 - a)[0])
            assert near(other - loss, (1 - 2 * a) * beta * h)
            assert near(loss, dpo_loss(c, r, rc + 7.5, rr + 7.5, beta, a)[0])
            assert near(loss, dpo_loss(c - 3, r, rc - 3, rr, beta, a)[0])
        one, two = (dpo_loss(*x, beta, kind="ipo")[0] for x in ((c, r, rc, rr), (r, c, rr, rc)))
        assert near(two - one, 2 * h / beta) and near(one, (h - 0.5 / beta) ** 2)
        assert near(one, dpo_loss(c, r, rc + 7.5, rr + 7.5, beta, kind="ipo")[0])
    far = torch.tensor([-1e4, 1e4])
    assert dpo_loss(far, -far, 0 * far, 0 * far, 1.0)[0].tolist() == [2e4, 0]


# ----------------------------------------------------------------------------------------------------------
# Rows
# ----------------------------------------------------------------------------------------------------------
def test_pairs_without_direction_are_dropped():
    """Pairs with smoothing .5 leave the row, with their nodes; the others stay, in order."""
    pairs = pairs_of()
    pairs[0].smoothing = pairs[2].smoothing = 0.5
    row = tree_row(forest_of([0]), 0, pairs)
    assert row.pairs == [pairs[1], pairs[3]]
    assert sorted(tree_row(forest_of([0]), 0, pairs[2:3], [5]).packed.place) == [0, 1, 4, 5]


@pytest.mark.parametrize("chosen, rejected", [
    ([], [4]), ([2], []), ([], []), ([2], [2]), ([2, 3], [2]), ([3], [4]), ([1], [2]), ([2], [6]),
    ([0], [0])])
def test_sides_that_are_no_branches(chosen, rejected):
    """Empty sides, one side twice, a step against its own parent, and steps of different parents are
    refused."""
    with pytest.raises(ValueError, match="different branches"):
        tree_row(forest_of([0]), 0, [Pair([2], [4]), Pair(chosen, rejected)])


def test_repeated_steps_are_imitated_repeatedly():
    """Steps that several solutions share weigh as often as in separate rows; the question weighs nothing."""
    row = tree_row(forest_of([0]), 0, paths=[3, 5, 7, 7])
    assert row.imitate == {1: 2, 2: 1, 3: 1, 4: 1, 5: 1, 6: 2, 7: 2}


def test_by_length():
    """Groups hold every row once and keep within the tokens they may have, counted with padding; a row longer
    than that goes alone."""
    rows = [SimpleNamespace(packed=SimpleNamespace(ids=range(n))) for n in (5, 3, 9, 3, 4, 30, 5, 1)]
    for tokens in (1, 9, 12, 20, 1000):
        groups = by_length(rows, tokens)
        assert sorted(map(id, sum(groups, []))) == sorted(map(id, rows))
        assert all(len(g) == 1 or len(g) * max(len(r.packed.ids) for r in g) <= tokens for g in groups)
    assert len(groups) == 1


# ----------------------------------------------------------------------------------------------------------
# Losses on packed rows
# ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ("sigmoid", "ipo"))
def test_preference_loss_is_that_of_plain_rows(kind):
    """Loss, weight, statistics and every gradient of packed rows equal those of a chosen row and a rejected
    row per pair (plain causal rows, formula written again), to 1e-5 of the largest entry."""
    model, beta, nll = tiny(), 0.3, 0.7
    forest, rows = rows_of(range(3))
    total, weight, stats = preference_loss(beta, nll, kind)(model, collate(rows, "cpu"))
    packed, want, seen = gradients(model, total), 0, []
    for b, row in enumerate(rows):
        for p in row.pairs:
            (chosen, size), (rejected, other) = (side(model, forest, b, x) for x in (p.chosen, p.rejected))
            good, bad = chosen - p.ref_chosen, rejected - p.ref_rejected
            h, a = good - bad, p.smoothing
            loss = (h - 1 / (2 * beta)) ** 2 if kind == "ipo" else \
                (1 - a) * torch.log1p(torch.exp(-beta * h)) + a * torch.log1p(torch.exp(beta * h))
            want = want + loss - nll * chosen / size
            seen.append([x.item() if torch.is_tensor(x) else x for x in (
                loss, beta * h, good > bad, good / size, size, bad / other, other)])
    assert weight == 12 and total.item() == pytest.approx(want.item(), rel=1e-5)
    assert_near(packed, gradients(model, want), 1e-5)
    assert list(stats) == ["dpo", "margin", "preference_accuracy", "chosen_shift", "chosen_length",
                           "rejected_shift", "rejected_length", "pairs"] and stats.pop("pairs") == 12
    assert list(stats.values()) == pytest.approx(np.sum(seen, 0).tolist(), rel=1e-5)


def test_loss_on_solutions_is_that_of_plain_rows():
    """With on_solutions: DPO of the pairs + nll * mean NLL per token of each imitated solution, whatever its length;
    rows without pairs count too; statistics are those of the pairs alone."""
    model, nll, leaves = tiny(), 0.7, (3, 5, 7)
    forest, rows = rows_of(range(3))
    mixed = [tree_row(forest, b, row.pairs if b else (), leaves, each=True) for b, row in enumerate(rows)]
    total, weight, stats = preference_loss(0.3, nll, on_solutions=True)(model, collate(mixed, "cpu"))
    pairs = sum(len(r.pairs) for r in rows[1:])
    alone, number, same = preference_loss(0.3, 0.0)(model, collate(rows[1:], "cpu"))
    sides = [side(model, forest, b, forest.path(b, n)[1:]) for b in range(3) for n in leaves]
    want = alone - nll * sum(x / size for x, size in sides)
    assert weight == pairs + 9 and number == pairs and total.item() == pytest.approx(want.item(), rel=1e-5)
    assert {k: v for k, v in stats.items()} == pytest.approx(same, rel=1e-4, abs=1e-5)
    packed = gradients(model, total)
    assert_near(packed, gradients(model, want), 1e-5)


def test_sft_loss_is_that_of_plain_rows():
    """Imitating the solutions of packed trees = the mean over tokens of plain rows, a row per solution:
    loss, weight (tokens of the solutions) and gradients; and a row made of a text is the same again."""
    model, leaves = tiny(), (3, 5, 7, 7)
    forest = forest_of(range(3))
    trees = [tree_row(forest, b, paths=leaves) for b in range(3)]
    total, weight, stats = sft_loss(model, collate(trees, "cpu"))
    plain = [side(model, forest, b, forest.path(b, n)[1:]) for b in range(3) for n in leaves]
    packed = gradients(model, total)
    assert stats == {} and weight == sum(size for _, size in plain)
    assert total.item() == pytest.approx(-sum(x.item() for x, _ in plain), rel=1e-5)
    want = gradients(model, -sum(x for x, _ in plain))
    assert_near(packed, want, 1e-5)
    texts = [text_row(forest.ids[b][0], forest.path_of(b, n, "ids", root=False))
             for b in range(3) for n in leaves]
    again, number, _ = sft_loss(model, collate(texts, "cpu"))
    assert number == weight
    assert_near(gradients(model, again), want, 1e-5)


def counted(loss_fn, rows, monkeypatch):
    """Ids whose log-probs a loss takes, and the (row, column) whose hidden states get a gradient from it."""
    model, ids, hidden, inner = tiny(), [], [], dpo.token_log_probs
    monkeypatch.setattr(dpo, "token_log_probs", lambda m, h, t: ids.extend(t.tolist()) or inner(m, h, t))
    model.model.norm.register_forward_hook(lambda module, given, out: out.retain_grad() or hidden.append(out))
    loss_fn(model, collate(rows, "cpu"))[0].backward()
    return sorted(ids), {tuple(at) for at in hidden[0].grad.abs().sum(-1).nonzero().tolist()}


@pytest.mark.parametrize("loss", ("preference", "sft"))
def test_only_the_sides_are_predicted(loss, monkeypatch):
    """Tokens of the question and of the shared prefix are not learnt: the log-probs taken are those of the
    sides' tokens, each once, and the last hidden states with a gradient are exactly the columns these
    tokens are predicted from (of a question only its last token). Here a pair below step a, beside a
    solution with f."""
    forest = forest_of(range(2))
    nodes = [2, 4, 5] if loss == "preference" else [6, 7]
    make = {"preference": lambda b: tree_row(forest, b, [Pair([2], [4, 5], 0.0, -3.0, -3.0)]),
            "sft": lambda b: tree_row(forest, b, paths=[7])}[loss]
    rows = [make(b) for b in range(2)]
    ids, columns = counted(preference_loss() if loss == "preference" else sft_loss, rows, monkeypatch)
    assert ids == sorted(i for b in range(2) for n in nodes for i in forest.ids[b][n].tolist())
    want = set()
    for b, row in enumerate(rows):
        lengths = [len(forest.ids[b][n]) for n in sorted(row.packed.place)]
        start = dict(zip(sorted(row.packed.place), np.cumsum([0, *lengths]).tolist()))
        for n in nodes:                         # a step is predicted from its parent's end, then from itself
            up = int(forest.parent[b, n])
            size = len(forest.ids[b][n])
            want.add((b, start[up] + len(forest.ids[b][up]) - 1))
            want |= {(b, start[n] + i) for i in range(size - 1)}
    assert columns == want


@pytest.fixture
def double(monkeypatch):
    """Every .float() and float32 of the code becomes float64, so that differences show formulas, not
    rounding."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", ("sigmoid", "ipo", "sft"))
def test_finite_differences(name, double):
    """The gradient along the gradient itself, along three random directions and at eleven single weights
    equals the central difference of the loss in float64, to 1e-6 of it."""
    model = tiny(hidden=16).double()
    _, rows = rows_of(range(2))
    batch, loss_fn = collate(rows, "cpu"), sft_loss if name == "sft" else preference_loss(0.3, 0.7, name)
    start, rng = weights(model), torch.Generator().manual_seed(0)
    grad = gradients(model, loss_fn(model, batch)[0])
    assert all(g.dtype == torch.float64 for g in grad.values())
    directions = [grad]
    directions += [{n: torch.randn(g.shape, generator=rng) for n, g in grad.items()} for _ in range(3)]
    for n, g in list(grad.items())[::2]:
        directions.append({m: torch.zeros_like(x) for m, x in grad.items()})
        directions[-1][n].view(-1)[g.abs().argmax()] = 1.0
    assert len(directions) == 15

    @torch.no_grad()
    def loss_at(step, direction):
        for n, p in model.named_parameters():
            p.copy_(start[n] + step * direction[n])
        return loss_fn(model, batch)[0].item()
    for direction in directions:
        size = math.sqrt(sum((d ** 2).sum().item() for d in direction.values()))
        slope = sum((grad[n] * direction[n]).sum().item() for n in grad) / size
        measured = (loss_at(1e-5 / size, direction) - loss_at(-1e-5 / size, direction)) / 2e-5
        assert measured == pytest.approx(slope, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("token", (0, V - 1))
def test_masks_go_by_length(token):
    """Id 0 (what padding is written as) and the end-of-text id are tokens like others, in questions and in
    sides: a tree made of little else has the log-probs of plain rows. Padding is no text: whatever ids stand
    there, and however much of it there is, log-probs of the real tokens keep their bits in the first case and
    change by rounding only in the second."""
    model, forest = tiny(), Forest(2)
    for b in range(2):
        forest.add(b, -1, [token] * (2 + 20 * b))
        for parent, ids in ((0, [token, token]), (1, [token] * 3), (1, [5, token]), (0, [token])):
            forest.add(b, parent, ids)
    rows = [tree_row(forest, b, [Pair([2], [3]), Pair([1, 2], [4])]) for b in range(2)]
    batch = collate(rows, "cpu")
    logps = tree_log_probs(model, batch)
    chosen, rejected = side_sums(batch, logps)
    want = [[side(model, forest, b, nodes)[0].item() for b in range(2) for nodes in sides]
            for sides in (([2], [1, 2]), ([3], [4]))]
    assert chosen.tolist() == pytest.approx(want[0], abs=1e-5)
    assert rejected.tolist() == pytest.approx(want[1], abs=1e-5)
    assert batch.wanted.sum().item() == 2 * (2 + 3 + 2 + 1)
    size = len(rows[0].packed.ids)
    assert size < batch.ids.shape[1] and (logps[0, size:] == 0).all()
    alone = collate(rows[:1], "cpu")
    assert (tree_log_probs(model, alone)[0] - logps[0, :size]).abs().max() < 1e-5
    before = gradients(model, chosen.sum())
    batch.ids[0, size:] = torch.arange(batch.ids.shape[1] - size) % V
    again = tree_log_probs(model, batch)
    assert torch.equal(again, logps)
    after = gradients(model, side_sums(batch, again)[0].sum())
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_stored_reference_is_the_policy():
    """After store_reference, in parts or at once: the references are the sums of plain rows, so the loss is
    ln 2 a pair, the margin 0; a pair in no part is not left behind."""
    model = tiny()
    forest, rows = rows_of(range(5))
    for tokens in (1, 60, 16384):
        for p in (p for r in rows for p in r.pairs):
            p.ref_chosen = p.ref_rejected = math.nan
        model.part_tokens = tokens
        store_reference(model, rows)
        total, weight, stats = preference_loss(0.3, 0.0)(model, collate(rows, "cpu"))
        assert weight == 20 and total.item() == pytest.approx(20 * math.log(2), abs=1e-4)
        assert abs(stats["margin"]) < 1e-4
        for b, row in enumerate(rows):
            for p in row.pairs:
                assert p.ref_chosen == pytest.approx(side(model, forest, b, p.chosen)[0].item(), abs=1e-4)
                assert p.ref_rejected == pytest.approx(side(model, forest, b, p.rejected)[0].item(), abs=1e-4)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("count", (7, 8, 9, 1, 0))
def test_sliced_log_probs(count, monkeypatch):
    """Log-probs made a slice at a time (at most four tokens' logits held at once, also in the backward pass)
    equal the log-softmax of all, with gradients, to 1e-6; whether or not the slices come out even. The fifth
    part of the ids is no token: it takes no part in the normalisation."""
    model, rng = tiny(), torch.Generator().manual_seed(0)
    model.no_ids = torch.arange(V) % 5 == 0
    targets = torch.randint(0, V // 5, (count,), generator=rng) * 5 + 1
    results, sizes, inner = [], [], model.token_logits
    monkeypatch.setattr(model, "token_logits", lambda h: sizes.append(len(h)) or inner(h))
    for entries in (dpo.LOGITS_AT_ONCE, V * 4 + V // 2):
        monkeypatch.setattr(dpo, "LOGITS_AT_ONCE", entries)
        hidden = torch.randn(count, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        sizes.clear()
        logps = token_log_probs(model, hidden, targets)
        model.zero_grad()
        (logps * torch.arange(1, count + 1)).sum().backward()
        results.append((logps.detach(), hidden.grad, model.lm_head.weight.grad))
        assert entries > V * 4.5 or max(sizes) <= 4
    for one, two in zip(*results):
        assert torch.allclose(one, two, rtol=0, atol=1e-5)
    logits = (hidden.detach() @ model.lm_head.weight.detach().T)[:, ~model.no_ids]
    kept = (~model.no_ids).cumsum(0)[targets] - 1
    want = torch.log_softmax(logits, -1).gather(-1, kept[:, None])[:, 0]
    assert torch.allclose(results[0][0], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_recorded_log_probs_are_those_trained_on(temperature):
    """What the sampler wrote down for every token of a grown tree (at any temperature: of temperature 1,
    over the tokenizer's ids although the model has more rows) is what the trainer computes for the very
    same tokens from the packed tree, end-of-text included, to 1e-4; and side sums are sums over exactly
    those."""
    tokenizer = Tokenizer.bytes_only()
    model = tiny(seed=1, vocab=tokenizer.n_ids + 7).bind(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[[10, 256]] *= 4    # newlines and ends now and then, see the assert below
    sampler, forest = Sampler(model, tokenizer, 4096, rows=8), Forest(2)
    for b, question in enumerate(("7+1*4?", "9-2*3+1?")):
        plant(forest, b, sampler, tokenizer.encode(question))
    grow(forest, sampler, [(0, 0, 12), (1, 0, 12)], [1, 2], 40, temperature)
    inner = [[n for n in range(1, forest.size[b]) if not forest.terminal[b, n]] for b in range(2)]
    grow(forest, sampler, [(b, n, 2) for b in range(2) for n in inner[b][:4]], [1, 2], 40, temperature)
    assert all(inner) and {0} < {*forest.end[0, :forest.size[0]].tolist()}
    leaves = [forest.leaves(b) for b in range(2)]
    rows = []
    for b in range(2):
        paths = [forest.path(b, leaf)[1:] for leaf in leaves[b]]
        pairs = [Pair(one, two) for one, two in zip(paths, paths[1:]) if one[0] != two[0]]
        rows.append(tree_row(forest, b, pairs, leaves[b]))
    batch = collate(rows, "cpu")
    with torch.no_grad():
        logps = tree_log_probs(model, batch)
    checked = 0
    for b, row in enumerate(rows):
        assert sorted(row.packed.place) == list(range(forest.size[b]))
        for n, i in row.packed.place.items():
            here = np.flatnonzero(row.packed.node == i)
            assert row.packed.ids[here].tolist() == forest.ids[b][n].tolist()
            if n:
                assert abs(logps[b, here].numpy() - forest.logps[b][n]).max() < 1e-4
                checked += len(here)
    assert checked == batch.wanted.sum().item() > 200
    pairs = [(b, p) for b, row in enumerate(rows) for p in row.pairs]
    assert pairs
    for got, name in zip(side_sums(batch, logps), ("chosen", "rejected")):
        want = [sum(forest.logps[b][n].sum() for n in getattr(p, name)) for b, p in pairs]
        assert got.tolist() == pytest.approx(want, abs=1e-3)


# ----------------------------------------------------------------------------------------------------------
# Rates and optimisers
# ----------------------------------------------------------------------------------------------------------
def test_schedule():
    """In (0, 1] at every step of every length and warm-up, one straight line up to 1 over the warm-up and one
    down that would meet 0 just after the last step."""
    for steps in range(1, 40):
        for warmup in range(0, 45):
            factors = [schedule(s, steps, warmup) for s in range(steps)]
            assert all(0 < f <= 1 for f in factors)
            if warmup < steps:
                up = [(s + 1) / warmup for s in range(warmup)]
                down = [(steps - s) / (steps - warmup) for s in range(warmup, steps)]
                assert factors == pytest.approx(up + down, abs=1e-12) and max(factors) == 1
            else:
                assert max(factors) <= 1 and factors[0] <= 1 / max(1, warmup)


def test_default_learning_rates():
    """The papers' 1e-6 and 1e-5 at 7B; ten times that at a thousandth of the size (parameters^-1/3)."""
    size = lambda n: SimpleNamespace(numel=lambda: n)
    of = lambda *sizes: SimpleNamespace(parameters=lambda: map(size, sizes))
    assert default_lr(of(7 * 10 ** 9), "dpo") == pytest.approx(1e-6)
    assert default_lr(of(7 * 10 ** 9), "sft") == pytest.approx(1e-5)
    assert default_lr(of(4 * 10 ** 6, 3 * 10 ** 6), "dpo") == pytest.approx(1e-5)
    assert default_lr(of(7 * 10 ** 6), "sft") == pytest.approx(1e-4)
    with pytest.raises(KeyError):
        default_lr(of(1), "ppo")


SHAPES = ((16, 48), (16, 48), (48, 16), (32, 32), (1, 8))


def textbook_muon(gradients_, lr):
    """Sum of the updates of one matrix in float64: momentum .95, Nesterov, five Newton-Schulz steps."""
    buffer, total = 0, 0
    for g in gradients_:
        g = g.double()
        buffer = 0.95 * buffer + 0.05 * g
        x = 0.05 * g + 0.95 * buffer
        x = x / x.norm()
        for _ in range(5):
            s = x @ x.T
            x = 3.4445 * x - 4.7750 * s @ x + 2.0315 * s @ s @ x
        total = total - lr * 0.2 * math.sqrt(max(g.shape)) * x
    return total


def test_muon():
    """The first update of each matrix has all singular values near 1, times lr * .2 * sqrt(larger side).
    Three steps equal a textbook in float64, a matrix at a time, to 1e-4, and torch.optim.Muon with the size
    of AdamW's steps to the roughness of its bf16 arithmetic. A matrix without gradient stays."""
    rng, lr = torch.Generator().manual_seed(0), 0.1
    steps = [[torch.randn(s, generator=rng) for s in SHAPES] for _ in range(3)]
    ours, theirs = ([torch.zeros(s, requires_grad=True) for s in SHAPES] for _ in range(2))
    idle = torch.ones(4, 4, requires_grad=True)
    peer = torch.optim.Muon(theirs, lr, weight_decay=0.0, momentum=0.95, nesterov=True,
                            adjust_lr_fn="match_rms_adamw")
    optimizers = [Muon([*ours, idle], lr), peer]
    for i, grads in enumerate(steps):
        for params, optimizer in zip((ours, theirs), optimizers):
            for p, g in zip(params, grads):
                p.grad = g.clone()
            optimizer.step()
        for p in ours if i == 0 else ():
            values = torch.linalg.svdvals(-p.detach() / (lr * 0.2 * max(p.shape) ** 0.5))
            assert 0.5 < values.min() and values.max() < 1.3
    for j, (p, q) in enumerate(zip(ours, theirs)):
        want = textbook_muon([grads[j] for grads in steps], lr)
        assert (p.detach() - want).norm() < 1e-4 * want.norm()
        assert (p.detach() - q.detach()).norm() < 0.03 * q.detach().norm()
    assert torch.equal(idle.detach(), torch.ones(4, 4))


# ----------------------------------------------------------------------------------------------------------
# train
# ----------------------------------------------------------------------------------------------------------
def batches_of(steps, seed=0, size=8):
    """A batch of different trees per step."""
    return [rows_of(range(100 * seed + size * s, 100 * seed + size * (s + 1)))[1] for s in range(steps)]


@pytest.mark.parametrize("muon", (False, True))
def test_accumulation(muon):
    """One part of eight rows, eight of one row, and what lies between: the same weights after three steps,
    to 1e-6, and the same report. The sum of the parts is divided by the weight of the batch, not of a part:
    it is the gradient of the mean over all pairs."""
    batches, results = batches_of(3), []
    for tokens in (10 ** 6, 1, 70):
        model = tiny()
        model.part_tokens = tokens
        report = train(model, batches, preference_loss(0.3, 0.7), 1e-3, muon=muon, warmup=1)
        results.append((weights(model), report))
    for other, report in results[1:]:
        assert_near(other, results[0][0], 1e-6)
        for key in report.keys() - {"train_seconds"}:
            assert report[key] == pytest.approx(results[0][1][key], abs=1e-5), key
    tokens = sum(len(r.packed.ids) for rows in batches for r in rows)
    assert results[0][1]["steps"] == 3 and results[0][1]["tokens"] == tokens
    model = tiny()
    params = dict(model.named_parameters())
    for loss_fn in (preference_loss(0.3, 0.7), sft_loss):
        total, weight, _ = loss_fn(model, collate(batches[0], "cpu"))
        want = gradients(model, total / weight)
        model.part_tokens = 1
        stats = dpo._gradients(model, batches[0], loss_fn, params, params)
        assert stats["loss"] == pytest.approx(total.item() / weight, rel=1e-5)
        assert_near({n: p.grad for n, p in params.items()}, want, 1e-6)


def spoilt(steps, how, seen=None):
    """A loss that is not finite (or whose gradient is not) at the given calls."""
    calls = iter(range(10 ** 6))

    def loss_fn(model, batch):
        call = next(calls)
        if seen is not None:
            seen.append(weights(model))
        total, weight, stats = sft_loss(model, batch)
        if call in steps:
            # "gradient": adds 0 whose slope is 0 * inf = NaN
            total = total * how if how != "gradient" else total + (0 * total).sqrt()
        return total, weight, stats
    return loss_fn


@pytest.mark.parametrize("how", (math.nan, math.inf, "gradient"))
def test_steps_that_are_not_finite(how):
    """A step whose loss or gradient is not finite changes no weight, is counted, and leaves later steps
    sound (no moment is spoilt); nine in a row pass, ten in a row are BadInput, and what is between them
    counts anew."""
    row, seen, model = text_row([1, 2], [3, 4, 5]), [], tiny()
    report = train(model, [[row]] * 6, spoilt({1, 3, 4}, how, seen), 1e-3, muon=True)
    seen.append(weights(model))
    for step in range(6):
        same = all(torch.equal(seen[step][n], seen[step + 1][n]) for n in seen[step])
        assert same == (step in (1, 3, 4))
    assert report["skipped"] == 3 and report["steps"] == 6
    assert all(p.isfinite().all() for p in model.parameters())
    nine = {*range(9), *range(10, 19)}
    assert train(tiny(hidden=8), [[row]] * 20, spoilt(nine, how), 1e-3)["skipped"] == 18
    with pytest.raises(BadInput, match="ten steps in a row"):
        train(tiny(hidden=8), [[row]] * 20, spoilt({*range(3, 13)}, how), 1e-3)


class Stop(Exception):
    """Somebody pulled the plug."""


class Interrupted(list):
    """Batches that raise when batch `at` is asked for."""
    at = None

    def __getitem__(self, i):
        if i == self.at:
            raise Stop
        return super().__getitem__(i)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("muon", (False, True))
def test_interrupted_training_ends_in_the_same_bytes(muon, dtype, tmp_path):
    """Training stopped at any step and taken up again from its state file, in a model with other weights (as
    after a restart: all comes from the file), ends in the same state file byte for byte, the same weights and
    the same report as training left alone; stopped twice, too. Taken up when finished it does no step."""
    batches, loss_fn = batches_of(5, size=2), preference_loss(0.3, 0.7)

    def run(file, *stops):
        for i, at in enumerate([*stops, None]):
            model, data = tiny(seed=i, dtype=dtype), Interrupted(batches)
            data.at = at
            if i == len(stops):
                return model, train(model, data, loss_fn, 1e-3, muon, warmup=2, state=file, save_seconds=0)
            with pytest.raises(Stop):
                train(model, data, loss_fn, 1e-3, muon, warmup=2, state=file, save_seconds=0)
    model, report = run(tmp_path / "whole")
    plain = tiny(dtype=dtype)
    train(plain, batches, loss_fn, 1e-3, muon, warmup=2)                # saving changes nothing
    for stops in ([1], [4], [2, 3]):
        file = tmp_path / f"stopped{stops}"
        other, again = run(file, *stops)
        assert file.read_bytes() == (tmp_path / "whole").read_bytes()
        assert {**again, "train_seconds": 0} == {**report, "train_seconds": 0} and again["steps"] == 5
        for n, p in model.named_parameters():
            assert torch.equal(p, other.get_parameter(n)) and torch.equal(p, plain.get_parameter(n))
    before, data = (tmp_path / "whole").read_bytes(), Interrupted(batches)
    data.at = 4                                                         # a finished one asks for no batch
    done = train(tiny(7, dtype=dtype), data, loss_fn, 1e-3, muon, warmup=2, state=tmp_path / "whole")
    assert {**done, "train_seconds": 0} == {**report, "train_seconds": 0}
    assert (tmp_path / "whole").read_bytes() == before


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_next_round_after_a_restart(dtype, tmp_path):
    """A second training after load_weights from the first one's state file ends in the same bytes as one in
    the model that did the first: the masters are those of the file, exactly, and in the model's own order (a
    norm summed in another order rounds otherwise)."""
    loss_fn, model = preference_loss(0.3, 0.7), tiny(dtype=dtype)
    train(model, batches_of(3, size=2), loss_fn, 1e-3, state=tmp_path / "one", muon=True)
    other = tiny(5, dtype=dtype)
    load_weights(other, {n: p.float() for n, p in model.named_parameters()}, tmp_path / "one")
    assert all(torch.equal(p, other.get_parameter(n)) for n, p in model.named_parameters())
    for m, name in ((model, "two"), (other, "again")):
        train(m, batches_of(3, seed=1, size=2), loss_fn, 1e-3, state=tmp_path / name, muon=True)
    assert (tmp_path / "two").read_bytes() == (tmp_path / "again").read_bytes()
    if dtype != torch.float32:
        assert list(other.masters) == list(model.masters) == [n for n, _ in model.named_parameters()]


def pull(model, batch):
    """A loss with slope 1 in every weight: AdamW then moves each by exactly the learning rate."""
    return sum(p.float().sum() for p in model.parameters()), 1, {}


def test_masters_keep_small_steps():
    """A bf16 model moved by 1e-5 a hundred times, in one training or in as many rounds of one step, ends
    where the sum of the steps leads, rounded once; added in bf16 itself the same steps would not have moved
    a single one of these weights. A fp32 model has no second copy."""
    rounds = [[100], [1] * 100]
    for steps in rounds:
        model, row = tiny(hidden=8, dtype=torch.bfloat16), text_row([1], [2])
        start, travelled = weights(model), 0.0
        for n in steps:
            factors = [schedule(s, n, 5) for s in range(n)]
            lr = 1e-5 / (sum(factors) / n)      # a mean step of 1e-5
            travelled += lr * sum(factors)
            train(model, [[row]] * n, pull, lr)
        assert travelled == pytest.approx(1e-3)
        moved = 0
        for n, p in model.named_parameters():
            stuck = start[n].clone()
            for _ in range(100):
                stuck -= torch.tensor(2.1e-5, dtype=torch.bfloat16)     # the largest single step
            large = (start[n].abs() > 2 ** -5) & (start[n].abs() < 2 ** -2)
            assert torch.equal(stuck[start[n].abs() > 2 ** -5], start[n][start[n].abs() > 2 ** -5])
            want = start[n].float() - travelled
            assert (model.masters[n].detach() - want).abs().max() < 1e-5
            assert torch.equal(p.detach(), model.masters[n].detach().bfloat16())
            moved += (p.detach() != start[n])[large].sum().item() - large.sum().item()
        assert moved == 0 and p.dtype == torch.bfloat16
    model = tiny(hidden=8)
    train(model, [[row]], pull, 1e-5)
    assert getattr(model, "masters", None) is None


def test_one_pair_moves():
    """Thirty steps of DPO alone on one pair raise the chosen and lower the rejected side: less than ln 2 is
    left."""
    model, rows = tiny(), [tree_row(forest_of([0]), 0, [Pair([2], [4])])]
    store_reference(model, rows)
    train(model, [rows] * 30, preference_loss(0.3, 0.0), 1e-3)
    chosen, rejected = side_sums(*(lambda batch: (batch, tree_log_probs(model, batch)))(collate(rows, "cpu")))
    pair, = rows[0].pairs
    assert chosen.item() > pair.ref_chosen + 0.1 and rejected.item() < pair.ref_rejected - 0.1


def test_alarm():
    """When the chosen log-prob of real pairs falls below the reference, the report says so and by how much a
    token; with the NLL term it rises, and the report is quiet."""
    rows = rows_of(range(3))[1]
    reports = []
    for sign in (1, -1):
        model = tiny()
        store_reference(model, rows)
        inner = preference_loss(0.1, 1.0)

        def loss_fn(model, batch):
            total, weight, stats = inner(model, batch)
            return sign * total, weight, stats
        reports.append(train(model, [rows] * 8, loss_fn, 1e-3, warmup=1))
    assert reports[0]["chosen_shift"] > 0 and "alarm" not in reports[0]
    assert reports[1]["chosen_shift"] < -0.05
    assert f"fell by {-reports[1]['chosen_shift']:.3f} nats a token" in reports[1]["alarm"]
