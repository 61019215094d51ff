"""How fast is it? Ratios within one run on one thread; seconds differ from machine to machine.

    python tests/bench.py            about two minutes
Each line says what is compared, and which share of plain matrix products is reached."""
import importlib.util
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import dpo  # noqa: E402
from critic import grade  # noqa: E402
from mcts import StepSampler, Tree, grow, search, until  # noqa: E402
from model import GPT, GPTConfig, Request, Sampler, Tokenizer, mix  # noqa: E402

TOKENIZER = Tokenizer.bytes_only()

def seconds(work, repeats=3):
    """Median wall time of `work`, after one run that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]

def question(seed):
    """A sum of five numbers: (question, solution, answer)."""
    numbers = [random.Random(mix(seed, i)).randrange(1, 30) for i in range(5)]
    sums = [sum(numbers[:i]) for i in range(1, 6)]
    lines = [f"{a}+{b}={c}\n" for a, b, c in zip(sums, numbers[1:], sums[1:])]
    return "+".join(map(str, numbers)) + "?\n", "".join(lines) + f"#### {sums[-1]}", str(sums[-1])

def planted(model, seeds):
    """A sampler with a fresh store, and a tree for each question."""
    sampler = Sampler(model, TOKENIZER, 100_000, finished=lambda line: line.startswith("####"))
    trees = []
    for seed in seeds:
        ids = TOKENIZER.encode(question(seed)[0])
        trees.append(Tree(question(seed), seed, ids, sampler.prompt(ids)))
    return sampler, trees

def sampling(model):
    """(tokens, seconds, seconds if every sample encodes its prompt): 8 samples of 64 prompts."""
    sampler = Sampler(model, TOKENIZER, 100_000)
    prompts = [TOKENIZER.encode(question(seed)[0] * 3) for seed in range(64)]

    def sample(numbers):
        """24 tokens below each prompt, so many times."""
        sampler.reset()
        paths = [sampler.prompt(ids) for ids in prompts]
        return sampler.extend([Request(path, mix(i, j), 24) for i, path in enumerate(paths)
                               for j in numbers])
    shared, apart = lambda: sample(range(8)), lambda: [sample([j]) for j in range(8)]
    return sum(len(one.ids) for one in shared()), seconds(shared), seconds(apart, 1)

def training(model):
    """(tokens, seconds, seconds with two rows a pair): the sibling pairs of 32 sampled trees."""
    sampler, trees = planted(model, range(32))
    grow(sampler, [(tree.root, 8) for tree in trees], 64)
    pairs = [[dpo.Pair([node.children[0]], [other]) for node in tree.nodes
              for other in node.children[1:]] for tree in trees]
    packed = [dpo.tree_row(some) for some in pairs if some]
    plain = [dpo.tree_row(also=side) for row in packed for pair in row.pairs
             for side in (pair.chosen, pair.rejected)]
    dpo.store_reference(model, packed)

    def plain_loss(model, rows):
        """What costs as much as DPO with a row for each side."""
        return sum(logps.sum() for logps in dpo.log_probs(model, rows)), len(rows), {}
    update = lambda rows, loss: lambda: dpo.train(model, [rows], loss, lr=0.0, label="")
    fast, slow = update(packed, dpo.preference_loss), update(plain, plain_loss)
    return sum(len(row.learn) for row in packed), seconds(fast), seconds(slow, 1)

def searching(model, seeds):
    """(tokens, seconds) of one batched search."""
    sampler, trees = planted(model, seeds)
    win = lambda end: grade(TOKENIZER.decode(end.solution()), end.tree.question[2])
    start = time.perf_counter()
    search(trees, StepSampler(sampler, 64), lambda ends: list(map(win, ends)), until(24))
    return sum(tree.tokens for tree in trees), time.perf_counter() - start

def peer(model):
    """Seconds for 32 tokens after each of 64 prompts: (here, in transformers.generate)."""
    from transformers import AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = torch.randint(0, 256, (64, 64))
    model.stop_ids = frozenset()                        # no text ends early, here or there

    def ours():
        """By the sampler."""
        sampler = Sampler(model, TOKENIZER, 8192, rows=64)
        sampler.extend([Request(sampler.prompt(ids), 0, 32) for ids in prompts.tolist()])
    return seconds(ours), seconds(lambda: theirs.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, pad_token_id=0,
        max_new_tokens=32, min_new_tokens=32))

if __name__ == "__main__":
    torch.set_num_threads(1)
    x, w = torch.randn(4096, 128), torch.randn(128, 320)
    limit = 2 * 4096 * 128 * 320 / seconds(lambda: x @ w, 20)
    print(f"matrix products of the tiny model's shape: {limit / 1e9:.0f} GFLOP/s on one thread")
    model = GPT(GPTConfig.tiny(TOKENIZER.n_ids)).initialise(0).bind(TOKENIZER)
    flops = 2 * sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    rows = [dpo.text_row(TOKENIZER.encode(text), TOKENIZER.encode(solution) + [model.end_id])
            for text, solution, _ in map(question, range(1024))]
    dpo.train(model, dpo.batches(rows, 16, 80, seed=0), dpo.sft_loss, 4e-3, muon=True)
    n, fast, slow = sampling(model)
    print(f"sampling: {n / fast:,.0f} tokens/s, {n / fast * flops / limit:.0%} of the products; "
          f"{slow / fast:.1f} times as fast as if each sample encoded its prompt again")
    n, fast, slow = training(model)
    print(f"training: {n / fast:,.0f} tokens/s, {3 * n / fast * flops / limit:.0%} of them; "
          f"packed trees are {slow / fast:.1f} times as fast as two rows a pair")
    n, took = searching(model, range(64))
    tokens, times = zip(*(searching(model, [seed]) for seed in range(5)))
    print(f"search: {n / took:,.0f} tokens/s with 64 trees in one batch; "
          f"{sum(times) / sum(tokens) * n / took:.1f} times as fast as one tree after the other")
    if importlib.util.find_spec("transformers"):
        here, there = peer(model)
        print(f"generation: {there / here:.1f} times as fast as transformers.generate")
