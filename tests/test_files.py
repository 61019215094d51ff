"""JSON and safetensors: what is written comes back, and a damaged file gives BadInput.

Oracles: the format's rules (a hand-made file breaks each), equality of bytes, seeded mutations."""
import errno
import json
import math
import os
import random
import shutil
import struct
from functools import partial
from pathlib import Path

import pytest
import torch

from model import (DTYPES, GPT, BadInput, Tokenizer, read_json, read_safetensors,
                   safetensors_header, weight_files, write_atomically, write_safetensors,
                   write_text)
from test_tokenizer import METASPACE, opened

DATA = Path(__file__).parent / "data"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
ONE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def pack(header, data=b"\0" * 8, n=None) -> bytes:
    """A safetensors file of a header (object or raw bytes) and data; n: the length it claims."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if n is None else n) + raw + data


def some_tensors():
    torch.manual_seed(0)
    return {"z.f32": torch.randn(3, 4), "x": torch.tensor(7.), "t": torch.zeros(0, 4),
            "v.bool": torch.tensor([[True, False]]), "s.slant": torch.randn(3, 2).T,
            "naïve 水 \"name\"": torch.tensor([torch.nan, -0.]),
            **{str(kind): torch.tensor([1, 2, 3]).to(kind) for kind in DTYPES.values()}}


def raw_bytes(tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def test_round_trip(tmp_path):
    """Every dtype, scalars, empty and transposed tensors, names, metadata come back bit for bit; in
    whatever order they come, each lies at a multiple of its width behind a header padded to 8."""
    tensors, path, turned = some_tensors(), tmp_path / "new" / "m", tmp_path / "turned"
    write_safetensors(path, tensors, {"format": "pt", "b": "水"})
    write_safetensors(turned, dict(reversed(tensors.items())), {"b": "水", "format": "pt"})
    assert os.listdir(path.parent) == ["m"]                             # no temporary file is left
    raw = path.read_bytes()
    assert raw == turned.read_bytes()
    back, metadata = read_safetensors(path)
    assert metadata == {"format": "pt", "b": "水"} and back.keys() == tensors.keys()
    at = 8 + struct.unpack("<Q", raw[:8])[0]
    assert at % 8 == 0
    for name, (_, shape, begin) in safetensors_header(path)[0].items():
        tensor = tensors[name]
        assert begin == at and begin % tensor.dtype.itemsize == 0 and shape == tensor.shape
        at += tensor.nbytes
        assert raw[begin:at] == raw_bytes(tensor) == raw_bytes(back[name])  # NaN and -0 included
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
    assert at == len(raw)


def entry(**change):
    return {"a": {**ONE["a"], **change}}


SOUND = [pack({}, b""), pack(entry(shape=[0, 3], data_offsets=[0, 0]), b""),
         pack(json.dumps(ONE).encode() + b" " * 100)]
DAMAGED = [  # a file's bytes, a word that the message must have
    (b"\0" * 7, "cut short"), (struct.pack("<Q", 100_000_001) + b" " * 64, "cut short"),
    (pack(ONE, n=10_000), "cut short"), (pack(b'{"\xff": 1}'), "UTF-8"), (pack([1]), "list"),
    (pack(b'{"a":' + b"[" * 100_000 + b"]" * 100_000), "recursion"),
    (pack(b'{"a": {}, "a": {}}'), "twice"), (pack(b"{'a': 1}"), "header"),
    (pack(entry(dtype="F12")), "F12"), (pack(entry(dtype=["F32"])), "unhashable"),
    (pack(entry(shape=None)), "shape"), (pack(entry(shape=[True, 2])), "odd"),
    (pack(entry(shape=[-1, -2])), "odd"), (pack(entry(shape=[2 ** 62, 4])), "odd"),
    (pack(entry(shape=[2 ** 33, 2 ** 31 + 1, 2])), "odd"),              # wraps round to 2
    (pack(entry(shape=[0, 2 ** 40, 2 ** 40], data_offsets=[0, 0]), b""), "odd"),    # strides
    (pack(entry(shape=[1] * 1000)), "odd"), (pack(entry(data_offsets=[0, 8, 8])), "fit"),
    (pack(entry(data_offsets=[8, 0])), "fit"), (pack(entry(shape=[1])), "fit"),
    (pack(entry(data_offsets=[8, 16]), b"\0" * 16), "gap"),
    (pack(ONE | {"b": entry(shape=[1], data_offsets=[4, 8])["a"]}), "overlap"),
    (pack(ONE, b"\0" * 7), "cut short"), (pack(ONE, b"\0" * 9), "damaged"),
    (pack({"__metadata__": {"a": 1}, **ONE}), "__metadata__"), (POINTER, "git lfs pull"),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "pickle")]


def test_each_check(tmp_path):
    """Each rule has a file that breaks it and nothing else; the message names file and reason."""
    path = tmp_path / "m.safetensors"
    for raw, word in DAMAGED:
        path.write_bytes(raw)
        with pytest.raises(BadInput, match="(?s)m.safetensors.*" + word):
            safetensors_header(path)
    for raw in SOUND:                                   # odd, but allowed
        path.write_bytes(raw)
        read_safetensors(path)


JUNK = (None, True, 0, -1, 2, 7, 1000, 2 ** 20, 2 ** 63, 10 ** 30, 0.5, -1.5, 1e-30, 1e30, math.inf,
        math.nan, "", "8", "x", "llama", "\ud800", [], [[]], [1], [None], [{}], {}, {"a": 1},
        {"type": "Sequence"}, {"rope_type": "linear", "factor": 2}, "delete")


def damaged(whole, node=None):
    """A JSON object, and copies with another value, or none, at one place. Of large tables only the
    first dozen places."""
    if node is None:
        yield json.dumps(whole).encode()
        node = whole
    for key in [*(node if isinstance(node, dict) else range(len(node)))][:12]:
        good = node[key]
        for node[key] in random.Random(str(key)).sample(JUNK, 3):
            copy = json.dumps(whole)
            yield copy.replace(f'"{key}": "delete"', '"gone": 0').encode()
        node[key] = good
        if isinstance(good, (dict, list)):
            yield from damaged(whole, good)


def weights(_, folder):
    """Copies of a file with wrong bytes or an early end; whatever is read fits its own header."""
    rng, path = random.Random(0), folder / "m"
    write_safetensors(path, {"a": torch.ones(2, 3), "b": torch.zeros(0), "c": torch.ones(4).half()})
    good = path.read_bytes()

    def use(raw):
        path.write_bytes(raw)
        tensors, header = read_safetensors(path)[0], safetensors_header(path)[0]
        assert all(tuple(tensors[name].shape) == header[name][1] for name in header)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(raw)
    copies = [good]
    for _ in range(500):
        at = rng.randrange(len(good))
        end = rng.choice((at, at + 1, at + 5, len(good)))
        new = rng.choice((b"", rng.randbytes(1), b"9", b"[", b"null"))
        copies.append(good[:at] + new + good[end:])
    return copies, use


def config(name, folder):
    """Copies of a config.json: the folder is opened, the model runs."""
    shutil.copytree(DATA / "models" / name, folder / name)

    def use(raw):
        (folder / name / "config.json").write_bytes(raw)
        net = GPT.from_pretrained(folder / name, "cpu")
        net.logits(net(torch.arange(9)[None]))
    return damaged(read_json(folder / name / "config.json")), use


def tokenizer(name, _, **change):
    """Copies of a tokenizer.json with a small vocabulary, which encode and decode."""
    raw = opened(name)[0].files["tokenizer.json"]
    spec = json.loads(raw.replace(b"1805", b"0")) | change
    added = [token["content"] for token in spec["added_tokens"]]
    vocab = {token: id for id, token in enumerate([*added, *"ab12Ġ▁", "ab"])}
    spec["model"] |= {"vocab": vocab, "merges": ["a b"]}
    spec["added_tokens"] = [{"id": vocab[text], "content": text} for text in added]

    def use(raw):
        found = Tokenizer({"tokenizer.json": raw})
        ids = found.encode_prompt("ab 12\n é <s>") + found.encode("<s> <|x", True)
        assert isinstance(found.decode(ids) + found.decode_more(ids), str)
    return damaged(spec), use


NEWER = partial(tokenizer, normalizer=None, pre_tokenizer=METASPACE)


@pytest.mark.parametrize("kind, name", [
    (weights, ""), (config, "qwen25_slide"), (config, "llama3_rope"), (config, "gpt2"),
    (tokenizer, "llama3"), (tokenizer, "llama2_legacy"), (NEWER, "llama2_legacy")])
def test_damage(kind, name, tmp_path):
    """Wrong bytes, or a wrong or missing value at any place: it is read and works, or BadInput."""
    copies, use = kind(name, tmp_path)
    refused = 0
    for i, raw in enumerate(copies):
        try:
            use(raw)
        except BadInput as error:
            refused += 1
            assert i and "\n" not in str(error)         # the first copy is sound
    assert 10 < refused < i - 10                # the damage is neither idle nor always fatal


def test_json(tmp_path):
    """read_json is the inverse of write_text; what is no file is BadInput. See also DAMAGED."""
    path = tmp_path / "c.json"
    write_text(path, '{"a": [1, {"b": "水\u2028"}]}')
    assert read_json(path) == {"a": [1, {"b": "水\u2028"}]}
    write_text(path, '{"a": "\ud835"}')                                # half a surrogate pair
    assert read_json(path) == {"a": "\ufffd"}
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')                          # a byte order mark
    assert read_json(path) == {"a": 1}
    path.write_bytes(POINTER)
    with pytest.raises(BadInput, match="git lfs pull"):
        read_json(path)
    for absent in (tmp_path / "none.json", tmp_path, str(tmp_path / "zero\0byte")):
        for read in (read_json, read_safetensors):
            with pytest.raises(BadInput):
                read(absent)


def test_disk_full(tmp_path):
    """The old file stays as it was, no temporary file stays, BadInput has path and reason."""
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"a": torch.ones(3)})

    def chunks():
        yield b"new"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(BadInput, match="m.safetensors.*No space left"):
        write_atomically(path, chunks())
    with pytest.raises(KeyError, match="complex64"):    # before anything is written
        write_safetensors(path, {"a": torch.zeros(1, dtype=torch.complex64)})
    assert read_safetensors(path)[0]["a"].tolist() == [1, 1, 1]
    assert os.listdir(tmp_path) == ["m.safetensors"]


def shards(folder, weight_map, **files):
    for name, tensors in files.items():
        write_safetensors(folder / f"{name}.safetensors", dict.fromkeys(tensors, torch.ones(1)))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("weight_map, files", [
    ({"x": "a.safetensors"}, {}),                                       # shard missing
    ({"x": "a.safetensors", "y": "a.safetensors"}, {"a": "x"}),         # tensor missing
    ({"x": "a.safetensors"}, {"a": "xy"}),                              # tensor not listed
    ({"x": "a.safetensors", "y": "b.safetensors"}, {"a": "x", "b": "xy"}),          # in two files
    ({"x": "../a.safetensors"}, {"a": "x"}), ({"x": "/a.safetensors"}, {"a": "x"}),
    ({"x": "..\\a.safetensors"}, {"a": "x"}), ({"x": ".."}, {"a": "x"}), ({"x": ""}, {"a": "x"}),
    ({"x": 1}, {"a": "x"}), ({"x": None}, {"a": "x"}), ([], {"a": "x"})])
def test_index_and_shards_must_agree(tmp_path, weight_map, files):
    """Every way in which an index can be wrong about its shards, or point elsewhere, is refused.
    A single file wins over shards, whatever their index says."""
    shards(tmp_path, {}, a="x")             # so that ../a.safetensors exists
    tmp_path = tmp_path / "model"
    tmp_path.mkdir()
    shards(tmp_path, weight_map, **files)
    with pytest.raises(BadInput):
        weight_files(tmp_path)
    shards(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"}, a="x", b="y")
    held = {n: (tmp_path / f"{f}.safetensors", "F32", (1,)) for n, f in ("xa", "yb")}
    assert weight_files(tmp_path) == held
    write_safetensors(tmp_path / "model.safetensors", {"w": torch.ones(1)})
    assert weight_files(str(tmp_path)) == {"w": (tmp_path / "model.safetensors", "F32", (1,))}


def test_folders_without_weights(tmp_path):
    """No folder, nothing in it, pickles, a LoRA adapter, GGUF: a sentence that says what it is."""
    with pytest.raises(BadInput, match="none"):
        weight_files(tmp_path / "none")
    for name, word in (("README.md", "neither"), ("pytorch_model.bin", "safe_serialization"),
                       ("model.ckpt", "pickles, which can run"), ("model-q4.gguf", "GGUF is not"),
                       ("adapter_config.json", "LoRA adapter.*merge_and_unload")):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes(b"{}")
        with pytest.raises(BadInput, match=word):
            weight_files(folder)
