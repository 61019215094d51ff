"""Losses against hand numbers, packed trees against separate rows, and training that resumes in the same bytes."""
import math

import numpy as np
import pytest
import torch

import dpo
from dpo import Pair, Row, collate, dpo_loss, preference_loss, sft_loss, side_sums, store_reference, text_row, train, \
    tree_log_probs, tree_row
from mcts import Forest, grow, plant
from model import GPT, BadInput, GPTConfig, Sampler, Tokenizer, read_safetensors

TOK = Tokenizer.bytes_only()


def tiny(seed=0, dtype=torch.float32):
    """A random two-layer byte model."""
    return GPT(GPTConfig.tiny(TOK.n_ids, hidden_size=32, layers=2)).initialise(seed).bind(TOK).to(dtype)


def forest_of_three():
    """A question with three branches; two share their first step."""
    f = Forest(1)
    f.add(0, -1, TOK.encode("7+1*4?"))
    a, d = f.add(0, 0, TOK.encode("1*4=4 : 7+4\n")), f.add(0, 0, TOK.encode("7+1=8 : 8*4\n"))
    b, c = f.add(0, a, TOK.encode("#### 11") + [256], end="eos"), f.add(0, a, TOK.encode("#### 12") + [256], end="eos")
    return f, a, b, c, d


def plain(model, prompt, side):
    """Sum of log-probs of `side` after `prompt` by an ordinary row."""
    ids = torch.tensor([list(prompt) + list(side)])
    logps = model.token_logits(model(ids)).log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    return logps[len(prompt) - 1:].sum()


@pytest.mark.parametrize("beta", (0.01, 0.1, 1.0))
@pytest.mark.parametrize("a", (0.0, 0.2, 0.49))
def test_loss_at_the_reference(beta, a):
    """ln 2 when policy = reference, slope -beta (1 - 2a) / 2 in h, for every beta and smoothing; IPO 1 / (4 beta^2)."""
    chosen = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([-5.0], dtype=torch.float64)
    loss, good, bad = dpo_loss(chosen, other, chosen.detach(), other, beta, a)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2)) and chosen.grad.item() == pytest.approx(-beta * (1 - 2 * a) / 2)
    assert good.item() == bad.item() == 0.0
    assert dpo_loss(chosen, other, chosen, other, beta, kind="ipo")[0].item() == pytest.approx(1 / (4 * beta ** 2))


def test_loss_by_hand():
    """h = (-3+4) - (-6+5) = 2: sigmoid loss at beta .5 is ln(1 + e^-1); conservative mixes both signs; smoothing may be
    (B,); swapping sides flips h; a constant on both references changes nothing; unknown kinds are refused."""
    t = lambda *x: torch.tensor(x, dtype=torch.float64)
    base = dpo_loss(t(-3.), t(-6.), t(-4.), t(-5.), 0.5)
    assert base[0].item() == pytest.approx(math.log(1 + math.exp(-1))) and base[1].item() == 0.5 and base[2].item() == -0.5
    mixed = dpo_loss(t(-3., -3.), t(-6., -6.), t(-4., -4.), t(-5., -5.), 0.5, t(0.0, 0.25))[0]
    assert mixed[1].item() == pytest.approx(0.75 * math.log(1 + math.exp(-1)) + 0.25 * math.log(1 + math.exp(1)))
    assert mixed[0].item() == base[0].item()
    assert dpo_loss(t(-6.), t(-3.), t(-5.), t(-4.), 0.5)[0].item() == pytest.approx(math.log(1 + math.exp(1)))
    assert dpo_loss(t(-3.), t(-6.), t(-1.), t(-2.), 0.5)[0].item() == pytest.approx(base[0].item())
    with pytest.raises(ValueError, match="kind"):
        dpo_loss(t(0.), t(0.), t(0.), t(0.), kind="hinge")


@pytest.mark.parametrize("kind", ("sigmoid", "ipo"))
def test_packed_loss_equals_separate_rows(kind):
    """Loss and gradients of pairs in one packed row equal those computed from a chosen and a rejected row each; so
    prompt tokens, which those sums leave out, get no gradient of their own."""
    model, (f, a, b, c, d) = tiny(), forest_of_three()
    pairs = [Pair([a, b], [d]), Pair([b], [c], 0.1)]
    row = tree_row(f, 0, pairs)
    for p in pairs:
        p.ref_chosen, p.ref_rejected = -20.0, -21.0
    total, weight, _ = preference_loss(0.3, 0.7, kind)(model, collate([row], model.device))
    total.backward()
    packed = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    q = f.ids[0][0].tolist()
    sides = [((q, np.concatenate((f.ids[0][a], f.ids[0][b]))), (q, f.ids[0][d])),
             ((q + f.ids[0][a].tolist(), f.ids[0][b]), (q + f.ids[0][a].tolist(), f.ids[0][c]))]
    expected = 0.0
    for pair, (chosen, rejected) in zip(pairs, sides):
        good, bad = plain(model, *chosen), plain(model, *rejected)
        expected = expected + dpo_loss(good, bad, -20.0, -21.0, 0.3, pair.smoothing, kind)[0] - 0.7 * good / len(chosen[1])
    expected.backward()
    assert weight == 2 and total.item() == pytest.approx(expected.item(), abs=1e-4)
    for n, p in model.named_parameters():
        assert torch.allclose(packed[n], p.grad, atol=1e-4), n


def test_masks_go_by_length():
    """Padding changes nothing, though it is id 0 and id 0 and end-of-text also occur inside the text."""
    model = tiny()
    rows = [text_row([65, 0, 66], [0, 256, 67, 0]), text_row(list(range(40, 60)), list(range(60, 90)))]
    alone = [-sft_loss(model, collate([r], model.device))[0].item() for r in rows]
    assert -sft_loss(model, collate(rows, model.device))[0].item() == pytest.approx(sum(alone), abs=1e-4)
    assert alone[0] == pytest.approx(plain(model, [65, 0, 66], [0, 256, 67, 0]).item(), abs=1e-4)


def test_sides_are_checked():
    """Smoothing .5 is dropped; empty sides and sides that are not branches of one node are refused."""
    f, a, b, c, d = forest_of_three()
    assert len(tree_row(f, 0, [Pair([a], [d], 0.5), Pair([b], [c])]).pairs) == 1
    for chosen, rejected in (([], [d]), ([a], []), ([a], [a]), ([b], [d])):
        with pytest.raises(ValueError, match="different branches"):
            tree_row(f, 0, [Pair(chosen, rejected)])


def test_imitated_steps_count_as_often_as_separate_rows():
    """Two solutions that share a step: packed SFT loss = the sum over two rows."""
    model, (f, a, b, c, d) = tiny(), forest_of_three()
    loss, weight, _ = sft_loss(model, collate([tree_row(f, 0, paths=[b, c])], model.device))
    q = f.ids[0][0].tolist()
    texts = [np.concatenate((f.ids[0][a], f.ids[0][n])) for n in (b, c)]
    assert -loss.item() == pytest.approx(sum(plain(model, q, t).item() for t in texts), abs=1e-4)
    assert weight == sum(map(len, texts))


def test_sliced_logits(monkeypatch):
    """Log-probs and gradients do not depend on how the (T, V) logits are sliced."""
    model, (f, a, b, c, d) = tiny(), forest_of_three()
    batch = collate([tree_row(f, 0, paths=[b, c, ])], model.device)

    def run():
        model.zero_grad()
        logps = tree_log_probs(model, batch)
        logps.sum().backward()
        return [logps.detach()] + [p.grad.clone() for p in model.parameters()]
    whole = run()
    monkeypatch.setattr(dpo, "LOGITS_AT_ONCE", 3 * model.config.vocab_size)
    assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(whole, run()))


def test_reference_makes_ln2():
    """After store_reference the first loss is ln 2 and both shifts are 0."""
    model, (f, a, b, c, d) = tiny(), forest_of_three()
    row = tree_row(f, 0, [Pair([a, b], [d]), Pair([b], [c])])
    store_reference(model, [row])
    _, _, stats = preference_loss()(model, collate([row], model.device))
    assert stats["dpo"] == pytest.approx(2 * math.log(2), abs=1e-5) and abs(stats["chosen_shift"]) < 1e-5


def test_sampled_log_probs_are_the_trainers():
    """What the sampler records equals what the trainer recomputes for the same tokens."""
    model, f = tiny(), Forest(2)
    sampler = Sampler(model, TOK, 64, 8)
    for b, text in enumerate(("7+1*4?", "9-2*3+1?")):
        plant(f, b, sampler, TOK.encode(text))
    leaves = grow(f, sampler, [(0, 0, 3), (1, 0, 2)], [1, 2], 12)
    batch = collate([tree_row(f, b, paths=leaves[b]) for b in range(2)], model.device)
    logps = tree_log_probs(model, batch).detach()
    for b in range(2):
        got = np.concatenate([f.logps[b][n] for n in sorted(batch.rows[b].packed.place) if n])
        size = len(batch.rows[b].packed.ids)
        assert np.allclose(got, logps[b, len(f.ids[b][0]):size].numpy(), atol=1e-4)


def batches(n=6):
    """Some batches of SFT rows."""
    rng = np.random.default_rng(0)
    return [[text_row(rng.integers(30, 90, 5), rng.integers(30, 90, int(rng.integers(3, 20)))) for _ in range(8)] for _ in range(n)]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_accumulation_is_exact():
    """1 x 8 rows = 8 x 1 row: the weights after training agree to rounding."""
    ends = []
    for tokens in (1, 10 ** 6):
        model = tiny()
        train(model, batches(), sft_loss, 1e-3, tokens=tokens)
        ends.append(weights(model))
    assert torch.allclose(*ends, atol=2e-5)


@pytest.mark.parametrize("muon", (False, True))
def test_interrupted_training_ends_in_the_same_bytes(tmp_path, muon):
    """Stopped after four steps and called again: same weights, same moments, same report but for seconds."""
    class Stops(list):
        def __getitem__(self, i):
            if i == 4 and self.armed:
                raise KeyboardInterrupt
            return super().__getitem__(i)
    one, two = tiny(), tiny()
    report = train(one, batches(), sft_loss, 1e-3, muon, state=tmp_path / "a", save_seconds=0)
    data = Stops(batches())
    data.armed = True
    with pytest.raises(KeyboardInterrupt):
        train(two, data, sft_loss, 1e-3, muon, state=tmp_path / "b", save_seconds=0)
    data.armed, two = False, tiny(seed=5)
    again = train(two, data, sft_loss, 1e-3, muon, state=tmp_path / "b", save_seconds=0)
    assert torch.equal(weights(one), weights(two)) and (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert {k: v for k, v in report.items() if "seconds" not in k} == {k: v for k, v in again.items() if "seconds" not in k}
    assert any("momentum_buffer" in n for n in read_safetensors(tmp_path / "a")[0]) == muon


def test_losses_that_are_not_finite():
    """A bad step is skipped and counted and leaves the weights alone; ten in a row end the training with a sentence."""
    model, calls = tiny(), []

    def sometimes(m, batch):
        calls.append(1)
        loss, weight, stats = sft_loss(m, batch)
        return (loss * math.nan if len(calls) == 2 else loss), weight, stats
    assert train(model, batches(4), sometimes, 1e-3, tokens=10 ** 6)["skipped"] == 1 and weights(model).isfinite().all()
    before = weights(model).clone()
    with pytest.raises(BadInput, match="ten steps in a row"):
        train(model, batches(12), lambda m, b: (sft_loss(m, b)[0] * math.nan, 1.0, {}), 1e-3)
    assert torch.equal(weights(model), before)


def test_bf16_keeps_fp32_masters():
    """A hundred steps of 1e-5 move bf16 weights through their fp32 masters; the model always is the rounded master."""
    model = tiny(dtype=torch.bfloat16)
    before = weights(model).clone()
    train(model, batches(1) * 100, sft_loss, 1e-5, warmup=1)
    assert model.dtype == torch.bfloat16 and model.masters is not None
    for n, p in model.named_parameters():
        assert torch.equal(p.data, model.masters[n].data.to(torch.bfloat16))
    assert (weights(model) != before).float().mean() > 0.05


def test_muon_agrees_with_torch():
    """One step equals torch.optim.Muon (which orthogonalises in bf16) to a few per cent of its size."""
    torch.manual_seed(0)
    for shape in ((8, 24), (24, 8), (16, 16)):
        a, b = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
        a.grad = b.grad = torch.randn(shape)
        dpo.Muon([a], 0.1).step()
        torch.optim.Muon([b], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
        assert (a - b).norm() < 0.05 * b.norm()


def test_alarm_and_rates():
    """The alarm names a chosen log-prob that fell; the schedule starts above 0 and ends above 0; rates at 7B are the
    papers'."""
    history = [dict(loss=1.0, tokens=1, skipped=0.0, chosen_shift=-0.2)] * 8
    assert "chosen log-prob fell by 0.200" in dpo._summary(history)["alarm"]
    assert "alarm" not in dpo._summary([h | {"chosen_shift": 0.01} for h in history])
    assert all(0 < dpo.schedule(i, 20, 5) <= 1 for i in range(20)) and dpo.schedule(4, 20, 5) == 1
    class Seven:
        def parameters(self):
            return [torch.empty(7 * 10 ** 9, device="meta")]
    assert dpo.default_lr(Seven(), "dpo") == pytest.approx(1e-6) and dpo.default_lr(Seven(), "sft") == pytest.approx(1e-5)


def test_one_pair_moves():
    """Training on one pair raises the chosen and lowers the rejected side against the reference."""
    model, (f, a, b, c, d) = tiny(), forest_of_three()
    row: Row = tree_row(f, 0, [Pair([a], [d])])
    store_reference(model, [row])
    train(model, [[row]] * 30, preference_loss(nll=0.0), 1e-3)
    good, bad = side_sums(*(lambda batch: (batch, tree_log_probs(model, batch)))(collate([row], model.device)))
    assert good.item() > row.pairs[0].ref_chosen and bad.item() < row.pairs[0].ref_rejected
