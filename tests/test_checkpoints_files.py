"""Files: what they are to others, and that none is trusted. A refused file has changed nothing."""

from __future__ import annotations

import json
import random
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fusedstep as fs
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from exact import BFLOAT16, DTYPES, Array
from resuming import SUFFIXES, Ramp, make, snapshot, train, tree

TEXT, SUMS = "fusedstep.json", "fusedstep.crc32"


def varied(value: float) -> dict[str, Any]:
    """Every dtype, no dimension, no element, another order."""
    return {
        "scalar": np.full((), value),
        "empty": np.full((0, 3), value, np.float32),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3) * value),
        "brain": np.full((2, 2), value, BFLOAT16),
        "half": np.full(3, value, np.float16),
    }


def optimizer(value: float) -> tuple[fs.NAdam, dict[str, Any]]:
    params = varied(value)
    return fs.NAdam(params, lr=fs.StepLR(0.5 * value, 2), betas=(Ramp(0.5), 0.75)), params


def stepped() -> tuple[fs.NAdam, dict[str, Any]]:
    opt, params = optimizer(1.0)
    opt.step(varied(0.5))
    opt.step(varied(-0.25))
    return opt, params


# --- what others see ----------------------------------------------------------------------------


def arrays_of(opt: fs.NAdam, params: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a file by their documented names."""
    found = {}
    for number, (key, param) in enumerate(params.items()):
        entry = opt.state_dict()["state"][key]
        found[f"params/{number}:{key}"] = param
        for name in ("exp_avg", "exp_avg_sq"):
            found[f"{name}/{number}:{key}"] = entry[name]
    return found


def test_numpy_reads_an_npz(tmp_path: Path) -> None:
    opt, params = stepped()
    opt.save(tmp_path / "run.npz")
    expected = arrays_of(opt, params)
    with np.load(tmp_path / "run.npz", allow_pickle=False) as file:
        assert set(file) == {*expected, TEXT}
        header = json.loads(file[TEXT].tobytes())
        for name, array in expected.items():
            bits = array.view(np.uint16) if array.dtype == BFLOAT16 else array
            np.testing.assert_array_equal(file[name], bits, strict=True)
    assert (header["optimizer"], header["steps"]) == ("NAdam", 2)


def test_safetensors_reads_a_safetensors_file(tmp_path: Path) -> None:
    opt, params = stepped()
    path = tmp_path / "run.safetensors"
    opt.save(path)
    expected = arrays_of(opt, params)
    with safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
    found = safetensors.numpy.load_file(path)
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    assert set(metadata) == {TEXT, SUMS}
    header = json.loads(metadata[TEXT])
    assert (header["optimizer"], header["steps"]) == ("NAdam", 2)


@pytest.mark.framework("torch")
def test_torch_reads_a_safetensors_file(tmp_path: Path) -> None:
    import safetensors.torch as reader
    import torch

    opt, params = stepped()
    opt.save(tmp_path / "run.safetensors")
    found = reader.load_file(tmp_path / "run.safetensors")
    dtypes = {}
    for name, array in arrays_of(opt, params).items():
        dtypes[name] = str(found[name].dtype)
        assert dtypes[name] == f"torch.{array.dtype.name}"
        values = torch.from_numpy(array.astype(np.float64))
        assert torch.equal(found[name].double(), values)
    assert dtypes["params/3:brain"] == "torch.bfloat16"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_parameters_may_stay_out(suffix: str, tmp_path: Path) -> None:
    path, (opt, _) = tmp_path / f"run{suffix}", stepped()
    opt.save(path, params=False)
    fresh, params = optimizer(3.0)
    before = [x.tobytes() for x in params.values()]
    fresh.load(path)
    assert [x.tobytes() for x in params.values()] == before
    assert fresh.steps == 2
    opt.save(path)
    fresh.load(path, params=False)
    assert [x.tobytes() for x in params.values()] == before


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["a.npy", "\n", "__metadata__", "ü☃", "\ud800", "x" * 300, ""])
def test_any_key(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"run{suffix}"
    opt = fs.Momentum({name: np.ones(2)}, lr=0.5)
    opt.step({name: np.ones(2)})
    opt.save(path)
    fresh = fs.Momentum({name: np.zeros(2)}, lr=0.5)
    fresh.load(path)
    assert fresh.state_dict()["state"][name]["velocity"][0] == 1.0


# --- suffixes and the package -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", "run.ckpt", "run.npz.gz", "run.NPZ", ".npz", "run.pt"])
def test_other_suffixes_are_refused(name: str, tmp_path: Path) -> None:
    """A misspelt suffix must not choose a container."""
    opt, _ = stepped()
    for call in (opt.save, opt.load):
        with pytest.raises(ValueError, match=rf"path: .*\.npz or \.safetensors.*'{name}'"):
            call(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing needs it, reading does not."""
    path, (opt, _) = tmp_path / "run.safetensors", stepped()
    opt.save(path)
    before = path.read_bytes()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fusedstep\[safetensors\]'"):
        opt.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    opt.load(path)
    opt.save(tmp_path / "run.npz")


class OldLibrary:
    """Releases before 0.8 have no TensorSpec: they take dicts with bytes."""

    SafetensorError = safetensors.SafetensorError

    @staticmethod
    def serialize_file(tensors: dict[str, dict[str, Any]], path: Any, metadata: Any) -> None:
        assert all(type(entry["data"]) is bytes for entry in tensors.values())
        arrays = {
            name: np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in tensors.items()
        }
        safetensors.numpy.save_file(arrays, path, metadata)


def test_older_releases_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opt, _ = stepped()
    opt.save(tmp_path / "new.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", OldLibrary)
    opt.save(tmp_path / "old.safetensors")
    old, new = (read_parts(tmp_path / f"{name}.safetensors") for name in ("old", "new"))
    assert old == new


# --- damage -----------------------------------------------------------------------------------


class Target:
    """An optimizer in the middle of something, which must not notice that loading failed."""

    def __init__(self) -> None:
        self.opt, self.params = optimizer(4.0)
        self.opt.step(varied(0.125))
        self.before = snapshot(self.opt, self.params)

    def refuses(self, path: Path, match: str = "") -> None:
        with pytest.raises(ValueError, match=rf"{path.name}: .*{match}"):
            self.opt.load(path)
        assert snapshot(self.opt, self.params) == self.before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_files(suffix: str, tmp_path: Path) -> None:
    """Cut after any number of bytes, a file is none."""
    path, target = tmp_path / f"run{suffix}", Target()
    stepped()[0].save(path)
    whole = path.read_bytes()
    for length in {*range(40), *range(40, len(whole), 53), *range(len(whole) - 40, len(whole))}:
        path.write_bytes(whole[:length])
        target.refuses(path)
    path.write_bytes(whole)
    target.opt.load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_changed_bytes_are_noticed_or_without_meaning(suffix: str, tmp_path: Path) -> None:
    path, (opt, params) = tmp_path / f"run{suffix}", stepped()
    opt.save(path)
    saved, whole, chance = snapshot(opt, params), path.read_bytes(), random.Random(3)
    errors = []
    for _ in range(400):
        changed = bytearray(whole)
        changed[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        fresh, fresh_params = optimizer(4.0)
        before = snapshot(fresh, fresh_params)
        try:
            fresh.load(path)
        except ValueError as error:
            errors.append(str(error))
            assert snapshot(fresh, fresh_params) == before
        else:
            assert snapshot(fresh, fresh_params)[:3] == saved[:3]
    assert len(errors) > 200
    assert all(error.startswith(str(path)) for error in errors)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_foreign_files(suffix: str, tmp_path: Path) -> None:
    path, target = tmp_path / f"run{suffix}", Target()
    for content in (b"", b"PK", b"hello", bytes(100), b"[" * 10**5, b"\xff" * 100):
        path.write_bytes(content)
        target.refuses(path)
    np.savez(tmp_path / "foreign", a=np.ones(3))
    safetensors.numpy.save_file({"a": np.ones(3)}, tmp_path / "foreign.safetensors")
    (tmp_path / f"foreign{suffix}").replace(path)
    target.refuses(path, "no checkpoint of fusedstep")
    other = next(other for other in SUFFIXES if other != suffix)
    stepped()[0].save(tmp_path / f"run{other}")
    (tmp_path / f"run{other}").replace(path)
    target.refuses(path, "no checkpoint of fusedstep")


# --- tensors: files that the writer of this test made ------------------------------------------


def read_parts(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_parts(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((length or len(text)).to_bytes(8, "little") + text + data)


def at(*way: Any) -> Callable[[Any], None]:
    """Sets the place that all but the last of `way` name."""

    def change(node: Any) -> None:
        for key in way[:-2]:
            node = node[key]
        node[way[-2]] = way[-1]

    return change


W, V = "params/0:w", "velocity/0:w"
HOSTILE: dict[str, Callable[[Any], None]] = {
    "dtype of the same size": at(W, "dtype", "F64"),
    "integers": at(W, "dtype", "I32"),
    "unknown dtype": at(W, "dtype", "nonsense"),
    "no dtype": lambda header: header[W].pop("dtype"),
    "other shape": at(W, "shape", [2, 2]),
    "negative shape": at(W, "shape", [-2, -2]),
    "huge shape": at(W, "shape", [2**62, 2**62]),
    "large shape": at(W, "shape", [2**45]),
    "huge empty shape": at(W, "shape", [0, 2**70]),
    "shape is a number": at(W, "shape", 4),
    "shape of floats": at(W, "shape", [4.0]),
    "shape of flags": at(V, "shape", [True]),
    "offsets beyond the end": at(W, "data_offsets", [16, 2**40]),
    "negative offsets": at(W, "data_offsets", [-16, 0]),
    "overlapping offsets": at(V, "data_offsets", [0, 16]),
    "offsets are a number": at(W, "data_offsets", 3),
    "entry is a number": at(W, 3),
    "no metadata": lambda header: header.pop("__metadata__"),
    "metadata is a list": at("__metadata__", []),
    "text is no JSON": at("__metadata__", TEXT, "{"),
    "text is a number": at("__metadata__", TEXT, 3),
    "no sums": lambda header: header["__metadata__"].pop(SUMS),
    "sums are a list": at("__metadata__", SUMS, "[]"),
    "one more": at("x", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
}


def simple() -> fs.Momentum:
    opt = fs.Momentum({"w": np.ones(4, np.float32)}, lr=0.5)
    opt.step({"w": np.ones(4, np.float32)})
    return opt


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tensors(name: str, tmp_path: Path) -> None:
    path, opt = tmp_path / "run.safetensors", simple()
    opt.save(path)
    header, data = read_parts(path)
    HOSTILE[name](header)
    write_parts(path, header, data)
    refuse_unchanged(opt, path)


def refuse_unchanged(opt: Any, path: Path, match: str = "") -> None:
    params = opt.param_groups[0]["params"]
    before = snapshot(opt, params)
    with pytest.raises(ValueError, match=rf"{path.name}: .*{match}"):
        opt.load(path)
    assert snapshot(opt, params) == before


def test_hostile_headers(tmp_path: Path) -> None:
    path, opt = tmp_path / "run.safetensors", simple()
    opt.save(path)
    header, data = read_parts(path)
    write_parts(path, header, data)
    opt.load(path)
    text = json.dumps(header).encode()
    twice = text[:-1] + b', "params/0:w": ' + json.dumps(header[W]).encode() + b"}"
    for bad, length in [
        (text, 2**64 - 1), (text, 2**40), (text, len(text) + len(data) + 1), (text, 1),
        (text + b"x", None), (twice, None), (b"[]", None), (b"3", None), (b"\xff\xff", None),
    ]:  # fmt: skip
        write_parts(path, bad, data, length)
        refuse_unchanged(opt, path)
    write_parts(path, header, data + b"\0")
    refuse_unchanged(opt, path, "bytes")
    write_parts(path, twice, data)
    refuse_unchanged(opt, path, "two entries are called 'params/0:w'")


def test_what_the_library_refuses_is_refused(tmp_path: Path) -> None:
    """Random changes of the header: our reader is as strict as the library's."""
    path, opt = tmp_path / "run.safetensors", simple()
    opt.save(path)
    whole, chance = path.read_bytes(), random.Random(7)
    length = int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(300):
        changed = bytearray(whole)
        changed[chance.randrange(8 + length)] = chance.choice(b'0123456789[]{}",:FBx ')
        try:
            safetensors.deserialize(bytes(changed))
        except safetensors.SafetensorError:
            refused += 1
            path.write_bytes(changed)
            refuse_unchanged(opt, path)
    assert refused > 50


# --- npz ----------------------------------------------------------------------------------------


def test_two_entries_of_one_name(tmp_path: Path) -> None:
    path, opt = tmp_path / "run.npz", simple()
    opt.save(path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(f"{W}.npy", content[f"{W}.npy"])
    refuse_unchanged(opt, path, f"two entries are called '{W}'")


@pytest.mark.parametrize("shape", ["(1099511627776,)", "(4611686018427387904, 4)", "(5,)", "()"])
def test_an_entry_whose_header_lies(shape: str, tmp_path: Path) -> None:
    """No memory is asked for before the sizes agree."""
    path, opt = tmp_path / "run.npz", simple()
    opt.save(path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    entry = content[f"{W}.npy"]
    changed = entry.replace(b"(4,), }", f"{shape}, }}".encode(), 1)
    cut = changed.index(b"\n") + 1
    content[f"{W}.npy"] = entry[:8] + (cut - 10).to_bytes(2, "little") + changed[10:]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    refuse_unchanged(opt, path, "its header says")


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    path, opt = tmp_path / "run.npz", simple()
    opt.save(path)
    with np.load(path) as file:
        entries = dict(file)
    entries[W] = np.array([{"a": 1}] * 4, object)
    np.savez(path, **entries)
    refuse_unchanged(opt, path)


# --- headers, in either container ---------------------------------------------------------------


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    """Changes the JSON text of a file, with right check sums."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            entries = dict(file)
        header = json.loads(entries[TEXT].tobytes())
        change(header)
        entries[TEXT] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        np.savez(path, **entries)
        return
    outer, data = read_parts(path)
    header = json.loads(outer["__metadata__"][TEXT])
    change(header)
    text = json.dumps(header)
    sums = json.loads(outer["__metadata__"][SUMS])
    sums[TEXT] = zlib.crc32(text.encode())
    outer["__metadata__"] = {TEXT: text, SUMS: json.dumps(sums)}
    write_parts(path, outer, data)


def doubled(header: Any) -> None:
    header["table"].append(header["table"][0])


def crossed(header: Any) -> None:
    """Two arrays of one name."""
    arrays = header["table"][0]["arrays"]
    arrays["velocity"] = arrays["params"]


ARRAYS = ("table", 0, "arrays")
HEADERS: dict[str, tuple[Callable[[Any], None], str]] = {
    "another class": (at("optimizer", "Adam"), "a checkpoint of 'Adam', not of Momentum"),
    "no class": (lambda h: h.pop("optimizer"), "missing 'optimizer'"),
    "another format": (at("format", "something"), "no checkpoint"),
    "another version": (at("version", 99), "version 99; this release reads 3"),
    "an old version": (at("version", 2), "version 2; this release reads 3"),
    "no table": (lambda h: h.pop("table"), "missing 'table'"),
    "an empty table": (at("table", []), "the table lacks .*'params/0:w'"),
    "a key twice": (doubled, "key 'w' twice"),
    "an array twice": (crossed, "called 'params/0:w', or two keys"),
    "an unused array": (lambda h: h["table"][0]["arrays"].pop("velocity"), "lacks 'velocity/0:w'"),
    "a missing array": (at(*ARRAYS, "velocity", "name", "x"), "no array is called 'x'"),
    "a wrong dtype": (at(*ARRAYS, "params", "dtype", "float64"), "header says float64"),
    "a dtype of its size": (at(*ARRAYS, "params", "dtype", "int32"), "header says int32"),
    "no such dtype": (at(*ARRAYS, "params", "dtype", "nonsense"), "nonsense"),
    "another key": (at("table", 0, "key", "u"), r"\['params'\]|has the key 'u'"),
    "a list as key": (at("table", 0, "key", []), "unhashable"),
    "another slot": (
        lambda h: h["table"][0]["arrays"].update(m=h["table"][0]["arrays"].pop("velocity")),
        r"state\['w'\]: expected \['velocity', 'step'\]",
    ),
    "a count too large": (at("table", 0, "scalars", "step", 2**62), r"\['step'\]: .*2\*\*62"),
    "a negative count": (at("table", 0, "scalars", "step", -1), r"\['step'\]: .*-1"),
    "half a step": (at("table", 0, "scalars", "step", 0.5), r"\['step'\]: .*0\.5"),
    "a product": (at("table", 0, "scalars", "mu_product", 0.5), "mu_product"),
    "a lr out of range": (at("param_groups", 0, "lr", -1.0), r"param_groups\[0\]\['lr'\]: .*-1"),
    "a text as lr": (at("param_groups", 0, "lr", "fast"), r"\['lr'\]: .*'fast'"),
    "no momentum": (lambda h: h["param_groups"][0].pop("momentum"), "expected the keys"),
    "one more group": (lambda h: h["param_groups"].append({}), "expected 1 groups, got 2"),
    "steps": (at("steps", -3), "steps: .*-3"),
    "skipped steps": (at("skipped_steps", 0.5), r"skipped_steps: .*0\.5"),
    "a policy": (at("on_nonfinite", "hope"), "on_nonfinite: .*'hope'"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", HEADERS)
def test_wrong_headers(name: str, suffix: str, tmp_path: Path) -> None:
    change, message = HEADERS[name]
    path, opt = tmp_path / f"run{suffix}", simple()
    opt.save(path)
    opt.step({"w": np.ones(4, np.float32)})
    rewrite(path, change)
    refuse_unchanged(opt, path, message)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rewriting_alone_is_no_damage(suffix: str, tmp_path: Path) -> None:
    path, opt = tmp_path / f"run{suffix}", simple()
    opt.save(path)
    rewrite(path, json.dumps)
    opt.load(path)


def without_params(header: Any) -> None:
    for entry in header["table"]:
        entry["arrays"].pop("params", None)
    header["has_params"] = True


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_promised_parameters_that_are_missing(suffix: str, tmp_path: Path) -> None:
    path, opt = tmp_path / f"run{suffix}", simple()
    opt.save(path, params=False)
    rewrite(path, without_params)
    refuse_unchanged(opt, path, r"params\['w'\]: there is no such array")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("params", "message"),
    [
        (np.ones(4), r"dtype|float64"),
        (np.ones(4, np.float16), r"dtype|float16"),
        (np.ones((2, 2), np.float32), r"shape \(2, 2\), got \(4,\)"),
        (np.ones(5, np.float32), r"shape \(5,\), got \(4,\)"),
        (np.array(1, np.float32), r"shape \(\), got \(4,\)"),
    ],
)
def test_parameters_of_another_form(
    params: Array, message: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"run{suffix}"
    simple().save(path)
    refuse_unchanged(fs.Momentum({"w": params.copy()}, lr=0.5), path, message)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("saved", "mine"),
    [
        *(("float32", "float64"), ("float64", "float32"), ("float16", "bfloat16")),
        *(("bfloat16", "float16"), ("bfloat16", "float32")),
    ],
)
def test_parameters_are_not_converted(saved: str, mine: str, suffix: str, tmp_path: Path) -> None:
    """Before the first step there is no state that could disagree."""
    path = tmp_path / f"run{suffix}"
    fs.Momentum({"w": np.ones(4, DTYPES[saved])}, lr=0.5).save(path)
    opt = fs.Momentum({"w": np.zeros(4, DTYPES[mine])}, lr=0.5)
    refuse_unchanged(opt, path, rf"params\['w'\]: expected dtype {mine}, got {saved}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_another_class(suffix: str, tmp_path: Path) -> None:
    """Even one with the same buffers."""
    path = tmp_path / f"run{suffix}"
    opt = make("adam", tree(0))
    train(opt, range(2))
    opt.save(path)
    refuse_unchanged(fs.AdamW(tree(1)), path, "a checkpoint of 'Adam', not of AdamW")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_files_are_os_errors(suffix: str, tmp_path: Path) -> None:
    opt = simple()
    with pytest.raises(FileNotFoundError):
        opt.load(tmp_path / f"run{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(IsADirectoryError):
        opt.load(tmp_path / f"folder{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_read_only_parameters_are_refused(suffix: str, tmp_path: Path) -> None:
    path, opt = tmp_path / f"run{suffix}", simple()
    opt.save(path)
    opt.step({"w": np.ones(4, np.float32)})
    params = opt.param_groups[0]["params"]
    before = snapshot(opt, params)
    params["w"].flags.writeable = False
    with pytest.raises(BufferError):
        opt.load(path)
    assert snapshot(opt, params) == before
