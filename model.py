"""
A language model: open weights in, tokens out; branches that share a beginning encode it once.

A GPT reads tokens and predicts the next one. A sampler draws from the prediction, appends the
token and repeats. The other files (mcts, critic, dpo, loop) ask this one for three things: hidden
states of tokens, log-probs of tokens, and continuations of many texts at once.

What is different from a usual implementation:
1. One class is GPT-2, Llama 2 and 3, Mistral, Qwen2 and 3, SmolLM2 and DeepSeekMath: config.json
   says which. What it does not support it rejects with an error that names the field.
2. Files are untrusted: each gives a checked result or BadInput. Pickled weights are never opened.
3. The sampler keeps keys and values of every token, so branches of a tree share their beginning.
4. Random numbers belong to a sample, not to a batch: batching changes log-probs by rounding alone.
Left out: dropout, tensor parallelism, quantised weights. Nothing here needs them.

Chapters: 1 Files   2 Tokenizer   3 Config   4 GPT   5 Sampler   6 Program

Try:  python model.py                                   what sharing a beginning saves; two seconds
      python model.py --model FOLDER --prompt "2+2 is"  goes on from a text, with your own weights
"""
import signal

if __name__ == "__main__":              # Ctrl-C and `| head` end the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(getattr(signal, "SIGPIPE", signal.SIGINT), signal.SIG_DFL)    # not on Windows

import argparse
import json
import math
import os
import re
import sys
import unicodedata
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, groupby, pairwise, takewhile
from pathlib import Path

# Threads that spin while they wait are 10-50x slower beside other processes; torch reads this once
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np  # noqa: E402
import regex  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402


# --------------------------------------------------------------------------------------------------
# 1. Files: JSON and safetensors
# --------------------------------------------------------------------------------------------------
FLOATS = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16)   # dtypes of weights
DTYPES = FLOATS | dict(                                 # also of other tensors in such a file
    F64=torch.float64, F8_E4M3=torch.float8_e4m3fn, F8_E5M2=torch.float8_e5m2, BOOL=torch.bool,
    I64=torch.int64, I32=torch.int32, I16=torch.int16, I8=torch.int8,
    U64=torch.uint64, U32=torch.uint32, U16=torch.uint16, U8=torch.uint8)
LFS = b"version https://git-lfs"
IS_LFS = "is a git-LFS pointer, not the file itself: fetch it with `git lfs pull`"
LORA = ("holds a LoRA adapter (adapter_config.json), not a whole model: merge it into its base "
        "model with peft's merge_and_unload() and save_pretrained()")
NO_WEIGHTS = ("has neither model.safetensors nor model.safetensors.index.json; GGUF is not read, "
              "nor are pickles, which can run code: convert them elsewhere with "
              "save_pretrained(..., safe_serialization=True)")


class BadInput(ValueError):
    """One sentence for the user: what is wrong, where, how to mend it. Programs exit with 2."""


@contextmanager
def about(path):
    """Errors inside become BadInput that names the path: an absent file, a full disk, a failed
    `need`, and what damaged data raise when they are used, such as KeyError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: byte {error.start} is not UTF-8 (the file is damaged, or was "
                       "saved in another encoding)") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError,
            RecursionError, regex.error) as error:
        raise BadInput(f"{path}: damaged or not supported, {error!r:.200}") from error


def need(condition, message: str):
    """ValueError unless the condition holds. (`python -O` would leave out an assert.)"""
    if not condition:
        raise ValueError(message)


def field(obj, key: str, kind, default=None):
    """obj[key], of exactly the type `kind`. Absent or null: the default, if there is one."""
    value = obj.get(key) if isinstance(obj, dict) else None
    value = default if value is None else value
    # `is`, because True is an instance of int: it must not pass for an id or a size
    if type(value) is not kind:         # not need(): to write the value out, each time, takes long
        raise ValueError(f"key {key!r} must be of type {kind.__name__}, not {value!r:.60}")
    return value


def one_of(name: str, value, known):
    """The value. ValueError unless it is one of the known ones."""
    need(value in [*known], f"{name} {value!r:.60} is not supported, only {', '.join(known)}")
    return value


def well_formed(text: str) -> str:
    """Half of a surrogate pair is no character and has no bytes: it becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_json(path, raw=None, kind=dict):
    """What a JSON file holds, or `raw` (then the path is only a name for messages). BadInput: the
    file is absent, a git-LFS pointer, no UTF-8, no JSON, not of this kind, or has a key twice."""
    def unique(pairs) -> dict:
        """dict(pairs). Of two equal keys readers take the first or the last, so neither is safe."""
        need(len(dict(pairs)) == len(pairs), "a key appears twice in one JSON object")
        return dict(pairs)

    with about(path):
        raw = Path(path).read_bytes() if raw is None else raw
        need(not raw.startswith(LFS), IS_LFS)
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique)
        need(isinstance(value, kind), f"holds a JSON {type(value).__name__}, not an object {{...}}")
    return value


def safetensors_header(path) -> tuple:
    """({name: (dtype, shape, begin)} in the order of the data, metadata), fully checked. dtype is
    a key of DTYPES; begin counts bytes of the file.

        8 bytes: N, little-endian | N bytes of JSON | the tensors, without gaps; offset 0 is here"""
    with about(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(len(LFS))
        need(start != LFS, IS_LFS)
        data = 8 + int.from_bytes(start[:8], "little")
        need(data <= min(size, 8 + 100_000_000),
             f"is cut short at {size} bytes, or is no safetensors file but, say, a renamed pickle")
        file.seek(8)
        raw = read_json("header", file.read(data - 8))
        metadata = field(raw, "__metadata__", dict, {})
        need(all(isinstance(text, str) for text in metadata.values()), "odd __metadata__")
        raw.pop("__metadata__", None)
        header = {}
        at = data                                       # the byte where the next tensor must begin
        place = lambda item: (item[1]["data_offsets"], item[0])
        for name, entry in sorted(raw.items(), key=place):
            with about(f"tensor {name!r:.120}"):
                shape = field(entry, "shape", list)
                # (0, 2**40, 2**40) is empty, but its strides overflow in torch: a 0 counts as a 1
                sizes = all(type(i) is int and i >= 0 for i in shape) and len(shape) < 9
                need(sizes and math.prod(i or 1 for i in shape) < 1 << 48, f"odd shape {shape}")
                end = at + math.prod(shape) * DTYPES[entry["dtype"]].itemsize
                need(entry["data_offsets"] == [at - data, end - data], f"data_offsets "
                     f"{entry['data_offsets']} leave a gap, overlap, or do not fit shape and dtype")
            header[name] = (entry["dtype"], tuple(shape), at)
            at = end
        need(at == size, f"has {size} bytes, its header says {at}: cut short or damaged")
    return header, metadata


def read_safetensors(path) -> tuple:
    """({name: CPU tensor}, metadata). No memory map: if a mapped file is cut, the process dies."""
    tensors = {}
    header, metadata = safetensors_header(path)
    with about(path), open(path, "rb") as file:
        for name, (dtype, shape, begin) in header.items():
            raw = torch.empty(math.prod(shape) * DTYPES[dtype].itemsize, dtype=torch.uint8)
            file.seek(begin)
            need(file.readinto(raw.numpy()) == len(raw), f"ended while {name!r:.120} was read")
            tensors[name] = raw.view(DTYPES[dtype]).reshape(shape)
    return tensors, metadata


def write_atomically(path, chunks):
    """Write chunks of bytes. A kill at any moment leaves the old file or the whole new one."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")       # two processes never write to the same one
    with about(f"{path}: cannot be written"):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())                 # the bytes reach the disk before the name
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)           # it is there only after an error


def write_text(path, text: str):
    """Write a text file (UTF-8) atomically."""
    write_atomically(path, [well_formed(text).encode()])


def write_safetensors(path, tensors: dict, metadata=None):
    """Write {name: tensor} atomically. The same tensors give the same bytes: they are sorted by
    width (so each begins at a multiple of its width), then by name."""
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name, tensor in order:
        span = [at, at + tensor.nbytes]
        header[name] = dict(dtype=kinds[tensor.dtype], shape=tensor.shape, data_offsets=span)
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                     # the data begins at a multiple of 8
    flat = (tensor.contiguous().view(-1) for _, tensor in order)
    data = (numbers.view(torch.uint8).numpy(force=True) for numbers in flat)
    write_atomically(path, chain([len(text).to_bytes(8, "little"), text], data))


def weight_files(folder) -> dict:
    """{tensor name: (its file, dtype, shape)} of a model folder: one file, or shards with an index.
    BadInput: no weights, weights of another kind, a missing shard, index and shards disagree."""
    single = "model.safetensors"
    index = "model.safetensors.index.json"
    with about(folder):
        names = {path.name for path in Path(folder).iterdir()}
        need("adapter_config.json" not in names, LORA)
        need(names & {single, index}, NO_WEIGHTS)
        if single in names:                             # it wins over shards, as in transformers
            places = dict.fromkeys(safetensors_header(Path(folder, single))[0], single)
        else:
            places = field(read_json(Path(folder, index)), "weight_map", dict)
        plain = all(re.fullmatch(r"\w[\w.-]*", file) for file in places.values())
        need(plain, "weight_map may hold only file names: a path could point anywhere on the disk")
        held = {}
        for file in {*places.values()}:
            path = Path(folder, file)
            for name, (dtype, shape, _) in safetensors_header(path)[0].items():
                held[name, file] = (path, dtype, shape)
        wrong = sorted(held.keys() ^ places.items())
        need(not wrong, f"{wrong[:1]} is in {index} or in the file, but not in both")
    return {name: entry for (name, _), entry in held.items()}


# --------------------------------------------------------------------------------------------------
# 2. Tokenizer: text -> ids and back, exactly as the makers of a tokenizer.json have it
# --------------------------------------------------------------------------------------------------
# A tokenizer.json says how to cut a text, how to spell the pieces, and which neighbours to merge.
#   byte-level (GPT-2, Llama 3, Qwen, DeepSeek): regular expressions cut, bytes spell
#   SentencePiece (Llama 2, Mistral, Llemma): the file has no cuts, characters spell; a space is the
#       letter "▁", and a character that is not in the vocabulary becomes its bytes
# Both merge in the order of the file's merges. (Ids have another order in some files.)
# GPT-2's alphabet for bytes: 188 are letters as they are, the others the letters from U+0100 on, so
# that no token holds a space or a control character: " the" is written "Ġthe".
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = sorted({*range(256)} - {*PLAIN})
LETTERS = dict(sorted(zip(PLAIN + OTHERS, map(chr, [*PLAIN, *range(256, 324)]))))
BYTES = {letter: byte for byte, letter in LETTERS.items()}
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")         # how SentencePiece writes a byte
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Where a Metaspace puts a "▁" before a text: where a whole text begins, behind an added token
SCHEMES = dict(always=("first", "behind"), first=("first",), never=())


def merge(ids, pairs) -> list:
    """Byte-pair encoding (Sennrich et al., 1508.07909): join two neighbours again and again, the
    pair of lowest rank first, of equal ones the leftmost. pairs: {(left, right): (rank, joined)}.

        merges  0: l l   1: h e   2: he ll      h e l l o  ->  h e ll o  ->  he ll o  ->  hell o

    A pass joins all places of one pair. It stops early if a join makes a pair of lower rank."""
    while True:
        ranks = [pairs[pair] for pair in pairwise(ids) if pair in pairs]
        if not ranks:
            return ids
        best = min(ranks)
        done = []
        for i, id in enumerate(ids):
            if not done or pairs.get((done[-1], id)) != best:
                done.append(id)
                continue
            done[-1] = best[1]
            around = [*done[-2:], *ids[i + 1:i + 2]]    # the new token and its neighbours
            if any(pairs.get(pair, best) < best for pair in pairwise(around)):
                done += ids[i + 1:]
                break
        ids = done


def cut(pattern, text: str) -> list:
    r"""Cut a text at both ends of every match: \d+ cuts "a12b" into "a", "12", "b"."""
    places = [place for match in pattern.finditer(text) for place in match.span()]
    borders = pairwise([0, *places, len(text)])
    return [text[a:b] for a, b in borders if a < b]


def flatten(part, supported: str) -> list:
    """One part of a tokenizer.json as a list without nested Sequences. ValueError: unknown type.

        {"type": "Sequence", "normalizers": [{"type": "NFC"}]}  ->  [{"type": "NFC"}]"""
    if part is None:
        return []
    if part["type"] == "Sequence":                      # each part has another word for its members
        members = [value for value in part.values() if isinstance(value, list)][0]
        return [item for member in members for item in flatten(member, supported)]
    one_of("type", part["type"], supported.split())
    return [part]


class Tokenizer:
    """Text <-> token ids. What a file asks for beyond this class is rejected by its name.
    n_ids, base_ids  largest id + 1, with and without added tokens; a model may have more rows
    bytes            {id: its bytes}; other ids stand for nothing: never sample them
    newline_ids      ids whose bytes hold a newline: they end a step
    eos_ids          ids that end a text, if the folder says so
    begin            ids that a prompt begins with"""
    FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

    def __init__(self, files: dict, folder="tokenizer"):
        self.files = files
        spec, config, older = (read_json(Path(folder, name), files.get(name, b"{}"))
                               for name in self.FILES)
        self.encode_piece = lru_cache(1 << 16)(self._encode_piece)      # words come again and again
        with about(Path(folder, self.FILES[0])):
            self._read_cuts(spec)
            self._read_model(field(spec, "model", dict))
            self._read_ids(field(spec, "added_tokens", list, []))
            self._read_begin(spec.get("post_processor"))
            # DeepSeek asks for its begin token only here (for this class transformers 4 reads it)
            if config.get("add_bos_token") and "Llama" in str(config.get("tokenizer_class")):
                self.begin = self.begin or self._named("bos_token", config, older)
            # does a "▁" come before a text? (To encode "a" also finds damage that shows in use)
            self.strips = self.decode_more(self.encode("a")).startswith(" ")
        self.eos_ids = {*self._named("eos_token", config, older)}

    def _read_cuts(self, spec: dict):
        """self.changes: what is done to a text. self.cuts: patterns, one applied after the other.
        (The engine is `regex`, because re knows no \\p{L}.)"""
        self.changes = flatten(spec.get("normalizer"), "NFC NFD NFKC NFKD Prepend Replace")
        parts = flatten(spec.get("pre_tokenizer"), "Split Digits ByteLevel Metaspace")
        kinds = [part["type"] for part in parts]
        alone = "ByteLevel" not in kinds[:-1] and "Metaspace" not in kinds[1:] + kinds[:-1]
        need(alone, "pre_tokenizer: ByteLevel must be the last step, Metaspace the only one")
        self.byte_level = "ByteLevel" in kinds          # or else SentencePiece
        self.changes += [part for part in parts if part["type"] == "Metaspace"]
        patterns = filter(None, map(self._read_cut, parts))
        # as in Hugging Face's engine: V1 allows [a[b-d]]; MULTILINE: ^ and $ match at every line
        self.cuts = [regex.compile(p, regex.V1 | regex.MULTILINE) for p in patterns]

    def _read_cut(self, part: dict) -> str:
        """The regular expression of one step of the pre-tokenizer; "" does not cut."""
        if part["type"] == "Digits":
            return r"\p{N}" if part.get("individual_digits") else r"\p{N}+"
        if part["type"] == "Split":
            one_of("behavior of a Split", part["behavior"], ["Isolated"])
            pattern = part["pattern"].get("Regex") or regex.escape(part["pattern"]["String"])
            # Hugging Face's engine reads {1,3}+ as ({1,3})+; `regex` reads it as possessive
            return re.sub(r"\{1,\d+\}\+", "+", pattern)
        if part["type"] == "ByteLevel":
            need(part.get("add_prefix_space") is False, "add_prefix_space is not supported")
            return GPT2_PATTERN if part.get("use_regex", True) else ""
        plain = part["replacement"] == "▁" and part.get("split") is False
        need(plain, "Metaspace: only replacement = ▁ and split = false are supported")
        return ""

    def _read_model(self, model: dict):
        """self.vocab: {token: id}. self.pairs: {(left id, right id): (rank, id of both joined)}."""
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            need(not model.get(key), f"model.{key} is not supported")
        need(self.byte_level or model.get("byte_fallback"), "model.byte_fallback must be true")
        self.vocab = vocab = field(model, "vocab", dict)
        lacks = self.byte_level and model.get("unk_token") and not vocab.keys() >= BYTES.keys()
        need(not lacks, "model.unk_token is supported only if vocab has letters for all bytes")
        self.whole_first = model.get("ignore_merges")   # a piece that is a token is not merged
        self.pairs = {}
        no_cut = self.byte_level or self.whole_first    # or a merge crosses the start of a word
        for rank, pair in enumerate(field(model, "merges", list)):
            left, right = pair.split(" ") if isinstance(pair, str) else pair    # "a b", ["a", "b"]
            self.pairs[vocab[left], vocab[right]] = (rank, vocab[left + right])
            no_cut = no_cut or right.startswith("▁") and not left.endswith("▁")
        if not no_cut:                                  # faster: words are cached; ids are the same
            self.cuts.append(regex.compile("▁*[^▁]+"))

    def _read_ids(self, added: list):
        """All ids and their bytes. self.finder: a pattern with one group for each added token. It
        searches the text before normalisation. (The flag `normalized` is ignored: if it were
        obeyed, early Llama 2 tokenizers would not find </s> after a word.)"""
        self.ids = dict(self.vocab)
        patterns = ["(?!)"]                             # matches nothing
        for token in sorted(added, key=lambda token: -len(token["content"])):   # longest first
            name, id = token["content"], token["id"]
            need(name and not token.get("single_word"), f"token {name!r:.60} asks for single_word")
            need(self.ids.setdefault(name, id) == id, f"added token {name!r:.60} has two ids")
            # lstrip, rstrip: the token takes the white space beside it. A match may begin only
            # where white space begins (this is faster) or where the last token ended (\G)
            before = r"(?:(?<!\s)|\G)\s*" if token.get("lstrip") else ""
            after = r"\s*" if token.get("rstrip") else ""
            patterns.append(f"{before}({regex.escape(name)}){after}")
        self.finder = regex.compile("|".join(patterns))
        names = {id: name for name, id in self.ids.items()}
        need(len(names) == len(self.ids), "two tokens have one id")
        need(all(type(id) is int and 0 <= id < 1 << 22 for id in names), "odd ids")
        self.bytes = {id: self._spelled(name) for id, name in names.items()}
        self.byte_ids = {id for id, name in names.items() if BYTE_TOKEN.fullmatch(name)}
        self.n_ids = max(names) + 1
        self.base_ids = max(self.vocab.values()) + 1
        self.newline_ids = [id for id in sorted(names) if b"\n" in self.bytes[id]]

    def _read_begin(self, processor):
        """self.begin: the ids before the text A in a template such as  <s> A </s>."""
        self.begin = []
        for step in flatten(processor, "ByteLevel TemplateProcessing"):
            for item in takewhile(lambda item: "Sequence" not in item, step.get("single", [])):
                self.begin += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
        need(self.bytes.keys() >= {*self.begin}, "post_processor begins a text with an unknown id")

    def _named(self, key: str, config: dict, older: dict) -> list:
        """[id] of the token that tokenizer_config.json, or else the older file, names; or []."""
        token = config.get(key) or older.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        return [id for name, id in self.ids.items() if name == token]

    def _spelled(self, name: str) -> bytes:
        """The bytes that a token stands for: b" the" for Ġthe or ▁the, byte 10 for <0x0A>."""
        if self.byte_level:                             # an added token is written as it is
            letters = BYTES.keys() >= {*name}
            return bytes(map(BYTES.get, name)) if letters else name.encode("utf-8", "replace")
        if byte := BYTE_TOKEN.fullmatch(name):
            return bytes.fromhex(byte[1])
        return name.replace("▁", " ").encode("utf-8", "replace")

    def _pieces(self, text: str, place: str) -> list:
        """Change and cut a text. place: "first" if a whole text begins with it, "behind" if it
        follows an added token, "" if it goes on from another text.

            "the cat" -> ["▁the", "▁cat"] if no merge joins words; GPT2_PATTERN: ["the", " cat"]"""
        for step in self.changes:
            kind = step["type"]
            if kind == "Replace":
                text = text.replace(step["pattern"]["String"], step["content"])
            elif kind == "Prepend":
                text = step["prepend"] + text if place and text else text
            elif kind == "Metaspace":           # a space becomes "▁"; one more is put before a text
                text = text.replace(" ", "▁")
                begins = place in SCHEMES[step["prepend_scheme"]]
                text = "▁" + text if begins and text and text[0] != "▁" else text
            else:
                text = unicodedata.normalize(kind, text)
        pieces = [well_formed(text)]
        for pattern in self.cuts:
            pieces = [part for piece in pieces for part in cut(pattern, piece)]
        return pieces

    def _encode_piece(self, piece: str) -> list:
        """Spell a piece in letters of the vocabulary, then merge. A letter that is not in it is
        spelled in byte tokens; without them it is left out (SmolLM2 has no token for 21 bytes)."""
        if self.byte_level:                             # latin-1: a character for each byte
            piece = piece.encode().decode("latin-1").translate(LETTERS)
        if self.whole_first and piece in self.vocab:
            return [self.vocab[piece]]
        spelling = []
        for letter in piece:
            known = letter in self.vocab
            spelling += [letter] if known else [f"<0x{byte:02X}>" for byte in letter.encode()]
        return merge([self.vocab[part] for part in spelling if part in self.vocab], self.pairs)

    def encode(self, text: str, allow_special=False, begins=True, data=(0, 0)) -> list:
        """Text -> ids. Added tokens count only with allow_special, and not where they touch the
        characters data[0] to data[1]: a question in a template must not open a chat turn.
        begins=False: the text goes on from another one (see encode_more).
            with bytes_only(("<s>",)):  "2<s>"  ->  [50, 60, 115, 62],  allow_special: [50, 256]"""
        spans = [(0, data[0]), (data[1], len(text))] if allow_special else []
        matches = [match for span in spans for match in self.finder.finditer(text, *span)]
        ids = []
        at = 0
        place = "first" if begins else ""
        for match in [*matches, None]:                  # None: the text behind the last one
            for piece in self._pieces(text[at:match and match.start()], place):
                ids += self.encode_piece(piece)
            if match:
                ids.append(self.ids[match[match.lastindex]])    # the group that matched: its name
                at = match.end()
                place = "behind"
        return ids

    def encode_more(self, text: str) -> list:
        """Ids of a text that goes on from another one: no "▁" comes between two steps."""
        return self.encode(text, begins=False)

    def encode_prompt(self, text: str, data=(0, 0)) -> list:
        """Ids of a text that begins here, after `begin`. Added tokens count; data: see encode."""
        ids = self.encode(text, allow_special=True, data=data)
        return ids if ids[:len(self.begin)] == self.begin else self.begin + ids

    def decode_more(self, ids) -> str:
        """Ids that go on from others -> text; bytes that are no UTF-8 become U+FFFD."""
        known = [id for id in map(int, ids) if id in self.bytes]
        text = ""
        for byte_tokens, run in groupby(known, key=self.byte_ids.__contains__):
            raw = b"".join(self.bytes[id] for id in run)
            read = raw.decode("utf-8", "replace")
            spoilt = byte_tokens and read.encode() != raw       # as in HF, by one bad byte of a run
            text += "\ufffd" * len(raw) if spoilt else read
        return text

    def decode(self, ids) -> str:
        """Ids of a whole text -> text, without the space that SentencePiece puts before it. The
        texts of steps come from decode_more: there that space belongs to the text."""
        text = self.decode_more(ids)
        return text.removeprefix(" ") if self.strips else text

    @classmethod
    def from_pretrained(cls, folder):
        """Open a model folder. BadInput: tokenizer.json is absent, damaged or not supported."""
        with about(folder):
            need(Path(folder).is_dir(), "is no folder; give one with config.json, safetensors and "
                 "tokenizer.json (nothing is downloaded, and GGUF is not read)")
            paths = [Path(folder, name) for name in (*cls.FILES, "chat_template.jinja")]
            files = {path.name: path.read_bytes() for path in paths if path.exists()}
            links = [path.name for path in paths if path.is_symlink() and not path.exists()]
            need(not links, f"{links} lead to no file; the cache is incomplete: download it again")
            need(cls.FILES[0] in files, "has no tokenizer.json (GGUF is not read); copy it from "
                 "where the weights are, or, of a run, give one of its models, such as round_1")
        return cls(files, folder)

    def save(self, folder):
        """Write the very bytes that were read: nothing is lost that this class does not read."""
        for name, raw in self.files.items():
            write_atomically(Path(folder, name), [raw])

    @classmethod
    def bytes_only(cls, special=("<|endoftext|>",)):
        """No merges: ids 0 to 255 are the bytes, then special tokens; the first ends a text."""
        step = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
        flags = dict(special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
        added = [dict(id=256 + i, content=name) | flags for i, name in enumerate(special)]
        spec = dict(version="1.0", model=dict(type="BPE", vocab=BYTES, merges=[]),
                    added_tokens=added, pre_tokenizer=step, decoder=step)
        config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=[*special, None][0])
        texts = [json.dumps(part).encode() for part in (spec, config)]
        return cls(dict(zip(cls.FILES, texts)))


# --------------------------------------------------------------------------------------------------
# 3. Config: what a config.json means
# --------------------------------------------------------------------------------------------------
FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
TANH_GELU = partial(F.gelu, approximate="tanh")
ACTIVATIONS = dict(silu=F.silu, relu=F.relu, gelu=F.gelu, gelu_new=TANH_GELU,
                   gelu_pytorch_tanh=TANH_GELU)
GPT2_WORDS = dict(                                      # GPT-2's words: those of the others
    n_embd="hidden_size", n_layer="num_hidden_layers", n_head="num_attention_heads",
    n_inner="intermediate_size", n_positions="max_position_embeddings",
    layer_norm_epsilon="rms_norm_eps", activation_function="hidden_act")
# Fields that change the mathematics in ways that this file does not have. Where one of them is not
# null, false or 0, the model would run and write fluent nonsense: it is refused.
STRANGE = re.compile("quantization_config|auto_map|expert|moe|softcapping|query_pre_attn|qk_norm|"
                     "logit_scale|interleaved|cross_attention|encoder_decoder|inverse_layer_idx")


class GPTConfig:
    """Everything `GPT` needs to know, in one spelling for all families."""

    @staticmethod
    def tiny(vocab_size: int, hidden_size=128, layers=3, max_positions=512):
        """A small Qwen3: with norms of queries and keys it learns from a fifth fewer examples than
        a llama. Four query heads share a key/value head: that samples 2.7 times faster."""
        return GPTConfig.from_json(dict(
            architectures=["Qwen3ForCausalLM"], model_type="qwen3", torch_dtype="float32",
            vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=hidden_size * 5 // 2,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=1,
            head_dim=hidden_size // 4, max_position_embeddings=max_positions, rms_norm_eps=1e-5,
            rope_theta=1e4, hidden_act="silu", tie_word_embeddings=False,
            eos_token_id=vocab_size - 1))

    @classmethod
    def from_json(cls, raw: dict, where="config.json"):
        """Read a config.json, old or new spelling. BadInput names the field (in llama's words)."""
        c = cls()
        c.raw = raw                                     # the file as it was read
        with about(where):
            c.family = one_of("model_type", raw.get("model_type"), FAMILIES)
            for key, value in raw.items():
                need(not (value and STRANGE.search(key)),
                     f"{key} = {value!r:.60} is not supported; use a plain checkpoint without it")
            need(raw.get("scale_attn_weights", True), "scale_attn_weights must be true")
            raw = {GPT2_WORDS.get(k, k): v for k, v in raw.items() if v is not None}
            c.gpt2 = c.family == "gpt2"     # LayerNorm, learned positions, no gate, biases
            can_have = c.family in ("gpt2", "llama", "qwen3")
            c.out_bias = can_have and field(raw, "attention_bias", bool, c.gpt2)
            c.qkv_bias = c.out_bias or c.family == "qwen2"  # Qwen2's config never says so
            c.mlp_bias = can_have and field(raw, "mlp_bias", bool, c.gpt2)
            c.vocab_size = number(raw, "vocab_size")        # V, may exceed the ids of the tokenizer
            c.hidden_size = number(raw, "hidden_size")                  # C
            c.layers = number(raw, "num_hidden_layers", most=512)       # L
            c.heads = number(raw, "num_attention_heads")                # H query heads
            c.kv_heads = number(raw, "num_key_value_heads", c.heads)    # G; H / G queries share one
            need(c.heads % c.kv_heads == 0, "num_key_value_heads must divide num_attention_heads")
            width = 128 if c.family == "qwen3" else c.hidden_size // c.heads
            c.head_dim = number(raw, "head_dim", width)                 # D
            need(c.gpt2 or c.head_dim % 2 == 0, f"head_dim = {c.head_dim} must be even to rotate")
            inner = 4 * c.hidden_size if c.gpt2 else None
            c.intermediate_size = number(raw, "intermediate_size", inner)
            c.max_positions = number(raw, "max_position_embeddings", 1024 if c.gpt2 else 2048)
            c.norm_eps = number(raw, "rms_norm_eps", 1e-5 if c.gpt2 else 1e-6, most=1.0)
            norm = nn.LayerNorm if c.gpt2 else nn.RMSNorm
            c.norm = partial(norm, c.hidden_size, c.norm_eps)       # makes a norm of width C
            act = raw.get("hidden_act", "gelu_new" if c.gpt2 else "silu")
            c.activation = one_of("hidden_act", act, ACTIVATIONS)
            c.tied = field(raw, "tie_word_embeddings", bool, c.gpt2)    # the head is the embedding
            c.frequencies = _frequencies(raw, c.head_dim)
            c.windows = _windows(c)                     # per layer: so many tokens, or None
        return c


def number(given: dict, key: str, default=None, most=1 << 20):
    """given[key], or the default. ValueError unless it is above 0, at most `most`, and a whole
    number (or a float if `most` is a float). (With 2**20, bytes of any tensor fit 64 bits.)"""
    value = given.get(key, default)
    kind = type(most)                                   # not isinstance: True is an instance of int
    need(type(value) in (int, kind) and 0 < value <= most,
         f"{key} must be of type {kind.__name__}, above 0 and at most {most}, not {value!r:.40}")
    return kind(value)


def _frequencies(raw: dict, width: int):
    """(D/2,) radians per position, fp32: how fast rotary positions turn each pair of dimensions.
    New files have `rope_parameters`, old ones rope_theta and `rope_scaling`. Type `linear` divides
    all by `factor`; `llama3` divides those of long waves and keeps those of short ones."""
    rope = field(raw, "rope_scaling", dict, {}) or field(raw, "rope_parameters", dict, {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    need("factor" not in rope or {"type", "rope_type"} & {*rope}, "rope_scaling lacks its type")
    one_of("rope type", kind, ["default", "linear", "llama3"])
    rope = dict(rope_theta=1e4) | raw | rope
    need(rope.get("partial_rotary_factor") in (None, 1.0), "partial_rotary_factor must be 1")
    need("full_attention" not in rope, "rope_parameters that differ by layer are not supported")
    given = partial(number, rope, most=1e12)
    inverse = 1.0 / given("rope_theta") ** (torch.arange(0, width, 2) / width)
    if kind == "default":
        return inverse
    factor = given("factor")
    keep = 0.0                          # 1: keep the frequency, 0: divide it; between: a blend
    if kind == "llama3":
        low, high = given("low_freq_factor"), given("high_freq_factor")
        turns = given("original_max_position_embeddings") * inverse / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * inverse + (1 - keep) * inverse / factor


def _windows(c: GPTConfig) -> tuple:
    """The sliding window of each layer. Mistral: an absent key means 4096, null means none. Qwen:
    only with use_sliding_window, on the layers of layer_types, else from max_window_layers on."""
    raw = c.raw
    qwen = c.family.startswith("qwen") and field(raw, "use_sliding_window", bool, False)
    size = None
    if raw.get("sliding_window", 4096) is not None and (qwen or c.family == "mistral"):
        size = number(raw, "sliding_window", 4096)
    first = field(raw, "max_window_layers", int, 28) if qwen else 0
    kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(c.layers)]
    kinds = field(raw, "layer_types", list, kinds)
    need(len(kinds) == c.layers, f"layer_types must name the attention of all {c.layers} layers")
    windows = dict(sliding_attention=size, full_attention=None)
    return tuple(windows[one_of("layer_types", kind, windows)] for kind in kinds)


# --------------------------------------------------------------------------------------------------
# 4. GPT: one transformer for all families
# --------------------------------------------------------------------------------------------------
# Shapes: B rows, T new tokens, S keys (cached and new), C width, V vocabulary,
#         H query heads, G key/value heads, D width of a head
def pick_device(name=None) -> torch.device:
    """The device of that name; "" or None: CUDA if there is one, else the CPU. Or BadInput."""
    count = torch.cuda.device_count()
    here = ["cuda"] * (count > 0) + ["cpu"] + [f"cuda:{i}" for i in range(count)]
    name = str(name or here[0])
    if name not in here:
        raise BadInput(f"--device {name}: this PyTorch sees only {', '.join(here)}; leave the flag "
                       "out, or name one of these.")
    device = torch.device(name)
    if device.index:
        torch.cuda.set_device(device)           # CUDA graphs are recorded on the current device
    return device


def rotate(x, cos, sin):
    """Rotary positions (RoFormer, 2104.09864): x (B, T, heads, D); cos, sin (B, T, 1, D).
    Dimension i is paired with i + D/2, as in HF files; the paper's i, i + 1 gives gibberish. Halves
    a, b of x become (a cos - b sin, b cos + a sin); `sin` comes with its first half negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attend(q, k, v, bias):
    """Softmax attention with grouped heads: q (B, H, T, D); k, v (B, G, S, D); bias (B or 1, 1, T,
    S) of 0 and -inf -> (B, H, T, D). Two batched products over the G heads: the H/G query heads of
    a group are more rows of one product, so k and v are never repeated.

    On a CPU torch's own attention is faster for long texts and in half precision, but slower for
    T = 1 in fp32: so it serves all but that. On an H200 sampling takes 5 to 16% less time with it,
    but its cuDNN gradients (torch 2.11) can be NaN where T % 128 is 64: pytorch issue 196678."""
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    if not q.is_cuda and (T > 1 or q.dtype.itemsize < 4):
        return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)
    grouped = q.reshape(B, G, H // G * T, D) * D ** -0.5
    scores = (grouped @ k.transpose(-1, -2)).view(B, H, T, S) + bias
    weights = torch.softmax(scores, -1).view(B, G, H // G * T, S)
    return (weights @ v).view(B, H, T, D)


class Block(nn.Module):
    """One layer: attention, then MLP, each added to the residual stream. Names as in HF's llama."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.head_dim, self.act = c.head_dim, ACTIVATIONS[c.activation]
        C, inner = c.hidden_size, c.intermediate_size
        width, kv_width = c.heads * c.head_dim, c.kv_heads * c.head_dim
        qwen3 = c.family == "qwen3"
        head_norm = partial(nn.RMSNorm, c.head_dim, c.norm_eps) if qwen3 else nn.Identity
        self.input_layernorm = c.norm()
        self.self_attn = nn.ModuleDict(dict(
            q_proj=nn.Linear(C, width, c.qkv_bias),
            k_proj=nn.Linear(C, kv_width, c.qkv_bias),
            v_proj=nn.Linear(C, kv_width, c.qkv_bias),
            o_proj=nn.Linear(width, C, c.out_bias),
            q_norm=head_norm(), k_norm=head_norm()))
        self.post_attention_layernorm = c.norm()
        gate = {} if c.gpt2 else dict(gate_proj=nn.Linear(C, inner, c.mlp_bias))
        self.mlp = nn.ModuleDict(gate | dict(
            up_proj=nn.Linear(C, inner, c.mlp_bias),
            down_proj=nn.Linear(inner, C, c.mlp_bias)))

    def forward(self, x, turn, bias, layer, cache):
        """x (B, T, C) -> same. turn: cos, sin of `rotate`; bias: `attend`; cache: `GPT.forward`."""
        at, mlp = self.self_attn, self.mlp
        y = self.input_layernorm(x)
        heads = (-1, self.head_dim)
        q = at.q_norm(at.q_proj(y).unflatten(-1, heads))                # (B, T, H, D)
        k = at.k_norm(at.k_proj(y).unflatten(-1, heads))                # (B, T, G, D)
        v = at.v_proj(y).unflatten(-1, heads)                           # (B, T, G, D)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        k, v = cache(layer, k, v)                                       # (B, G, S, D)
        mixed = attend(q.transpose(1, 2), k, v, bias)                   # (B, H, T, D)
        x = x + at.o_proj(mixed.transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        up = mlp.up_proj(y)
        gated = self.act(mlp.gate_proj(y)) * up if "gate_proj" in mlp else self.act(up)
        return x + mlp.down_proj(gated)


# Parts of the network in our words, which are those of HF's llama files, and in GPT-2's files.
GPT2_NAMES = dict(
    model="transformer", embed_tokens="wte", embed_positions="wpe", layers="h", norm="ln_f",
    self_attn="attn", input_layernorm="ln_1", post_attention_layernorm="ln_2", q_proj="c_attn",
    k_proj="c_attn", v_proj="c_attn", o_proj="c_proj", up_proj="c_fc", down_proj="c_proj")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")  # in old files; no weights


class GPT(nn.Module):
    """A decoder-only language model; `config` says which. Parameters have HF llama names."""
    device = property(lambda self: self.model.embed_tokens.weight.device)
    dtype = property(lambda self: self.model.embed_tokens.weight.dtype)

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, self.model = config, nn.Module()
        # not nn.Embedding(...): it draws random numbers, which on "meta" takes a second
        embedding = partial(nn.Embedding.from_pretrained, freeze=False)
        self.model.embed_tokens = embedding(torch.zeros(config.vocab_size, config.hidden_size))
        if config.gpt2:
            zeros = torch.zeros(config.max_positions, config.hidden_size)
            self.model.embed_positions = embedding(zeros)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.model.norm = config.norm()
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.frequencies = config.frequencies   # no buffer: .to(bfloat16) must not round them
        self.generation = {}      # generation_config.json, if there is one
        self.saved_as = {}        # {tensor name in the file: its dtype there}
        self._masters = None      # see `masters`
        self.stop_ids, self.end_id, self.id_bias = frozenset(), None, None      # these: see `bind`
        self.bound_to = None      # tokenizer of `bind`: a Sampler keeps stop_ids that you change

    def initialise(self, seed: int):
        """Random weights for training from scratch: normal with deviation 1/sqrt(fan-in). Layers
        that write to the residual stream start smaller, or its variance grows with depth; so do
        embeddings, for a tied one is also the head."""
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

    def forward(self, ids, positions=None, mask=None, cache=None):
        """Hidden states after the last norm: ids (B, T) -> (B, T, C).
        positions (B, T): depth of each token in its own text; default 0 to T-1. mask (B, T, S)
        bool, True = may see; default causal. In a row that holds a whole tree a token sees its
        ancestors and itself. A sliding window counts depth: position(query) - position(key).
        cache(layer, k, v) stores new keys and values, (B, T, G, D) each, and returns all of them
        as (B, G, S, D); column s of a row holds the token at position s."""
        B, T = ids.shape
        if positions is None:
            positions = torch.arange(T, device=ids.device).expand(B, T)
        if mask is None:
            mask = torch.ones(1, T, T, dtype=torch.bool, device=ids.device).tril()
        keys = positions                                # (B, S)
        if cache is not None:
            keys = torch.arange(mask.shape[-1], device=ids.device)[None]
        cache = cache or (lambda layer, k, v: (k.transpose(1, 2), v.transpose(1, 2)))
        x = self.model.embed_tokens(ids)                # (B, T, C)
        if self.config.gpt2:
            x, turn = x + self.model.embed_positions(positions), None
        else:
            self.frequencies = self.frequencies.to(ids.device)  # no graph records a copy from a CPU
            # (B, T, 1, D/2), in fp32: bf16 does not hold every whole number above 256
            angle = positions[..., None, None].float() * self.frequencies
            cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
            turn = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)        # (B, T, 1, D)
        bias = {}
        for window in set(self.config.windows):         # one bias for all layers with this window
            seen = mask
            if window is not None:
                seen = mask & (positions[:, :, None] - keys[:, None, :] < window)
            zeros = torch.zeros_like(seen, dtype=x.dtype)
            bias[window] = zeros.masked_fill_(~seen, -math.inf)[:, None]        # (B, 1, T, S)
        for i, block in enumerate(self.model.layers):
            x = block(x, turn, bias[self.config.windows[i]], i, cache)
        return self.model.norm(x)

    def logits(self, hidden, bias=None):
        """hidden (..., C) -> (..., V), also for rows of the head that are no token."""
        head = self.model.embed_tokens if self.config.tied else self.lm_head
        return F.linear(hidden, head.weight, bias)

    def all_logps(self, hidden):
        """Log-probs in fp32 over the tokenizer's ids, (..., C) -> (..., V); other ids have -inf.
        Sampling and training both use these, so that log-probs mean the same in both."""
        # as a bias of the product the -inf costs no pass over all logits
        bias = None if self.id_bias is None else self.id_bias.to(hidden)
        return self.logits(hidden, bias).log_softmax(-1, dtype=torch.float32)

    def bind(self, tokenizer):
        """Learn from the tokenizer which ids exist, and at which ids text ends: all that config,
        generation_config or tokenizer call end-of-text (each is incomplete in some release).
        BadInput: the model lacks a row for an id of the vocabulary or of `begin`."""
        rows = self.config.vocab_size
        known = {id for id in tokenizer.bytes if id < rows}
        if tokenizer.base_ids > rows or not known >= {*tokenizer.begin}:
            raise BadInput(f"The tokenizer has {tokenizer.n_ids} ids and the model {rows} rows: "
                           "they do not belong together; copy the model's own tokenizer.json.")
        self.id_bias = None                             # or (V,): -inf at padding rows and holes
        if len(known) < rows:
            bias = [0.0 if i in known else -math.inf for i in range(rows)]
            self.id_bias = torch.tensor(bias, device=self.device)
        ends = sorted(tokenizer.eos_ids)
        for source in (self.config.raw, self.generation):
            named = source.get("eos_token_id")
            ends += named if isinstance(named, list) else [named]
        ends = [i for i in ends if type(i) is int and i in known]
        self.stop_ids, self.bound_to = frozenset(ends), tokenizer
        self.end_id = ends[0] if ends else None
        return self

    def _in_file(self, weights: dict, held=()) -> dict:
        """{tensor name in a file: its parts}, the embedding first. A part is a view of a tensor in
        `weights` (a tied head: a copy). held: tensor names of files that exist; () for a new model.

        Llama files have our names. GPT-2 files store linear weights transposed, (in, out), and q, k
        and v as one tensor. Some leave out the prefix "transformer.":
            transformer.h.0.attn.c_attn.weight: [model.layers.0.self_attn.q_proj.weight.t(), k, v]
        """
        gpt2, parts = self.config.gpt2, {}
        prefix = "transformer." if gpt2 else "model."
        bare = held and not any(name.startswith(prefix) for name in held)
        for name, weight in weights.items():
            words = [GPT2_NAMES.get(word, word) if gpt2 else word for word in name.split(".")]
            file_name = ".".join(words).removeprefix(prefix if bare else "")
            weight = weight.t() if gpt2 and ".c_" in file_name else weight      # a bias stays
            parts.setdefault(file_name, []).append(weight.detach())
        if self.config.tied and HEAD in held:           # the embedding a second time
            parts[HEAD] = [weights[EMBEDDING].detach().clone()]
        return parts

    def _fitting(self, folder) -> dict:
        """weight_files(folder), if they fit this model in names and shapes. Every tensor is used or
        is a known buffer; what is missing or left over is listed."""
        files = weight_files(folder)
        plan = self._in_file(dict(self.named_parameters()), files)
        missing = sorted(plan.keys() - files.keys())
        extra = sorted(n for n in files.keys() - plan.keys() if not BUFFERS.search(n))
        with about(folder):
            need(not missing and not extra, "the weights do not fit config.json (a model without "
                 f'{HEAD} must say "tie_word_embeddings": true): missing {len(missing)} '
                 f"{missing[:4]}, left over {len(extra)} {extra[:4]}")
            for name, parts in plan.items():
                _, kind, shape = files[name]
                want = *parts[0].shape[:-1], sum(part.shape[-1] for part in parts)
                need(shape == want and kind in FLOATS, f"{name} is {kind} {shape}, and config.json "
                     f"asks for {', '.join(FLOATS)} of {want}: they do not belong together")
        return {name: files[name] for name in plan}

    def _read(self, files: dict, weights: dict):
        """Copy the tensors of files into weights, {parameter name: tensor}, one shard at a time."""
        plan = self._in_file(weights, files)
        for path in {path for path, *_ in files.values()}:
            tensors, _ = read_safetensors(path)
            for name in plan.keys() & tensors.keys():
                pieces = tensors[name].chunk(len(plan[name]), -1)       # q, k, v of GPT-2
                for part, piece in zip(plan[name], pieces):
                    with about(path):
                        # both are NaN if one is. isfinite().all() takes a CPU 20 times as long
                        finite = all(extreme.isfinite() for extreme in piece.aminmax())
                        need(finite, f"{name} holds NaN or infinity")
                    part.copy_(piece)
        if self.config.tied and HEAD in plan:
            twin, = plan[HEAD]
            with about(files[HEAD][0]):
                need(torch.equal(twin, weights[EMBEDDING]), f"{HEAD} differs from the embedding; "
                     'set "tie_word_embeddings": false in config.json')

    @classmethod
    def from_pretrained(cls, folder, device=None, dtype=None):
        """Open a HF-format folder. dtype None: fp32 on a CPU, the file's own on CUDA. BadInput:
        config or weights are missing, damaged, not supported, or do not fit each other."""
        device = pick_device(device)
        path = Path(folder, "config.json")
        config = GPTConfig.from_json(read_json(path), path)
        with torch.device("meta"):                      # shapes without memory
            model = cls(config)
        files = model._fitting(folder)
        model.saved_as = {name: DTYPES[kind] for name, (_, kind, _) in files.items()}
        own = next(iter(model.saved_as.values()))       # half precision is slow on a CPU
        dtype = dtype or (torch.float32 if device.type == "cpu" else own)
        model = model.to(dtype).to_empty(device=device)
        model._read(files, dict(model.named_parameters()))
        path = Path(folder, "generation_config.json")
        model.generation = read_json(path) if os.path.lexists(path) else {}
        return model

    def masters(self) -> dict:
        """{parameter name: fp32 weights}: what an optimiser updates. They are the parameters
        themselves or, in half precision, copies: bf16 has no number between 1 and 1.0078, so it
        would lose small updates."""
        if self.dtype == torch.float32:
            return dict(self.named_parameters())
        if self._masters is None:
            self._masters = {name: p.detach().float().requires_grad_()
                             for name, p in self.named_parameters()}
        return self._masters

    @torch.no_grad()
    def from_masters(self):
        """Round the masters into the parameters."""
        for name, master in self.masters().items():
            self.get_parameter(name).copy_(master)

    def load_weights(self, folder):
        """Take over a folder's weights in place, exact in the masters. BadInput: another shape."""
        self._read(self._fitting(folder), self.masters())
        self.from_masters()

    def save_pretrained(self, folder, dtype=None):
        """Write config, generation_config and weights (the masters') in HF's format, with the names
        of the folder that the model came from. dtype None: with the dtypes of that folder, too.
        After training give torch.float32: bf16 would round most of a small update away."""
        config = dict(self.config.raw)
        if dtype is not None:
            key = "torch_dtype" if "torch_dtype" in config else "dtype"
            config[key] = str(dtype).removeprefix("torch.")
        for name, raw in ("config.json", config), ("generation_config.json", self.generation):
            if raw:
                write_text(Path(folder, name), json.dumps(raw, indent=2) + "\n")
        tensors = {}
        weights = self._masters or dict(self.named_parameters())
        for name, parts in self._in_file(weights, self.saved_as).items():
            whole = torch.cat(parts, -1) if len(parts) > 1 else parts[0]    # cat would copy it
            tensors[name] = whole.to("cpu", dtype or self.saved_as.get(name, torch.float32))
        write_safetensors(Path(folder, "model.safetensors"), tensors, {"format": "pt"})


# --------------------------------------------------------------------------------------------------
# 5. Sampler: continue many prefixes at once, run the model on each token once
# --------------------------------------------------------------------------------------------------
# Shapes: P slots of the store, R rows, T new tokens, S columns of the widest row, L layers; others
#         as in chapter 4. To encode a token: run the model on it (Tokenizer.encode: text to ids)
PREFILL_TOKENS = 8192             # tokens that are encoded at once; bounds the attention scores
GRAPH_COLUMNS = 64                # widths are rounded up to a multiple of this: fewer graphs
GRAPH_ROWS = 16                   # fewer rows are rounded up (64 take only 1.3 times as long as 1)


@dataclass
class Request:
    """One continuation to sample, and what becomes of it. It is submitted once; it has ended when
    `why` is set. To go on from there, append `slots` to `path`."""
    path: np.ndarray              # (length,) addresses of the prefix's tokens in the store
    seed: int                     # 64 bits; the draw of token t depends on (seed, t) alone
    max_tokens: int               # `submit` lowers it to what the context has room for
    greedy: bool = False          # argmax, whatever the temperature of the others
    line: str = ""                # the unfinished last line of path + ids[:read]
    read: int = 0                 # so many ids are read already
    slots: list = None            # (n,) addresses of the sampled tokens; an array once it has ended
    ids: np.ndarray = None        # (n,) sampled ids, the end-of-text id included
    logps: np.ndarray = None      # (n,) log-probs at temperature 1 over the tokenizer's ids
    why: str = ""                 # "eos", "answer" (the final line is written), "length" or "step"


# What `advance` needs of each live row, as arrays: a Python loop over rows is slow
LIVE = np.dtype([
    ("request", object),
    ("seed", np.uint64),                # of its draws
    ("greedy", int),                    # 1: argmax
    ("last", int),                      # slot of its last token; `_encode_drawn` encodes it
    ("start", int),                     # length of its prefix
    ("columns", int),                   # tokens of its text so far: columns that it fills in `work`
    ("stop_at", int)])                  # columns at which it stops at the latest

MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15                             # 2**64 / the golden ratio


def splitmix64(z):
    """The last steps of the random number generator of that name, for an int or uint64 array."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def mix(*parts: int) -> int:
    """Hash whole numbers to a 64-bit seed: mix(seed of a tree, node, sample)."""
    z = 0
    for part in parts:
        z = splitmix64(((z ^ (int(part) & MASK64)) + GOLDEN) & MASK64)
    return z


def uniforms(seeds, t):
    """(R,) numbers in [0, 1): the t-th draw of each seed, by splitmix64 with t as its counter. A
    row draws the same numbers whoever else is in the batch, and after a restart."""
    return (splitmix64(seeds + (t.astype(np.uint64) + 1) * GOLDEN) >> 11) * 2.0 ** -53


def step_rule(kind: str, tokenizer):
    """When is a step, the unit of all trees, over? Returns a function (ids so far -> bool) and the
    most tokens of a step. A line ends with the first token that holds a newline, a paragraph with
    an empty line that follows a formula (a digit and a "="), kind "16" after 16 tokens. The
    function is called for nearly every token, so it must be cheap. BadInput: another kind."""
    newline = set(tokenizer.newline_ids)

    def paragraph(ids):
        """Text is made of the ids only where a newline came."""
        text = tokenizer.decode_more(ids) if ids[-1] in newline else ""
        return text.endswith("\n\n") and "=" in text and bool(re.search(r"\d", text))
    rules = dict(line=lambda ids: ids[-1] in newline, paragraph=paragraph)
    if kind.isdecimal() and int(kind) > 0:
        return (lambda ids: len(ids) >= int(kind)), int(kind)
    if kind not in rules:
        raise BadInput(f"--unit {kind}: a step is a line, a paragraph or a number of tokens.")
    return rules[kind], math.inf


def record(compute, beside):
    """Run `compute`, then record its CUDA kernels as a graph. graph.replay() runs them again: the
    same addresses, the data of that moment. beside: a graph to share scratch memory with."""
    compute()                           # cuBLAS takes its workspace, which a recording may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=beside and beside.pool()):
        compute()
    return graph


class Sampler:
    """Continues prefixes for one model, and keeps keys and values of every encoded token.

    Each token has an address ("slot") in a store that only grows. The store holds the token's key
    and value in each layer and its last hidden state. A prefix is the list of its tokens' slots:

        question  0 1 2 3 --+-- 4 5 6      path of the upper branch: 0 1 2 3 4 5 6
                            `-- 7 8        path of the lower one:    0 1 2 3 7 8

    To continue a path, its keys and values are copied into a row of the working cache. Those of a
    new token go into that row and into the store. So a token is encoded once, however many branches
    hang from it. Texts that are given (`prompt`, `follow`) share slots; two samples never do.
    `reset` after every change of the weights.

    slots: size of the store at first. rows: rows that are decoded at once. finished(line) -> bool:
    is the solution over with this line? step: see `step_rule`."""

    def __init__(self, model: GPT, tokenizer, slots: int, rows=256, finished=None, step="line"):
        self.model = model if model.bound_to is tokenizer else model.bind(tokenizer)
        self.tokenizer, self.rows = tokenizer, rows
        self.finished = finished or (lambda line: False)
        self.newline = set(tokenizer.newline_ids)
        self.step_over, self.step_tokens = step_rule(step, tokenizer)
        self.counts = dict(prompt=0, sampled=0, encoded=0)              # tokens
        self.use_graphs = model.device.type == "cuda"   # see `_replay`
        self.reset(slots)

    def reset(self, slots=None):
        """Forget all tokens; the counts stay. slots: new size of the store; 1 frees its memory."""
        c = self.model.config
        # not torch.empty: a masked column has weight 0, and 0 * NaN would be NaN
        zeros = partial(torch.zeros, dtype=self.model.dtype, device=self.model.device)
        if slots is not None:
            self.store = zeros(2, c.layers, slots, c.kv_heads, c.head_dim)  # (2, L, P, G, D)
            self.hidden = zeros(slots, c.hidden_size)   # (P, C)
            self.ids = np.zeros(slots, np.int64)        # (P,)
            self.logps = np.zeros(slots, np.float32)    # (P,) of the sampled ones
        self.encoded = np.zeros(len(self.ids), bool)    # (P,)
        self.used, self.trie = 0, {}                    # trie: {(slot above, id): slot}
        self.waiting = []                               # requests
        self.live = np.zeros(0, LIVE)                   # (R,), in the order of the rows of `work`
        # ids at which a row may stop before its last column
        self.may_stop = np.isin(np.arange(c.vocab_size), [*self.newline | self.model.stop_ids])
        if slots is not None or not self.use_graphs:
            # CPU: from size 0 again, so a rerun gives the same bytes. CUDA: graphs need `work`
            self.work = zeros(2, c.layers, 0, c.kv_heads, 0, c.head_dim)    # R = S = 0
            self.graphs = {}                            # (rows, columns): (numbers, graph)

    def prompt(self, ids):
        """Slots of a text, (length,); texts that begin alike share slots. Nothing is encoded yet.
        BadInput: no id, or no room for an answer."""
        limit = self.model.config.max_positions
        if not 0 < len(ids) < limit:
            raise BadInput(f"A question of {len(ids)} tokens does not fit a context of {limit}; "
                           "shorten it or leave it out (an empty one has nothing to go on from).")
        return self.follow(np.zeros(0, np.int64), ids)

    def follow(self, path, ids):
        """Slots of `path` and of a given text behind it, such as a judge's question: (length,).
        Example: behind slots 0 1 the ids [65, 66] give 0 1 2 3, and then the ids [65, 67] give
        0 1 2 4. BadInput: an id without a row in the model, or a text beyond the context."""
        c, length = self.model.config, len(path) + len(ids)
        most = max(ids, default=0)
        if length > c.max_positions or most >= c.vocab_size:
            raise BadInput(f"A text of {length} tokens with ids up to {most} does not fit "
                           f"a model of {c.max_positions} positions and {c.vocab_size} ids.")
        path = path.tolist()
        for token in ids:
            place = (path[-1] if path else -1, token)
            if place not in self.trie:
                slot, = self._take(1).tolist()
                self.trie[place], self.ids[slot] = slot, token
                self.counts["prompt"] += 1
            path.append(self.trie[place])
        return np.array(path)

    def extend(self, requests: list, temperature=1.0, whole=True, progress=None) -> list:
        """Complete the requests, and return them: `submit`, and `advance` until all have stopped.
        For the other arguments see `advance`. ValueError while others wait for what they
        submitted."""
        need(not (len(self.live) or self.waiting),
             "a search waits for answers of this sampler; if it broke off, call reset()")
        self.encode([request.path for request in requests])             # fewer, larger forwards
        self.submit(requests)
        while not all(request.why for request in requests):
            self.advance(temperature, whole, progress)
        return requests

    def submit(self, requests: list):
        """Queue requests, which `advance` completes. ValueError: one was submitted before."""
        need(all(one.slots is None for one in requests), "submit a request once; make a new one")
        for request in requests:
            room = self.model.config.max_positions - len(request.path)
            request.max_tokens = min(request.max_tokens, room)
            need(request.max_tokens > 0, "a request leaves no room for a token")
            request.slots = []
        self.waiting += requests

    @torch.no_grad()
    def advance(self, temperature=1.0, whole=True, progress=None) -> None:
        """Sample a token for every live row, encode it, and take out the rows that stop. Waiting
        rows take their places: nobody waits for the longest row of a batch. ValueError: there is
        nothing to do. temperature 0: argmax. whole False: stop where a step is over, too.
        progress(n): n tokens were sampled.
        Nothing is read from the device before the tokens' encoding has been started there. So a
        GPU encodes while this function sees which rows stop. (Their last tokens are encoded, too: a
        search goes on from them, and critics read them.)"""
        self._admit(whole)
        live = self.live
        need(len(live), "no request waits; was the sampler reset in between?")
        drawn = self._draw(temperature)                 # ids and log-probs, on the device
        copies = [numbers.to("cpu", non_blocking=True) for numbers in drawn]
        copied = torch.cuda.current_stream().record_event() if drawn[0].is_cuda else None
        slots = self._take(len(live))
        live["last"] = slots
        live["columns"] += 1
        self._encode_drawn(drawn[0])
        if copied:
            copied.synchronize()                        # waits for the draw, not for the encoding
        tokens, logps = (numbers.numpy() for numbers in copies)
        self.ids[slots], self.logps[slots] = tokens, logps
        for request, slot in zip(live["request"], slots.tolist()):
            request.slots.append(slot)
        gone = []                                       # places of the rows that stop
        # only these can stop: stop_at covers max_tokens, the context and steps of so many tokens
        for i in np.flatnonzero(self.may_stop[tokens] | (live["columns"] >= live["stop_at"])):
            request = live["request"][i]
            request.why = self._why(request, self.ids[request.slots].tolist(), whole)
            if request.why:
                request.slots = np.array(request.slots)
                request.ids, request.logps = self.ids[request.slots], self.logps[request.slots]
                gone.append(i)
        self.counts["sampled"] += len(slots)
        if progress is not None:
            progress(len(slots))
        if gone:
            self._close(gone)

    def _admit(self, whole: bool):
        """Let waiting rows in if there is room for an eighth of all rows, or for all that wait: so
        one gather and one forward serve many rows."""
        count = min(self.rows - len(self.live), len(self.waiting))
        if count < max(1, min(self.rows // 8, len(self.waiting))):      # too few: wait for more
            return
        new, self.waiting = self.waiting[:count], self.waiting[count:]
        paths = [request.path for request in new]
        self.encode(paths)
        records = []
        for request, path in zip(new, paths):
            start = len(path)
            stop_at = start + min(request.max_tokens, math.inf if whole else self.step_tokens)
            seed, greedy = request.seed, request.greedy
            records.append((request, seed, greedy, path[-1], start, start, stop_at))
        first = len(self.live)
        self.live = np.concatenate((self.live, np.array(records, LIVE)))
        self._make_room()
        given = self._gather(paths)                     # (2, L, count, G, S, D)
        self.work[:, :, first:first + count, :, :given.shape[4]] = given

    def _draw(self, temperature: float) -> tuple:
        """Next ids of the live rows, their log-probs at temperature 1: (R,) on the device."""
        hidden = self.hidden[self._to_device(self.live["last"])]        # (R, C)
        logps = self.model.all_logps(hidden)            # (R, V)
        if temperature == 0:
            tokens = logps.argmax(-1)
        elif temperature == 1:                          # the usual case: no second softmax
            tokens = self._pick(logps.exp())
        else:                                           # below .001 counts as .001
            tokens = self._pick(torch.softmax(logps / max(temperature, 1e-3), -1))
        if self.live["greedy"].any():
            greedy = self._to_device(self.live["greedy"]) > 0
            tokens = torch.where(greedy, logps.argmax(-1), tokens)
        return tokens, logps.gather(-1, tokens[:, None])[:, 0]

    def _pick(self, chances):
        """chances (R, V) -> ids (R,), each where the row's own random number falls in the sums:
            chances .2 .5 .3 -> sums .2 .7 1.0; u = .6 draws token 1"""
        live = self.live
        u = uniforms(live["seed"], live["columns"] - live["start"])
        sums = chances.cumsum(-1)
        total = sums[:, -1:]
        target = self._to_device(u).to(sums.dtype)[:, None] * total
        # u may round to 1, which would draw id V: stay below the total
        target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
        # right=True: ids of chance 0 are passed over
        return torch.searchsorted(sums, target, right=True)[:, 0]

    def _why(self, request: Request, ids: list, whole: bool) -> str:
        """Why it stops after these ids; "" if it goes on. Length comes before step: a step that
        uses up max_tokens or the context is an end, for nothing can follow it. To be called once
        for each newline, for request.line is then read on."""
        if ids[-1] in self.model.stop_ids:
            return "eos"
        if ids[-1] in self.newline:
            text = request.line + self.tokenizer.decode_more(ids[request.read:])
            *complete, request.line = text.split("\n")
            request.read = len(ids)
            if any(self.finished(line + "\n") for line in complete):
                return "answer"
        if len(ids) >= request.max_tokens:
            return "length"
        return "step" if not whole and self.step_over(ids) else ""

    def _close(self, gone: list):
        """Take out the rows that stopped. Rows from the end fill the holes, so that the live rows
        stay the first ones: A B C D without B is A D C."""
        left = len(self.live) - len(gone)
        holes = np.array([i for i in gone if i < left], np.int64)
        tails = np.setdiff1d(np.arange(left, len(self.live)), gone)     # at the end, and still live
        # given lists as indices, torch would wait until the GPU is done
        self.work[:, :, self._to_device(holes)] = self.work[:, :, self._to_device(tails)]
        self.live[holes] = self.live[tails]
        self.live = self.live[:left]

    @torch.no_grad()
    def log_probs(self, above, slots):
        """(n,) log-probs at temperature 1 of encoded tokens `slots` behind the path `above`."""
        before = np.concatenate((above[-1:], slots[:-1]))               # each is predicted by these
        logps = self.model.all_logps(self.hidden[before])               # (n, V)
        return logps.cpu().numpy()[np.arange(len(slots)), self.ids[slots]]

    @torch.no_grad()
    def encode(self, paths: list):
        """Encode the tokens of these paths that are not yet encoded, each once, in waves. If paths
        continue one encoded prefix with the same token, a wave takes only one of them:

            Question: 7+1?        wave 1: "Question: 7+1?"
            Question: 7*2?        wave 2: "*2?"     (behind "Question: 7")
            Question: 9*2?                "9*2?"    (behind "Question: ")"""
        paths = {path[-1]: path for path in paths}.values()             # each path once
        while True:
            runs = {}
            for path in paths:
                done = int(self.encoded[path].sum())    # a path is encoded from its start
                if done < len(path):
                    runs.setdefault(path[done], (path[:done], path[done:]))
            if not runs:
                return
            wave = sorted(runs.values(), key=lambda run: len(run[1]))   # the longest last
            while wave:
                count = min(self.rows, max(1, PREFILL_TOKENS // len(wave[-1][1])))
                self._encode_runs(wave[-count:])        # runs of similar length
                del wave[-count:]

    def _encode_runs(self, runs: list):
        """Encode runs, pairs (encoded prefix, slots to encode behind it). A short run repeats its
        last token, which writes the same values to the same place again:
            slots 4 5 6 behind 2 tokens, T = 5: slots 4 5 6 6 6, columns 2 3 4 4 4"""
        T = max(len(run) for _, run in runs)
        slots, cols = np.zeros((2, len(runs), T), np.int64)
        for i, (prefix, run) in enumerate(runs):
            places = np.minimum(np.arange(T), len(run) - 1)             # 0 1 2 2 2
            slots[i] = run[places]
            cols[i] = len(prefix) + places
            self.counts["encoded"] += len(run)
        given = self._gather([prefix for prefix, _ in runs])            # (2, L, R, G, S, D)
        width = int(cols.max()) + 1
        work = F.pad(given, (0, 0, 0, width - given.shape[4]))          # by at least one column
        numbers = np.stack((self.ids[slots], slots, cols))              # (3, R, T)
        self._compute(work, self._to_device(numbers), width)
        self.encoded[slots] = True

    def _gather(self, paths: list):
        """Keys and values of encoded paths, (2, L, R, G, S, D). Shorter ones are masked behind."""
        slots = nn.utils.rnn.pad_sequence([torch.from_numpy(path) for path in paths], True)
        return self.store[:, :, slots.to(self.model.device, non_blocking=True)].transpose(3, 4)

    def _encode_drawn(self, tokens):
        """Encode the tokens (R,) that were drawn for the live rows. Rows beyond the live ones are
        padding: each sees itself alone, and what it computes goes to the next free slot, where the
        next token overwrites it."""
        slots, columns = self.live["last"], self.live["columns"]        # (R,) each
        rows, width = self._rounded(len(slots), int(columns.max()))
        places = np.zeros((2, rows, 1), np.int64)
        places[0] = self.used                           # padding rows: the next free slot
        places[:, :len(slots), 0] = slots, columns - 1
        ids = F.pad(tokens, (0, rows - len(slots)))[None, :, None]
        numbers = torch.cat((ids, self._to_device(places)))             # (3, R, 1)
        if self.use_graphs:
            self._replay(numbers, width)
        else:
            self._compute(self.work, numbers, width)
        self.encoded[slots] = True
        self.counts["encoded"] += len(slots)

    def _replay(self, numbers, width):
        """`_compute` by a CUDA graph. A forward of a 0.5B model is 700 small kernels, which take
        longer to launch than to run. For each number of rows and of columns they are recorded, and
        then replayed by one launch, until the store or `work` grows."""
        size = numbers.shape[1], width
        if size not in self.graphs:
            static = numbers.clone()                    # the graph reads these addresses
            compute = partial(self._compute, self.work, static, width)
            _, beside = next(iter(self.graphs.values()), (None, None))  # any: one runs at a time
            self.graphs[size] = static, record(compute, beside)
        static, graph = self.graphs[size]
        static.copy_(numbers)
        graph.replay()

    def _compute(self, work, numbers, width):
        """Run the model on tokens in the first R rows of `work`, and copy their keys, values and
        hidden states to the store. numbers (3, R, T) on the device: ids, slots, columns < width."""
        ids, slots, cols = numbers
        rows = torch.arange(len(ids), device=ids.device)[:, None]

        def cache(layer, k, v):
            """Add new keys and values, (R, T, G, D) each; return all of them as (R, G, S, D)."""
            for i, new in enumerate((k, v)):
                work[i, layer][rows, :, cols] = new
            return work[:, layer, :len(k), :, :width]   # unpacks into keys and values
        mask = torch.arange(width, device=ids.device) <= cols[..., None]        # (R, T, S)
        self.hidden[slots] = self.model(ids, cols, mask, cache)
        kept = work[:, :, rows, :, cols]                # (R, T, 2, L, G, D), of all layers at once
        self.store[:, :, slots] = kept.movedim((0, 1), (2, 3))

    def _take(self, count: int):
        """The next free slots, (count,); the store grows if it must."""
        slots = np.arange(self.used, self.used + count)
        self.used += count
        if self.used >= len(self.ids):                  # one slot stays free, see `_encode_drawn`
            self.graphs = {}                            # they hold the old addresses
            more = count + len(self.ids) // 2
            self.store = F.pad(self.store, (0, 0, 0, 0, 0, more))
            self.hidden = F.pad(self.hidden, (0, 0, 0, more))
            self.ids = np.pad(self.ids, (0, more))
            self.logps = np.pad(self.logps, (0, more))
            self.encoded = np.pad(self.encoded, (0, more))
        return slots

    def _make_room(self):
        """Let `work` have a row for each live and waiting request, and all columns that the live
        rows may come to fill. To grow is to copy all of it, so it is made large enough at once."""
        count = min(self.rows, len(self.live) + len(self.waiting))
        rows, columns = self._rounded(count, int(self.live["stop_at"].max()))
        more_rows = max(0, rows - self.work.shape[2])
        more_columns = max(0, columns - self.work.shape[4])
        if more_rows or more_columns:
            self.work = F.pad(self.work, (0, 0, 0, more_columns, 0, 0, 0, more_rows))
            self.graphs = {}                            # they hold the old addresses

    def _rounded(self, rows: int, columns: int) -> tuple:
        """On CUDA both are rounded up, so that one graph fits many steps."""
        if self.use_graphs:
            rows = min(self.rows, max(GRAPH_ROWS, 1 << (rows - 1).bit_length()))    # 16 32 64 ...
            columns += -columns % GRAPH_COLUMNS
        return rows, columns

    def _to_device(self, numbers):
        """A numpy array as a tensor on the model's device, without waiting for what runs there."""
        return torch.from_numpy(numbers).to(self.model.device, non_blocking=True)


# --------------------------------------------------------------------------------------------------
# 6. Program: continue a prompt
# --------------------------------------------------------------------------------------------------
class Flags(argparse.ArgumentParser):
    """A parser of flags whose errors are BadInput: one sentence, as for any other bad input."""

    def error(self, message):
        """What argparse calls for a wrong flag or value; its own prints a usage and exits."""
        raise BadInput(f"{message}; see --help")


def start_console():
    """No character that the console lacks (it becomes "?") and no closed stderr ends a program."""
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


LATEX = ("abla|atural|e|earrow|eg|eq|ewline|exists|geq|i|leq|mid|onumber|ot|otin|parallel|u|"
         "warrow")                      # ends of LaTeX commands that begin with \n


def with_newlines(typed: str) -> str:
    r"""A shell cannot type a newline, so \n becomes one: in "user\nassistant", not in x \neq 3."""
    return re.sub(rf"\\n(?!(?:{LATEX})(?![a-z]))", "\n", typed)


def main(arguments: list) -> int:
    """Continue a prompt with a model folder; without flags show what the sampler shares. Returns
    the exit code: 0, or 2 for bad input (with one sentence)."""
    start_console()
    parser = Flags(prog="model.py", allow_abbrev=False)
    add = parser.add_argument
    add("--model", help="folder with config.json, weights and tokenizer.json")
    add("--prompt", default="", help=r"text to continue; \n is a newline, but not in \neq, \nu ...")
    add("--temperature", type=float, default=1.0, help="0 is greedy (default 1.0)")
    add("--max-tokens", type=int, default=128, help="of one continuation (default 128)")
    add("--samples", type=int, default=1, help="number of continuations (default 1)")
    add("--seed", type=int, default=0, help="of the random numbers (default 0)")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    try:
        flags = parser.parse_args(arguments)
        continue_prompt(flags) if arguments else demo()
        return 0
    except (BadInput, MemoryError, torch.OutOfMemoryError) as error:
        print(f"error: {str(error) or 'out of memory'}", file=sys.stderr)
        return 2


def continue_prompt(flags):
    """Print the continuations of --prompt. BadInput: flags or folder."""
    if not flags.model or not flags.prompt:
        raise BadInput('Give both --model FOLDER and --prompt "the text to continue".')
    if min(flags.max_tokens, flags.samples) < 1 or not 0 <= flags.temperature <= 100:
        raise BadInput("--max-tokens and --samples must be at least 1, --temperature 0 to 100.")
    tokenizer = Tokenizer.from_pretrained(flags.model)
    model = GPT.from_pretrained(flags.model, flags.device)
    sampler = Sampler(model, tokenizer, 4096)
    text = with_newlines(flags.prompt)
    path = sampler.prompt(tokenizer.encode_prompt(text))
    requests = [Request(path, mix(flags.seed, i), flags.max_tokens) for i in range(flags.samples)]
    for found in sampler.extend(requests, flags.temperature):
        written = tokenizer.decode_more(i for i in found.ids if i not in model.stop_ids)
        print(f"{text}{written}\n[{len(found.ids)} tokens, end: {found.why}, mean log-prob "
              f"{found.logps.mean():.3f}]")


def demo():
    """What sharing saves: eight samples of each of three questions that begin alike."""
    tokenizer = Tokenizer.bytes_only()
    model = GPT(GPTConfig.tiny(tokenizer.n_ids, hidden_size=64, layers=2)).initialise(seed=0)
    sampler = Sampler(model, tokenizer, 4096)
    texts = [f"Question: what is {task}? Answer:" for task in ("7+1*4", "7+1", "9*2-3")]
    paths = [sampler.prompt(tokenizer.encode_prompt(text)) for text in texts]
    requests = [Request(path, mix(i, j), 30) for i, path in enumerate(paths) for j in range(8)]
    found = sampler.extend(requests)
    written = sum(len(one.ids) for one in found)
    asked = sum(len(request.path) for request in requests)
    shared, encoded = sampler.counts["prompt"], sampler.counts["encoded"]
    print(f"Three questions, eight samples of each; {written} sampled tokens are encoded.\n"
          f"without sharing {written + asked:,} tokens encoded: {asked} of questions, each whole\n"
          f"with sharing    {encoded:5,} tokens encoded: {shared} of questions, a beginning once")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
