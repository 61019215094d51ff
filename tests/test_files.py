"""JSON and safetensors: what is written comes back, and a damaged file gives BadInput.

Oracles: the format's rules (a hand-made file breaks each), equality of bytes, seeded mutations."""
import errno
import json
import os
import random
import struct

import pytest
import torch

from model import (BadInput, read_json, read_safetensors, safetensors_header, weight_files,
                   write_atomically, write_safetensors, write_text)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
ONE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def pack(header, data=b"\0" * 8, n=None) -> bytes:
    """A safetensors file of a header (object or raw bytes) and data; n: the length it claims."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if n is None else n) + raw + data


def some_tensors():
    torch.manual_seed(0)
    return {"z.f32": torch.randn(3, 4), "y.f16": torch.randn(2, 2).half(), "x": torch.tensor(7.),
            "r": torch.randn(5).bfloat16(), "w.i64": torch.arange(-2, 3), "t": torch.zeros(0, 4),
            "v.bool": torch.tensor([[True, False]]), "s.slant": torch.randn(3, 2).T,
            "naïve 水 \"name\"": torch.tensor([torch.nan, -0.])}


def raw_bytes(tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def test_round_trip(tmp_path):
    """Every dtype, scalars, empty and transposed tensors, names, metadata come back bit for bit."""
    tensors, path = some_tensors(), tmp_path / "new" / "m"
    write_safetensors(path, tensors, {"format": "pt", "b": "水"})
    back, metadata = read_safetensors(path)
    assert metadata == {"format": "pt", "b": "水"} and back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert raw_bytes(back[name]) == raw_bytes(tensor)               # NaN and -0 included
    assert os.listdir(path.parent) == ["m"]                             # no temporary file is left


def test_layout(tmp_path):
    """Header padded to 8, each tensor at a multiple of its width, whatever order they come in."""
    tensors, a, b = some_tensors(), tmp_path / "a", tmp_path / "b"
    write_safetensors(a, tensors, {"y": "1", "x": "2"})
    write_safetensors(b, dict(reversed(tensors.items())), {"x": "2", "y": "1"})
    raw = a.read_bytes()
    assert raw == b.read_bytes()
    at = 8 + struct.unpack("<Q", raw[:8])[0]
    assert at % 8 == 0 and json.loads(raw[8:at])["__metadata__"] == {"x": "2", "y": "1"}
    for name, (_, shape, begin) in safetensors_header(a)[0].items():
        assert begin == at and begin % tensors[name].dtype.itemsize == 0
        at += tensors[name].nbytes
        assert raw[begin:at] == raw_bytes(tensors[name]) and shape == tensors[name].shape
    assert at == len(raw)


def entry(**change):
    return {"a": {**ONE["a"], **change}}


SOUND = [pack({}, b""), pack(entry(shape=[0, 3], data_offsets=[0, 0]), b""),
         pack(json.dumps(ONE).encode() + b" " * 100)]
DAMAGED = [  # a file's bytes, a word that the message must have
    (b"\0" * 7, "cut short"), (struct.pack("<Q", 100_000_001) + b" " * 64, "cut short"),
    (pack(ONE, n=10_000), "cut short"), (pack(b'{"\xff": 1}'), "utf-8"), (pack([1]), "list"),
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


def test_mutations_and_truncations(tmp_path):
    """800 damaged copies give tensors that fit their own header, or BadInput in one sentence."""
    rng, path, results = random.Random(0), tmp_path / "m", 0
    write_safetensors(path, {"a": torch.ones(2, 3), "b": torch.zeros(0), "c": torch.ones(4).half()})
    good = path.read_bytes()
    n = 8 + struct.unpack("<Q", good[:8])[0]
    spice = [*(bytes([b]) for b in b'09[]{}",-e. \0\xff'), b"null", b"true"]
    for _ in range(800):
        raw = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(n if rng.random() < .9 else max(len(raw), 1))
            kind = rng.choice("spice spice byte cut end".split())
            if kind == "end":
                raw = raw[:at]
            elif kind == "cut":
                del raw[at:at + rng.randrange(1, 9)]
            else:
                raw[at:at + 1] = rng.choice(spice) if kind == "spice" else rng.randbytes(1)
        path.write_bytes(raw)
        try:
            tensors = read_safetensors(path)[0]
        except BadInput as error:
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        results += 1
        header = safetensors_header(path)[0]
        assert all(tuple(tensors[name].shape) == header[name][1] for name in header)
        assert sum(t.numel() * t.dtype.itemsize for t in tensors.values()) <= len(raw)
    assert results > 5                                                 # damaged data is still data


def test_json(tmp_path):
    """read_json gives an object or BadInput with the file's name; write_text is its inverse."""
    path = tmp_path / "c.json"
    write_text(path, '{"a": [1, {"b": "水\u2028"}]}')
    assert read_json(path) == {"a": [1, {"b": "水\u2028"}]}
    write_text(path, '{"a": "\ud835"}')                                # half a surrogate pair
    assert read_json(path) == {"a": "\ufffd"}
    for raw, word in ((b'{"a": "\xff"}', "utf-8"), (b'{"a": 1', "delimiter"), (b"[1]", "list"),
                      (b'{"a": {"b": 1, "b": 2}}', "twice"), (POINTER, "git lfs pull")):
        path.write_bytes(raw)
        with pytest.raises(BadInput, match="(?s)c.json.*" + word):
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
    with pytest.raises(BadInput, match="float64"):      # refused before anything is written
        write_safetensors(path, {"a": torch.zeros(1, dtype=torch.float64)})
    assert read_safetensors(path)[0]["a"].tolist() == [1, 1, 1]
    assert os.listdir(tmp_path) == ["m.safetensors"]


def shards(folder, weight_map, **files):
    for name, tensors in files.items():
        write_safetensors(folder / f"{name}.safetensors", dict.fromkeys(tensors, torch.ones(1)))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_weight_files(tmp_path):
    """Each tensor with the file that holds it; a single file wins over shards."""
    shards(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"}, a="x", b="y")
    held = {n: (tmp_path / f"{f}.safetensors", "F32", (1,)) for n, f in ("xa", "yb")}
    assert weight_files(tmp_path) == held
    write_safetensors(tmp_path / "model.safetensors", {"w": torch.ones(1)})
    assert weight_files(str(tmp_path)) == {"w": (tmp_path / "model.safetensors", "F32", (1,))}


@pytest.mark.parametrize("weight_map, files", [
    ({"x": "a.safetensors"}, {}),                                       # shard missing
    ({"x": "a.safetensors", "y": "a.safetensors"}, {"a": "x"}),         # tensor missing
    ({"x": "a.safetensors"}, {"a": "xy"}),                              # tensor not listed
    ({"x": "a.safetensors", "y": "b.safetensors"}, {"a": "x", "b": "xy"}),          # in two files
    ({"x": "../a.safetensors"}, {"a": "x"}), ({"x": "/a.safetensors"}, {"a": "x"}),
    ({"x": "..\\a.safetensors"}, {"a": "x"}), ({"x": ".."}, {"a": "x"}), ({"x": ""}, {"a": "x"}),
    ({"x": 1}, {"a": "x"}), ({"x": None}, {"a": "x"}), ({}, {"a": "x"}), ([], {"a": "x"})])
def test_index_and_shards_must_agree(tmp_path, weight_map, files):
    """Every way in which an index can be wrong about its shards, or point elsewhere, is refused."""
    shards(tmp_path, weight_map, **files)
    with pytest.raises(BadInput):
        weight_files(tmp_path)


def test_folders_without_weights(tmp_path):
    """No folder, nothing in it, pickles, a LoRA adapter, GGUF: a sentence that says what it is."""
    with pytest.raises(BadInput, match="none"):
        weight_files(tmp_path / "none")
    for name, word in (("README.md", "neither"), ("pytorch_model.bin", "safe_serialization"),
                       ("model.ckpt", "CVE-2025-32434"), ("model-q4.gguf", "llama.cpp"),
                       ("adapter_config.json", "LoRA adapter.*merge_and_unload")):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes(b"{}")
        with pytest.raises(BadInput, match=word):
            weight_files(folder)
