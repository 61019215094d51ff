"""Is it right and fast on one GPU? One command; progress on stderr, one JSON object on stdout.

    python tests/gpu_check.py                            random weights in Qwen2.5-0.5B's shape
    python tests/gpu_check.py --model FOLDER --data DIR  open weights; then four recipes on GSM8K
    python tests/gpu_check.py --toy                      all of it at toy size, on a CPU

FOLDER is in Hugging Face's format; DIR holds train.jsonl and dev.jsonl. After --minutes a call
stops as by Ctrl-C, with exit code 130; the same command goes on, for --out keeps what is finished.
Exit code 0: all is measured and correct; 1: numbers differ that must be equal, or an update was not
finite (or a traceback says what else); 2: no GPU, or bad files.
Goals at 0.5B: share of the roof .35 (sampling) and .40 (training); 64 trees searched together 20
times as fast as one alone; a recipe 5 points above its base."""
import argparse
import json
import signal
import sys
import tempfile
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
# bench comes first: it makes the project's files importable
from bench import TOKENIZER, limits, planted, question, roof, searching, seconds, training_roof
import dpo
import loop
from critic import t_interval
from mcts import grow
from model import GPT, GPTConfig, Tokenizer

QWEN = dict(model_type="qwen2", vocab_size=151_936, hidden_size=896, num_hidden_layers=24,
            num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
            tie_word_embeddings=True)
# rows of a product, bytes of a copy, new tokens of a sample, updates, rows of an update
REAL = SimpleNamespace(device="cuda", dtype=torch.bfloat16,
                       rows=8192, copied=1 << 30, new=128, updates=5, batch=64,
                       flags="--questions 3000 --budget 1200 --chunk 500 --rows 2048 "
                             "--max-tokens 256 --temperature 0.7 --steps 96 --batch 64 --epochs 2 "
                             "--base-steps 234 --sft-lr 1e-5 --dpo-lr 2.4e-6")
TOY = SimpleNamespace(device="cpu", dtype=torch.float32,
                      rows=256, copied=1 << 24, new=4, updates=1, batch=2,
                      flags="--preset smoke --device cpu --threads 1 --workers 1 --questions 8 "
                            "--budget 150 --max-tokens 48 --sft-lr 0.01")
# Relative (logits, norms of gradients), in nats a token, or prompts (greedy). bf16 knows a logit of
# 20 to 1/16 only
LIMITS = dict(float32=dict(logits=1e-3, greedy=0, packed=1e-3, cached=1e-3, parts=1e-3),
              bfloat16=dict(packed=.5, cached=.5, parts=.1))

def load(folder, device, dtype):
    """(model, tokenizer) of a folder."""
    tokenizer = Tokenizer.from_pretrained(folder)
    return GPT.from_pretrained(folder, device, dtype).bind(tokenizer), tokenizer

def write_model(folder, config):
    """A folder with random weights and the ids of bytes."""
    GPT(config).initialise(0).save_pretrained(folder)
    TOKENIZER.save(folder)

def sampling(model, tokenizer, size, most, rows):
    """Tokens a second in so many rows; the time includes their prompts, one for eight rows."""
    def sample():
        """All rows, from the prompts on; the trees."""
        sampler, trees = planted(model, tokenizer, range(-(-rows // 8)), repeat=4, rows=rows)
        grow(sampler, [(tree.root, min(8, rows)) for tree in trees], size.new)
        return trees
    trees = sample()
    S = len(trees[0].root.ids) + size.new / 2           # the mean over the steps
    speed = sum(tree.tokens for tree in trees) / seconds(sample)
    return dict(per_second=speed, share=speed / roof(model, most, rows, S))

def training(model, tokenizer, size, most):
    """Tokens a second of SFT updates, optimiser included."""
    texts = [tokenizer.encode(question(seed)[0] * 16) for seed in range(size.batch)]
    rows, tokens = [dpo.text_row(ids[:1], ids[1:]) for ids in texts], sum(map(len, texts))
    train = partial(dpo.train, model, loss_fn=dpo.sft_loss, lr=0.0, label="",
                    tokens=loop.TRAINED_AT_ONCE[model.device.type])
    more, one = (seconds(lambda: train([rows] * n), 1) for n in (1 + size.updates, 1))
    speed = size.updates * tokens / (more - one)        # without what is done once a training
    return dict(per_second=speed, share=speed / training_roof(model, most, tokens / size.batch))

def search(model, tokenizer, size, most):
    """Tokens a second of 64 trees searched together, and over those of one tree. A step is 16
    tokens, so that it does not matter what the weights write."""
    of = partial(searching, model, tokenizer, rows=512, step="16", repeat=4)
    alone, together = of(range(1)), of(range(64))
    return dict(per_second=together, ratio=together / alone)

def speed(folder, size):
    """All that is measured in seconds, and the most memory so far (GiB of a GPU)."""
    model, tokenizer = load(folder, size.device, size.dtype)
    model.stop_ids = frozenset()                        # every sample gets all its tokens
    most = limits(model, size.rows, size.copied)
    stages = {f"sampling_{rows}": partial(sampling, rows=rows) for rows in (1, 64, 512, 2048)}
    stages |= dict(search=search, training=training)
    found = dict(vars(most), dtype=str(model.dtype))
    for name, stage in stages.items():
        print(name, flush=True)
        found[name] = stage(model, tokenizer, size, most)
        found[name]["peak_gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
    return found

def outputs(model, tokenizer):
    """(logits, greedy ids) of eight prompts."""
    sampler, trees = planted(model, tokenizer, range(8), repeat=2)
    ends = grow(sampler, [(tree.root, 1) for tree in trees], 24, temperature=0)
    with torch.no_grad():
        ids = [torch.from_numpy(tree.root.ids[None]).to(model.device) for tree in trees]
        logits = torch.cat([model.logits(model(each))[0] for each in ids]).cpu()
    return logits, [end.solution().tolist() for end in ends]

def laws(model, tokenizer):
    """Largest differences of log-probs: a tree in one row and its solutions each in one (packed),
    while sampling and afterwards (cached). Of gradient norms: a part of 8 rows, 8 of 1 (parts)."""
    sampler, trees = planted(model, tokenizer, range(8), step="4")
    rows, packed, cached = [], [], []
    for tree in trees:
        ends = grow(sampler, [(tree.root, 4)], 12)
        whole = dpo.tree_row(also=tree.nodes)
        together, = dpo.log_probs(model, [whole])
        for end in ends:
            branch = torch.cat([together[whole.packed.span[node]] for node in end.path()[1:]])
            alone = dpo.log_probs(model, [dpo.tree_row(also=end.path())])[0][-len(branch):]
            packed.append((branch - alone).abs().max().item())
            cached.append((torch.from_numpy(end.solution("logps")) - alone).abs().max().item())
        first, *others = tree.root.children
        rows.append(dpo.tree_row([dpo.Pair([first], [other]) for other in others], ends[:1]))
    dpo.store_reference(model, rows)
    train = partial(dpo.train, model, [rows], dpo.preference_loss, lr=0.0, label="")
    one, eight = (train(tokens=tokens)["norm"] for tokens in (100_000, 1))
    return dict(packed=max(packed), cached=max(cached), parts=abs(eight / one - 1))

def correctness(folder, size):
    """The device against the CPU in fp32; the laws in fp32 and in bf16."""
    there, their_ids = outputs(*load(folder, "cpu", torch.float32))
    model, tokenizer = load(folder, size.device, torch.float32)
    here, our_ids = outputs(model, tokenizer)
    logits = ((here - there).abs().max() / there.abs().max()).item()
    greedy = sum(ours != theirs for ours, theirs in zip(our_ids, their_ids))
    fp32 = dict(logits=logits, greedy=greedy) | laws(model, tokenizer)
    return dict(float32=fp32, bfloat16=laws(model.to(torch.bfloat16), tokenizer))

def recipes(folder, size, data, out):
    """Run or resume SFT and all recipes -> (exit code, {recipe: its rounds so far}). gain: points
    over round 0, with the interval of one seed's questions."""
    train, dev, found = f"{data}/train.jsonl", f"{data}/dev.jsonl", {}
    code = loop.main([*size.flags.split(), "--model", str(folder), "--out", str(out),
                      "--data", train, "--sft-data", train, "--eval-data", dev, "--rounds", "2",
                      "--compare", "rft,self_explore,mcts_dpo,alphallm", "--seeds", "1"])
    for log in sorted(out.glob("*_seed0/log.jsonl")):
        for row in loop.read_lines(log):
            solved = [loop.read_lines(log.with_name(f"eval_{r}.jsonl")) for r in (0, row["round"])]
            gains = [100 * (new["right"] - old["right"]) for old, new in zip(*solved)]
            found.setdefault(row["recipe"], []).append(row | dict(gain=t_interval(gains)))
    return code, found

def check(flags, out, found):
    """Fill `found`, the JSON object. Returns the exit code."""
    size, folder, data = TOY if flags.toy else REAL, flags.model, flags.data
    if not folder:
        folder = out / "weights"
        config = GPTConfig.tiny(TOKENIZER.n_ids, 32, 2) if flags.toy else GPTConfig.from_json(QWEN)
        loop.cached(folder, lambda: config, write_model, str)
    for name, numbers in dict(train=range(40), dev=range(40, 60)).items() if flags.toy else []:
        items = [dict(question=f"What is {i} mod 2?", answer=f"#### {i % 2}") for i in numbers]
        loop.write_lines(out / f"{name}.jsonl", items)
        data = out
    for stage in (speed, correctness):
        which = zlib.crc32(str(Path(folder).resolve()).encode())        # another folder: anew
        path = out / f"{stage.__name__}_{which:08x}.jsonl"
        found[stage.__name__], = loop.cached(path, lambda: [stage(folder, size)])
    code, found["recipes"] = recipes(folder, size, data, out) if data else (0, {})
    found["finished"] = code == 0
    exact = all(found["correctness"][kind][name] <= limit for kind in LIMITS
                for name, limit in LIMITS[kind].items())
    finite = not any(row.get("skipped") for rows in found["recipes"].values() for row in rows)
    return code or int(not exact or not finite)

def main(arguments):
    """Print the JSON object; return the exit code."""
    parser = argparse.ArgumentParser(description="Check and measure this project on one GPU.")
    parser.add_argument("--model", help="folder with open weights, such as Qwen2.5-Coder-0.5B")
    parser.add_argument("--data", help="folder with train.jsonl and dev.jsonl of GSM8K")
    parser.add_argument("--out", help="folder of what is finished (default: runs/gpu_check)")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call (default: 9)")
    parser.add_argument("--toy", action="store_true", help="everything tiny, on a CPU")
    flags = parser.parse_args(arguments)
    if not flags.toy and not torch.cuda.is_available():
        print("PyTorch sees no GPU here; --toy tries the program on a CPU.", file=sys.stderr)
        return 2
    scratch = tempfile.TemporaryDirectory()             # removed at the end
    out = Path(flags.out or (scratch.name if flags.toy else "runs/gpu_check"))
    found = dict(device="CPU" if flags.toy else torch.cuda.get_device_name(), finished=False,
                 torch=torch.__version__, allowed=LIMITS)
    signal.signal(signal.SIGALRM, signal.default_int_handler)           # raises KeyboardInterrupt
    signal.setitimer(signal.ITIMER_REAL, 60 * flags.minutes)
    sys.stdout = sys.stderr
    try:
        code = check(flags, out, found)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        code = 130
    print(json.dumps(found, indent=1), file=sys.__stdout__)
    return code

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
