"""Config, GPT and Sampler: the same numbers as other programs, a naive reference, and no cache at all.

Oracles: logits and greedy text recorded from Hugging Face transformers (data/models: random weights; logits
kept at every fourth position), a dense float64 forward of loops and complex rotations, plain forwards of
whole texts for everything the cached sampler says, and a Markov chain whose text is known. All seeds are
fixed, so there is no chance in it beyond rounding: where ids of two batch shapes are compared, a draw may
fall within 1e-6 of a border between two ids; the docstrings give the chance that this ever differs on some
other machine."""
import copy
import json
import math
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import (GPT, BadInput, GPTConfig, Request, Sampler, mix, read_json, read_safetensors,  # noqa: E402
                   rope_frequencies, uniforms, write_safetensors)

MODELS = Path(__file__).resolve().parent / "data" / "models"
NAMES = sorted(path.name for path in MODELS.iterdir())
KINDS = ("llama", "window", "gpt2", "qwen2", "qwen3")
V = 40                                          # ids of the models made here
BASE = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=1e4)


class Letters:
    """The part of a tokenizer that models and samplers look at: one letter an id, newlines where we want
    them."""

    def __init__(self, n_ids=V, base_ids=None, holes=(), newline=(), eos=()):
        self.n_ids, self.base_ids, self.holes = n_ids, n_ids if base_ids is None else base_ids, list(holes)
        self.newline_ids, self.eos_ids = list(newline), set(eos)

    def decode(self, ids):
        return "".join("\n" if i in self.newline_ids else chr(ord("A") + i) for i in map(int, ids))

    decode_more = decode


def language_model(kind="llama", seed=0, positions=64, **more):
    """A random model of a family, its logits spread enough that a wrong hidden state shows in every
    log-prob."""
    if kind == "gpt2":
        raw = dict(model_type="gpt2", vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=positions)
    else:
        raw = BASE | dict(model_type={"window": "mistral"}.get(kind, kind), max_position_embeddings=positions)
        raw |= {"window": dict(sliding_window=5), "qwen3": dict(head_dim=12)}.get(kind, {})
    model = GPT(GPTConfig.from_json(raw | more)).initialise(seed)
    rng = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 1:                        # biases and norms away from 0 and 1
            p.data += 0.2 * torch.randn(p.shape, generator=rng)
        elif "embed" in name and kind == "gpt2":
            p.data *= 6                         # it is tied: this spreads the logits
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            p.data *= 2
    return model.requires_grad_(False)


def log_probs(model, prompt, ids):
    """Log-probs of ids after prompt: one plain forward of the whole text, (n,)."""
    with torch.no_grad():
        logits = model.token_logits(model(torch.tensor([[*prompt, *ids]])))[0, len(prompt) - 1:-1]
    return torch.log_softmax(logits, -1)[torch.arange(len(ids)), torch.tensor(ids)].numpy()


def chi_square(counts, chances):
    """(statistic, the value it exceeds with chance 1e-4); bins of fewer than five expected are put
    together."""
    expected, order = chances * counts.sum(), np.argsort(chances)
    small = order[:int((expected[order].cumsum() < 5).sum()) + 1]
    big = np.setdiff1d(order, small)
    got, want = (np.append(x[big], x[small].sum()) for x in (counts, expected))
    k = len(got) - 1
    limit = k * (1 - 2 / (9 * k) + 3.719 * math.sqrt(2 / (9 * k))) ** 3         # Wilson and Hilferty
    return ((got - want) ** 2 / want).sum(), limit


# ----------------------------------------------------------------------------------------------------------
# A second opinion: one token, one head, one key at a time
# ----------------------------------------------------------------------------------------------------------
def naive_logits(tensors, raw, ids, windows=None, squeeze=1.0):
    """Llama-like logits (T, V) in float64. Pairs of a head are complex numbers turned by position /
    squeeze."""
    w = {n.removeprefix("model."): t.double().numpy() for n, t in tensors.items()}
    H, G, L = raw["num_attention_heads"], raw["num_key_value_heads"], raw["num_hidden_layers"]
    D, eps = raw.get("head_dim") or raw["hidden_size"] // H, raw["rms_norm_eps"]
    norm = lambda x, name: x / np.sqrt((x ** 2).mean(-1, keepdims=True) + eps) * w[name]
    linear = lambda x, name: x @ w[name + ".weight"].T + w.get(name + ".bias", 0)
    speed = np.array([raw["rope_theta"] ** (-2 * j / D) for j in range(D // 2)]) / squeeze

    def turned(vector, position):
        z = (vector[:D // 2] + 1j * vector[D // 2:]) * np.exp(1j * position * speed)
        return np.concatenate((z.real, z.imag))

    x = w["embed_tokens.weight"][ids]                                   # (T, C)
    for i in range(L):
        at, y = f"layers.{i}.self_attn.", norm(x, f"layers.{i}.input_layernorm.weight")
        q, k, v = (linear(y, at + f"{n}_proj").reshape(len(ids), -1, D) for n in "qkv")
        if at + "q_norm.weight" in w:
            q, k = norm(q, at + "q_norm.weight"), norm(k, at + "k_norm.weight")
        out = np.zeros((len(ids), H, D))
        for t in range(len(ids)):
            for h in range(H):
                g, query = h * G // H, turned(q[t, h], t)
                seen = [s for s in range(t + 1) if not (windows and windows[i]) or t - s < windows[i]]
                scores = np.array([query @ turned(k[s, g], s) / math.sqrt(D) for s in seen])
                weights = np.exp(scores - scores.max())
                out[t, h] = (weights / weights.sum()) @ v[seen, g]
        x = x + linear(out.reshape(len(ids), -1), at + "o_proj")
        y, mlp = norm(x, f"layers.{i}.post_attention_layernorm.weight"), f"layers.{i}.mlp."
        gate = linear(y, mlp + "gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, mlp + "up_proj"), mlp + "down_proj")
    return norm(x, "norm.weight") @ w.get("lm_head.weight", w["embed_tokens.weight"]).T


def differs_from_naive(model, windows=None, squeeze=1.0, length=24):
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, length)
    with torch.no_grad():
        logits = model.logits(model(torch.from_numpy(ids)[None]))[0].numpy()
    return abs(logits - naive_logits(model.state_dict(), model.config.raw, ids, windows, squeeze)).max()


# ----------------------------------------------------------------------------------------------------------
# Logits
# ----------------------------------------------------------------------------------------------------------
def expected(name):
    with np.load(MODELS / name / "expected.npz") as file:
        return {k: file[k].astype(np.int64) if file[k].dtype == np.uint8 else file[k] for k in file.files}


def folder_of(name, into, **changes):
    """A copy of a model's folder, keys of its config.json changed (`...` deletes one)."""
    shutil.copytree(MODELS / name, into, ignore=shutil.ignore_patterns("expected.npz"))
    raw = read_json(into / "config.json") | changes
    (into / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return into


@pytest.mark.parametrize("spelling", ("config.json", "config_v4.json"))
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(name, spelling, tmp_path):
    """Every family, in the old and the new spelling of config.json, gives the recorded logits to 1e-4 in
    fp32."""
    folder, want = folder_of(name, tmp_path / name), expected(name)
    if spelling != "config.json":
        shutil.copyfile(folder / spelling, folder / "config.json")
    model = GPT.from_pretrained(folder, "cpu")
    assert model.dtype == torch.float32
    with torch.no_grad():
        logits = model.logits(model(torch.from_numpy(want["input_ids"])))
    assert logits.shape[:2] == (2, 64)
    assert abs(logits.numpy()[:, want["at"]] - want["logits"]).max() < 1e-4


@pytest.mark.parametrize("kind", ("llama", "mistral", "qwen2", "qwen3"))
def test_families_equal_a_naive_forward(kind):
    """Also with biases where a family may have them, fewer key/value heads, and a head width of its own."""
    more = dict(attention_bias=True, mlp_bias=True) if kind == "llama" else dict(sliding_window=None)
    for tied in (False, True):
        model = language_model(kind, head_dim=12, tie_word_embeddings=tied, **more)
        biases = {n.split(".")[-2] for n, _ in model.named_parameters() if n.endswith("bias")}
        qkv, o, mlp = {"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj", "down_proj"}
        assert biases == {"llama": qkv | o | mlp, "qwen2": qkv}.get(kind, set())
        assert differs_from_naive(model) < 1e-4


def test_sliding_window():
    """A window of 8 is: a query sees itself and the 7 tokens before it. And it makes a difference to 4096,
    which an absent key means; null means none."""
    model = language_model("window", sliding_window=8)
    assert differs_from_naive(model, windows=(8, 8)) < 1e-4
    assert differs_from_naive(model) > 1e-2 and differs_from_naive(model, windows=(9, 9)) > 1e-2
    windows = lambda **more: GPTConfig.from_json(BASE | dict(model_type="mistral") | more).windows
    assert windows() == (4096, 4096) and windows(sliding_window=None) == (None, None)
    assert windows(sliding_window=3) == (3, 3)
    layered = ["full_attention", "sliding_attention"]
    assert windows(sliding_window=3, layer_types=layered) == (None, 3)


@pytest.mark.parametrize("kind", ("qwen2", "qwen3"))
def test_qwen_windows(kind):
    """Only with use_sliding_window, on the layers of layer_types, else from max_window_layers (28 if
    absent) on."""
    on = dict(model_type=kind, use_sliding_window=True, sliding_window=6, num_hidden_layers=4)
    windows = lambda **more: GPTConfig.from_json(BASE | on | more).windows
    assert windows() == (None,) * 4 and windows(max_window_layers=0) == (6,) * 4
    assert windows(max_window_layers=3) == (None, None, None, 6)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert windows(max_window_layers=3, layer_types=kinds) == (6, None, 6, None)
    assert windows(max_window_layers=0, use_sliding_window=False) == (None,) * 4
    assert windows(max_window_layers=0, sliding_window=None) == (None,) * 4
    assert windows(max_window_layers=0, sliding_window=4096) == (4096,) * 4
    full = ["full_attention"] * 3
    for wrong in (full, full + ["chunked_attention"], "full_attention", [[]] * 4):
        with pytest.raises(BadInput, match="layer_types"):
            windows(layer_types=wrong)
    model = language_model(kind, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    assert differs_from_naive(model, windows=(None, 6)) < 1e-4
    assert differs_from_naive(model, windows=(6, 6)) > 1e-2


@pytest.mark.parametrize("spelling", (
    dict(rope_scaling=dict(type="linear", factor=4.0)), dict(rope_scaling=dict(rope_type="linear", factor=4)),
    dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4))))
def test_linear_rope(spelling):
    """Linear scaling by f is every position divided by f: in the naive forward, and in frequencies
    theta^(-2j/D)/f."""
    model = language_model("llama", **spelling)
    speeds = [1e4 ** (-j / 4) / 4 for j in range(4)]
    assert torch.allclose(rope_frequencies(model.config), torch.tensor(speeds))
    assert differs_from_naive(model, squeeze=4.0) < 1e-4 and differs_from_naive(model) > 1e-2


def test_llama3_rope_bands():
    """Waves shorter than the old context / high keep their speed, those longer than it / low are slowed by
    the factor, and between the two the blend is linear in turns over the old context."""
    rope = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=256, rope_theta=1e4)
    raw = BASE | dict(model_type="llama", head_dim=32, rope_parameters=rope)
    got = rope_frequencies(GPTConfig.from_json(raw))
    kinds = set()
    for j, speed in enumerate(got.tolist()):
        plain = 1e4 ** (-j / 16)
        turns = 256 * plain / (2 * math.pi)
        share = min(1.0, max(0.0, (turns - 1) / 3))
        kinds.add((share > 0) + (share == 1))
        assert math.isclose(speed, share * plain + (1 - share) * plain / 8, rel_tol=1e-5)
    assert kinds == {0, 1, 2}


# ----------------------------------------------------------------------------------------------------------
# Files of a model
# ----------------------------------------------------------------------------------------------------------
def tensors_of(folder):
    return {n: t for path in folder.glob("*.safetensors") for n, t in read_safetensors(path)[0].items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        flat = [t[name].contiguous().reshape(-1).view(torch.uint8) for t in (got, want)]
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape, name
        assert torch.equal(*flat), name


@pytest.mark.parametrize("name", NAMES)
def test_saved_as_loaded(name, tmp_path):
    """Every tensor (nine shards too) comes back under its name, dtype and bytes, and both configs as they
    were."""
    GPT.from_pretrained(MODELS / name, "cpu").save_pretrained(tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), tensors_of(MODELS / name))
    for file in ("config.json", "generation_config.json"):
        assert read_json(tmp_path / "out" / file) == read_json(MODELS / name / file)
    again = GPT.from_pretrained(tmp_path / "out", "cpu")
    first = GPT.from_pretrained(MODELS / name, "cpu")
    assert_same(dict(again.state_dict()), dict(first.state_dict()))


@pytest.mark.parametrize("name, variant", [
    (name, variant) for name in ("llama_sharded", "qwen2", "gpt2")
    for variant in ("bf16", "fp16", "mixed", "bare names", "second head")[:4 if "llama" in name else 5]])
def test_saved_as_loaded_variants(name, variant, tmp_path):
    """So do half precision (held as fp32 meanwhile, which is exact), a mixture of dtypes, names without
    prefix, and a tied head that is stored a second time."""
    folder, tensors = folder_of(name, tmp_path / "in"), tensors_of(MODELS / name)
    if variant in ("bf16", "fp16"):
        dtype = torch.bfloat16 if variant == "bf16" else torch.float16
        tensors = {n: t.to(dtype) for n, t in tensors.items()}
    if variant == "mixed":
        kinds = (torch.float32, torch.bfloat16, torch.float16)
        tensors = {n: t.to(kinds[i % 3]) for i, (n, t) in enumerate(sorted(tensors.items()))}
    if variant == "bare names":
        tensors = {n.removeprefix("transformer.").removeprefix("model."): t for n, t in tensors.items()}
    if variant == "second head":
        tensors["lm_head.weight"] = next(t for n, t in tensors.items() if "embed_tokens" in n or "wte" in n)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    write_safetensors(folder / "model.safetensors", tensors)
    model = GPT.from_pretrained(folder, "cpu")
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), tensors)
    if variant in ("bare names", "second head"):
        assert_same(dict(model.state_dict()), dict(GPT.from_pretrained(MODELS / name, "cpu").state_dict()))
    else:
        low = GPT.from_pretrained(folder, "cpu", torch.bfloat16)
        assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
        for p, q in zip(low.parameters(), model.parameters()):
            assert torch.equal(p, q.to(torch.bfloat16))


@pytest.mark.parametrize("prefix", ("transformer.", ""))
def test_gpt2_buffers_are_skipped(prefix, tmp_path):
    """Causal masks that old GPT-2 files hold as tensors are neither weights nor left over; of other names
    the like is refused."""
    folder = folder_of("gpt2", tmp_path / "in")
    tensors = {prefix + n.removeprefix("transformer."): t for n, t in tensors_of(folder).items()}
    buffers = {f"{prefix}h.{i}.attn.{name}": torch.ones(1, 1, 96, 96, dtype=torch.bool)
               for i in range(3) for name in ("bias", "masked_bias")}
    write_safetensors(folder / "model.safetensors", tensors | buffers)
    model = GPT.from_pretrained(folder, "cpu")
    assert_same(dict(model.state_dict()), dict(GPT.from_pretrained(MODELS / "gpt2", "cpu").state_dict()))
    model.save_pretrained(tmp_path / "out")
    assert_same(tensors_of(tmp_path / "out"), tensors)
    write_safetensors(folder / "model.safetensors", tensors | {prefix + "h.0.attn.other": torch.ones(2)})
    with pytest.raises(BadInput, match="h.0.attn.other"):
        GPT.from_pretrained(folder, "cpu")


def test_made_here_and_opened_again(tmp_path):
    """A model made from GPTConfig.tiny is an ordinary folder: the same weights and logits after a round
    trip."""
    model = GPT(GPTConfig.tiny(50, hidden_size=32, layers=2)).initialise(3)
    model.save_pretrained(tmp_path)
    again, ids = GPT.from_pretrained(tmp_path, "cpu"), torch.arange(20)[None]
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    assert torch.equal(again.logits(again(ids)), model.logits(model(ids)))
    assert {n.split(".")[0] for n in tensors_of(tmp_path)} == {"model", "lm_head"}
    assert differs_from_naive(again) < 1e-4


# ----------------------------------------------------------------------------------------------------------
# Refusals
# ----------------------------------------------------------------------------------------------------------
REFUSALS = {
    "model_type": [dict(model_type=x) for x in ("gpt_neox", "gemma2", None, 3, ["llama"], ..., {})],
    "rope type": [dict(rope_scaling=dict(rope_type="yarn", factor=2.0)),
                  dict(rope_scaling=dict(rope_type=[])),
                  dict(rope_parameters=dict(rope_type="yarn", factor=2.0)),
                  dict(rope_scaling=dict(type="dynamic"))],
    "rope_parameters": [dict(rope_scaling="linear"), dict(rope_parameters=[1])],
    "factor": [dict(rope_scaling=dict(type="linear", factor=x)) for x in (None, "2", 0, -1, math.nan, True)],
    "low_freq_factor": [dict(rope_scaling=dict(rope_type="llama3", factor=8, low_freq_factor=4,
                                               high_freq_factor=1, original_max_position_embeddings=64))],
    "rope_theta": [dict(rope_theta=x) for x in ("1e4", 0, -1.0, math.inf, [])],
    "quantization_config": [dict(quantization_config=x) for x in ({}, dict(quant_method="gptq"))],
    "auto_map": [dict(auto_map={"AutoModelForCausalLM": "modeling.Evil"})],
    "num_experts": [dict(num_experts=8)], "num_local_experts": [dict(num_local_experts=4)],
    "logit_softcapping": [dict(attn_logit_softcapping=50.0), dict(final_logit_softcapping=30.0)],
    "hidden_act": [dict(hidden_act=x) for x in ("swish9", 7, None, ["silu"])],
    "hidden_size": [dict(hidden_size=x) for x in ("64", -64, 0, 10 ** 12, 10 ** 30, 64.0, True, [64], None,
                                                  ...)],
    "num_hidden_layers": [dict(num_hidden_layers=x) for x in (10 ** 6, 0, -1, "3", 1.5, ...)],
    "vocab_size": [dict(vocab_size=x) for x in (0, -1, 10 ** 9, "131", ...)],
    "num_attention_heads": [dict(num_attention_heads=x) for x in (0, -8, "8", ...)],
    "key/value heads": [dict(num_key_value_heads=3)],
    "num_key_value_heads": [dict(num_key_value_heads=x) for x in (0, -1, 2.0, "2")],
    "head_dim": [dict(head_dim=x) for x in (0, 7, -8, "8")],
    "rms_norm_eps": [dict(rms_norm_eps=x) for x in (-1, "1e-5", math.nan, 2)],
    "max_position_embeddings": [dict(max_position_embeddings=x) for x in (0, "256", 1e3)],
    "tie_word_embeddings": [dict(tie_word_embeddings=x) for x in ("false", 0, [])],
    "attention_bias": [dict(attention_bias="yes")],
}


@pytest.mark.parametrize("field", REFUSALS)
def test_config_is_refused_by_name(field):
    """What cannot be run rightly is BadInput, and its sentence names the field and the file."""
    good = read_json(MODELS / "llama_sharded" / "config_v4.json")
    for change in REFUSALS[field]:
        raw = {k: v for k, v in (good | change).items() if v is not ...}
        with pytest.raises(BadInput, match=field) as caught:
            GPTConfig.from_json(raw, "some/config.json")
        assert "some/config.json" in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("change", (
    dict(n_embd="48"), dict(n_embd=50), dict(n_layer=10 ** 6), dict(n_inner=-1), dict(n_head=5),
    dict(n_head=10 ** 7), dict(n_positions=0), dict(n_embd=...), dict(activation_function="sine"),
    dict(scale_attn_by_inverse_layer_idx=True)))
def test_gpt2_config_is_refused_by_name(change):
    """The same for GPT-2's spelling."""
    raw = {k: v for k, v in (read_json(MODELS / "gpt2" / "config.json") | change).items() if v is not ...}
    with pytest.raises(BadInput, match=next(iter(change))):
        GPTConfig.from_json(raw)


def test_weights_that_do_not_fit(tmp_path):
    """Missing and left-over tensors are listed, wrong shapes and dtypes named, an absent head is refused
    with a hint, and absurd sizes are noticed before anything of that size is made."""
    def refused(match, drop=(), add={}, **config):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder_of("gpt2" if config.pop("gpt2", False) else "llama3_rope", folder, **config)
        tensors = {n: t for n, t in tensors_of(folder).items() if n not in drop} | add
        write_safetensors(folder / "model.safetensors", tensors)
        start = time.process_time()
        with pytest.raises(BadInput, match=match) as caught:
            GPT.from_pretrained(folder, "cpu")
        assert time.process_time() - start < 2
        return str(caught.value)
    up = "model.layers.1.mlp.up_proj.weight"
    message = refused(up, drop=[up])
    assert "missing 1" in message and "left over 0" in message
    message = refused("extra.weight", add={"extra.weight": torch.ones(2)}, drop=["model.norm.weight"])
    assert "missing 1 (model.norm.weight)" in message and "left over 1 (extra.weight)" in message
    assert "left over 1 (q.bias)" in refused("q.bias", add={"q.bias": torch.ones(2)})
    message = refused("tie_word_embeddings", drop=["lm_head.weight"])
    assert "lm_head.weight" in message
    refused(up, add={up: torch.ones(64, 112)})
    refused("I64", add={up: torch.ones(112, 64, dtype=torch.int64)})
    refused("4096 layers", num_hidden_layers=4096)
    refused("num_hidden_layers", num_hidden_layers=10 ** 6)
    refused("4 layers|layers.3", num_hidden_layers=4)
    refused("layers.2", num_hidden_layers=2)
    refused("belong together|fit", hidden_size=2 ** 24)
    refused("belong together", vocab_size=2 ** 24, rope_scaling=None)
    refused("belong together", num_attention_heads=2 ** 20, num_key_value_heads=2 ** 20)
    refused("wpe", gpt2=True, n_positions=97)
    message = refused("left over", model_type="qwen3")          # its names lack what the other family has
    assert "q_norm" in message or "k_norm" in message
    for name in ("config.json", "model.safetensors"):
        folder = folder_of("gpt2", tmp_path / ("no " + name))
        (folder / name).unlink()
        with pytest.raises(BadInput):
            GPT.from_pretrained(folder, "cpu")


JUNK = (None, True, False, 0, 1, -1, 2, 3, 7, 8, 1000, 2 ** 20, 2 ** 24, 2 ** 31, 2 ** 63, 10 ** 30, 0.0, 0.5,
        -1.5, 1e-30, 1e30, math.inf, -math.inf, math.nan, "", "x", "8", "llama", "gpt2", "\x00", "\ud800", [],
        [[]], [1], [None], [{}], [[[[]]]], {}, {"a": 1}, {"rope_type": "linear"},
        {"rope_type": "llama3", "factor": 2.0})


def mutate(raw, rng):
    """One to three changes anywhere in a tree of JSON: a value replaced, dropped, doubled, wrapped, or
    moved."""
    raw = copy.deepcopy(raw)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        place = raw
        while True:
            inner = [k for k, v in place.items() if isinstance(v, dict) and v]
            if not inner or rng.random() < 0.6:
                break
            place = place[rng.choice(inner)]
        key, how = rng.choice(sorted(place) or ["rope_parameters"]), rng.randrange(6)
        if how == 0:
            place.pop(key, None)
        elif how == 1:
            place[key] = rng.choice([[place.get(key)], {key: place.get(key)}, str(place.get(key))])
        elif how == 2:
            place[key] = copy.deepcopy(place.get(rng.choice(sorted(place) or [key])))
        elif how == 3 and type(place.get(key)) in (int, float):
            place[key] *= rng.choice((-1, 0, 2, 0.5, 3, 2 ** 20))
        else:
            place[key] = copy.deepcopy(rng.choice(JUNK))
    return raw


@pytest.mark.parametrize("kind", ("llama", "qwen2", "gpt2"))
def test_mutated_configs(kind, tmp_path):
    """Of 1,500 damaged config.json per family each is read or is BadInput; every fourth that is read either
    opens a folder of weights, and then runs, or is BadInput: never another exception, never more than two
    seconds. Both ends happen often (so the mutations are neither idle nor all fatal)."""
    more = dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                  original_max_position_embeddings=32))
    small = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=4, sliding_window=4, use_sliding_window=False,
                 layer_types=None, max_window_layers=1, tie_word_embeddings=False, hidden_act="silu",
                 attention_bias=False)
    raw = (dict(model_type="gpt2", vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=16, n_inner=None,
                activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=True)
           if kind == "gpt2" else BASE | small | dict(model_type=kind) | more)
    raw |= dict(eos_token_id=2, torch_dtype="float32", quantization_config=None)
    GPT(GPTConfig.from_json(raw)).initialise(0).save_pretrained(tmp_path)
    rng, read, opened, ids = random.Random(kind), 0, 0, torch.arange(9)[None]
    for i in range(1500):
        broken = mutate(raw, rng)
        start = time.process_time()
        try:
            GPTConfig.from_json(json.loads(json.dumps(broken)))
            read += 1
            if read % 4:                                    # reading is fast, opening files is not
                continue
            (tmp_path / "config.json").write_text(json.dumps(broken))
            model = GPT.from_pretrained(tmp_path, "cpu").bind(Letters(9))
            with torch.no_grad():
                assert model.logits(model(ids)).shape == (1, 9, 9)
            opened += 1
        except BadInput:
            pass
        except Exception as error:
            pytest.fail(f"mutation {i}: {type(error).__name__}: {error}\n{broken}")
        assert time.process_time() - start < 2, broken
    assert 300 < read < 1200 and 40 < opened <= read // 4


@pytest.mark.parametrize("change", (
    dict(num_attention_heads=2 ** 24, head_dim=2 ** 24), dict(hidden_size=2 ** 24, intermediate_size=2 ** 24),
    dict(hidden_size=2 ** 24, num_attention_heads=2 ** 24, num_key_value_heads=2 ** 24, head_dim=2 ** 24)))
def test_sizes_that_overflow(change, tmp_path):
    """Sizes that are each in range and whose product is beyond 64 bits are refused, not an overflow in
    torch."""
    with pytest.raises(BadInput):
        GPT.from_pretrained(folder_of("llama3_rope", tmp_path / "x", **change), "cpu")


@pytest.mark.parametrize("eos", ([[2]], {"a": 2}, [{}], "2", [None, "x", 2.5], -1, 10 ** 30))
def test_odd_end_of_text(eos):
    """eos_token_id of a wrong kind, in a config that opened, ends no text and raises nothing."""
    assert language_model(eos_token_id=eos).bind(Letters()).stop_ids == frozenset()


# ----------------------------------------------------------------------------------------------------------
# Sampler against plain forwards
# ----------------------------------------------------------------------------------------------------------
def prompts_of(seed, count=8, longest=20):
    """Ragged prompts, of which many begin alike and one is the beginning of another."""
    rng, prompts = np.random.default_rng(seed), []
    for _ in range(count):
        stem = prompts[rng.integers(len(prompts))] if prompts and rng.random() < 0.7 else []
        stem = stem[:rng.integers(len(stem) + 1)]
        prompts.append(stem + rng.integers(0, V, rng.integers(1, max(2, longest - len(stem)))).tolist())
    return prompts + [prompts[0][:1], prompts[-1], prompts[0] + [1]]


def distinct(prompts):
    """Number of tokens that differ in themselves or in what is before them."""
    return len({tuple(p[:i + 1]) for p in prompts for i in range(len(p))})


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_transformers(name):
    """Temperature 0 from the cache writes the recorded greedy continuations of both prompts (16 tokens
    each; the smallest gap between the best two logits is 0.005, rounding about 1e-5)."""
    want = expected(name)
    model = GPT.from_pretrained(MODELS / name, "cpu")
    sampler, prompts = Sampler(model, Letters(131), 8), want["input_ids"]
    n = prompts.shape[1]
    assert want["greedy_margin"].min() > 1e-3 and (want["greedy"][:, :n] == prompts).all()
    found = sampler.extend([Request(sampler.prompt(p), 5, 16) for p in prompts.tolist()], temperature=0)
    assert [f.ids.tolist() for f in found] == want["greedy"][:, n:].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_cached_is_uncached(kind):
    """Log-probs recorded while sampling equal those of a plain forward of the whole text to 1e-4: ragged
    prompts, several branches each, more requests than rows (rows are refilled and moved), a store and a
    cache that grow. Every prompt token is encoded once, every sampled one once, but for last ones never:
    the counts are exact."""
    model, prompts = language_model(kind), prompts_of(1)
    sampler, seen = Sampler(model, Letters(), 2, rows=3), []
    paths = [sampler.prompt(p) for p in prompts]
    asked = [(i % len(prompts), 1 + 7 * i % 23) for i in range(20)]
    found = sampler.extend([Request(paths[p], mix(1, j), most) for j, (p, most) in enumerate(asked)],
                           progress=seen.append)
    for (p, most), f in zip(asked, found):
        assert len(f.ids) == len(f.logps) == len(f.slots) == most and f.why == "length"
        assert abs(f.logps - log_probs(model, prompts[p], f.ids.tolist())).max() < 1e-4
        assert (sampler.ids[f.slots] == f.ids).all()
    c, sampled = sampler.counts, sum(most for _, most in asked)
    used = distinct([prompts[p] for p, _ in asked])
    assert c["prompt"] == distinct(prompts) == used and c["sampled"] == sampled == sum(seen)
    assert c["processed"] == used + sampled - len(asked) <= c["prompt"] + c["sampled"]
    assert c["live"] == sampled and c["room"] >= sampled and c["room"] % 3 == 0
    slots = [s for path in paths + [f.slots for f in found] for s in path.tolist()]
    assert len({*slots}) == used + sampled


@pytest.mark.parametrize("kind", KINDS)
def test_steps_from_the_cache(kind):
    """A tree grown a step at a time, three branches below each of a few nodes, over five rounds: log-probs
    as from a plain forward of everything above, and no token encoded twice in all the rounds."""
    model, tokenizer = language_model(kind, 2), Letters(newline=range(0, V, 5))
    sampler, prompts = Sampler(model, tokenizer, 16, rows=4), prompts_of(2, 3, 9)
    rng = np.random.default_rng(0)
    live, kinds = [(p, sampler.prompt(p)) for p in prompts], set()
    for turn in range(5):
        requests = [Request(path, mix(turn, i, j), 6) for i, (_, path) in enumerate(live) for j in range(3)]
        grown = []
        for i, f in enumerate(sampler.extend(requests, to_end=False)):
            above, path = live[i // 3]
            kinds.add(f.why)
            ends = [t in tokenizer.newline_ids for t in f.ids.tolist()]
            assert not any(ends[:-1]) and ends[-1] == (f.why == "step") and len(f.ids) <= 6
            assert abs(f.logps - log_probs(model, above, f.ids.tolist())).max() < 1e-4
            grown.append((above + f.ids.tolist(), np.concatenate((path, f.slots))))
        live = [grown[i] for i in rng.choice(len(grown), 4, replace=False)]
        assert sampler.counts["processed"] <= sampler.counts["prompt"] + sampler.counts["sampled"]
    assert kinds == {"step", "length"} and sampler.counts["prompt"] == distinct(prompts)
    twice = sampler.counts["processed"]
    sampler.encode([path[:-1] for _, path in live])         # all of it is there already
    assert sampler.counts["processed"] == twice


@pytest.mark.parametrize("kind", KINDS[:3])
def test_in_a_batch_as_alone(kind):
    """A row's ids depend on its prefix and seed, not on who else is in the batch, on the rows, or on what
    was sampled before; log-probs differ by rounding. About 300 draws, each within 1e-6 of one of a few
    likely borders with chance 1e-5: a false alarm on another machine in 0.3% of machines."""
    model, prompts = language_model(kind, 3), prompts_of(3)
    def run(chosen, rows, sampler=None):
        sampler = sampler or Sampler(model, Letters(), 64, rows)
        requests = [Request(sampler.prompt(prompts[i]), mix(9, i), 4 + 2 * i) for i in chosen]
        return sampler.extend(requests), sampler
    together, sampler = run(range(len(prompts)), 256)
    few = run(range(len(prompts)), 2)[0]
    backwards = run(range(len(prompts))[::-1], 5)[0][::-1]
    again = run(range(len(prompts)), 256, sampler)[0]
    for i in range(len(prompts)):
        for other in (run([i], 1)[0][0], few[i], backwards[i], again[i]):
            assert other.ids.tolist() == together[i].ids.tolist()
            assert abs(other.logps - together[i].logps).max() < 1e-5


def test_same_work_same_bytes():
    """After a reset the same requests give bit-equal log-probs, whatever was sampled between."""
    model = language_model()
    sampler, prompts = Sampler(model, Letters(), 4, rows=4), prompts_of(4)
    requests = lambda: [Request(sampler.prompt(p), i, 9) for i, p in enumerate(prompts)]
    run = lambda: [f.logps for f in sampler.extend(requests())]
    first = run()
    sampler.extend([Request(sampler.prompt([3] * 30), 1, 30)])
    sampler.reset()
    assert all((a == b).all() for a, b in zip(first, run()))


@pytest.mark.parametrize("kind", ("llama", "gpt2"))
def test_temperature_0_is_argmax(kind):
    """Every token at temperature 0 is the best of a plain forward's logits, whatever the seed; recorded
    log-probs are those of temperature 1."""
    model, prompts = language_model(kind, 5), prompts_of(5)
    sampler = Sampler(model, Letters(), 64, rows=4)
    for seed in (0, 1):
        found = sampler.extend([Request(sampler.prompt(p), mix(seed), 12) for p in prompts], temperature=0)
        for p, f in zip(prompts, found):
            with torch.no_grad():
                best = model.logits(model(torch.tensor([p + f.ids.tolist()])))[0].argmax(-1)
            assert best[len(p) - 1:-1].tolist() == f.ids.tolist()
            assert abs(f.logps - log_probs(model, p, f.ids.tolist())).max() < 1e-4


def test_weights_change_the_next_sample():
    """After an update of the weights and a reset, texts and log-probs are the new model's; nothing old is
    left."""
    model, prompts = language_model(seed=6), prompts_of(6)
    sampler = Sampler(model, Letters(), 8)
    run = lambda: sampler.extend([Request(sampler.prompt(p), i, 10) for i, p in enumerate(prompts)])
    before = run()
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p += 0.1 * torch.randn(p.shape, generator=rng)
    sampler.reset()
    after = run()
    assert sum(a.ids.tolist() != b.ids.tolist() for a, b in zip(before, after)) > len(prompts) // 2
    for p, f in zip(prompts, after):
        assert abs(f.logps - log_probs(model, p, f.ids.tolist())).max() < 1e-4


@pytest.mark.parametrize("temperature", (1.0, 0.5, 2.0))
def test_first_tokens_match_the_softmax(temperature):
    """First tokens of 4,000 samples from different seeds have the frequencies of the softmax, and
    neighbours are independent: chi-square beyond its 1e-4 point with a right sampler for 2 in 10,000
    choices of the seeds; the seeds are fixed, so this holds here for good."""
    model, prompt = language_model(seed=7), [3, 1, 4, 1, 5]
    sampler = Sampler(model, Letters(), 8, rows=500)
    path = sampler.prompt(prompt)
    found = sampler.extend([Request(path, mix(2, i), 1) for i in range(4000)], temperature)
    ids = np.array([f.ids[0] for f in found])
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([prompt])))[0, -1].double()
    chances = torch.softmax(logits / temperature, -1).numpy()
    assert (chances * 4000 > 5).sum() > 8                   # premise: a distribution worth testing
    statistic, limit = chi_square(np.bincount(ids, minlength=V), chances)
    assert statistic < limit
    pairs = np.bincount(ids[0::2] * V + ids[1::2], minlength=V * V)
    statistic, limit = chi_square(pairs, np.outer(chances, chances).ravel())
    assert statistic < limit
    recorded, plain = np.array([f.logps[0] for f in found]), torch.log_softmax(logits, -1).numpy()
    assert abs(recorded - plain[ids]).max() < 1e-4          # at temperature 1, whatever the sampling's was


def test_uniforms():
    """Numbers of (seed, t) are even in [0, 1), over t with one seed and over neighbouring seeds with one t
    (chi-square of 50 bins and of pairs in 7 x 7; 1e-4 each, fixed seeds), and mix tells order and number of
    parts."""
    n = 20_000
    seeds, zeros = np.arange(n, dtype=np.uint64), np.zeros(n, np.uint64)
    for u in (uniforms(zeros + np.uint64(5), np.arange(n)), uniforms(seeds, np.zeros(n, int)),
              uniforms(np.array([mix(1, i) for i in range(n)], np.uint64), np.full(n, 3))):
        assert 0 <= u.min() and u.max() < 1
        statistic, limit = chi_square(np.bincount((u * 50).astype(int), minlength=50), np.full(50, 0.02))
        assert statistic < limit
        pairs = (u[0::2] * 7).astype(int) * 7 + (u[1::2] * 7).astype(int)
        statistic, limit = chi_square(np.bincount(pairs, minlength=49), np.full(49, 1 / 49))
        assert statistic < limit
    pairs = [(a, b) for a in range(-5, 60) for b in range(60)]
    mixed = {mix(*parts) for parts in pairs + [(0,), (0, 0, 0), (1,)]}
    assert len(mixed) == 65 * 60 + 3 and all(0 <= m < 2 ** 64 for m in mixed) and mix(3, 4) == mix(3, 4)


def test_ids_that_do_not_exist():
    """Holes and padding rows are never sampled, though their logits are the highest, and log-probs are
    normalised over the ids there are; greedy too."""
    model, real = language_model(seed=8), [i for i in range(33) if i not in (5, 7, 30)]
    fake = [i for i in range(V) if i not in real]
    with torch.no_grad():
        model.lm_head.weight[fake] *= 4
    model.bind(Letters(33, base_ids=31, holes=(5, 7, 30)))
    assert model.no_ids.nonzero().flatten().tolist() == fake and model.last_id == 32
    prompt = [real[i] for i in (4, 9, 2)]
    sampler = Sampler(model, Letters(33), 8)
    path, lured, met = sampler.prompt(prompt), 0, set()
    for temperature in (0, 1.0, 3.0, 100.0):
        for i, f in enumerate(sampler.extend([Request(path, i, 12) for i in range(40)], temperature)):
            with torch.no_grad():
                logits = model.logits(model(torch.tensor([prompt + f.ids.tolist()])))[0, 2:-1]
            lured += sum(b in fake for b in logits.argmax(-1).tolist())
            plain = torch.log_softmax(logits[:, real].double(), -1)
            met |= {*f.ids.tolist()}
            assert met <= {*real}
            want = [plain[t, real.index(token)] for t, token in enumerate(f.ids.tolist())]
            assert np.allclose(f.logps, want, atol=1e-4)
    assert lured > 500 and met == {*real}
    with pytest.raises(BadInput, match="41"):
        model.bind(Letters(41))


# ----------------------------------------------------------------------------------------------------------
# Where a continuation stops
# ----------------------------------------------------------------------------------------------------------
def chain(following, positions=64, **more):
    """A model that writes following[token] after each token, surely: nothing is mixed in, and the head is a
    table."""
    model = GPT(GPTConfig.from_json(BASE | dict(model_type="llama", vocab_size=16, num_hidden_layers=1,
                                                max_position_embeddings=positions) | more)).initialise(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embed" in name or "lm_head" in name or name.endswith(("o_proj.weight", "down_proj.weight")):
                p.zero_()
        for token, after in following.items():
            model.model.embed_tokens.weight[token, token] = 1.0
            model.lm_head.weight[after, token] = 100.0
    return model.requires_grad_(False)


CYCLE = {i: (i + 1) % 16 for i in range(16)}


def test_stop_reasons():
    """eos, step, answer and length, each exactly where it belongs; a stop id counts before a newline, a
    newline before the length; the finished line is the text since the last newline."""
    tokenizer, lines = Letters(16, newline=(4, 9), eos=(14,)), []
    model = chain(CYCLE).bind(tokenizer)
    assert model.stop_ids == {14}
    def run(most, start=(2,), finished=None, **more):
        sampler = Sampler(model, tokenizer, 8, 4, finished)
        found, = sampler.extend([Request(sampler.prompt(start), 0, most)], **more)
        return found.ids.tolist(), found.why
    assert run(99) == ([*range(3, 15)], "eos")
    assert run(99, to_end=False) == ([3, 4], "step")
    assert run(99, (4,), to_end=False) == ([5, 6, 7, 8, 9], "step")
    assert run(99, (9,), to_end=False) == ([10, 11, 12, 13, 14], "eos")
    assert run(5) == ([3, 4, 5, 6, 7], "length") and run(1, to_end=False) == ([3], "length")
    assert run(2, to_end=False) == ([3, 4], "step") and run(12) == ([*range(3, 15)], "eos")
    assert run(99, finished=lambda line: lines.append(line)) == ([*range(3, 15)], "eos")
    assert lines == ["D\n", "FGHI\n"]
    last = lambda line: line == "FGHI\n"
    assert run(99, finished=last) == ([*range(3, 10)], "answer")
    assert run(99, (4,), finished=last, to_end=False) == ([5, 6, 7, 8, 9], "answer")
    assert run(7, finished=last) == ([*range(3, 10)], "answer")
    model.bind(Letters(16, newline=(4, 9), eos=(4,)))
    assert run(99, to_end=False) == ([3, 4], "eos")


def test_stop_ids_are_a_union():
    """Text ends at what config, generation_config or tokenizer call its end, as far as such an id exists."""
    model = language_model(eos_token_id=[3, 4, 39, 100, None, "5"])
    model.generation = {"eos_token_id": 6}
    assert model.bind(Letters(39, holes=(4,), eos=(7, 8))).stop_ids == {3, 6, 7, 8}
    assert model.bind(Letters(40)).stop_ids == {3, 4, 6, 39}
    folder = GPT.from_pretrained(MODELS / "qwen2", "cpu").bind(Letters(131, eos=(5,)))
    assert folder.generation == read_json(MODELS / "qwen2" / "generation_config.json")
    assert folder.stop_ids == {2, 5}


@pytest.mark.parametrize("kind", ("llama", "gpt2"))
def test_context_end(kind):
    """A text fills the context to the last position and stops there by length, without an index error:
    prompts of every length up to the limit in one ragged prefill (whose padding runs past the position
    table), short waves of rows; log-probs as from a plain forward. Longer and empty prompts are refused."""
    limit = 12
    model, rng = language_model(kind, positions=limit), np.random.default_rng(0)
    prompts = [rng.integers(0, V, n).tolist() for n in range(1, limit)] * 2
    for rows in (256, 3):
        sampler = Sampler(model, Letters(), 4, rows)
        found = sampler.extend([Request(sampler.prompt(p), i, 99) for i, p in enumerate(prompts)])
        for p, f in zip(prompts, found):
            assert len(p) + len(f.ids) == limit and f.why == "length"
            assert abs(f.logps - log_probs(model, p, f.ids.tolist())).max() < 1e-4
    for wrong in ([], [1] * limit, [1] * 100):
        with pytest.raises(BadInput, match="context|question"):
            sampler.prompt(wrong)


def test_context_end_by_steps():
    """A step that fills the context ends the text: what is called a step can be gone on from within the
    context."""
    model = language_model("gpt2", positions=12)
    sampler = Sampler(model, Letters(newline=range(V)), 8)      # every token is a step
    path = sampler.prompt([1] * 9)
    for n in (10, 11, 12):
        found, = sampler.extend([Request(path, n, 99)], to_end=False)
        path = np.concatenate((path, found.slots))
        assert len(path) == n and found.why == ("step" if n < 12 else "length")


def test_nothing_asked():
    """No requests, no results, no work; prompts that begin alike share the addresses of what they share."""
    sampler = Sampler(language_model(), Letters(), 8)
    assert sampler.extend([]) == [] and not any(sampler.counts.values())
    a, b, c = (sampler.prompt(p) for p in ([1, 2, 3], [1, 2, 4, 5], [1, 2]))
    assert a[:2].tolist() == b[:2].tolist() == c.tolist() and len({*a.tolist(), *b.tolist()}) == 5
    assert sampler.counts["prompt"] == 5 and sampler.counts["processed"] == 0
