"""Judging: where a solution went wrong, what half a solution is worth, whether an answer is right.
The idea (Self-Explore, 2404.10346). Only the end of a solution can be checked. To find the step
that ruined it, complete each of its prefixes k times: the first step from which no completion comes
out right is the first pit. It becomes the rejected side of a preference pair (dpo.py).
What is different from the published codes:
1. Completions are branches of the tree: a right end serves all solutions that share its prefix.
2. AlphaLLM's critics are small heads on the policy's hidden states, not language models.
3. Each task has one rule, `Task.reward`, for search, labels and evaluation: two that disagree would
   make false pits. It rests on `grade` (Countdown has a rule of its own).
Chapters: 1 Pits  2 Policy as judge  3 Critics  4 Rollouts  5 Grading  6 Formulas  7 Statistics
Try:  python critic.py      labels the first pit of one wrong solution; two seconds
"""
import signal

if __name__ == "__main__":              # Ctrl-C and `| head` end the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(getattr(signal, "SIGPIPE", signal.SIGINT), signal.SIG_DFL)    # not on Windows

import math
import re
import statistics
from fractions import Fraction
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F

from mcts import NOTHING, Tree, draw, grow, record_grade
from model import BadInput

# --------------------------------------------------------------------------------------------------
# 1. The first pit
# --------------------------------------------------------------------------------------------------
# HACK HERE: what a pit is. `known_successes` says what is known of each step, `first_pit` which one
# is the pit. For "the success rate drops by half", the former gives tried_right / tried (None if
# not tried, 0 at the end), and the latter compares neighbours (the first step with 1). Tests of
# pits will fail then, and a budget gives fewer pits, for every step must be tried.
def known_successes(path: list) -> list:
    """For each step of a wrong solution: how many right samples pass through it; None: unknown. A
    count of 0 is known if the step ends the solution, or if fresh completions of it all failed.
    (The wrong solution does not count against its steps: it was picked because it is wrong.)
    Steps A B C D, one right sample passes through A, none through B or C: [1, None, None, 0]."""
    return [node.rights if node.rights or node.tried or node.ended else None for node in path]


def first_pit(successes: list) -> int | None:
    """Index, from 0, of the first step with no success (Self-Explore, 3.2): [4, 2, 0, 0] -> 2;
    [4, 4, 4] -> None; [4, None, 0] -> None, because the step at index 1 is unknown.
    It errs both ways: a good step whose completions end right with chance p is called a pit with
    probability (1 - p)^k, 24% at p = .3 and k = 4; a bad step with one lucky completion is not."""
    for step, count in enumerate(successes):
        if not count:                                   # 0 or None
            return None if count is None else step
    return None


def pit(end):
    """The node of the first pit of a wrong solution. None while an earlier step is unknown, and for
    a right or ungraded end. A right branch that is found later moves or removes a pit."""
    path = end.path()[1:]
    step = first_pit(known_successes(path)) if end.right is False else None
    return None if step is None else path[step]


def label_pits(ends: list, complete, k: int, left=lambda: math.inf) -> None:
    """Complete prefixes of wrong solutions until each has its pit or the budget is spent.
    complete([(node, k)]) samples k completions below each node and grades them (record_grade).
    left: the budget, see mcts.tokens_left. A completion is expected to be as long as the rest of
    the solution; a prefix that the budget does not afford stays unknown. k = 0 labels nothing.
    In every wave each solution asks for one prefix. Here are two that share A; k = 4:
        root - A - B - C - D  wrong     wave 1   A, for both: 2 of 4 are right
                `- E - F  wrong         wave 2   B: 0 of 4, the pit of D;  E: 1 of 4, so F is a pit
    """
    while k > 0:
        wave, cost = {}, 0                              # node -> its right samples before
        for end in ends:
            path = end.path()[1:]
            known = known_successes(path)
            if end.right is False and None in known and first_pit(known) is None:
                step = known.index(None)
                tokens = k * sum(len(node.ids) for node in path[step + 1:])
                if path[step] not in wave and cost + tokens <= left():
                    wave[path[step]] = path[step].rights
                    cost += tokens
        if not wave:
            return
        complete([(node, k) for node in wave])
        for node, rights in wave.items():
            node.tried_right += node.rights - rights    # no node of a wave lies below another
            node.tried += k


# --------------------------------------------------------------------------------------------------
# 2. The policy as its own judge (MCTS-DPO, 2405.00451)
# --------------------------------------------------------------------------------------------------
JUDGE = "\n\nIs the solution so far correct?\n(A) {}\n(B) {}\nThe solution so far is ("
JUDGE_STEP = "\n\nIs the last step correct?\n(A) {}\n(B) {}\nThe last step is ("
REFERENCE = "\n\nReference solution:\n{}"


@torch.no_grad()
def self_evaluation(nodes: list, sampler, template: str = JUDGE, shown="") -> list:
    """The policy's own P(correct) of each solution so far, a number in (0, 1) each.
    `template` is appended to the solution; the cached keys and values of the solution are reused.
    Models favour one letter, so both orders of the options are asked and averaged: .3 with correct
    as (B) and .4 with correct as (A) give .35. An order that does not fit the context counts as .5.
    shown: a function node -> reference solution, or "". It tells the judge the answer, so say when
    you use it: AUC .747, without .620 (MCTS-DPO). BadInput: A or B is not one token."""
    model, tokenizer = sampler.model, sampler.tokenizer
    letters = tokenizer.encode_more("A") + tokenizer.encode_more("B")
    if len(letters) != 2:
        raise BadInput("This tokenizer splits single letters: switch self-evaluation off.")
    p = np.full((len(nodes), 2), 0.5)                   # (nodes, orders)
    paths, places = [], []
    for i, node in enumerate(nodes):
        above = node.slots_from_root()
        above = above[:-1] if node.ended == "eos" else above            # judge before end-of-text
        text = shown and REFERENCE.format(shown(node))
        for order, options in enumerate((("incorrect", "correct"), ("correct", "incorrect"))):
            ids = tokenizer.encode_more(text + template.format(*options))
            if len(above) + len(ids) < model.config.max_positions:
                paths.append(sampler.follow(above, ids))
                places.append((i, order))
    sampler.encode(paths)
    hidden = sampler.hidden[[path[-1] for path in paths]]               # (paths, C)
    logps = model.all_logps(hidden)[:, letters]                         # (paths, A or B)
    for (i, order), chance in zip(places, torch.softmax(logps, -1).tolist()):
        p[i, order] = chance[1 - order]                 # "correct" is (B), then (A)
    return p.mean(1).tolist()


# --------------------------------------------------------------------------------------------------
# 3. Learned critics                      M nodes, C hidden size of the policy
# --------------------------------------------------------------------------------------------------
HEADS = ("value", "process", "outcome")
LEAST_AUC = 0.55        # a head below it, on a fifth of the training questions, is not trusted


class Critic(torch.nn.Module):
    """Three heads on one hidden layer; each gives a probability.
        head      question                                label (critic_labels)
        value     how likely is a right end from here?    share of right ends below the node
        process   is this step good?                      can the solution still end right?
        outcome   is this finished solution right?        its grade
    Inputs: `features`. fit_critic trains the heads anew every round, on four questions of five. The
    fifth gives the report, and trusted (3,): 1 for a head whose AUC there is at least LEAST_AUC."""

    def __init__(self, hidden_size: int, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inner = torch.nn.Linear(hidden_size + 4, 128)
            self.heads = torch.nn.Linear(128, 3)
        self.register_buffer("mean", torch.zeros(hidden_size + 4))      # of the inputs
        self.register_buffer("std", torch.ones(hidden_size + 4))
        self.register_buffer("trusted", torch.zeros(3))

    def forward(self, x):
        """(M, C + 4) features -> (M, 3) logits."""
        return self.heads(F.gelu(self.inner((x - self.mean) / self.std)))

    @torch.no_grad()
    def read(self, nodes: list, sampler) -> np.ndarray:
        """(M, 3): what the heads say of nodes that lie in the sampler's store."""
        return torch.sigmoid(self(features(nodes, sampler))).cpu().numpy()


class Judge:
    """The three opinions by asking the policy, as AlphaLLM asks language models."""
    trusted = torch.ones(3)

    def read(self, nodes: list, sampler) -> np.ndarray:
        """(M, 3), as Critic.read."""
        whole = self_evaluation(nodes, sampler)
        return np.array([whole, self_evaluation(nodes, sampler, JUDGE_STEP), whole]).T


def features(nodes: list, sampler) -> torch.Tensor:
    """(M, C + 4): the hidden state of the step's last token, and four log-probs: lowest and mean of
    the step, lowest and mean of the whole path.
    Log-probs (-1, -4) of the first step and (-2) of the second give the second -2, -2, -4, -7/3.
    The AUC of the outcome head is .88 without the four and .91 with them (homework, a number)."""
    numbers = np.zeros((len(nodes), 4), np.float32)
    for node, row in zip(nodes, numbers):
        step, whole = node.logps, node.solution("logps")
        if len(whole):
            row[:] = step.min(), step.mean(), whole.min(), whole.mean()
    hidden = sampler.hidden[[node.slots[-1] for node in nodes]].float()         # (M, C)
    return torch.cat((hidden, torch.from_numpy(numbers).to(hidden.device)), 1)


def critic_labels(tree: Tree, k: int) -> list:
    """[(node, (value, process, outcome), weight)]: one row for each step with graded samples below
    it; nan where a head has no label. In the picture a 3:1 has 3 right and 1 wrong below it; k = 4:
        q 3:6 -+- a 3:1 -+- b 3:0 end      a  (.75, 1, nan)       b  (nan, 1, 1)
               |         `- c 0:1 end      d  (0, 0, nan)         c  (nan, 0, 0)
               |- d 0:4 --- e 0:4 end      f  (0, nan, nan)       e  (nan, nan, 0)
               `- f 0:1 --- g 0:1 end

    A step is bad (process 0) if its parent has a right end below it, and it is a wrong end (c) or k
    or more samples below it are all wrong (d); f has too few. Below the pit d there is no process
    label. weight: the number of samples, at most 8."""
    rows = []
    for node in tree.nodes[1:]:
        samples, good = node.rights + node.wrongs, float(node.rights > 0)
        judged = node.parent.rights > 0 and (good or samples >= k or node.ended)
        value = math.nan if node.ended else node.rights / max(1, samples)
        labels = (value, good if judged else math.nan, good if node.ended else math.nan)
        if samples:
            rows.append((node, labels, min(samples, 8)))
    return rows


def fit_critic(inputs, labels, weights, held_out, updates: int, seed: int) -> tuple:
    """(Critic trained on the nodes that are not held out, report on those that are).
    inputs (M, C + 4), labels (M, 3), weights (M,), held_out (M,) bool. Hold out whole questions,
    never single nodes: the nodes of one tree share their ends. M may be 0. The loss is the
    cross-entropy (paper: squared error) of the labels that exist; a soft .75 is learnt as .75."""
    critic = Critic(inputs.shape[1] - 4, seed).to(inputs.device)
    x, y, w = inputs[~held_out], labels[~held_out], weights[~held_out]
    if len(x):
        critic.mean.copy_(x.mean(0))
        critic.std.copy_(x.std(0, unbiased=False) + 1e-6)
    optimizer = torch.optim.AdamW(critic.parameters(), 3e-3)
    rng = torch.Generator().manual_seed(seed)
    for update in range(updates if len(x) else 0):
        batch = torch.randint(len(x), (256,), generator=rng).to(x.device)
        weight = w[batch, None] * ~y[batch].isnan()     # (256, 3), 0 where there is no label
        loss = F.binary_cross_entropy_with_logits(critic(x[batch]), y[batch].nan_to_num(), weight,
                                                  reduction="sum") / w[batch].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - update / updates)
        optimizer.step()
    with torch.no_grad():
        said = torch.sigmoid(critic(inputs[held_out])).cpu().numpy()      # (held out, 3)
    report = {}
    for i, head in enumerate(HEADS):
        report[head] = measure(said[:, i], labels[held_out, i].cpu().numpy())
        if y[:, i].isnan().all():
            report[head].update(trusted=False, note="no label to learn from")
        critic.trusted[i] = report[head]["trusted"]
    return critic, report


def measure(said, truth) -> dict:
    """What a head says (M,) against the labels (M,), nan where there is none.
    auc          chance that a right node (label >= .5) scores above a wrong one
    brier        mean (said - truth)^2;  constant: that of the best constant, for comparison
    calibration  for each tenth of [0, 1]: (mean said, mean truth, number of nodes)
    trusted      is auc at least LEAST_AUC?  note: if not, why, in words
    Of heads that know nothing 40% pass with 5 right and 20 wrong nodes, 11% with 60 and 300."""
    said, truth = said[~np.isnan(truth)], truth[~np.isnan(truth)]
    area, n = auc(said, truth >= 0.5), len(truth)
    note = "" if (area or 0) >= LEAST_AUC else f"AUC below {LEAST_AUC}"
    if area is None:
        note = "all held-out labels are of one kind" if n else "no held-out label"
    tenth = np.minimum(said * 10, 9).astype(int)
    calibration = []
    for i in np.unique(tenth):
        here = tenth == i
        means = float(said[here].mean()), float(truth[here].mean())
        calibration.append((*means, int(here.sum())))
    return dict(auc=area, brier=float(np.mean((said - truth) ** 2)) if n else None,
                constant=float(np.var(truth)) if n else None, calibration=calibration,
                nodes=n, trusted=not note, note=note)


# HACK HERE: what a leaf of the search is worth. Also change: the numbers in tests/test_critic.py.
def leaf_values(nodes, critic, sampler, combine="weakest", rollouts=None, known=None) -> list:
    """One number in [0, 1] for each node. Heads that are not trusted are left out.
    weakest (ours): the lowest of what the heads say along the path: value of every open step,
        process of every step, outcome of the end. Among many samples one will fool a single head.
        (Best of 64 on homework: 72% by the outcome head, 89% by the weakest link.) Set no threshold
        on it: the value of a prefix is low wherever the policy seldom succeeds.
    mean, judge: the mean of what is said of the node alone (the paper: a sum with weights).
        heads say (value, process, outcome): a (.7, .9, -), its end b (-, .8, .95)
        weakest   a: min(.7, .9) = .7        b: min(.7, .9, .8, .95) = .7
        mean      a: (.7 + .9) / 2 = .8      b: (.8 + .95) / 2 = .875
    rollouts add one number for a node that is no end. With no number at all a node is worth .5.
    known: {node: (3,)}, what the heads said; the caller keeps it through a search."""
    known = {} if known is None else known
    weakest = combine == "weakest"
    paths = {node: node.path()[1:] if weakest and node.parent else [node] for node in nodes}
    new = dict.fromkeys(step for path in paths.values() for step in path if step not in known)
    if new:
        known.update(zip(new, critic.read(list(new), sampler)))
    rolled = rollouts.score([node for node in nodes if not node.ended]) if rollouts else {}
    trust_value, trust_process, trust_outcome = critic.trusted.bool().tolist()
    combined = min if weakest else np.mean
    worth = []
    for node in nodes:
        said = [rolled[node]] if node in rolled else []
        said += [known[step][0] for step in paths[node] if trust_value and not step.ended]
        said += [known[step][1] for step in paths[node] if trust_process and step.parent]
        said += [known[node][2]] if trust_outcome and node.ended else []
        worth.append(float(combined(said)) if said else 0.5)
    return worth


# --------------------------------------------------------------------------------------------------
# 4. Fast rollouts (AlphaLLM)
# --------------------------------------------------------------------------------------------------
class Rollouts:
    """A small model finishes a leaf n times. The mean of what its own outcome head says of these
    ends is one more opinion about the leaf.
    sampler, critic  of the small model
    encode           node -> its ids: the small model's tokenizer may be another one
    room             its store is emptied when it holds more tokens than this
    tokens           sampled by the small model so far
    twin[node] is the node's copy in a tree of the small model, so no prefix is encoded twice."""
    tokens = property(lambda self: self.sampler.counts["sampled"])

    def __init__(self, sampler, critic, n: int, max_tokens: int, encode, room: int = 65536):
        self.sampler, self.critic, self.encode = sampler, critic, encode
        self.n, self.max_tokens, self.room = n, max_tokens, room
        self.forget()

    def forget(self):
        """Empty the store: done before each file of trees, so that no file depends on others."""
        self.sampler.reset()
        self.twin = {}

    def copy(self, node):
        """The twin of a node, made with those above it if they are missing. None: no room."""
        limit = self.sampler.model.config.max_positions
        twin, above = None, NOTHING
        for step in node.path():                        # no recursion: a path may be long
            if step not in self.twin:
                ids = self.encode(step)
                if not 0 < len(above) + len(ids) < limit:
                    return None
                slots = self.sampler.follow(above, ids)[len(above):]
                if twin:
                    self.twin[step] = twin.tree.add(twin, ids, slots=slots)
                else:
                    self.twin[step] = Tree(None, step.tree.seed + 1, ids, slots).root
            twin = self.twin[step]
            above = twin.slots_from_root()
        return twin

    def score(self, nodes: list) -> dict:
        """{node: mean outcome of n rollouts}, if there is room; {} if the head is not trusted."""
        if not self.critic.trusted[2]:
            return {}
        sampler = self.sampler
        if sampler.used > self.room:
            self.forget()
        twins = {node: twin for node in nodes
                 if (twin := self.copy(node)) and len(twin.solution()) < self.max_tokens}
        sampler.encode([twin.slots_from_root() for twin in twins.values()])
        for step in {step for twin in twins.values() for step in twin.path()[1:]}:
            if len(step.logps) == 0:                    # it was copied, not sampled
                step.logps = sampler.log_probs(step.parent.slots_from_root(), step.slots)
        ends = grow(sampler, [(twin, self.n) for twin in twins.values()], self.max_tokens)
        said = self.critic.read(ends, sampler)[:, 2].reshape(-1, self.n)    # (leaves, n)
        return dict(zip(twins, said.mean(1).tolist()))


# --------------------------------------------------------------------------------------------------
# 5. Grading numbers and letters
# --------------------------------------------------------------------------------------------------
# How "So x = 10-3 = 7 apples" is graded: `grade` (chapter 6) calls `find_answer`, which asks
# `stated` for pieces of the text and `read_number` for their number, 7; `same_answer` compares.
# A false right is worse than a false wrong: a self-improving loop finds it and imitates it. So a
# number is read only if all tokens beside it are in KNOWN, or are longer words not in CHANGES:
#     #### **18** apples, as 3 > 2   18: `*` `apples` `,` are known; the reason is cut off
#     18 or 20   #### 18-20   1 000  unread: two numbers
#     18k   18 - x   18²   18!       unread: k, x, ^ and ! are not known
#     not 18   18 thousand           unread: these words change the value
# Left out: algebra, 5k, 1e3, number words, 2 1/2; behind a mark sums in words (3 boxes * 6 = 18).
DENIED = r"(?<!wrong )(?<!false )(?<!incorrect )(?<!\bone )(?<!other )(?<!in)"    # wrong answer
OPTION = r"(?:\bthe |best |(?<![^\n]))(?:option|choice)(?= is[ *_(]*(?-i:[A-Z])[*_).!]*(?:\n|$))"
PHRASE = (rf"(?i:{DENIED}(?:answer|correct (?:option|choice)|{OPTION}))[*_]*\s*"
          r"(?:(?i:(?:to th\w+ (?:question|problem) )?(?:is|(?:should|would) be))\b|:)"
          r"[*_:]*(?: +(?:therefore|thus|then|about|approximately|exactly)\b)?|<answer>\s*|"
          r"(?<![^\n])[#*_ ]*(?i:(?:final |correct )?answer)[*_ ]*(?=\n)")     # a heading
DIGITS = r"(?:[0-9]{1,3}(?:[,\u00a0\u2009\u202f][0-9]{3}){1,9}(?![0-9])|[0-9]{1,99})"   # 1,000
RATIO = r"[0-9]{1,99} ?/ ?[1-9][0-9]{0,98}(?!\.?[0-9])"                 # 1 / 2
SIGN = r"(?:(?<![\w)\]%.+-])(?<![0-9] )[-+] *)?"                # -3, by -3; none in 10-3, 10 - 3
NUMBER = rf"{SIGN}(?:{RATIO}|{DIGITS}(?:\.[0-9]{{1,99}})?|\.[0-9]{{1,99}})"     # -1,000.5  .5
TOKEN = re.compile(rf"{NUMBER}|\\[A-Za-z]+|or so\b|[-/]?[A-Za-z]+(?:'(?:s|d|ll|ve)\b|[0-9]+)?|\S")
KNOWN = set("""a I an as at be by do he in is it my of on so to up us we A An As At By He In Is It
               Mr Ms My Of On So To Up We /hr cm fl ft hr kg km lb mg mi mL ml mm oz pt qt sq yd yr
               GB MB Rs US
               . , : ; ? ' " ( ) [ ] * _ ` % = #""".split())
CHANGES = ("and|cannot|cubed|doubled?|dozens?|factorial|half|halve[ds]|hundreds?|maybe|minus|nor|"
           "not|negative|nearly|almost|never|over|plus|point|squared|than|thirds?|thousands?|"
           "twice|thrice|tripled?|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths|unclear|"
           "unknown|divided|multiplied|sqrt|root|log|sin|cos|tan|lakhs?|crores?|[a-z]+illions?")
WORD = re.compile(rf"(?i)[-/]?(?!(?:{CHANGES})\b)[a-z' ]{{3,}}")   # 3 letters or more
# 18, not 20; but in "18 is not right" nothing is cut off
REASON = re.compile(r"(?<!well )(?<!is )\b(?:because|since|as|not|given)\b(?! well)")
WORKING = re.compile(r"(?: *[A-Za-z]\w* *=)?"                           # x = 9 + 9 = 18
                     r"(?:(?:[-+*/().%\s0-9]|,[0-9]{3}|x(?= ?[0-9])|\\times|\\cdot)*=)?")
RESULT = re.compile(r"(?<![<>!])=|\bis +(?=[-+0-9])|[0-9] ?- ?(?=[0-9])")   # 9 * 2 is 18, 3-18
THAN = re.compile(r"\b(?:more|[a-z]+er)\b(?: [a-z]+)* than \D*$")     # = 3 hours more than James
MINUS = "\u2212\u2013\u2014\uff0d\ufe63\u2010\u2011"
SYMBOLS = str.maketrans(MINUS + "×·÷：≈’&", "-------**/:=',", "°")
SYMBOLS |= str.maketrans({"²": "^2 ", "½": r"\frac12 ", "√": r"\sqrt ", "π": r"\pi "})
BOX = "[^{}]*"
for _ in range(7):                      # braces within braces, seven deep
    BOX = rf"(?:[^{{}}]|\{{{BOX}\}})*"
HEADING = re.compile(r"[^\w\\]*(?:[A-Za-z]{2,}[\s:]|[AaI] ).*[0-9]")     # Step 1: count
NUMBERED = re.compile(r"\W*[0-9]+[.)] +\W*[A-Za-z]")                     # 1. Count


def tidy(text: str) -> str:
    r"""One spelling of signs, without $ and \text: ` - 18  cm ` of `\(−\$18\text{ cm}\)`."""
    text = text.translate(SYMBOLS)
    text = re.sub(r"\\(?:text|math|mbox|operatorname)[a-z]* *\{([^{}]*)\}", r" \1", text)
    return re.sub(r"(?<!\\)\\[()\[\]]|\\?[$€£¥₹]", " ", text)


def last_box(text: str) -> str:
    r"""What the last balanced \boxed{...} (or \fbox) holds: `\frac12` of `\boxed{\frac12} \boxed{`,
    2 of `\boxed 2` (it stands in MATH), the list `3, 7` of `\boxed{3} and \boxed{7}`, or ""."""
    box = rf"\\{'boxed' if 'boxed' in text else 'fbox'}(?:\s*\{{{BOX}\}}| +-?\w+)"
    lists = re.findall(rf"{box}(?:[\s$*]*(?:,|;|,? *(?:and|or)\b)[\s$*]*{box})*", text)
    boxes = re.findall(box, "".join(lists[-1:]))
    return ", ".join(dict.fromkeys(re.sub(r"^\\f?box(?:ed)?\s*\{?|\}?$", "", one) for one in boxes))


@lru_cache(4096)                        # a reference is read again for every sample
def stated(text: str) -> tuple:
    """(mark, piece) where a text may state its answer: the surest mark first, its last piece first.
    Then the whole text, as "bare", unless it holds a box or its last line holds a mark."""
    text = re.split("</think(?:ing)?>", text)[-1].partition("<think")[0]        # no thoughts
    text = re.split(r"\n(?:Question:|Q:.*\?)", text)[0]                 # a base model invents more
    text = tidy(re.sub("<<[^<>]*>>", "", text))                         # 9*2=<<9*2=18>>18
    text = re.sub(r"</\w{1,20}>|<\|\w{1,20}\|>", "\n", text).strip()            # a tag ends a line
    text = text.replace(". I hope it is correct", "")                   # how Minerva's prompt ends
    box, found = last_box(text).replace("\n", " "), []
    pieces = {"####": text.split("####")[1:], "boxed": [box], "phrase": re.split(PHRASE, text)[1:]}
    for mark, candidates in pieces.items():
        for piece in reversed(candidates):
            line, _, below = piece.partition("\n")
            lines = [one for one in below.split("\n") if re.search(r"\w", one)]
            if mark == "phrase" and not re.search(r"\w", line) and len(lines) == 1:
                line, below = lines[0], ""                              # "The answer is:\nB"
            heading = HEADING.match(line) or mark == "####" and NUMBERED.match(line)
            if not (below and heading):
                found.append((mark, line))
    if not box and not re.search(f"####|{PHRASE}", text.split("\n")[-1]):
        found.append(("bare", text))
    return tuple(found)                 # of a cache: not to be changed


def strange(text: str) -> list:
    """The tokens that are not known: 18 and k of "only 18 k, or so"; 18 and ! of "18 is wrong"."""
    text = re.sub(r"\band (?=[A-Z][a-z]|every\b)", "", text)             # 18 in April and May
    text = re.sub(r"(?i)(^|\bis)\W*(the )?(wrong|incorrect|false|above|below|under)\b", "!", text)
    tokens = TOKEN.findall(text)
    return [token for token in tokens if token not in KNOWN and not WORD.fullmatch(token)]


def read_number(piece: str, mark: str):
    """The number that a piece states when a working before it and a reason behind it are cut off: 7
    of `7 apples`, `x = 10-3 = 7`, `7, not 8`. Else the piece as it is, which equals no number.
    Without a mark ("bare") it is the one result of the last line with a digit: 20 of 18-20."""
    with_digits = [line for line in piece.split("\n") if re.search("[0-9]", line)]
    last = with_digits[-1] if with_digits else ""
    formula = canonical(last) if re.search(r"[\\{^]", last) else ""
    if number(formula) is not None:                     # \frac12  2\frac{1}{2}  5 cm^2
        return formula
    answer = WORKING.sub("", last, count=1)
    line = RESULT.split(last)[-1] if mark == "bare" else REASON.split(answer)[0]
    worded = mark == "bare" and line != last and re.search("[a-z]{2}", line)    # = 18, so he has 18
    unknown = list(set(strange(THAN.sub("", line)))) if worded else strange(line)
    if len(unknown) == 1 and re.fullmatch(NUMBER, unknown[0]):
        return re.sub(r"[+,\s]", "", unknown[0])
    return piece.strip() if last and mark != "bare" else None


def number(spelling: str) -> Fraction | None:
    """The exact value of a number that stands alone ($18.00, 1,000, 50%, 1/2), or None."""
    alone = tidy(spelling).strip("* ").rstrip("%. ")
    return Fraction(re.sub(r"[,\s]", "", alone)) if re.fullmatch(NUMBER, alone) else None


LETTER = re.compile(r"(?i)(?!.*\n)[^\w\\]*(?:(?:option|choice)\W+)?([a-z])(?![\w'])")
CLOSED = (r"\w[*_`\"'\])}]*(?:[).:](?!\w)| is (?:correct|right)\b"          # (B) iron   B.
          r"|[\s.,;:!?)\]}'\"*_`-]*$)")
APART = (r"|\w[*_]*(?:[,;]| -)(?!\w)|\w \("                             # B, iron   B - iron
         r"|[B-HJ-Z] (?!plus|minus)[a-z]{4,}\.?$")                      # B iron; but not A car


def read_letter(piece: str, mark: str, options=None):
    """The letter of an option: B, (B), "B. iron", "(b) since"; a text of several lines has none.
    options: {letter: its text} as shown, if known. Then the text after the letter must not be that
    of another option. In `B, iron` and `B iron` it must be the text of option B."""
    piece = piece.split("\n\n")[0]                      # "B", then an explanation
    match = LETTER.match(piece)
    if not match:
        return None
    letter = match[1].upper()
    behind = piece[match.end():]
    stop = r"[.!?][\"')*_]* +(?!(?:No|Wait|Actually|But|Hmm|Sorry)\b)(?=[A-Z] ?[a-z])"
    sentence = re.split(stop, REASON.split(behind)[0])[0]               # up to C of "B. No, C"
    words = lambda text: re.findall(r"\w+", text.casefold())
    for name, text in (options or {}).items():
        if words(text) and words(text) in (words(behind), words(sentence)):
            return letter if name == letter else None
    clear = re.match(CLOSED if options else CLOSED + APART, match[1] + sentence)
    doubt = r"\b(OR|AND|NOR|[A-Z])\b|^\W*IS (THE )?(WRONG|INCORRECT|FALSE|NOT)\b"
    doubt = re.search(doubt, re.sub(r"\b(a|an|I)(?= [a-z]{3})", "", sentence).upper())
    return letter if clear and not doubt else None                      # B or C   (B) is wrong


def read_words(piece: str, mark: str):
    """What is neither letter, formula nor number: `Light  BLUE.` gives `light blue`."""
    return " ".join(piece.split("\n")[0].strip(" #*_.()[]$\"'").casefold().split())


# --------------------------------------------------------------------------------------------------
# 6. Grading formulas; the verdict
# --------------------------------------------------------------------------------------------------
# LaTeX (MATH): equal are formulas with one canonical spelling. No algebra: 1 + x is not x + 1. One
# name before = does not count: y = 2 is 2, and also x = 2.
BARE = r"([0-9A-Za-z]|\\(?!frac|sqrt|binom)[a-z]+)"     # an argument without braces: 2  \pi
WHOLE = {                                               # for a whole answer, in this order
    r"(?<=[0-9])(?:\{,\}|, *\\!|\\[,!]|,(?=...,\\!)) *(?=[0-9]{3}(?![0-9]))": "",    # 1,\!000
    r"\\(?:left|right|[Bb]igg?[lr]?|displaystyle|q?quad|fbox|boxed)(?![a-z])": "",
    r"\\[dtc](frac|binom)": r"\\\1",
    r"\\\\ *(?=\\end)": "", r"\\\\": ",|,", r"\\end\{(?!v)\w+\} *[)\]]?": ")",     # no vmatrix
    r"[(\[]? *\\begin\{(?!v)\w+\}(?:\{[clr|]*\})?": "(",            # a matrix: (1, 2, |, 3, 4)
    r"\\(le|ge|ne)q(?:slant)?(?![a-z])": r"\\\1",
    r"\^ *\{? *\\circ *\}?|\\?%|\\!": "", r"\\[,:; ]|~|\s+": " ",       # 90^\circ
    r"\\(?:times|cdot|ast)(?![a-z])": "*", r"\\l?dots|\.\.\.": "…",
    r"\\in(?![a-z])": "=", r",? +(?:and|or) +": ", ", r"[ .]+$": ""}    # x \in [0, 1]
PART = {                                                # for a part that is no list, in this order
    r"([_^]) *([0-9A-Za-z])": r"\1{\2}",                                # x^10 is x^{1}0
    rf"\\(sqrt *(?:\[\w*\])?|frac|binom) *{BARE}": r"\\\1{\2}",         # \sqrt2  \frac12
    rf"(\\(?:frac|binom)\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}) *{BARE}": r"\1{\2}",
    r"(?<=[0-9]) +(?=[0-9])": "~", " +": "", r"^[*_:;,`\"+]+|[*_:;,`\".]+$": "",    # 1 2 is not 12
    r"^(?:\{([^{}]*)\}|\(([^(),]*)\))$": r"\1\2",                      # {72}  (72)  (A)
    r"^(-?)(?:\(([^()]*)\)|((?:[^-+,()\[\]/={}]|\{[^{}]*\})+))/"        # (x+1)/2  \pi/4
    r"([0-9.]+|[A-Za-z]|\\[a-z]+|\\sqrt\{[^{}]*\})$": r"\1\\frac{\2\3}{\4}",
    r"^(-?)\\frac\{(-?[0-9.]+)\}\{([0-9.]+)\}$": r"\1\2/\3"}            # -1/2
UNIT = re.compile(r"(?:(?<=[0-9})])|(?<=\\pi)) +([A-Za-z]+(?:[ .]+[A-Za-z]+)*)"
                  r"(?: *\^ *\{?[0-9]\}?)?[. ]*$")                      # 5 cm^2
NAME = re.compile(r"(?:^|(?<=,)) *((?!\\not)\\?[A-Za-z]+(?:_\w|\([a-z]\))?|\([a-z, ]+\)) *=")


def canonical(tex: str) -> str:
    r"""One spelling for all formulas that count as equal: `2\frac12`, `2.5`, `x = 5/2 cm` are 5/2;
    (1, 2] keeps order and brackets; lists and sets are sorted. Empty only if `tex` is blank."""
    short = tidy(tex) if len(tex) <= 1000 else ""
    for pattern, new in WHOLE.items():
        short = re.sub(pattern, new, short)
    names = NAME.findall(short)
    if len({*names}) == 1 and len(names) == short.count("="):
        short = NAME.sub("", short)                     # x = 1, x = 2; but x = 1, y = 2 stays
    return spell(short) or "".join(tex.split())


def spell(tex: str) -> str:
    """`canonical` of a tidied formula: a list, set or bracket part by part, else one value."""
    variable = lambda word: strange(word) or re.fullmatch("[aAI]|abc|xyz", word)     # 6 a^2
    tex = UNIT.sub(lambda unit: unit[0] if variable(unit[1]) else "", tex.strip())
    if number(tex) is None:
        tex = re.sub(r"(?<=[0-9]),(?=0..(?![0-9]))", "", tex)       # 10,000/7 is one part
    parts = split(tex) if number(tex) is None else []   # 1,000 is no list
    if len(parts) > 1:
        return ", ".join(sorted(map(spell, parts)))
    bracket = re.fullmatch(r"(\\?[(\[{])(.*,.*?)(\\?[)\]}])", tex)
    if bracket:
        order = sorted if "{" in bracket[1] else list
        return bracket[1] + ", ".join(order(map(spell, split(bracket[2])))) + bracket[3]
    for pattern, new in PART.items():
        tex = re.sub(pattern, new, tex)
    mixed = re.fullmatch(r"(-?)([0-9]+)\\frac\{([0-9]+)\}\{([0-9]+)\}", tex)
    if mixed and int(mixed[3]) < int(mixed[4]):         # -2\frac{1}{2} is -5/2
        whole, part = int(mixed[2]), Fraction(int(mixed[3]), int(mixed[4]))
        tex = mixed[1] + str(whole + part)
    if number(tex) is not None:
        return str(number(tex))
    return tex.casefold() if re.match("[A-Za-z]{3}", tex) else tex      # Even is even, X is not x


def split(tex: str) -> list:
    """The parts between commas outside of all brackets: `(1,2],3` gives `(1,2]` and `3`."""
    depths = np.cumsum([(char in "([{") - (char in ")]}") for char in tex])
    cut = [char if depth or char != "," else "\n" for char, depth in zip(tex, depths)]
    return "".join(cut).split("\n")


def read_formula(piece: str, mark: str):
    """The canonical spelling of what a piece states; of prose, its number."""
    if mark != "boxed":
        prose = re.search(r"\n|(?<![\\A-Za-z])[A-Za-z]{2,} ", piece)
        piece = read_number(piece, mark) or ("" if prose else piece)
    return canonical(piece)


def find_answer(text: str, read=read_number) -> tuple:
    """(answer, mark) that a text states; mark: "####", "boxed", "phrase", or unmarked "bare"."""
    for mark, piece in stated(text):
        answer = read(piece, mark)
        if answer:
            return answer, mark
    return None, None


def extract_answer(text: str) -> str | None:
    """For programs that use this file: the number that a text states, as written ("18" of `so 9+9 =
    18`), what stands behind a mark if that has digits but is no number, or None."""
    return find_answer(text)[0]


def same_answer(a, b) -> bool:
    """Are two answers one? By value: 18 = 18.0 = $18.00; else as spelled. None equals nothing."""
    if a is None or b is None:
        return False
    return a == b or (number(a) is not None and number(a) == number(b))


# HACK HERE: what a right answer is. Also change: tests/test_grade.py. The reference decides how to
# compare: `#### B` a letter, `\boxed{x}` or LaTeX a formula, `#### 18` a number, else words. Its
# surest mark counts: a reference that ends in `#### 12` has a number, whatever "(b)" says above it.
def grade(text: str, reference: str, cut: bool = False, question: str = "") -> bool:
    """Does the text state the reference's answer? cut: it ran into the length limit, so its last
    number is any number on the way, and only a marked answer counts (####, box, phrase).
    question: if it shows options as lines "(B) iron", `B iron` is read with them (read_letter)."""
    latex = "\\" in reference and "####" not in reference
    letter = partial(read_letter, options=dict(re.findall(r"\n\(([A-Z])\) (.+)", question)))
    readers = [read_formula] if latex else [letter, read_number, read_words]
    wanted = {read: find_answer(reference, read) for read in readers}
    sureness = ("####", "boxed", "phrase", "bare", None).index
    read = min(readers, key=lambda read: sureness(wanted[read][1]))     # ties: the first
    answer, mark = find_answer(text, read)
    return same_answer(answer, wanted[read][0]) and not (cut and mark == "bare")


# --------------------------------------------------------------------------------------------------
# 7. Statistics, demo
# --------------------------------------------------------------------------------------------------
def auc(scores, labels) -> float | None:
    """Chance that a right one scores above a wrong one, ties half: .9 .4 .4 .1, 1 1 0 0 -> .875."""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    right, wrong = scores[labels], np.sort(scores[~labels])
    if len(right) == 0 or len(wrong) == 0:
        return None
    below, up_to = (np.searchsorted(wrong, right, side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * len(wrong)))


def wilson(right: int, n: int) -> tuple:
    """Wilson's 95% interval of a rate: 8 of 10 give .490 to .943."""
    z2 = 1.959964 ** 2
    half = math.sqrt(z2 * (right * (n - right) / n + z2 / 4))
    low, high = ((right + z2 / 2 + side) / (n + z2) for side in (-half, half))
    return min(right / n, max(0.0, low)), max(right / n, min(1.0, high))        # despite rounding


def mcnemar(ours: list, theirs: list) -> float:
    """Exact two-sided p on the same questions of one seed; 1 against 9 that only one got: .021."""
    won = [bool(a) for a, b in zip(ours, theirs) if bool(a) != bool(b)]
    n = len(won)
    fewer = min(sum(won), n - sum(won))
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2 ** n)


def t_interval(differences) -> tuple:
    """(mean, low, high): Student's 95% interval of a mean difference, one number a seed. 1, 2, 3:
    2 +- 4.303 / sqrt(3), so (2, -.48, 4.48). One seed: -inf to inf; none: ValueError."""
    t_95 = ("12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 "
            "2.131 2.120 2.110 2.101 2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 "
            "2.045 2.042").split()                      # Student's t, 1 to 30 degrees of freedom
    mean = statistics.fmean(differences)
    half = math.inf
    n = len(differences)
    if n > 1:
        half = float(t_95[min(n, 31) - 2]) * statistics.stdev(differences) / math.sqrt(n)
    return mean, mean - half, mean + half


def demo() -> None:
    """8-2*3+1: line 1 is good, line 2 is the mistake; completions of line 1 show the right way."""
    after = {"2*3=6 : 8-6+1": "8-6=2 : 2+1", "8-6=2 : 2+1": "2+1=3 : 3", "2+1=3 : 3": "#### 3",
             "6+1=7 : 8-7": "8-7=1 : 1", "8-7=1 : 1": "#### 1"}
    tree = Tree("", 0, list(b"8-2*3+1"))
    text = lambda node: bytes(node.ids.tolist()).decode()
    write = lambda node, line: tree.add(node, list(line.encode()), ended="eos" * (line[0] == "#"))

    def complete(wants) -> None:
        """k completions below each node, graded."""
        for node in [node for node, k in wants for _ in range(k)]:
            while not node.ended:
                node = write(node, after[text(node)])
            record_grade(node, grade(text(node), "3"))
    complete([(write(write(tree.root, "2*3=6 : 8-6+1"), "6+1=7 : 8-7"), 1)])
    label_pits(tree.ends(), complete, k=4)
    print(draw(tree, text, pits=[pit(tree.ends()[0])]))


if __name__ == "__main__":
    demo()
