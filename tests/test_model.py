"""Config, GPT, Sampler and program of model.py.

Oracles: logits and greedy text recorded from Hugging Face transformers (data/models, random
weights), plain forwards of whole texts for all that the cached sampler says, a model whose text is
known, and the summed-up softmax for every draw."""
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import gpu_check
import model as program
from mcts import grow
from model import (GPT, BadInput, GPTConfig, Request, Sampler, Tokenizer, attend, mix, pick_device,
                   read_json, read_safetensors, uniforms, write_safetensors)

MODELS = Path(__file__).resolve().parent / "data" / "models"
V = 40                                          # ids of the models that are made here
BASE = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            rms_norm_eps=1e-5, rope_theta=1e4)


class Letters:
    """What models and samplers look at in a tokenizer: a letter an id, or the text given for it."""

    def __init__(self, n_ids=V, base_ids=None, holes=(), eos=(), begin=(), texts=()):
        self.n_ids, self.eos_ids, self.begin = n_ids, set(eos), list(begin)
        self.bytes = {*range(n_ids)}.difference(holes)
        self.base_ids = n_ids if base_ids is None else base_ids
        self.texts = {i: chr(ord("A") + i) for i in range(n_ids)} | dict(texts)
        self.newline_ids = [i for i, text in self.texts.items() if "\n" in text]

    def decode_more(self, ids):
        """Texts of the ids, one behind the other."""
        return "".join(self.texts[int(i)] for i in ids)


def language_model(kind="llama", seed=0, **more):
    """A random model with spread logits, so that a wrong hidden state shows in every log-prob."""
    raw = BASE | dict(model_type="mistral" if kind == "window" else kind)
    raw |= {"window": dict(sliding_window=5), "qwen3": dict(head_dim=12)}.get(kind, {})
    if kind == "gpt2":
        raw = dict(model_type="gpt2", vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    net = GPT(GPTConfig.from_json(raw | more)).initialise(seed)
    rng = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        if p.dim() == 1:                        # biases and norms away from 0 and 1
            p.data += 0.2 * torch.randn(p.shape, generator=rng)
        elif "embed" in name and kind == "gpt2":
            p.data *= 6                         # it is tied: this spreads the logits
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            p.data *= 2
    return net.requires_grad_(False)


def plain_log_probs(net, ids, last):
    """(last,) log-probs of the last tokens: one plain forward of the whole text."""
    logps = net.all_logps(net(torch.tensor([ids])))[0, -last - 1:-1]
    return logps[range(last), ids[-last:]].numpy()


def off(net, prompt, f):
    """How far a continuation's log-probs are from those of one plain forward of the whole text."""
    return abs(plain_log_probs(net, [*prompt, *f.ids.tolist()], len(f.ids)) - f.logps).max()


def folder_of(name, into, tensors=None, **changes):
    """A copy of a model's folder, with keys of config.json changed."""
    shutil.copytree(MODELS / name, into, ignore=shutil.ignore_patterns("expected.npz"))
    (into / "config.json").write_text(json.dumps(read_json(into / "config.json") | changes))
    if tensors is not None:
        for path in [*into.glob("*.safetensors"), *into.glob("*.index.json")]:
            path.unlink()
        write_safetensors(into / "model.safetensors", tensors)
    return into


def tensors_of(folder):
    """All tensors of a folder."""
    files = folder.glob("*.safetensors")
    return {name: t for path in files for name, t in read_safetensors(path)[0].items()}


def assert_same(got, want):
    """The same names, dtypes, shapes and values."""
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]), name


CASES = [(folder.name, file) for folder in sorted(MODELS.iterdir())
         for file in ("config.json", "config_v4.json") if (folder / file).exists()]


@pytest.mark.parametrize("name, spelling", CASES)
def test_equals_transformers(name, spelling, tmp_path):
    """Recorded logits and greedy text, in old and new spellings; saved as it was loaded."""
    folder = folder_of(name, tmp_path / name)
    shutil.copyfile(MODELS / name / spelling, folder / "config.json")
    with np.load(MODELS / name / "expected.npz") as file:
        want = dict(file)
    ids = want.get("input_ids", want.get("ids")).astype(np.int64)       # (B, T)
    at = want.get("at", np.arange(ids.shape[1])).astype(int)
    net = GPT.from_pretrained(folder, "cpu")
    with torch.no_grad():
        got = net.logits(net(torch.from_numpy(ids))).numpy()
    assert abs(got[:, at] - want["logits"]).max() < 1e-4
    if "greedy" in want:
        sampler = Sampler(net, Letters(131), 8)
        found = sampler.extend([Request(sampler.prompt(p), 5, 16) for p in ids.tolist()], 0)
        assert [f.ids.tolist() for f in found] == want["greedy"][:, ids.shape[1]:].tolist()
    net.save_pretrained(tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), tensors_of(MODELS / name))
    for file in ("config.json", "generation_config.json"):
        assert read_json(tmp_path / "out" / file) == read_json(folder / file)


def test_biases_and_linear_rope(tmp_path):
    """A llama with all biases is saved and opened again; linear rope stretches positions."""
    raw = BASE | dict(model_type="llama", attention_bias=True, mlp_bias=True)
    net = GPT(GPTConfig.from_json(raw)).initialise(0)
    assert {name.split(".", 3)[3] for name, _ in net.named_parameters() if "bias" in name} == {
        f"self_attn.{x}_proj.bias" for x in "qkvo"} | {
        f"mlp.{x}_proj.bias" for x in ("gate", "up", "down")}
    net.save_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    assert torch.equal(GPT.from_pretrained(tmp_path, "cpu")(ids), net(ids))
    wide = GPT(GPTConfig.from_json(raw | dict(rope_scaling=dict(type="linear", factor=4.0))))
    wide.load_state_dict(net.state_dict())
    torch.testing.assert_close(wide(ids, torch.arange(0, 48, 4)[None]), net(ids))


KINDS, SLIDES = ["sliding_attention", "full_attention"] * 2, dict(sliding_window=6)
ON = SLIDES | dict(use_sliding_window=True)


@pytest.mark.parametrize("dtype, bound", ((torch.float32, 1e-5), (torch.bfloat16, 0.03)), ids=str)
@pytest.mark.parametrize("T", (1, 3))
def test_attention(T, dtype, bound):
    """Each way of computing it against the formula, head by head in fp64, with unseen keys."""
    rng = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, heads, length, 16, generator=rng).to(dtype)
               for heads, length in ((6, T), (2, 9), (2, 9)))
    bias = torch.zeros(2, 1, T, 9, dtype=dtype)
    bias[0, :, :, 4:] = bias[1, :, :, 7] = -math.inf
    found = attend(q, k, v, bias)
    for head in range(6):
        of_query, of_key, of_value = (x.double() for x in (q[:, head], k[:, head // 3],
                                                           v[:, head // 3]))
        scores = of_query @ of_key.transpose(1, 2) / 4 + bias[:, 0].double()
        assert (found[:, head] - scores.softmax(-1) @ of_value).abs().max() < bound


@pytest.mark.parametrize("kind, more, want", [
    ("mistral", {}, [4096] * 4), ("mistral", dict(sliding_window=None), [None] * 4),
    ("llama", ON, [None] * 4), ("qwen3", ON | dict(layer_types=KINDS), [6, None, 6, None]),
    ("qwen2", SLIDES | dict(layer_types=KINDS), [None] * 4),
    ("qwen2", ON | dict(max_window_layers=3), [None, None, None, 6])])
def test_windows_of_a_config(kind, more, want):
    """Mistral: absent is 4096, null none. Qwen: if told to."""
    raw = BASE | dict(model_type=kind, num_hidden_layers=4) | more
    assert [*GPTConfig.from_json(raw).windows] == want


@pytest.mark.parametrize("name, variant", [
    ("gpt2", "bf16"), ("llama3_rope", "mixed"), ("gpt2", "bare"), ("qwen2", "second head")])
def test_saved_as_loaded(name, variant, tmp_path):
    """Half precision, mixed dtypes, names without prefix, a head stored twice: all come back."""
    tensors = tensors_of(MODELS / name)
    if variant == "bare":
        tensors = {n.removeprefix("transformer."): t for n, t in tensors.items()}
    elif variant == "second head":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    else:
        kinds = [torch.bfloat16, torch.float32, torch.float16][:1 if variant == "bf16" else 3]
        tensors = {n: t.to(kinds[i % len(kinds)]) for i, (n, t) in enumerate(tensors.items())}
    net = GPT.from_pretrained(folder_of(name, tmp_path / "in", tensors), "cpu")
    assert net.dtype == torch.float32
    net.save_pretrained(tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), tensors)
    net.save_pretrained(tmp_path / "full", torch.float32)
    assert {t.dtype for t in tensors_of(tmp_path / "full").values()} == {torch.float32}
    assert read_json(tmp_path / "full" / "config.json")["dtype"] == "float32"


def test_small_updates_survive_rounds(tmp_path):
    """200 updates of 1e-6 to a bf16 model, saved and loaded after 100, end in the bytes of a model
    that was never saved. In bf16 alone all of them would be lost."""
    def base():
        return GPT.from_pretrained(tmp_path / "base", "cpu", torch.bfloat16)

    def update(net, times):
        for _ in range(times):
            for p in net.masters().values():
                p.data += 1e-6
            net.from_masters()
        return net
    GPT(GPTConfig.tiny(50, 32, 1)).initialise(0).save_pretrained(tmp_path / "base", torch.bfloat16)
    whole, second = update(base(), 200), base()
    update(base(), 100).save_pretrained(tmp_path / "round", torch.float32)
    second.load_weights(tmp_path / "round")
    update(second, 100)
    assert_same(second.masters(), whole.masters())
    assert_same(dict(second.named_parameters()), dict(whole.named_parameters()))
    starts = dict(base().named_parameters())
    assert all((p - starts[name]).min() > 1.5e-4 for name, p in whole.masters().items())
    GPT(GPTConfig.tiny(50, 64, 1)).save_pretrained(tmp_path / "other")
    with pytest.raises(BadInput, match="belong together"):
        second.load_weights(tmp_path / "other")


def test_weights_that_do_not_fit(tmp_path):
    """Names that are missing or left over are listed, wrong shapes and dtypes are named."""
    def refused(match, name="llama3_rope", drop=(), add={}, **config):
        tensors = {n: t for n, t in tensors_of(MODELS / name).items() if n not in drop} | add
        into = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(BadInput, match=match):
            GPT.from_pretrained(folder_of(name, into, tensors, **config), "cpu")
    up, norm = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
    refused("missing 1 .*up_proj.*left over 0", drop=[up])
    refused("missing 1 .*norm.*left over 1 ..extra", drop=[norm], add={"extra": torch.ones(2)})
    refused("tie_word_embeddings", drop=["lm_head.weight"])
    refused("missing", drop=tensors_of(MODELS / "llama3_rope"))         # a file without a tensor
    refused(up, add={up: torch.ones(64, 112)})
    refused("I64", add={up: torch.ones(112, 64, dtype=torch.int64)})
    for value in (math.nan, -math.inf):
        spoilt = torch.ones(112, 64).index_fill(1, torch.tensor(5), value)
        refused("up_proj.weight holds NaN", add={up: spoilt})
    nans = {"model.embed_tokens.weight": torch.full((131, 64), math.nan)}
    refused("embed_tokens.weight holds NaN", "qwen2", add=nans)         # and no talk of a head
    refused("layers.2", num_hidden_layers=2)
    huge = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
    refused("belong together", **dict.fromkeys(huge, 2 ** 20))
    refused("wpe", "gpt2", n_positions=97)
    refused("q_norm|k_norm", model_type="qwen3")
    refused("differs", "qwen2", add={"lm_head.weight": torch.ones(131, 64)})
    refused("attn.other", "gpt2", add={"transformer.h.0.attn.other": torch.ones(2)})
    masks = {f"transformer.h.0.attn.{i}bias": torch.ones(1, 1, 96, 96).to(kind)
             for i, kind in (("", torch.uint8), ("masked_", torch.float64))}
    folder = folder_of("gpt2", tmp_path / "masks", tensors_of(MODELS / "gpt2") | masks)
    GPT.from_pretrained(folder, "cpu").save_pretrained(tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), tensors_of(MODELS / "gpt2"))


BANDS = dict(rope_type="llama3", factor=8.0, low_freq_factor=4.0, high_freq_factor=1.0,
             original_max_position_embeddings=32)
REFUSED = [                                     # changes of a good config.json
    *(dict(model_type=x) for x in ("gpt_neox", "gemma2", None, ["llama"])),
    *(dict(rope_scaling=x) for x in (dict(rope_type="yarn"), dict(type="linear"), "linear")),
    *(dict(rope_scaling=x) for x in (dict(rope_type="llama3", factor=8.0), dict(factor=2.0))),
    dict(attention_bias="yes"),
    dict(rope_parameters=dict(partial_rotary_factor=0.5)), dict(rope_theta=-1.0),
    dict(quantization_config=dict(bits=4)), dict(auto_map=dict(a="b")), dict(num_experts=8),
    dict(final_logit_softcapping=30.0), dict(hidden_act="swish9"), dict(num_hidden_layers=10 ** 6),
    *(dict(hidden_size=x) for x in ("64", 0, 10 ** 30, 64.0, True, None)), dict(head_dim=7),
    dict(layer_types=KINDS), dict(layer_types=["chunked_attention"] * 3),
    dict(rope_parameters=dict(full_attention=dict(rope_theta=1e6))),
    dict(num_key_value_heads=3), dict(rms_norm_eps=math.nan), dict(tie_word_embeddings="false"),
    dict(scale_attn_weights=False)]


@pytest.mark.parametrize("change", REFUSED, ids=str)
def test_config_is_refused_by_name(change):
    """What cannot be run rightly is BadInput, and its sentence names the field and the file."""
    raw, name = read_json(MODELS / "llama_sharded" / "config_v4.json") | change, str(*change)
    name = "rope|rotary|factor" if name.startswith("rope") else name
    with pytest.raises(BadInput, match=f"some/config.json.*({name})"):
        GPTConfig.from_json(raw, "some/config.json")


def test_bind():
    """Text ends at what config, generation_config or tokenizer call its end; ids without a row."""
    net = language_model(eos_token_id=[3, 4, 39, 100, None, "5", [2]])
    net.generation = {"eos_token_id": 6}
    net.bind(Letters(39, holes=(4,), eos=(7, 8)))
    assert net.stop_ids == {3, 6, 7, 8} and net.end_id == 7
    assert net.bind(Letters(40)).stop_ids == {3, 4, 6, 39} and net.end_id == 3
    for wrong in (Letters(41), Letters(41, base_ids=40, begin=[40])):
        with pytest.raises(BadInput, match="41"):
            net.bind(wrong)
    net.bind(Letters(41, base_ids=40, eos=(40,)))       # added tokens that nobody uses do no harm
    Sampler(net, Letters(41, base_ids=40, texts={40: "\n"}), 8)
    sampler = Sampler(net, Letters(), 8)
    for wrong, word in (([], "context"), ([1] * 64, "context"), ([1, 40], "40 ids")):
        with pytest.raises(BadInput, match=word):
            sampler.prompt(wrong)
    with pytest.raises(BadInput, match="64 positions"):
        sampler.follow(sampler.prompt([1] * 61), [2] * 4)


def prompts_of(seed):
    """Ragged prompts, of which many begin alike and one is the beginning of another."""
    rng, prompts = np.random.default_rng(seed), []
    for _ in range(8):
        stem = prompts[rng.integers(len(prompts))] if prompts and rng.random() < 0.7 else []
        stem = stem[:rng.integers(len(stem) + 1)]
        prompts.append(stem + rng.integers(0, V, rng.integers(1, max(2, 20 - len(stem)))).tolist())
    return prompts + [prompts[0][:1], prompts[-1], prompts[0] + [1]]


@pytest.mark.parametrize("kind", ("llama", "window", "gpt2", "qwen3"))
def test_cached_is_uncached(kind):
    """Log-probs are those of plain forwards and no token is encoded twice: ragged prompts, refilled
    rows, a store that grows, texts up to the context's last position; then a tree, by steps."""
    size = {"n_positions" if kind == "gpt2" else "max_position_embeddings": 30}
    net, prompts, seen = language_model(kind, **size), prompts_of(1), []
    tokenizer = Letters(texts={i: "\n" for i in range(0, V, 5)})
    sampler = Sampler(net, tokenizer, 2, rows=3)
    paths, most = [sampler.prompt(p) for p in prompts], [1 + 7 * i % 23 for i in range(11)]
    asks = [Request(path, mix(1, n), n) for path, n in zip(paths, most)]
    for p, path, n, f in zip(prompts, paths, most, sampler.extend(asks, progress=seen.append)):
        assert len(f.ids) == min(n, 30 - len(p)) and f.why == "length" and off(net, p, f) < 1e-4
    assert any(n > 30 - len(p) for p, n in zip(prompts, most))
    distinct = len({tuple(p[:i + 1]) for p in prompts for i in range(len(p))})
    done = distinct + sum(seen)
    assert sampler.counts == dict(prompt=distinct, sampled=sum(seen), encoded=done)
    f.logps = sampler.log_probs(path, f.slots[:-1])
    f.ids = f.ids[:-1]
    assert off(net, p, f) < 1e-4
    live = [(p, path) for p, path in zip(prompts, paths) if len(p) < 12]
    for turn in range(3):
        asks = [Request(path, mix(turn, i), 6) for _, path in live[:3] for i in range(3)]
        grown = []
        for i, f in enumerate(sampler.extend(asks, whole=False)):
            above, path = live[i // 3]
            ends = [token in tokenizer.newline_ids for token in f.ids.tolist()]
            assert not any(ends[:-1]) and f.why == ("length" if len(f.ids) == 6 else "step")
            assert off(net, above, f) < 1e-4
            grown.append((above + f.ids.tolist(), np.concatenate((path, f.slots))))
        live = grown[::3]
        assert sampler.counts["encoded"] <= distinct + sampler.counts["sampled"]


@pytest.mark.parametrize("kind", ("llama", "gpt2"))
def test_in_a_batch_as_alone(kind):
    """A row's ids depend on its prefix and seed alone, not on the batch or what came before."""
    net, prompts = language_model(kind, 3), prompts_of(3)

    def run(chosen, rows, sampler=None):
        sampler = sampler or Sampler(net, Letters(), 64, rows)
        asks = [Request(sampler.prompt(prompts[i]), i, 4 + i, i % 4 == 0) for i in chosen]
        return sampler.extend(asks), sampler
    order = range(len(prompts))
    together, sampler = run(order, 256)
    others = run(order, 2)[0], run(order[::-1], 5)[0][::-1], run(order, 0, sampler)[0]
    for i, found in enumerate(zip(*others)):
        for f in (*found, *run([i], 1)[0]):
            assert f.ids.tolist() == together[i].ids.tolist()
            assert abs(f.logps - together[i].logps).max() < 1e-5
    sampler.reset()                             # and after a reset with the same bytes
    assert all((a.logps == b.logps).all() for a, b in zip(together, run(order, 0, sampler)[0]))
    for p in net.parameters():
        p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    sampler.reset(1)                            # new weights: what the new model says
    for prompt, f in zip(prompts, run(order, 0, sampler)[0]):
        assert off(net, prompt, f) < 1e-4


@pytest.mark.parametrize("free", (0, 7))
def test_recorded_steps(free, monkeypatch):
    """On a GPU a step is recorded for more rows and columns than it may need, and replayed for
    other numbers in the same memory. Here a stand-in computes each step again, and refuses if the
    memory has moved; the samples must be those of a plain sampler. (With 7 free slots the first
    step fills the store.)"""
    net, prompts, made = language_model(seed=4), prompts_of(4), []

    def record(work, beside):
        """Like `model.record`, without CUDA."""
        sampler = work.func.__self__
        memory = lambda: [sampler.store, sampler.hidden, sampler.work]
        made.append(memory())

        def replay(before=made[-1]):
            """The same work once more."""
            assert all(now is then for now, then in zip(memory(), before))
            work()
        work()
        return SimpleNamespace(replay=replay)
    monkeypatch.setattr(program, "record", record)
    monkeypatch.setattr(program, "GRAPH_COLUMNS", 16)
    monkeypatch.setattr(program, "GRAPH_ROWS", 2)
    plain = Sampler(net, Letters(), 8, rows=7)
    for prompt in prompts:
        plain.prompt(prompt)
    recorded = Sampler(net, Letters(), plain.used + free, rows=7)
    recorded.use_graphs = True
    for start in (0, 5):
        both = [sampler.extend([Request(sampler.prompt(prompt), start + i, 4 + 3 * i)
                                for i, prompt in enumerate(prompts)])
                for sampler in (plain, recorded)]
        for one, other in zip(*both):
            assert one.ids.tolist() == other.ids.tolist()
            assert abs(one.logps - other.logps).max() < 1e-5
        plain.reset()
        recorded.reset()                        # keeps what is recorded
    assert 2 < len(made) < recorded.counts["sampled"] / 8
    assert {rows for rows, _ in recorded.graphs} == {2, 4, 7}


def test_draws():
    """A token is the place of the row's own random number in the summed-up softmax of a plain
    forward, so that first tokens have its frequencies; the numbers are those of splitmix64."""
    net, prompt, seeds = language_model(seed=7), [3, 1, 4, 1, 5], [mix(2, i) for i in range(2000)]
    logits = net.logits(net(torch.tensor([prompt])))[0, -1].double()
    sampler = Sampler(net, Letters(), 8, rows=500)
    path, u = sampler.prompt(prompt), uniforms(np.array(seeds, np.uint64), np.zeros(2000))
    for temperature in (1.0, 0.5):
        found = sampler.extend([Request(path, seed, 1) for seed in seeds], temperature)
        ids, chances = [f.ids[0] for f in found], torch.softmax(logits / temperature, -1).numpy()
        assert (ids != np.searchsorted(chances.cumsum(), u)).sum() <= 2     # rounding at a border
        assert abs(np.bincount(ids, minlength=V) / 2000 - chances).max() < 0.03
    assert mix(0) == 0xE220A8397B1DCDAF         # the first number of splitmix64 with seed 0
    assert uniforms(np.zeros(1, np.uint64), np.zeros(1)) == (mix(0) >> 11) * 2.0 ** -53
    parts = [(a, b) for a in range(-5, 60) for b in range(60)] + [(0,), (0, 0, 0), (1,)]
    assert len({mix(*p) for p in parts}) == len(parts)


@pytest.mark.parametrize("u, wanted", ((0.0, 1), (0.3, 2), (1 - 2.0 ** -53, 2)))
def test_no_draw_of_chance_zero(monkeypatch, u, wanted):
    """Not even of the last ids, where rounding puts the random number on the whole sum."""
    monkeypatch.setattr(program, "uniforms", lambda seeds, t: np.array([u]))
    sampler = Sampler(language_model(), Letters(), 8)
    sampler.live = np.zeros(1, program.LIVE)
    assert sampler._pick(torch.tensor([[0, 0.2, 0.8, 0, 0]])).tolist() == [wanted]


def test_ids_that_do_not_exist():
    """Holes and padding rows are never sampled, however high their logits; log-probs omit them."""
    net, real = language_model(seed=8), [i for i in range(33) if i not in (5, 7, 30)]
    fake = [i for i in range(V) if i not in real]
    net.lm_head.weight[fake] *= 4
    letters = Letters(33, base_ids=31, holes=(5, 7, 30))
    sampler, prompt, met = Sampler(net, letters, 8), [4, 10, 2], set()
    for temperature in (0, 1.0, 100.0):
        asks = [Request(sampler.prompt(prompt), i, 12) for i in range(40)]
        for f in sampler.extend(asks, temperature):
            met |= {*f.ids.tolist()}
            assert off(net, prompt, f) < 1e-4
    assert met == {*real}
    assert torch.isinf(net.all_logps(torch.ones(1, 32))[0, fake]).all()


def test_why_it_stops():
    """eos before answer before length before step. Lines lie between newlines, and text behind the
    newline of a token begins the next line. The model surely writes i + 1 behind i."""
    net = GPT(GPTConfig.from_json(BASE | dict(model_type="llama", vocab_size=16))).initialise(0)
    for name, p in net.requires_grad_(False).named_parameters():
        if any(part in name for part in ("embed", "head", "o_proj", "down_proj")):
            p.zero_()
    for token in range(16):
        net.model.embed_tokens.weight[token, token] = 1.0
        net.lm_head.weight[(token + 1) % 16, token] = 100.0
    tokenizer, lines = Letters(16, eos=(14,), texts={4: "\n", 9: "\n#### ", 13: "\n"}), []

    def run(most, start=(2,), finished=None, line="", step="line", **more):
        sampler = Sampler(net, tokenizer, 8, 4, finished, step)
        f, = sampler.extend([Request(sampler.prompt(start), 0, most, line=line)], **more)
        return len(f.ids), f.why
    assert run(99) == run(12) == (12, "eos") and run(99, (13,), whole=False) == (1, "eos")
    assert run(99, whole=False) == (2, "step") and run(99, (4,), whole=False) == (5, "step")
    assert run(5) == (5, "length") and run(2, whole=False) == (2, "length")
    assert run(99, (0,), lines.append, line="so ") == (14, "eos")
    assert lines == ["so BCD\n", "FGHI\n", "#### KLM\n"]
    last = lambda line: line == "#### KLM\n"
    assert run(11, finished=last) == (11, "answer")
    sampler = Sampler(net, tokenizer, 8, 4, last)
    path = sampler.follow(sampler.prompt([2]), [*range(3, 11)])     # as a search goes on from here
    assert sampler.extend([Request(path, 0, 99, line="#### K")])[0].why == "answer"
    assert run(99, step="3", whole=False) == (3, "step")
    letters = Letters(16, texts={5: "2=2", 6: "\n\n"})
    paragraph = Sampler(net, letters, 8, step="paragraph").step_over
    assert paragraph([5, 6]) and not paragraph([4, 6]) and not paragraph([5, 6, 5])
    with pytest.raises(BadInput, match="--unit"):
        run(9, step="sentence")


def test_nothing_asked_and_two_users():
    """No requests: no work, no endless loop. While answers are waited for, `extend` is refused."""
    sampler = Sampler(language_model(), Letters(), 8)
    assert sampler.extend([]) == []
    with pytest.raises(ValueError, match="no request waits"):
        sampler.advance()
    a, b, c = (sampler.prompt(p) for p in ([1, 2, 3], [1, 2, 4, 5], [1, 2]))
    assert a[:2].tolist() == b[:2].tolist() == c.tolist()
    assert sampler.counts == dict(prompt=5, sampled=0, encoded=0)
    mine = [Request(a, 1, 3), Request(b, 2, 9)]
    sampler.submit(mine)
    while not (mine[0].why and mine[1].why):
        with pytest.raises(ValueError, match="waits"):
            sampler.extend([Request(c, 3, 5)])
        sampler.advance()
    assert [len(one.ids) for one in mine] == [3, 9]
    again = [Request(c, 3, 5)]
    assert [len(f.ids) for f in sampler.extend(again)] == [5]
    with pytest.raises(ValueError, match="once"):           # it would return the old answer
        sampler.extend(again)
    with pytest.raises(ValueError, match="no room"):
        sampler.extend([Request(c, 3, 0)])


def test_program(tmp_path, capsys):
    """Continues a prompt, reads \\n but not \\neq; bad input is one sentence and exit code 2."""
    tokenizer = Tokenizer.bytes_only()
    GPT(GPTConfig.tiny(tokenizer.n_ids, 32, 1, 64)).initialise(0).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    ask = ["--model", str(tmp_path), "--max-tokens", "3", "--device", "cpu", "--prompt"]
    assert program.main([*ask, r"$\neq$\nuser", "--samples", "2"]) == 0
    assert capsys.readouterr().out.count("$\\neq$\nuser") == 2
    assert program.main([*ask, "<|endoftext|>" * 60]) == 0      # 60 tokens, not 780 characters
    capsys.readouterr()
    wrong = [["--device", name] for name in ("tpu", "cuda", "cuda:99")]
    wrong += [["--temperature", "nan"], ["--samples", "0"], ["--prompt", "x" * 64]]
    wrong += [["--model", "nowhere"], ["--wrong"], ["--seed", "x"]]
    for flags in (*([*ask, "x", *flags] for flags in wrong), ["--prompt", "x"]):
        assert program.main(flags) == 2
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and err.count("\n") == 1 and not out
    assert program.main([]) == 0
    told = capsys.readouterr().out
    numbers = re.findall(r"\d[\d,]*", told)
    sampled, without, asked, encoded, shared = (int(n.replace(",", "")) for n in numbers)
    assert "without sharing" in told
    assert without == sampled + asked and encoded == sampled + shared < without
    assert pick_device("").type == pick_device(None).type and pick_device("cpu").type == "cpu"


def test_gpu_check_samples_full_rows(monkeypatch):
    """Speed is told of rows that are all live. None stops at an end-of-text if stop_ids is empty: a
    Sampler binds no model that is bound to its tokenizer."""
    model, ends = GPT(GPTConfig.tiny(gpu_check.TOKENIZER.n_ids, 32, 1)).initialise(0), []
    model.bind(gpu_check.TOKENIZER).stop_ids = frozenset()
    monkeypatch.setattr(gpu_check, "seconds", lambda work: 1)
    monkeypatch.setattr(gpu_check, "grow", lambda *wants: ends.extend(grow(*wants)))
    most, size = SimpleNamespace(N=1, rate=1, bandwidth=1), SimpleNamespace(new=96)
    found = gpu_check.sampling(model, gpu_check.TOKENIZER, size, most, 16)
    assert found["per_second"] == sum(len(end.solution()) for end in ends)
    assert {len(end.solution()) for end in ends} == {96}    # else a third would end before
