"""How fast is it? Ratios within one run on one thread; seconds differ from machine to machine.

    python tests/bench.py            about two minutes
Each line says what is compared, or which share of the machine's limits is reached."""
import itertools
import random
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import dpo  # noqa: E402
import loop  # noqa: E402
from critic import grade  # noqa: E402
from mcts import StepSampler, Tree, grow, search, until  # noqa: E402
from model import GPT, GPTConfig, Sampler, Tokenizer, mix  # noqa: E402

TOKENIZER = Tokenizer.bytes_only()
# One thread's processor time: what else runs on the machine changes it less than the wall time
CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time

def seconds(work, repeats=3, clock=CLOCK):
    """Median time of `work` and of what it began on a GPU; the first run is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = clock()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(clock() - start)
    return sorted(times[1:])[repeats // 2]

def question(seed):
    """A sum of five numbers: (question, solution, answer)."""
    numbers = [random.Random(mix(seed, i)).randrange(1, 30) for i in range(5)]
    sums = [sum(numbers[:i]) for i in range(1, 6)]
    lines = [f"{a}+{b}={c}\n" for a, b, c in zip(sums, numbers[1:], sums[1:])]
    return "+".join(map(str, numbers)) + "?\n", "".join(lines) + f"#### {sums[-1]}", str(sums[-1])

def planted(model, tokenizer, seeds, repeat=1, **options):
    """A sampler, and a tree for each question, which is written so many times."""
    sampler = Sampler(model, tokenizer, 100_000, **options)
    trees = []
    for seed in seeds:
        ids = tokenizer.encode(question(seed)[0] * repeat)
        trees.append(Tree(question(seed), seed, ids, sampler.prompt(ids)))
    return sampler, trees

@torch.no_grad()
def limits(model, rows=256, copied=1 << 24):
    """What the machine can do: operations a second in plain products of the model's shapes, of so
    many rows; bytes a second in a copy, which reads and writes; N, the weights in the products."""
    head = model.model.embed_tokens if model.config.tied else model.lm_head
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2] + [head.weight]
    N, took = sum(matrix.numel() for matrix in matrices), 0.0
    for matrix in matrices:
        x = torch.randn(rows, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
        took += seconds(lambda: [(x @ matrix.T).shape for _ in range(10)]) / 10
    here, there = torch.empty(2, copied, dtype=torch.uint8, device=model.device)
    copying = seconds(lambda: [there.copy_(here).shape for _ in range(10)]) / 10
    return SimpleNamespace(N=N, rate=2 * rows * N / took, bandwidth=2 * copied / copying)

def roof(model, most, rows, S):
    """Tokens a second that these limits allow while `rows` texts of S tokens each are decoded. A
    step reads all weights once, and keys and values of every row: bytes / bandwidth. It multiplies
    every row with all weights, and with S keys and values: operations / rate. The larger of the
    two is the least time of a step."""
    c, width = model.config, model.dtype.itemsize
    read = (most.N + rows * S * 2 * c.layers * c.kv_heads * c.head_dim) * width
    work = 2 * rows * (most.N + 2 * S * c.layers * c.heads * c.head_dim)
    return rows / max(read / most.bandwidth, work / most.rate)

def training_roof(model, most, T):
    """Tokens a second that the limits allow in training on rows of T tokens. A token costs 6
    operations a weight; attention to half of T keys adds 6 T a layer and head dimension."""
    c = model.config
    return most.rate / (6 * (most.N + T * c.layers * c.heads * c.head_dim))

def sampling(model):
    """(tokens, seconds, seconds if every sample encodes its prompt): 8 samples of 64 prompts."""
    def sample(times, k):
        """24 tokens below each prompt, k samples at once, so many times; the number of tokens."""
        tokens = 0
        for _ in range(times):
            sampler, trees = planted(model, TOKENIZER, range(64), repeat=3, rows=512)
            grow(sampler, [(tree.root, k) for tree in trees], 24)
            tokens += sum(tree.tokens for tree in trees)
        return tokens
    return sample(1, 8), seconds(lambda: sample(1, 8)), seconds(lambda: sample(8, 1), 1)

def training(model):
    """The sibling pairs of 32 sampled trees: (tokens, tokens of a tree, seconds, seconds with two
    rows a pair)."""
    sampler, trees = planted(model, TOKENIZER, range(32), finished=last_line)
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
    tokens = sum(len(row.learn) for row in packed)
    return tokens, tokens / len(packed), seconds(fast), seconds(slow, 1)

def last_line(line):
    """Does this line end a solution?"""
    return line.startswith("####")

def searching(model, tokenizer, seeds, repeat=1, **options):
    """Tokens a second of one batched search."""
    sampler, trees = planted(model, tokenizer, seeds, repeat, finished=last_line, **options)
    win = lambda end: grade(tokenizer.decode(end.solution().tolist()), end.tree.question[2])
    start = CLOCK()
    search(trees, StepSampler(sampler, 64), lambda ends: list(map(win, ends)), until(12))
    return sum(tree.tokens for tree in trees) / (CLOCK() - start)

def on_two_cores(model):
    """Seconds with one core and with two: of an evaluation of two parts (by processes), and of
    eight updates of the base (by threads)."""
    with tempfile.TemporaryDirectory() as folder:
        count = 2 * loop.EVALUATED_AT_ONCE
        lab = loop.Lab(loop.Settings(out=folder, device="cpu", threads=1, eval_questions=count))
        lab.model.load_state_dict(model.state_dict())
        fresh, questions = itertools.count(), lab.task.eval_questions()
        rows = lab.example_rows(8 * loop.BASE_BATCH, random.Random(0))
        plan, took = loop.parts(rows, loop.BASE_BATCH), ([], [])
        works = (lambda: loop.solve_greedily(lab, questions, next(fresh)),
                 lambda: lab.train(plan, dpo.sft_loss, 0.0, muon=True, label=""))
        for cores in (1, 2):
            lab.workers = lab.threads = cores
            for work, times in zip(works, took):
                times.append(seconds(work, 1, time.perf_counter))
    return took

def main():
    """Print all lines."""
    torch.set_num_threads(1)
    model = GPT(GPTConfig.tiny(TOKENIZER.n_ids)).initialise(0).bind(TOKENIZER)
    most, half = limits(model), limits(GPT(model.config).to(torch.bfloat16))
    units = half.rate > 1.5 * most.rate
    print(f"limits: {most.rate / 1e9:.0f} GFLOP/s in products of the tiny model's shapes, "
          f"{half.rate / most.rate:.2f} times as many in bf16 (so bf16 units are "
          f"{'' if units else 'not '}there); copies {most.bandwidth / 1e9:.0f} GB/s")
    rows = [dpo.text_row(TOKENIZER.encode(text), TOKENIZER.encode(solution) + [model.end_id])
            for text, solution, _ in map(question, range(1024))]
    dpo.train(model, dpo.batches(rows, 16, 80, seed=0), dpo.sft_loss, 4e-3, muon=True)
    n, fast, slow = sampling(model)
    share = n / fast / roof(model, most, 512, 57)       # a prompt has 45 tokens, a sample 24
    print(f"sampling: {n / fast:,.0f} tokens/s, {share:.0%} of the limits; "
          f"{slow / fast:.1f} times as fast as if each sample encoded its prompt again")
    n, T, fast, slow = training(model)
    share = n / fast / training_roof(model, most, T)
    print(f"training: {n / fast:,.0f} tokens/s, {share:.0%} of the limits; "
          f"packed trees are {slow / fast:.1f} times as fast as two rows a pair")
    together, alone = (searching(model, TOKENIZER, range(n)) for n in (64, 1))
    print(f"search: {together:,.0f} tokens/s with 64 trees in one batch; "
          f"{together / alone:.1f} times as fast as one tree")
    (one, two), (alone, both) = on_two_cores(model)
    print(f"two cores against one: {one / two:.1f} times as fast in evaluation (two processes), "
          f"{alone / both:.1f} in training (two threads)")

if __name__ == "__main__":
    main()
