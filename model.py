"""The language model: open weights in, tokens out, and no token encoded twice.

The textbook idea. A GPT reads tokens and predicts the next; a sampler draws from the prediction, appends,
repeats. All above this file (trees, critics, training) only ever ask for hidden states of tokens, log-probs
of tokens, and continuations of many prefixes at once.

What is different here
  1. One class is GPT-2, Llama 2/3, Mistral, Qwen2/2.5, Qwen3, SmolLM2 and DeepSeekMath, by their config.json;
     what it does not know it refuses by name. Tensors are saved under the name and dtype they came with.
  2. safetensors are read and written here, every length checked. Pickled weights are refused.
  3. The sampler keeps keys and values of every token under an address; branches of a tree share their prefix.
  4. Random numbers belong to the row (run, question, node, sample), not to the batch.
  Left out: dropout, tensor parallelism, beam search. Nothing here needs them.

Chapters: 1 Files   2 Tokenizer   3 Config   4 GPT   5 Sampler   6 Program
Try:  python model.py                                                      (what sharing saves; 2 seconds)
      python model.py --model FOLDER --prompt "..." --temperature 0.7      (any supported HF-format folder)
"""
import argparse
import functools
import heapq
import json
import math
import os
import re
import sys
import time
import unicodedata
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, groupby
from pathlib import Path

# OpenMP threads that spin while they wait are 10-50x slower beside other processes; torch reads this once
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np  # noqa: E402
import tiktoken  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402


class BadInput(ValueError):
    """One sentence for the user: what is wrong, where, how to mend it. Programs print it and exit with 2."""


# ----------------------------------------------------------------------------------------------------------
# 1 · Files: JSON and safetensors. What comes from the net is hostile: it gives a checked result or BadInput
# ----------------------------------------------------------------------------------------------------------
DTYPES = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64, BOOL=torch.bool)
LFS, IS_LFS = b"version https://git-lfs", "is a git-LFS pointer, not the file: fetch it with `git lfs pull`"
PICKLED = ("pickled weights, and a pickle can run code (weights_only=True has had holes: CVE-2025-32434, "
           "CVE-2026-24747): convert them first, with save_pretrained(..., safe_serialization=True)")


@contextmanager
def about(path):
    """Inside, what is wrong with a file (absent, disk full, failed `need`) becomes BadInput with its name."""
    try:
        yield
    except (OSError, ValueError, OverflowError, RecursionError, re.error) as error:     # all damage raises
        raise BadInput(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def need(condition, message: str) -> None:
    """ValueError unless the condition holds. (Not assert: `python -O` would leave the checks out.)"""
    if not condition:
        raise ValueError(message)


def field(obj, key: str, kind, default=None):
    """obj[key], sure to be of type `kind`. Absent or null gives `default`, ValueError where that is None."""
    value = obj.get(key) if isinstance(obj, dict) else None
    value = default if value is None else value
    # `is`: to isinstance a bool is an int, and true would pass for an id or a size
    need(type(value) is kind, f"key {key!r} must be of type {kind.__name__}, not {value!r:.60}")
    return value


def one_of(name: str, value, known):
    """The value, sure to be one of those that we know."""
    need(value in [*known], f"{name} {value!r:.60} is not supported, only {', '.join(known)}")
    return value


def read_json(path, raw: bytes | None = None) -> dict:
    """The object in a JSON file, or in `raw` (then the path is but a name). BadInput: absent, a git-LFS
    pointer, no UTF-8 JSON, no object, a key twice (readers differ in which counts: checked is not used)."""
    def unique(pairs):
        """dict, that refuses a key it has."""
        need(len(found := dict(pairs)) == len(pairs), "a key appears twice in one JSON object")
        return found
    with about(path):
        raw = Path(path).read_bytes() if raw is None else raw
        need(not raw.startswith(LFS), IS_LFS)
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
        need(isinstance(found, dict), f"holds a JSON {type(found).__name__} in place of an object {{...}}")
    return found


def safetensors_header(path, metadata=None) -> dict[str, tuple]:
    """{name: (dtype, shape, begin, end)} in order of the data, all checked, nothing allocated. dtype is a key
    of DTYPES; begin and end count bytes from the start. A dict given as `metadata` gets the file's. The file:
        8 bytes: N, little-endian | N bytes of JSON, offsets from its own end | the tensors, without gaps"""
    with about(path), open(path, "rb") as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(len(LFS))
        n = int.from_bytes(start[:8], "little")
        need(size >= 8 and n <= 100_000_000 and 8 + n <= size, IS_LFS if start == LFS else
             "holds " + PICKLED if start.startswith((b"PK\3\4", b"\x80")) else     # zip or bare pickle
             f"is no safetensors file, or was cut short ({size} bytes, a header of {n})")
        file.seek(8)                                    # the test above read on, for the LFS mark
        raw, header, at = read_json("header", file.read(n)), {}, 8 + n
        texts = field(raw, "__metadata__", dict, {})
        need(all(isinstance(text, str) for text in texts.values()), "__metadata__ must hold strings only")
        (metadata if metadata is not None else {}).update(texts)
        for name in raw.keys() - {"__metadata__"}:
            with about(f"tensor {name!r:.120}"):
                dtype = one_of("dtype", field(raw[name], "dtype", str), DTYPES)
                shape, span = field(raw[name], "shape", list), field(raw[name], "data_offsets", list)
                need(len(raw[name]) == 3 and len(span) == 2 and len(shape) <= 8 and all(
                    type(i) is int and 0 <= i < 2 ** 48 for i in shape + span), "odd shape or data_offsets")
                # note: (0, 2**40, 2**40) is empty, but its strides overflow: so a zero counts as a one here
                need(math.prod(max(i, 1) for i in shape) < 2 ** 48
                     and span[1] - span[0] == math.prod(shape) * DTYPES[dtype].itemsize,
                     f"data_offsets {span} do not fit shape {shape} of {dtype}")
                header[name] = (dtype, tuple(shape), 8 + n + span[0], 8 + n + span[1])
        header = dict(sorted(header.items(), key=lambda item: (*item[1][2:], item[0])))
        for name, (_, _, begin, end) in header.items():
            need(begin == at, f"tensor {name!r:.120} begins at byte {begin}, not {at}: a gap or an overlap")
            at = end
        need(at == size, f"is {size} bytes long, its header says {at}: cut short or damaged")
    return header


def read_safetensors(path, keep=None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """({name: CPU tensor}, metadata); what keep(name) denies is not read. Each tensor gets memory of its own.
    (No memory map: a file that is cut short while mapped kills the process instead of raising.)"""
    tensors, metadata = {}, {}
    header = safetensors_header(path, metadata)
    with about(path), open(path, "rb") as file:
        for name, (dtype, shape, begin, end) in header.items():
            if keep is None or keep(name):
                raw = torch.empty(end - begin, dtype=torch.uint8)
                file.seek(begin)
                need(file.readinto(raw.numpy()) == end - begin, f"ended while {name!r:.120} was read")
                # footgun: a bool byte that is neither 0 nor 1 is undefined behaviour, hence != 0 and no view
                tensors[name] = (raw != 0 if dtype == "BOOL" else raw.view(DTYPES[dtype])).reshape(shape)
    return tensors, metadata


def write_atomically(path, chunks) -> None:
    """Write byte chunks to `path`: whoever looks, or kills us, sees the old file or the whole new one."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")       # in the same folder: a rename across disks would copy
    with about(f"{path}: cannot be written"):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())                 # or the rename may reach the disk before the bytes do
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)           # it is there only if something failed


def write_text(path, text: str) -> None:
    """Write a text file (UTF-8) atomically."""
    write_atomically(path, [text.encode()])


def write_safetensors(path, tensors: dict, metadata=None) -> None:
    """Write {name: tensor} atomically, one by one (never a second copy of the model). Widest type first, then
    by name: the same tensors give the same bytes, each begins at a multiple of its width."""
    kinds, at = {dtype: name for name, dtype in DTYPES.items()}, 0
    header = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}       # sorted: same bytes
    order = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, tensor in order:
        with about(path):
            need(tensor.dtype in kinds, f"cannot store {name!r:.120} as {tensor.dtype}, only as {[*DTYPES]}")
        begin, at = at, at + tensor.numel() * tensor.dtype.itemsize
        header[name] = dict(dtype=kinds[tensor.dtype], shape=[*tensor.shape], data_offsets=[begin, at])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                     # the data begins at a multiple of 8
    write_atomically(path, chain([len(text).to_bytes(8, "little"), text], (
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for _, tensor in order)))


def weight_files(folder) -> dict[str, Path]:
    """{tensor name: the safetensors file that holds it} of a model folder: one file, or shards with an index.
    BadInput: no folder, no weights, only pickles, a missing shard, index and shards that disagree."""
    single, index = Path(folder, "model.safetensors"), Path(folder, "model.safetensors.index.json")
    with about(folder):
        endings = {path.suffix for path in Path(folder).iterdir()}
        if single.exists():                             # it wins over shards, as in transformers
            return dict.fromkeys(safetensors_header(single), single)
        need(index.exists(), f"has only {PICKLED}" if endings & {".bin", ".pt", ".pth", ".ckpt"} else
             f"has no weights: neither {single.name} nor {index.name}")
    with about(index):
        places = field(read_json(index), "weight_map", dict)
        for name, file in places.items():               # a path in here could point anywhere on the disk
            need(isinstance(file, str) and file.isprintable() and re.fullmatch(r"(?!.*\.\.)[^/\\]+", file),
                 f"places {name!r:.120} in {file!r:.120}: only plain file names are allowed")
        held = [(n, file) for file in {*places.values()} for n in safetensors_header(Path(folder, file))]
        wrong = sorted({*held} ^ {*places.items()})     # in two files, in none, or not listed
        need(held and not wrong, f"{wrong[:1]} is listed here or held there, but not both")
    return {name: Path(folder, file) for name, file in held}


# ----------------------------------------------------------------------------------------------------------
# 2 · Tokenizer: BPE over bytes or characters out of a tokenizer.json, id for id as Hugging Face has it
# ----------------------------------------------------------------------------------------------------------
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]           # bytes that are spelled as themselves
LETTERS = dict(zip(map(chr, PLAIN + [*range(256, 324)]), PLAIN + sorted({*range(256)} - {*PLAIN})))   # Ġ: 32
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
          r"\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
# digits cut off first, then GPT2, as one: spaces before a digit end a piece, so the digit gets none of them
DIGITS = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"\s+(", r"\s+(?=\p{N})|\s+(", 1)
FAST = {(): r"[\s\S]+", (GPT2,): GPT2, (LLAMA3,): LLAMA3, (QWEN2,): QWEN2, (r"\p{N}", GPT2): DIGITS}
LONG = 100_000      # characters; subtle: tiktoken's regex panics at a million spaces in a row (its stack)
BPE = partial(tiktoken.Encoding, "bpe", special_tokens={})
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")                 # how SentencePiece spells a byte
SPACES = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c <= "\x1f")   # as Rust has it


@lru_cache(maxsize=64)
def char_class(chars: str) -> str:
    r"""Python's re knows no \p{L}: a class as tiktoken reads it -> its ranges. tiktoken is asked which of all
    characters match: no other Unicode version plays a part. (Planes 4 to 13 are empty: one code for all.)"""
    probe = BPE(pat_str=f"(?:{chars})+", mergeable_ranks={bytes([b]): b for b in range(256)})
    every = [*range(0xD800), *range(0xE000, 0x40001), *range(0xE0000, 0x110000)]
    found = probe.decode(probe.encode_ordinary("".join(map(chr, every)))).encode("utf-32-le")
    codes = np.frombuffer(found, "<u4").astype(int)
    runs = np.split(codes, np.flatnonzero(np.diff(codes) != 1) + 1) if len(codes) else []
    ends = [0xDFFFF if run[-1] == 0x40000 else run[-1] for run in runs]
    ranges = "".join(f"\\U{run[0]:08x}-\\U{end:08x}" for run, end in zip(runs, ends))
    return f"[{ranges}]" if ranges else "(?!)"


@lru_cache(maxsize=64)
def splitter(pattern: str) -> re.Pattern:
    """A regular expression of a tokenizer.json, for Python's re to split with: text, match, text ... text.
    ValueError: it has a part that dialects read differently."""
    strange = re.search(r"\\[^\WpPsSdDrntf]|\d\}[?+]|\{,|\(\?(?!i?:|>|<?[=!])|^$", pattern)
    need(not strange, f"its part {strange and strange[0]!r} is not supported")
    parts = r"(\\[pP](?:\{\w+\}|\w)|\\[sSdD]|\[(?:[^][\\]|\\.|\[(?:[^][\\]|\\.)*\])+\])|\\.|\((?!\?)"
    found = re.sub(parts, lambda m: char_class(m[1]) if m[1] else "(?:" if m[0] == "(" else m[0], pattern)
    return re.compile(f"({found})", re.MULTILINE)       # to the files' makers ^ and $ are the edges of a line


def live_tokens(order: dict) -> dict:
    """{(left, right): index of merge} -> {token: (index, left, right)}: those that merging makes of their own
    bytes. No merge ever makes another one, for its bytes would have gone the same way in any text.

    A merge (l, r) comes about iff nothing joined across its border before. Undo the later half, and so on:
        he|llo: any earlier merge (he, llo)? llo came last: (he, l) before it? he next: (e, l) before it?"""
    made = {letter: (-1, "", "") for letter in LETTERS}
    for (left, right), index in order.items():
        l, r, limit = left, right, index
        while l in made and r in made and order.get((l, r), limit) >= limit:
            if made[l][0] > made[r][0]:
                limit, _, l = made[l]
            elif made[r][0] >= 0:                       # of two equal halves the left one is made first
                limit, r = made[r][0] + 1, made[r][1]
            else:                                       # down to two bytes
                made.setdefault(left + right, (index, left, right))
                break
    return made


def steps(part, members: str, known: str) -> list[dict]:
    """A component of tokenizer.json as a list: a Sequence's members, none for null; types must be known."""
    kind = "null" if part is None else field(part, "type", str)
    if kind == "Sequence":
        return [step for inner in field(part, members, list) for step in steps(inner, members, known)]
    one_of(f"{members}: type", kind, known.split())
    return [] if part is None else [part]


def merge_pairs(model: dict) -> list[tuple]:
    """The merges, first ones first: "a b", or ["a", "b"] in newer files, both being ("a", "b")."""
    pairs = []
    for merge in field(model, "merges", list):
        pair = merge.split(" ") if isinstance(merge, str) else field({"merges": merge}, "merges", list)
        pairs.append(tuple(map(str, pair)))
        need(len(pair) == 2 and {*pairs[-1], "".join(pairs[-1])} <= model["vocab"].keys(),
             "a merge is not of two tokens")
    return pairs


def well_formed(text: str) -> str:
    """Halves of surrogate pairs become U+FFFD: they are no characters, and have no bytes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Tokenizer:
    """Text <-> token ids. What we would read otherwise than a tokenizer.json's makers is refused by name.
    This class is the byte-level kind; of a file of the other kind it makes a `SentencePiece`.

    n_ids, base_ids  largest id + 1, with and without added tokens; a model may have more rows: never sample
    holes            ids below n_ids that stand for nothing
    newline_ids      ids whose bytes hold a newline: they end a step
    eos_ids, begin   ids that end a text, where the folder says so; ids the post-processor puts before one"""
    FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")   # the last two: if there

    def __init__(self, files: dict[str, bytes], folder="tokenizer"):
        self.files, self.added, self.cuts, self.begin, self.eos_ids = files, {}, [], [], set()
        spec, *others = [read_json(Path(folder, name), files.get(name, b"{}")) for name in self.FILES]
        with about(Path(folder, self.FILES[0])):
            model, cutting = field(spec, "model", dict), [spec.get("normalizer"), spec.get("pre_tokenizer")]
            one_of("model.type", model.get("type", "BPE"), ["BPE"])
            if model.get("byte_fallback") or re.search(r"Metaspace|\\u2581", json.dumps(cutting)):
                self.__class__ = SentencePiece          # from here on the same fields are read its way
            for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):      # other merges
                need(not model.get(key), f"model.{key} {model.get(key)!r:.60} is not supported")
            self._read_cuts(spec)
            self._read_ids(field(spec, "added_tokens", list, []), field(model, "vocab", dict))
            self._read_merges(model)
            for step in steps(spec.get("post_processor"), "processors", "null ByteLevel TemplateProcessing"):
                for item in field(step, "single", list, []):
                    if field(item, "Sequence", dict, {}):
                        break                           # the text itself: the rest comes after it
                    name = field(field(item, "SpecialToken", dict), "id", str)
                    self.begin += field(field(field(step, "special_tokens", dict), name, dict), "ids", list)
            need(all(type(id) is int and id in self.bytes for id in self.begin), "post_processor: unknown id")
        for other in others[::-1]:                      # the config, read last, has the last word
            eos = other.get("eos_token")
            eos = eos.get("content") if isinstance(eos, dict) else eos
            self.eos_ids = {self.ids[eos]} if isinstance(eos, str) and eos in self.ids else self.eos_ids

    def _read_cuts(self, spec: dict) -> None:
        """self.cuts: regular expressions that cut text into pieces before merges; None: a space to each."""
        forms = steps(spec.get("normalizer"), "normalizers", "null NFC NFD NFKC NFKD")
        self.forms = [form["type"] for form in forms]
        self.strange = ["lstrip", "rstrip"] + ["normalized"] * bool(forms)      # in added tokens
        need(len(steps(spec.get("decoder"), "decoders", "ByteLevel")) == 1, "decoder must be one ByteLevel")
        parts = steps(spec.get("pre_tokenizer"), "pretokenizers", "Split Digits ByteLevel")
        need([part["type"] == "ByteLevel" for part in parts] == [False] * (len(parts) - 1) + [True],
             "pre_tokenizer must end in its only ByteLevel")
        for part in parts:
            if part["type"] == "Digits":
                self.cuts.append(r"\p{N}" if field(part, "individual_digits", bool, False) else r"\p{N}+")
            elif part["type"] == "Split":
                one_of("behavior of a Split", part.get("behavior"), ["Isolated"])       # others drop them
                rule = field(part, "pattern", dict)
                plain = re.sub(r"([][\\.*+?^${}()|])", r"\\\1", field(rule, "String", str, ""))
                self.cuts.append(field(rule, "Regex", str, plain))
            else:
                self.cuts += [None] * field(part, "add_prefix_space", bool, True)
                self.cuts += [GPT2] * field(part, "use_regex", bool, True)
        self.fast = FAST.get(tuple(self.cuts))
        for cut in self.cuts if not self.fast else []:
            with about(f"regular expression {cut!r:.80}"):
                need(cut is None or splitter(cut), "cannot be used")    # seen here, and not first when in use

    def _read_ids(self, added: list, vocab: dict) -> None:
        """Who has which id, and which bytes an id stands for."""
        self.ids, names, read_as, tokens = dict(vocab), {}, {}, ({}, {})
        for token in added:
            name, id = field(token, "content", str), field(token, "id", int)
            for key in ["single_word", *self.strange]:
                need(not token.get(key), f"added token {name!r:.60} with {key} is not supported")
            late = bool(token.get("normalized"))        # then it is looked for, and read, in its normalized form
            sought = self._normal(name) if late else name
            held = tokens[late].setdefault(sought, (id, bool(token.get("lstrip")), bool(token.get("rstrip"))))
            need(sought and self.ids.setdefault(name, id) == held[0] == id,
                 f"added token {name!r:.60}: empty, or two ids for one text")
            self.added[name], read_as[id] = id, sought
        for name, id in self.ids.items():
            need(type(id) is int and 0 <= id < 2 ** 22 and names.setdefault(id, name) == name,
                 f"token {name[:60]!r} has an id that is none, too large or taken")
        self.names = names | read_as
        self.bytes = {id: self._spelled(name) for id, name in self.names.items()}
        self.n_ids, self.base_ids = max(names, default=-1) + 1, max(vocab.values(), default=-1) + 1
        self.holes = [id for id in range(self.n_ids) if id not in names]        # a list: hence the 2 ** 22
        self.newline_ids = [id for id in sorted(names) if b"\n" in self.bytes[id]]
        self.finders = [(re.compile("|".join(map(re.escape, sorted(sought, key=len, reverse=True))) or "(?!)"),
                         sought) for sought in tokens]  # sorted: if two match, it is the longer one

    def _spelled(self, name: str) -> bytes:
        """What a token of this name stands for. As Hugging Face has it, one with any letter outside the byte
        alphabet stands for its own text."""
        return bytes(map(LETTERS.get, name)) if LETTERS.keys() >= {*name} else name.encode("utf-8", "replace")

    def _read_merges(self, model: dict) -> None:
        """self.bpe gets the live tokens: tiktoken merges to all it has, and takes whole pieces first. Others
        count with ignore_merges, as whole pieces: in self.whole are those it could also merge to."""
        vocab, order, self.whole = model["vocab"], {}, {}
        for pair in merge_pairs(model):
            order[pair] = len(order)
        ids, made = [vocab["".join(pair)] for pair in order], live_tokens(order)
        need(ids == sorted(ids), "ids of the vocabulary are not in the order of the merges")
        ranks = {self.bytes[vocab[name]]: vocab[name] for name in made if name in vocab}
        ignore = field(model, "ignore_merges", bool, False)
        self.lacking = bytes(LETTERS[letter] for letter in LETTERS.keys() - vocab.keys())
        need(not self.lacking or not (ignore or model.get("unk_token")),
             f"vocab lacks bytes {self.lacking[:9]}; with unk_token or ignore_merges that is not supported")
        live, names = BPE(pat_str=r"[\s\S]+", mergeable_ranks=ranks), {id: name for name, id in vocab.items()}
        for name in vocab.keys() - made.keys() - {""}:
            raw = self.bytes[vocab[name]]
            if LETTERS.keys() >= {*name} and raw.translate(None, self.lacking) == raw:
                parts = live._encode_single_piece(raw)
                need((*map(names.get, parts),) not in order, f"the merges to {name[:60]!r} are out of order")
                if ignore:
                    (self.whole if len(parts) == 2 else ranks)[raw] = vocab[name]       # 2: one merge away
        self.bpe = BPE(pat_str=self.fast or r"[\s\S]+", mergeable_ranks=ranks)

    def _normal(self, text: str, begins=True) -> str:
        """Text as the normalizer leaves it."""
        for form in self.forms:
            text = unicodedata.normalize(form, text)
        return text

    def _find(self, text: str, late: bool) -> list:
        """Text -> [text, id, text, id ... text]: the added tokens in it, without the white space they strip."""
        parts, at, (finder, sought) = [], 0, self.finders[late]
        for match in finder.finditer(text):
            id, left, right = sought[match[0]]
            before = text[at:match.start()].rstrip(SPACES if left else "")
            start = at + len(before) if left else match.start()
            end = re.compile(f"[{SPACES}]*").match(text, match.end()).end() if right else match.end()
            parts += [before, id] if start < end else []        # or else the one before it has stripped it
            at = end
        return [*parts, text[at:]]

    def _merge(self, text: str, place=0) -> list[int]:
        """Text without added tokens -> ids, in one call where tiktoken gets it right, or piecewise. (Where the
        text stands is nothing to this kind.)"""
        raw = text.encode()
        if self.fast and len(text) <= LONG and raw.translate(None, self.lacking) == raw and not any(
                token in raw for token in self.whole):
            return self.bpe.encode_ordinary(text)
        ids, pieces = [], [text]
        for cut in self.cuts:
            pieces = [part for piece in pieces for part in (
                splitter(cut).split(piece) if cut else [" " * (piece[0] != " ") + piece]) if part]
        for piece in map(str.encode, pieces):
            if piece in self.whole:
                ids.append(self.whole[piece])
            elif piece := piece.translate(None, self.lacking):          # as in Hugging Face, they get lost
                ids += self.bpe._encode_single_piece(piece)
        return ids

    def encode(self, text: str, allow_special=False, begins=True) -> list[int]:
        """Text -> ids. Added tokens are seen only where asked for: data must not open a turn of a chat."""
        ids, text = [], well_formed(text)
        parts = self._find(text, late=False) if allow_special else [text]
        parts = [part if isinstance(part, int) else self._normal(part, begins or i > 0) for i, part in enumerate(parts)]
        parts = [self._find(part, late=True) if allow_special and isinstance(part, str) else [part] for part in parts]
        for i, part in enumerate(chain(*parts)):        # place 0: where a text begins, 1: behind an added token
            place = int(i > 0) if i or begins else 2
            ids += [part] if isinstance(part, int) else self._merge(part, place) if part else []
        return ids

    def encode_more(self, text: str, allow_special=False) -> list[int]:
        """Ids of a text that goes on from another one: nothing of what a beginning gets."""
        return self.encode(text, allow_special, begins=False)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that begins here: those of `begin` first. A new list, never self.begin itself."""
        return self.begin + self.encode(text)

    def token_bytes(self, id: int) -> bytes:
        """What an id stands for; a hole, or a row of padding, for nothing. Not always whole characters."""
        return self.bytes.get(int(id), b"")

    def decode(self, ids) -> str:
        """Ids of a whole text -> text, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_more(ids)

    def decode_more(self, ids) -> str:
        """Ids that go on from others (a step, a solution behind its question) -> text, with the space it begins
        with: texts of steps join to the text of their joined ids, unless a character lies across the border."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    @classmethod
    def from_pretrained(cls, folder) -> "Tokenizer":
        """Open a model folder. BadInput: no tokenizer.json, or one that is damaged or not supported."""
        with about(folder):
            files = {name: path.read_bytes() for name in cls.FILES if (path := Path(folder, name)).exists()}
            need(cls.FILES[0] in files, "has no tokenizer.json; get it from where the weights come from")
            return cls(files, folder)

    def save(self, folder) -> None:
        """Write the very bytes that were read: what we do not understand is not lost."""
        for name, raw in self.files.items():
            write_atomically(Path(folder, name), [raw])

    @classmethod
    def bytes_only(cls, special=("<|endoftext|>",)) -> "Tokenizer":
        """No merges: ids 0 to 255 are the bytes, then come special tokens, of which the first ends a text."""
        step = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
        off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [dict(id=256 + i, content=name, special=True, **off) for i, name in enumerate(special)]
        vocab = {letter: LETTERS[letter] for letter in sorted(LETTERS, key=LETTERS.get)}
        spec = dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
                    pre_tokenizer=step, post_processor=None, decoder=step,
                    model=dict(type="BPE", unk_token=None, byte_fallback=False, vocab=vocab, merges=[]))
        config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=special[0] if special else None)
        return cls({name: json.dumps(part).encode() for name, part in zip(cls.FILES, [spec, config])})


class SentencePiece(Tokenizer):
    """The kind of Llama 2, Mistral and Llemma: BPE over characters, of a text as a whole. tiktoken has none.

    A space is spelled ▁, and where a text begins one is put, so that a word is one token wherever it stands:
        encode("the cat"), encode_more(" the cat") -> ▁the ▁cat         encode_more("the cat") -> the ▁cat
    A character that is not in the vocabulary becomes its bytes, <0xE6> <0xB0> <0xB4>, or else the unknown token.
    The first ▁ comes from the normalizer (older files) or a Metaspace (newer ones). The latter puts none before
    a space, and with the scheme `first` none behind an added token."""

    def _read_cuts(self, spec: dict) -> None:
        """self.changes, self.undo: steps of normalizer and decoder, as they are. self.border: where a Metaspace
        cuts text. self.begins: how many places get its ▁: none, the start, or behind an added token as well."""
        self.strange, self.begins, self.border = [], 0, None
        self.changes = steps(spec.get("normalizer"), "normalizers", "null Prepend Replace NFC NFD NFKC NFKD")
        self.undo = steps(spec.get("decoder"), "decoders", "Replace ByteFallback Fuse Strip Metaspace")
        spaces = steps(spec.get("pre_tokenizer"), "pretokenizers", "null Metaspace")
        need(len(spaces) < 2, "pre_tokenizer: more than one Metaspace is not supported")
        for step in spaces:
            self.begins = ("never", "first", "always").index(self._scheme(step))
            self.border = re.compile("(?=▁)" if field(step, "split", bool, True) else "(?!)")
        self._normal("")                                # damage is seen here, and not first when in use
        self.decode([])

    def _scheme(self, step: dict) -> str:
        """Where a Metaspace puts a ▁. Older files say add_prefix_space."""
        one_of("replacement of a Metaspace", step.get("replacement"), "▁")
        old = field(step, "add_prefix_space", bool, True)
        scheme = field(step, "prepend_scheme", str, "always" if old else "never")
        return one_of("prepend_scheme", scheme, ["always", "first", "never"] if old else ["never"])

    def _replaced(self, step: dict) -> tuple[str, str]:
        """What a Replace puts in place of what."""
        old = field(field(step, "pattern", dict), "String", str, "")
        need(old, "a Replace of anything but a String is not supported")
        return old, field(step, "content", str)

    def _spelled(self, name: str) -> bytes:
        """What a token of this name stands for: <0x0A> a newline, ▁the " the"."""
        text = name.replace("▁", " ").encode("utf-8", "replace")
        return bytes.fromhex(name[3:5]) if BYTE.fullmatch(name) else text

    def _read_merges(self, model: dict) -> None:
        """self.pairs: ids of two neighbours -> (rank of their merge, id of what it makes)."""
        self.vocab, unknown = model["vocab"], field(model, "unk_token", str, "")
        need(not unknown or unknown in self.vocab, f"unk_token {unknown!r:.60} is not in the vocabulary")
        self.unknown = [self.vocab[unknown]] if unknown else []
        self.bytewise, self.fuse, self.ignore = (
            field(model, key, bool, False) for key in ("byte_fallback", "fuse_unk", "ignore_merges"))
        self.pairs = {(self.vocab[left], self.vocab[right]): (rank, self.vocab[left + right])
                      for rank, (left, right) in enumerate(merge_pairs(model))}

    def _letters(self, text: str) -> list[int]:
        """Ids of a text's characters, before any merge."""
        ids, waiting = [], []
        for char in text:
            if char in self.vocab:
                ids += [*waiting, self.vocab[char]]
                waiting = []
            elif self.bytewise and {*(raw := [f"<0x{b:02X}>" for b in char.encode()])} <= self.vocab.keys():
                ids += map(self.vocab.get, raw)         # subtle: as in Hugging Face, bytes overtake unknowns
            else:
                ids += [] if self.fuse else waiting     # fused: neighbouring unknowns are one
                waiting = self.unknown
        return ids + waiting

    def _join(self, ids: list[int]) -> list[int]:
        """Merge neighbours, the lowest rank first and of one rank the leftmost, until no merge is left. In n log n:
        neighbours are a linked list, and a heap holds every pair that was one at any time."""
        pairs, size, ids = self.pairs, len(ids), [*ids, None]       # None, the end on both sides: it is ids[-1] too
        before, after = [*range(-1, size)], [*range(1, size + 2)]
        heap = [(pairs[pair][0], i, pairs[pair][1]) for i, pair in enumerate(zip(ids, ids[1:])) if pair in pairs]
        heapq.heapify(heap)                             # (rank, left of the two, id they make)
        while heap:
            _, i, made = heapq.heappop(heap)
            j = after[i]
            if pairs.get((ids[i], ids[j]), (0, None))[1] != made:
                continue                                # they are neighbours no more
            ids[i], ids[j] = made, None
            after[i], before[after[j]] = after[j], i
            for left, right in ((before[i], i), (i, after[i])):
                if pair := pairs.get((ids[left], ids[right])):
                    heapq.heappush(heap, (pair[0], left, pair[1]))
        return [id for id in ids if id is not None]

    def _normal(self, text: str, begins=True) -> str:
        """Text as the normalizer leaves it."""
        for step in self.changes:
            if step["type"] == "Prepend":
                text = field(step, "prepend", str) * bool(begins and text) + text
            elif step["type"] == "Replace":
                text = text.replace(*self._replaced(step))
            else:
                text = unicodedata.normalize(step["type"], text)
        return text

    def _merge(self, text: str, place=0) -> list[int]:
        """Text without added tokens -> ids. place: 0 where a text begins, 1 behind an added token, 2 elsewhere."""
        parts, ids = [text], []
        if self.border:
            text = text.replace(" ", "▁")
            parts = self.border.split("▁" * (place < self.begins and not text.startswith("▁")) + text)
        for part in filter(None, parts):
            ids += [self.vocab[part]] if self.ignore and part in self.vocab else self._join(self._letters(part))
        return ids

    def decode(self, ids) -> str:
        """Ids of a whole text -> text, without the ▁ put before it; to the letter what Hugging Face gives."""
        parts = [self.names[id] for id in map(int, ids) if id in self.names]
        for step in self.undo:
            if step["type"] == "Replace":
                old, new = self._replaced(step)
                parts = [part.replace(old, new) for part in parts]
            elif step["type"] == "Metaspace":           # note: the first token loses every ▁ that it has
                first = " " if self._scheme(step) == "never" else ""
                parts = [part.replace("▁", " " if i else first) for i, part in enumerate(parts)]
            elif step["type"] == "Strip":
                letter, most = field(step, "content", str), field(step, "start", int)
                need(len(letter) == 1 and most >= 0 and step.get("stop") == 0, "a Strip at the end is not supported")
                parts = [part[:most].lstrip(letter) + part[most:] for part in parts]
            elif step["type"] == "ByteFallback":        # note: one bad byte spoils the whole run of bytes
                runs, parts = groupby(parts, key=lambda part: bool(BYTE.fullmatch(part))), []
                for are_bytes, run in runs:
                    raw = b"".join(map(self._spelled, run)) if are_bytes else b""
                    text = raw.decode("utf-8", "replace")
                    parts += run if not are_bytes else [text] if text.encode() == raw else ["\ufffd"] * len(raw)
            else:
                parts = ["".join(parts)]
        return "".join(parts)


# ----------------------------------------------------------------------------------------------------------
# 3 · Config: what a config.json means
# ----------------------------------------------------------------------------------------------------------
FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu} | dict.fromkeys(
    ("gelu_new", "gelu_pytorch_tanh"), partial(F.gelu, approximate="tanh"))
# GPT-2's words for the same fields
GPT2_FIELDS = dict(hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head",
                   intermediate_size="n_inner", max_position_embeddings="n_positions",
                   rms_norm_eps="layer_norm_epsilon", hidden_act="activation_function")
ROPE = {"default": (), "linear": ("factor",),                           # rope type: its parameters
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
# Fields that change the mathematics in ways this file does not have. Any value but the harmless ones here is
# refused: the model would run on and write fluent nonsense.
REFUSED = {"quantization_config": (None,), "auto_map": (None,), "num_local_experts": (None, 0, 1),
           "num_experts": (None, 0), "n_routed_experts": (None, 0), "attn_logit_softcapping": (None,),
           "final_logit_softcapping": (None,), "partial_rotary_factor": (None, 1), "logit_scale": (None, 1),
           "add_cross_attention": (None, False), "scale_attn_by_inverse_layer_idx": (None, False),
           "scale_attn_weights": (None, True), "is_encoder_decoder": (None, False),
           "query_pre_attn_scalar": (None,), "use_qk_norm": (None, False)}


@dataclass(frozen=True)
class GPTConfig:
    """Everything `GPT` needs to know, in one spelling for all families; `raw` is the file as it was read."""
    family: str
    vocab_size: int               # V, rows of the embedding (may exceed the tokenizer's ids: padding rows)
    hidden_size: int              # C
    intermediate_size: int        # width of the MLP
    layers: int                   # L
    heads: int                    # H query heads
    kv_heads: int                 # G key/value heads; H / G queries share one (grouped-query attention)
    head_dim: int                 # D; H * D need not equal C (Qwen3)
    max_positions: int
    norm_eps: float
    activation: str
    rope_theta: float
    rope: dict                    # {"rope_type": "default" | "linear" | "llama3", ...}
    windows: tuple                # per layer: sliding window in tokens, or None
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool                 # Qwen3: RMSNorm of each query and key head before the rotation
    tied: bool                    # the head is the embedding
    raw: dict

    @property
    def gpt2(self) -> bool:
        """GPT-2 differs in kind: LayerNorm, learned positions, no gate, fused and transposed files."""
        return self.family == "gpt2"

    @staticmethod
    def tiny(vocab_size: int, hidden_size=128, layers=3, max_positions=512) -> "GPTConfig":
        """A small llama for training from scratch: four query heads share one key/value head (sampling is
        2.7x faster than with four)."""
        return GPTConfig.from_json(dict(
            architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=vocab_size,
            hidden_size=hidden_size, intermediate_size=hidden_size * 5 // 2, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=1, head_dim=hidden_size // 4,
            max_position_embeddings=max_positions, rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu",
            tie_word_embeddings=False, eos_token_id=vocab_size - 1, torch_dtype="float32"))

    @staticmethod
    def from_json(raw: dict, where: str = "config.json") -> "GPTConfig":
        """Read a config.json in the old or the new spelling. Raises BadInput naming the field."""
        with about(where):
            family = one_of("model_type", raw.get("model_type"), FAMILIES)
            for key, harmless in REFUSED.items():
                need(raw.get(key) in harmless, f"{key} = {raw.get(key)!r:.60} is not supported; use a plain, "
                                               f"unquantised {family} checkpoint without it")
            gpt2, qwen3 = family == "gpt2", family == "qwen3"
            name = lambda key: GPT2_FIELDS[key] if gpt2 else key
            get = lambda key, *default_and_range: number(raw, name(key), *default_and_range)
            rest = {} if gpt2 else raw                  # whatever GPT-2 has no word for has its default
            hidden, heads = get("hidden_size"), get("num_attention_heads")
            layers = get("num_hidden_layers", None, 1, 4096)        # `windows` has an entry for each
            need(not gpt2 or hidden % heads == 0, f"n_embd = {hidden} is not a multiple of n_head = {heads}")
            kv_heads = number(rest, "num_key_value_heads", heads)   # without the key: no grouping
            head_dim = number(rest, "head_dim", 128 if qwen3 else hidden // heads)  # transformers' defaults
            need(heads % kv_heads == 0, f"{heads} heads cannot share {kv_heads} key/value heads evenly")
            # or the sizes of tensors leave 64 bits, and torch raises what is no BadInput
            need(heads * head_dim <= 1 << 24, f"{heads} heads of {head_dim} is no possible attention")
            need(gpt2 or head_dim % 2 == 0, f"head_dim = {head_dim}; rotary positions need an even number")
            act = raw.get(name("hidden_act"), "gelu_new" if gpt2 else "silu")           # null is refused
            bias = field(rest, "attention_bias", bool, gpt2) and family in ("gpt2", "llama", "qwen3")
            theta, rope = _rope(rest)
            return GPTConfig(
                family, number(raw, "vocab_size"), hidden,
                get("intermediate_size", 4 * hidden if gpt2 else None), layers, heads, kv_heads, head_dim,
                max_positions=get("max_position_embeddings", 1024 if gpt2 else 2048),
                norm_eps=get("rms_norm_eps", 1e-5 if gpt2 else 1e-6, 0.0, 1.0),
                activation=one_of(name("hidden_act"), act, ACTIVATIONS), rope_theta=theta, rope=rope,
                windows=_windows(rest, family, layers), qkv_bias=bias or family == "qwen2", out_bias=bias,
                mlp_bias=field(rest, "mlp_bias", bool, gpt2) and family in ("gpt2", "llama"), qk_norm=qwen3,
                tied=field(raw, "tie_word_embeddings", bool, gpt2), raw=raw)


def number(raw: dict, key: str, default=None, low=1, high=1 << 24):
    """raw[key] or, absent or null, the default; ValueError unless from low to high and of the type of low."""
    value = default if raw.get(key) is None else raw[key]
    kind = type(low)                                    # types, not isinstance: True is an instance of int
    need(type(value) in (int, kind) and low <= value <= high,
         f"{key} must be a{' whole' * (kind is int)} number from {low} to {high}, not {value!r:.40}; is the "
         "file damaged?")
    return kind(value)


def _rope(raw: dict) -> tuple[float, dict]:
    """(theta, parameters) from `rope_parameters` (new files) or rope_theta + `rope_scaling` (old ones)."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    need(isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values()),
         f"rope_parameters / rope_scaling must be one flat object, not {rope!r:.40}")
    kind = one_of("rope type", rope.get("rope_type", rope.get("type", "default")), ROPE)
    both = raw | {key: value for key, value in rope.items() if value is not None}
    number(both, "partial_rotary_factor", 1.0, 1.0, 1.0)                # rotating a part of a head: not here
    clean = {key: number(both, key, None, 1e-6, 1e12) for key in ROPE[kind]}
    need(kind != "llama3" or clean["low_freq_factor"] < clean["high_freq_factor"],
         "rope high_freq_factor must exceed low_freq_factor")
    return number(both, "rope_theta", 1e4, 1e-6, 1e12), {"rope_type": kind} | clean


def _windows(raw: dict, family: str, layers: int) -> tuple:
    """Sliding window of each layer. Mistral: absent means 4096, null means none (absent is not null).
    Qwen: only with use_sliding_window, on the layers named by layer_types, else from max_window_layers on."""
    kinds, known = raw.get("layer_types"), ("full_attention", "sliding_attention")
    need(kinds is None or isinstance(kinds, list) and len(kinds) == layers and all(k in known for k in kinds),
         f"layer_types must name full_attention or sliding_attention for each of the {layers} layers")
    mistral = family == "mistral"
    if not mistral and not (family.startswith("qwen") and field(raw, "use_sliding_window", bool, False)):
        return (None,) * layers
    first = 0 if mistral else number(raw, "max_window_layers", 28, 0)   # layer_types comes first
    size = None if raw.get("sliding_window", 4096) is None else number(raw, "sliding_window", 4096)
    slides = [k == "sliding_attention" for k in kinds] if kinds else [i >= first for i in range(layers)]
    return tuple(size if slide else None for slide in slides)


# ----------------------------------------------------------------------------------------------------------
# 4 · GPT: one transformer for all families
#     B rows, T new tokens, S keys (cached + new), C width, H query heads, G key/value heads, D head width
# ----------------------------------------------------------------------------------------------------------
def rope_frequencies(config: GPTConfig) -> torch.Tensor:
    """(D/2,) radians per position, fp32. `linear` divides all by `factor`; `llama3` divides slow waves, keeps
    fast ones, blends between."""
    rope, keep = config.rope, float(config.rope["rope_type"] == "default")          # 1: keep, 0: stretch
    inverse = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * inverse / (2 * math.pi)  # in the old context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * inverse + (1 - keep) * inverse / rope.get("factor", 1.0)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (RoFormer, 2104.09864): x (B, T, heads, D); cos, sin (B, T, 1, D/2). Dimension i pairs
    with i + D/2, as in HF files. note: the paper's layout, i with i + 1, gives gibberish with these files."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attend(q, k, v, bias):
    """Softmax attention with grouped heads: q (B, H, T, D), k and v (B, G, S, D), bias (B or 1, 1, T, S) of 0
    and -inf -> (B, H, T, D). On CUDA the fused kernel. On a CPU two plain batched products over the G heads:
    the H/G query heads of a group are extra rows of one product, so k and v are never repeated (one kv head:
    2-3x faster than SDPA there, whose CPU backward took half the training time)."""
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=H != G)
    grouped = q.reshape(B, G, H // G * T, D) * D ** -0.5                # (B, G, H/G*T, D)
    scores = (grouped @ k.transpose(-1, -2)).view(B, H, T, S) + bias    # (B, H, T, S)
    weights = torch.softmax(scores, -1).view(B, G, H // G * T, S)
    return (weights @ v).view(B, H, T, D)


class Attention(nn.Module):
    """Self-attention of one layer; module names are those of HF llama files."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.head_dim, self.qk_norm = c.head_dim, c.qk_norm
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.hidden_size, n * c.head_dim, bias=c.qkv_bias)
                                                 for n in (c.heads, c.kv_heads, c.kv_heads))
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden_size, bias=c.out_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(c.head_dim, c.norm_eps), nn.RMSNorm(c.head_dim, c.norm_eps)

    def forward(self, x, turn, bias, layer, cache):
        """x (B, T, C) -> (B, T, C). `cache.update` keeps new keys and values, gives all S of them."""
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim))         # (B, T, heads, D)
                   for linear in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:                                # before the rotation, or Qwen3 writes nonsense
            q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        k, v = (k.transpose(1, 2), v.transpose(1, 2)) if cache is None else cache.update(layer, k, v)
        return self.o_proj(attend(q.transpose(1, 2), k, v, bias).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Gated (llama: down(act(gate x) * up x)) or plain (GPT-2: down(act(up x)))."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.gate_proj = None if c.gpt2 else nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)
        self.act = ACTIVATIONS[c.activation]

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        up = self.up_proj(x)
        return self.down_proj(self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x)) * up)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        norm = nn.LayerNorm if c.gpt2 else nn.RMSNorm
        self.input_layernorm, self.self_attn = norm(c.hidden_size, c.norm_eps), Attention(c)
        self.post_attention_layernorm, self.mlp = norm(c.hidden_size, c.norm_eps), MLP(c)

    def forward(self, x, turn, bias, layer, cache):
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.self_attn(self.input_layernorm(x), turn, bias, layer, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


# our words (those of HF's llama files) for parts of the network: what GPT-2's files call them
GPT2_NAMES = dict(model="transformer", embed_tokens="wte", embed_positions="wpe", layers="h", norm="ln_f",
                  self_attn="attn", input_layernorm="ln_1", post_attention_layernorm="ln_2", q_proj="c_attn",
                  k_proj="c_attn", v_proj="c_attn", o_proj="c_proj", up_proj="c_fc", down_proj="c_proj")


class GPT(nn.Module):
    """A decoder-only language model; `config` says which. Parameters carry the names of HF llama files."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = c = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        if c.gpt2:
            self.model.embed_positions = nn.Embedding(c.max_positions, c.hidden_size)
        self.model.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.model.norm = (nn.LayerNorm if c.gpt2 else nn.RMSNorm)(c.hidden_size, c.norm_eps)
        self.lm_head = None if c.tied else nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.inverse = None               # of RoPE; no buffer: model.to(bfloat16) must not round frequencies
        self.generation = {}              # generation_config.json, when there is one
        self.saved_as = {}                # name of a tensor in the file: its dtype there, to save it the same
        self.stop_ids, self.no_ids, self.last_id = frozenset(), None, config.vocab_size - 1     # see `bind`

    def initialise(self, seed: int) -> "GPT":
        """Random weights for training from scratch: normal, 1/sqrt(fan-in); layers that write to the residual
        stream start smaller, so that its variance does not grow with depth (GPT-2)."""
        rng = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() < 2:                             # norms are 1, biases 0
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
                continue
            std = 0.05 if "embed" in name else p.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self.config.layers)
            nn.init.normal_(p, 0.0, std, generator=rng)
        return self

    device = property(lambda self: self.model.embed_tokens.weight.device, doc="Where the weights lie.")
    dtype = property(lambda self: self.model.embed_tokens.weight.dtype, doc="What the weights are.")

    def forward(self, ids, positions=None, mask=None, cache=None):
        """Hidden states after the last norm: ids (B, T) -> (B, T, C).

        positions (B, T): depth of each token in its own text; default 0..T-1. mask (B, T, S) bool, True = may
        see; default causal. In a row that holds a whole tree a token sees its ancestors and itself. A sliding
        window counts depth, not columns: a key is seen while position(query) - position(key) < window.
        cache: its `update(layer, k, v)` stores new keys and values, (B, T, G, D) each, and returns all there
        are as (B, G, S, D); with a cache, column = position."""
        B, T = ids.shape
        if positions is None:
            positions = torch.arange(T, device=ids.device).expand(B, T)
        if mask is None:
            mask = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril()[None]
        keys = positions if cache is None else torch.arange(mask.shape[-1], device=ids.device)[None]
        x, turn, bias = self.model.embed_tokens(ids), None, {}
        if self.config.gpt2:
            x = x + self.model.embed_positions(positions)
        else:
            if self.inverse is None or self.inverse.device != ids.device:
                self.inverse = rope_frequencies(self.config).to(ids.device)
            angle = positions[:, :, None, None].float() * self.inverse  # (B, T, 1, D/2); bf16 loses positions
            turn = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for w in set(self.config.windows):              # one bias for all layers that have this window
            seen = mask if w is None else mask & (positions[:, :, None] - keys[:, None, :] < w)
            bias[w] = torch.zeros_like(seen, dtype=x.dtype).masked_fill_(~seen, -math.inf)[:, None]
        for i, block in enumerate(self.model.layers):
            x = block(x, turn, bias[self.config.windows[i]], i, cache)
        return self.model.norm(x)

    def logits(self, hidden):
        """hidden (..., C) -> (..., V); V counts all rows of the head, also those that are no token."""
        return F.linear(hidden, (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight)

    def token_logits(self, hidden):
        """fp32 logits with -inf at ids the tokenizer does not have: what is sampled from and what log-probs
        are taken over, while sampling and while training alike."""
        out = self.logits(hidden).float()
        return out if self.no_ids is None else out.masked_fill(self.no_ids.to(out.device), -math.inf)

    def bind(self, tokenizer) -> "GPT":
        """Learn from the tokenizer which ids exist, and the ids at which text ends: the union of what config,
        generation_config and tokenizer call end-of-text (each of the three is incomplete in some release)."""
        V = self.config.vocab_size
        known = {*range(min(V, tokenizer.n_ids))}.difference(tokenizer.holes)
        if tokenizer.base_ids > V or not known:
            raise BadInput(f"The tokenizer has {tokenizer.base_ids} ids and the model only {V} rows: they do "
                           "not belong together; put the model's own tokenizer.json into its folder.")
        missing = torch.ones(V, dtype=torch.bool)
        missing[[*known]] = False                       # True: padding rows and holes
        self.no_ids, self.last_id = missing.to(self.device) if missing.any() else None, max(known)
        ends = [*tokenizer.eos_ids]
        for source in (self.config.raw, self.generation):
            eos = source.get("eos_token_id")
            ends += eos if isinstance(eos, list) else [eos]             # or null, or damaged
        self.stop_ids = frozenset(end for end in ends if type(end) is int and end in known) 
        return self

    # -- files ---------------------------------------------------------------------------------------------
    def file_plan(self, held=()) -> dict[str, tuple[list[str], bool]]:
        """{tensor name in the file: (names of the parameters it holds, transposed?)}, the embedding first.

        Llama-like files have our own names. GPT-2's hold q, k, v in one and linear layers ("Conv1D") as (in,
        out). held: names in a file that is there; some lack the prefix, some hold a tied head as well."""
        gpt2, plan = self.config.gpt2, {}
        for name, _ in self.named_parameters():
            file_name = ".".join(GPT2_NAMES.get(word, word) if gpt2 else word for word in name.split("."))
            plan.setdefault(file_name, []).append(name)                 # (q, k, v follow one another)
        if self.config.tied and "lm_head.weight" in held:
            plan["lm_head.weight"] = ["model.embed_tokens.weight"]
        prefix = "transformer." if gpt2 else "model."
        bare = held and not any(name.startswith(prefix) for name in held)
        return {name.removeprefix(prefix) if bare else name:
                (params, gpt2 and ".c_" in name and name.endswith("weight")) for name, params in plan.items()}

    def _stored(self, params: list, flip: bool) -> torch.Tensor:
        """Parameters as the one tensor that a file holds of them (on the meta device: just its shape)."""
        parts = [self.get_parameter(name).data for name in params]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]        # to cat a single one would copy it
        return whole.T if flip else whole

    @classmethod
    def from_pretrained(cls, folder, device=None, dtype=None) -> "GPT":
        """Open a HF-format folder. dtype None: fp32 on a CPU, the file's own on CUDA. Shapes are compared
        before anything is allocated. BadInput: folder, config or weights missing, damaged, not supported."""
        where, path = weight_files(folder), Path(folder, "config.json")         # where: {tensor name: file}
        config = GPTConfig.from_json(read_json(path), str(path))
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        with about(folder), torch.device("meta"):
            need(config.layers <= len(where),           # seen before thousands of layers are built in vain
                 f"config.json names {config.layers} layers, the weights hold only {len(where)} tensors")
            model = cls(config)
            plan = model.file_plan(where)
            _compare_names({*plan}, {*where}, config)
        headers = {file: safetensors_header(file) for file in {*where.values()}}
        for name, entry in plan.items():
            (kind, shape, *_), want = headers[where[name]][name], model._stored(*entry).shape
            with about(where[name]):
                need(shape == want and DTYPES[kind].is_floating_point, f"tensor {name} is {kind} {[*shape]}, "
                     f"config.json asks for a floating-point {[*want]}: they do not belong together")
            model.saved_as[name] = DTYPES[kind]
        # the embedding's dtype stands for the file's; half precision is slow on a CPU
        dtype = dtype or (torch.float32 if device.type == "cpu" else model.saved_as[next(iter(plan))])
        model = model.to(dtype).to_empty(device=device)
        if config.tied:
            plan.pop("lm_head.weight", None)            # a second copy is not read: the embedding counts
        for file in headers:                            # a shard at a time: never two copies in memory
            for name, tensor in read_safetensors(file, keep=plan.__contains__)[0].items():
                params, flip = plan[name]
                for param, piece in zip(params, (tensor.T if flip else tensor).chunk(len(params))):
                    model.get_parameter(param).data.copy_(piece)        # (q, k, v of GPT-2 are equally large)
        path = Path(folder, "generation_config.json")
        model.generation = read_json(path) if path.exists() else {}
        return model

    def save_pretrained(self, folder) -> None:
        """Write config.json, generation_config.json and model.safetensors so that other tools open them: the
        same tensor names and dtypes as the folder the model came from (fp32 when it was made here)."""
        for name, raw in (("config.json", self.config.raw), ("generation_config.json", self.generation)):
            if raw:
                write_text(Path(folder, name), json.dumps(raw, indent=2) + "\n")
        tensors = {name: self._stored(*entry).to("cpu", self.saved_as.get(name, torch.float32))
                   for name, entry in self.file_plan(self.saved_as).items()}
        write_safetensors(Path(folder, "model.safetensors"), tensors, {"format": "pt"})


def _compare_names(want: set, have: set, config: GPTConfig) -> None:
    """Every tensor is used or knowingly skipped; what is missing or left over is listed. ValueError."""
    buffers = r"\.attn\.(bias|masked_bias)$" if config.gpt2 else r"rotary_emb\.inv_freq$"   # in old files
    missing, extra = want - have, {name for name in have - want if not re.search(buffers, name)}
    some = lambda names: f"{len(names)} ({', '.join(sorted(names)[:4])}{', ...' if len(names) > 4 else ''})"
    hint = '; if this model ties its head to the embedding, set "tie_word_embeddings": true in config.json'
    need(not missing and not extra, f"the weights do not fit a {config.family} config.json: missing "
         f"{some(missing)}, left over {some(extra)}{hint if missing == {'lm_head.weight'} else ''}")


# ----------------------------------------------------------------------------------------------------------
# 5 · Sampler: continue many prefixes at once, encode no token twice
#     P tokens kept, R rows being decoded, S columns of the widest row
# ----------------------------------------------------------------------------------------------------------
@dataclass
class Request:
    """One continuation to sample: where from, with which random numbers, how far."""
    path: np.ndarray              # (length,) addresses of the prefix's tokens in the sampler's store
    seed: int                     # 64 bits; the draw of token t depends on (seed, t) alone
    max_tokens: int
    greedy: bool = False          # argmax, whatever the temperature of the others
    line: tuple = ()              # ids of a line of the solution that the path leaves unfinished


@dataclass
class Continuation:
    """What a request became. `slots` are the addresses of its tokens: append them to the path to go on."""
    ids: np.ndarray               # (n,) sampled ids, the end-of-text id included
    logps: np.ndarray             # (n,) log-probs at temperature 1 over the tokenizer's ids
    slots: np.ndarray             # (n,)
    why: str                      # "eos", "answer" (final line written), "step", "length"


def mix(*parts: int) -> int:
    """Hash whole numbers to a 64-bit seed (splitmix64): mix(run, question, node, sample)."""
    z = 0
    for part in parts:
        z = (z ^ (int(part) & MASK64)) + 0x9E3779B97F4A7C15 & MASK64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK64
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK64
        z ^= z >> 31
    return z


MASK64 = (1 << 64) - 1


def uniforms(seeds: np.ndarray, t: np.ndarray) -> np.ndarray:
    """(R,) numbers in [0, 1): the t-th draw of each seed, splitmix64 as a counter-based generator. No state:
    a row draws the same numbers whoever else is in the batch, and after a restart."""
    z = seeds + (t.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0 ** -53


def step_rule(kind: str, tokenizer) -> Callable:
    """When a step, the action of every search here (AlphaLLM's option), is over: f(ids of the step so far) -> bool.

    line: after the first token that holds a newline; paragraph: after an empty line, when a formula is above it (a
    digit and a "="); a number: after so many tokens. Raises BadInput for anything else."""
    newline = set(tokenizer.newline_ids)

    def paragraph(ids):
        """Asked after every token, so text is made of ids only where a newline came."""
        text = tokenizer.decode_more(ids) if ids[-1] in newline else ""
        return text.endswith("\n\n") and "=" in text and any(c.isdigit() for c in text)
    if kind.isdecimal() and int(kind):
        return lambda ids: len(ids) >= int(kind)
    if kind not in ("line", "paragraph"):
        raise BadInput(f"--step {kind}: a step is a line, a paragraph or a number of tokens, such as 16.")
    return paragraph if kind == "paragraph" else lambda ids: ids[-1] in newline


class Sampler:
    """Continues prefixes for one model, keeping the keys and values of every token it has encoded.

    Every token has an address ("slot") in an append-only store that holds its key and value in each layer and
    its last hidden state; a prefix is the list of its tokens' slots. Growing a tree is: gather the path's keys
    and values into a row of the working cache (R, G, S, D), decode there (column = position), and append each
    new token to the store. So a token is encoded once however many branches hang from it; the last token of a
    leaf is never encoded. `reset` forgets everything: call it after every change of the weights.

    slots: tokens to hold at first; the store grows. rows: rows decoded at once. finished(line) -> bool, asked when a
    line is complete, says that the solution is over (the answer line was written). step: as for `step_rule`."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, slots: int, rows: int = 256, finished=None,
                 step: str = "line"):
        self.model, self.tokenizer, self.rows, self.finished = model, tokenizer, rows, finished or (lambda line: False)
        self.newline, self.step_over = set(tokenizer.newline_ids), step_rule(step, tokenizer)
        self.new = functools.partial(torch.zeros, dtype=model.dtype, device=model.device)
        self.counts = dict(prompt=0, sampled=0, processed=0, live=0, room=0)
        self.allocate(slots)

    def allocate(self, slots: int) -> None:
        """A store of so many tokens in place of the one there is: a small one leaves the memory to a training."""
        c = self.model.config
        # note: zeros, not empty: a masked column has weight 0, and 0 * NaN of stale memory is NaN
        self.key, self.value = (self.new(c.layers, slots, c.kv_heads, c.head_dim) for _ in range(2))
        self.hidden = self.new(slots, c.hidden_size)
        self.reset()

    @staticmethod
    def bytes_per_slot(model: GPT) -> int:
        """Memory of one token in the store."""
        c = model.config
        return (2 * c.layers * c.kv_heads * c.head_dim + c.hidden_size) * model.dtype.itemsize

    def reset(self) -> None:
        """Forget all tokens (the counts of work done stay)."""
        c, slots = self.model.config, self.key.shape[1]
        self.used, self.trie = 1, {}                                    # slot 0 takes what padding writes
        self.ids, self.encoded = np.zeros(slots, np.int64), np.zeros(slots, bool)
        self.branches = np.zeros(slots, np.int32)                       # children in the trie of prompts
        self.waiting, self.live, self.tickets, self.last = deque(), [], 0, self.hidden[:0]     # last: (R, C)
        # a fresh width, too: the same work gives the same bytes whatever was sampled before
        self.work = [self.new(c.layers, self.rows + SPARE_ROWS, c.kv_heads, 0, c.head_dim) for _ in range(2)]

    def prompt(self, ids) -> np.ndarray:
        """Slots of a text given as ids, (length,). Texts that begin alike share the slots of what they share.
        Nothing is encoded yet. Raises BadInput when nothing would be left to write the answer in."""
        limit = self.model.config.max_positions
        if not 0 < len(ids) < limit:
            raise BadInput(f"A question of {len(ids)} tokens does not fit this model's context of {limit}; "
                           "shorten or leave out the question (an empty one has nothing to go on from).")
        return self.follow(np.zeros(0, np.int64), ids)

    def follow(self, path: np.ndarray, ids) -> np.ndarray:
        """Slots of `path` and, behind it, of a given text (a judge's question, say): (length,). Texts that follow
        one prefix share the slots of what they share. Nothing is encoded yet."""
        path = path.tolist()
        above = path[-1] if path else -1
        for token in ids:
            slot = self.trie.get((above, token))
            if slot is None:
                slot = self.trie[above, token] = int(self._take([token])[0])
                self.counts["prompt"] += 1
                if above >= 0:
                    self.branches[above] += 1
            path.append(slot)
            above = slot
        return np.array(path)

    def _take(self, ids) -> np.ndarray:
        """Append tokens to the store and return their slots; keys and values follow when they are encoded."""
        slots = np.arange(self.used, self.used + len(ids))
        if slots[-1] >= len(self.ids):                                  # full: half as much again
            more = max(len(ids), len(self.ids) // 2)
            self.key, self.value = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in (self.key, self.value))
            self.hidden = F.pad(self.hidden, (0, 0, 0, more))
            self.ids, self.encoded, self.branches = (np.pad(x, (0, more)) for x in
                                                     (self.ids, self.encoded, self.branches))
        self.ids[slots] = ids
        self.used += len(ids)
        return slots

    # -- encoding ------------------------------------------------------------------------------------------
    def update(self, layer, k, v):
        """Called by the model: keep new keys and values (R, T, G, D), return all as views (R, G, S, D)."""
        rows, cols, slots, S, first = self._at
        for work, store, new in ((self.work[0], self.key, k), (self.work[1], self.value, v)):
            work[layer][rows, :, cols] = new
            store[layer][slots] = new
        part = slice(first, first + len(k))
        return self.work[0][layer, part, :, :S], self.work[1][layer, part, :, :S]

    def _forward(self, slots: np.ndarray, cols: np.ndarray, real: np.ndarray, first: int = 0):
        """Encode tokens of R rows from `first` on: slots, cols, real (R, T); -> hidden (R, T, C). Where `real` is
        False the row is padding: it writes to columns past its end, which are never seen, and to the spare slot."""
        device, S = self.model.device, int(cols.max()) + 1
        to = lambda a: torch.from_numpy(a).to(device)
        positions = to(cols)
        where = to(np.where(real, slots, 0))
        self._at = (torch.arange(first, first + len(slots), device=device)[:, None], positions, where, S, first)
        mask = torch.arange(S, device=device) <= positions[..., None]   # (R, T, S): nothing right of a row's end
        hidden = self.model(to(self.ids[slots]), positions, mask, cache=self)
        self.hidden[where] = hidden
        self.encoded[slots[real]] = True
        self.counts["processed"] += int(real.sum())
        return hidden

    def _load(self, paths: list, first: int) -> None:
        """Gather keys and values of paths into working rows first, first + 1, ..."""
        longest = max(map(len, paths), default=0)
        if longest == 0:
            return
        slots = np.zeros((len(paths), longest), np.int64)
        for row, path in zip(slots, paths):
            row[:len(path)] = path
        slots = torch.from_numpy(slots).to(self.model.device)
        for work, store in zip(self.work, (self.key, self.value)):      # (L, R', S, G, D) -> (L, R', G, S, D)
            work[:, first:first + len(paths), :, :longest] = store[:, slots].transpose(2, 3)

    def _widen(self, columns: int) -> None:
        """Make the working cache at least `columns` wide; what is in it stays."""
        old = self.work[0].shape[3]
        if columns > old:
            columns = max(columns, old * 5 // 4)
            self.work = [F.pad(w, (0, 0, 0, columns - old)) for w in self.work]

    @torch.no_grad()
    def encode(self, paths: list) -> None:
        """Encode what is not yet encoded of these paths, each token once, in waves: a wave takes, below every
        encoded prefix, the run of tokens up to the next fork of the trie.

            Question: 7+1?        wave 1: "Question: "   (one row)
                      9*2?        wave 2: "7+1?", "9*2?" (two rows)

        It borrows working rows behind the live ones, so it may be called between two steps."""
        while True:
            runs = {}
            for path in paths:
                todo = np.flatnonzero(~self.encoded[path])
                if len(todo):
                    start = todo[0]
                    forks = np.flatnonzero(self.branches[path[start:]] > 1)
                    end = start + forks[0] + 1 if len(forks) else len(path)
                    runs[path[start]] = (path[:start], path[start:end])
            if not runs:
                return
            runs = sorted(runs.values(), key=lambda run: len(run[1]))   # like lengths together: little padding
            while runs:
                free = min(self.rows, self.rows + SPARE_ROWS - len(self.live))
                batch = runs[-max(1, min(free, PREFILL_TOKENS // len(runs[-1][1]))):]
                del runs[-len(batch):]
                self._encode_runs(batch, len(self.live))

    def _encode_runs(self, batch: list, first: int) -> None:
        T = max(len(run) for _, run in batch)
        slots, cols = np.zeros((len(batch), T), np.int64), np.zeros((len(batch), T), np.int64)
        real = np.zeros((len(batch), T), bool)
        for i, (before, run) in enumerate(batch):
            slots[i, :len(run)], real[i, :len(run)] = run, True
            # padding stays inside the position table; its own column, so that its softmax is not empty
            cols[i] = np.minimum(len(before) + np.arange(T), self.model.config.max_positions - 1)
        self._widen(int(cols.max()) + 1)
        self._load([before for before, _ in batch], first)
        self._forward(slots, cols, real, first)

    @torch.no_grad()
    def log_probs(self, above: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """(n,) log-probs at temperature 1 of encoded tokens `slots` behind the path `above`, whoever wrote them."""
        before = torch.from_numpy(np.concatenate((above[-1:], slots[:-1]))).to(self.model.device)
        logits = self.model.token_logits(self.hidden[before])
        ids = torch.from_numpy(self.ids[slots]).to(self.model.device)
        return (logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)).cpu().numpy()

    # -- sampling ------------------------------------------------------------------------------------------
    def extend(self, requests: list, temperature: float = 1.0, to_end: bool = True, progress=None) -> list:
        """Sample one continuation per request, in the order of the requests: `submit` and `step` to the end.

        to_end False: stop when one step is over. temperature 0: argmax.
        `progress(tokens)` is called with the number of tokens just sampled."""
        self.encode([r.path for r in requests])         # all at once: fewer forwards than as rows get free
        tickets, results = self.submit(requests, temperature, to_end), {}
        while len(results) < len(requests):
            results |= self.step(progress)
        return [results[ticket] for ticket in tickets]

    def submit(self, requests: list, temperature: float = 1.0, to_end: bool = True) -> list:
        """Put requests in the queue; returns a ticket for each. Nothing is computed before `step`."""
        rows = [_Row(self.tickets + i, r, 0.0 if r.greedy else temperature, to_end) for i, r in enumerate(requests)]
        self.waiting += rows
        self.tickets += len(rows)
        return [row.ticket for row in rows]

    @torch.no_grad()
    def step(self, progress=None) -> dict:
        """Sample one token for every live row -> {ticket: Continuation} of the rows that stopped. Rows that stop
        make room for waiting ones, so nobody waits for the longest of a batch."""
        self._admit()
        live = self.live
        if not live:
            return {}
        self.counts["live"] += len(live)
        self.counts["room"] += self.rows
        tokens, logps = self._draw(self.last, live)
        slots = self._take(tokens)
        self.counts["sampled"] += len(live)
        for row, token, logp, slot in zip(live, tokens.tolist(), logps.tolist(), slots.tolist()):
            row.ids.append(token), row.logps.append(logp), row.slots.append(slot)
            row.why = self._stop(row, token)
        if progress is not None:
            progress(len(live))
        stopped = {row.ticket: Continuation(np.array(row.ids), np.array(row.logps, np.float32), np.array(row.slots),
                                            row.why) for row in live if row.why}
        self.live = live = self._close(live)
        if live:
            slots = np.array([[row.slots[-1]] for row in live])
            cols = np.array([[row.columns - 1] for row in live])
            self._widen(int(cols.max()) + 1)
            self.last = self._forward(slots, cols, np.ones_like(cols, bool))[:, 0]
        else:
            self.last = self.hidden[:0]
        return stopped

    def _admit(self) -> None:
        """Let waiting rows in, in groups: one gather and one forward for many. With half the rows idle or all
        that wait fitting in, there is nothing to wait for."""
        free = self.rows - len(self.live)
        if not self.waiting or free < min(len(self.waiting), max(1, self.rows // 8)):
            return
        new = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        self._widen(max(len(row.request.path) for row in new) + 1)
        self.encode([row.request.path for row in new])
        self._load([row.request.path for row in new], len(self.live))
        ends = torch.tensor([int(row.request.path[-1]) for row in new], device=self.model.device)
        self.last = torch.cat((self.last, self.hidden[ends]))
        self.live += new

    def _draw(self, hidden, live):
        """(R, C) hidden -> (R,) ids and log-probs. Inverse of the cumulated distribution at one uniform number:
        a tenth of the time of torch.multinomial for 49k ids, and the number is the row's own."""
        logits, heats = self.model.token_logits(hidden), [row.temperature for row in live]      # (R, V)
        tokens = logits.argmax(-1) if 0 in heats else None
        if any(heats):
            heat = torch.tensor(heats, device=logits.device)[:, None]
            seeds = np.array([row.request.seed for row in live], np.uint64)
            u = uniforms(seeds, np.array([len(row.ids) for row in live]))
            mass = torch.softmax(logits / torch.where(heat == 0, 1, heat), -1).cumsum(-1)       # (R, V)
            u = torch.from_numpy(u).to(mass)[:, None] * mass[:, -1:]
            # right=True: an id of probability 0 is never hit; when rounding puts u on the total: the last real id
            drawn = torch.searchsorted(mass, u, right=True).squeeze(-1).clamp_(max=self.model.last_id)
            tokens = drawn if tokens is None else torch.where(heat[:, 0] == 0, tokens, drawn)
        logps = logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
        return tokens.cpu().numpy(), logps.float().cpu().numpy()

    def _stop(self, row, token):
        if token in self.model.stop_ids:
            return "eos"
        full = row.columns >= self.model.config.max_positions           # then no further step would fit
        if token in self.newline:
            ids = [*row.request.line, *row.ids] if row.line is None else row.ids[row.line:]
            line = self.tokenizer.decode_more(ids)
            row.line = len(row.ids)
            if self.finished(line):
                return "answer"
        if not row.to_end and not full and self.step_over(row.ids):
            return "step"
        return "length" if full or len(row.ids) >= row.request.max_tokens else None

    def _close(self, live):
        """Move rows from the end into the holes of those that stopped, so that rows 0..R-1 are always the live
        ones and a forward pays for no one else."""
        keep = sum(not row.why for row in live)
        holes = [i for i in range(keep) if live[i].why]
        tails = [i for i in range(keep, len(live)) if not live[i].why]
        if holes:
            columns = max(live[i].columns for i in tails)
            for work in self.work:
                work[:, holes, :, :columns] = work[:, tails, :, :columns]
            for hole, tail in zip(holes, tails):
                live[hole] = live[tail]
        return live[:keep]


PREFILL_TOKENS = 8192         # tokens of one prefill batch; bounds its attention scores
SPARE_ROWS = 32               # working rows for prefills while all others are decoding


class _Row:
    """A request being decoded."""

    def __init__(self, ticket, request, temperature, to_end):
        self.ticket, self.request, self.temperature, self.to_end = ticket, request, temperature, to_end
        self.why = None
        self.ids, self.logps, self.slots = [], [], []
        self.line = None          # where the line being written begins; None: above this row, with request.line

    @property
    def columns(self):
        """Columns of the working cache that the row takes."""
        return len(self.request.path) + len(self.ids)


# ----------------------------------------------------------------------------------------------------------
# 6 · Program: continue a prompt
# ----------------------------------------------------------------------------------------------------------
def main(arguments: list) -> int:
    """Continue a prompt with a model folder; without a folder show what the sampler shares. Exit code 2 and
    one sentence for bad input."""
    parser = argparse.ArgumentParser(prog="model.py", description="Continue a prompt.", allow_abbrev=False)
    for name, start, text in (("model", "", "folder with config.json, weights and tokenizer.json"),
                              ("prompt", "", "text to continue"), ("temperature", 1.0, "0 = greedy"),
                              ("max-tokens", 128, "of one continuation"), ("samples", 1, "continuations"),
                              ("seed", 0, "of the samples"), ("device", "", "empty: CUDA when there is one"),
                              ("dtype", "", "float32 or bfloat16")):
        parser.add_argument("--" + name, type=type(start), default=start, help=f"{text} (default {start!r})")
    a = parser.parse_args(arguments)
    try:
        if not a.model:
            return demo()
        dtypes = {"": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
        if a.temperature < 0 or min(a.max_tokens, a.samples) < 1 or a.dtype not in dtypes:
            raise BadInput("--temperature must be 0 or more, --max-tokens and --samples 1 or more, --dtype "
                           "float32 or bfloat16.")
        if not a.prompt:
            raise BadInput('--prompt is missing: the text to continue, e.g. --prompt "What is 2+2? Answer:"')
        tokenizer = Tokenizer.from_pretrained(a.model)
        model = GPT.from_pretrained(a.model, a.device or None, dtypes[a.dtype]).bind(tokenizer)
        sampler, start = Sampler(model, tokenizer, 4096, a.samples), time.time()
        path = sampler.prompt(tokenizer.encode_prompt(a.prompt.replace("\\n", "\n")))     # typed in a shell
        requests = [Request(path, mix(a.seed, i), a.max_tokens) for i in range(a.samples)]
        for found in sampler.extend(requests, a.temperature):
            text = tokenizer.decode_more(i for i in found.ids if i not in model.stop_ids)
            print(f"{a.prompt}{text}\n[{len(found.ids)} tokens, {found.why}, "
                  f"mean log-prob {found.logps.mean():.3f}]")
        print(f"[{sampler.counts['sampled'] / (time.time() - start):,.0f} tokens/s]")
        return 0
    except KeyboardInterrupt:
        return 130                # what a shell expects after Ctrl-C
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:      # disk full, no permission, ...: what was finished is on the disk
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}; mend it and run the same "
              "command again", file=sys.stderr)
    return 2


def demo() -> int:
    """Eight samples of three questions that begin alike, from random weights: what was encoded, and what a
    program without a shared store would have encoded."""
    tokenizer = Tokenizer.bytes_only()
    model = GPT(GPTConfig.tiny(tokenizer.n_ids, hidden_size=64, layers=2)).initialise(seed=0).bind(tokenizer)
    sampler = Sampler(model, tokenizer, 4096)
    prompts = [f"Question: what is {q}? Answer:" for q in ("7+1*4", "7+1", "9*2-3")]
    paths = [sampler.prompt(tokenizer.encode_prompt(p)) for p in prompts]
    sampler.extend([Request(path, mix(i, j), 30) for i, path in enumerate(paths) for j in range(8)])
    c, apart = sampler.counts, 8 * sum(map(len, paths))
    share = c["processed"] / (c["prompt"] + c["sampled"])
    print(f"24 samples of 3 prompts: {c['prompt']} prompt tokens kept (apart: {apart}), {c['sampled']} "
          "sampled,")
    print(f"{c['processed']} encoded = {share:.3f} of prompt + sampled. Continue a prompt of your own:")
    print('python model.py --model FOLDER --prompt "..." --temperature 0.7 --max-tokens 100')
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
