"""load: the user's code, weights and data, and everything that can be wrong with them."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgeprune.compact import save_compact
from edgeprune.core.errors import DataError, ModelError
from edgeprune.core.records import ModelSpec
from edgeprune.graphs.archive import _refused_values
from edgeprune.load import example_inputs, load_data, load_model

torch.set_num_threads(1)

NETS = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))

def broken():
    sizes = []
    return sizes[3]

def not_a_net():
    return 7

def leaves():
    raise SystemExit(3)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path


def spec(**changes: object) -> ModelSpec:
    return ModelSpec(**{"factory": "nets.py:net", "inputs": ((2, 3, 8, 8),), **changes})


class RunsCommand:
    """A pickle of this runs a command when it is loaded the ordinary way."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


# --- models --------------------------------------------------------------------------------------


def test_a_factory_gives_an_evaluating_model(folder: Path) -> None:
    model = load_model(spec(), folder)
    assert not model.training
    assert model(*example_inputs(spec())).shape == (2, 5)


def test_a_package_factory_needs_no_file(folder: Path) -> None:
    (folder / "my_nets_for_edgeprune").mkdir()
    (folder / "my_nets_for_edgeprune" / "__init__.py").write_text(NETS)
    assert load_model(spec(factory="my_nets_for_edgeprune:net"), folder)(torch.ones(1, 3, 8, 8)).shape == (1, 5)


def test_example_inputs_are_the_same_every_time() -> None:
    assert torch.equal(example_inputs(spec())[0], example_inputs(spec())[0])
    with pytest.raises(ModelError, match="input shapes"):
        example_inputs(spec(inputs=()))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nets.py:broken", r"nets\.py:10: IndexError: list index out of range"),
        ("nets.py:leaves", r"nets\.py:16: SystemExit: 3"),
        ("nets.py:absent", "no function 'absent'; it has .*'net'"),
        ("nets.py:not_a_net", "returned int, expected a torch.nn.Module"),
        ("nowhere.py:net", "no file"),
        ("nets.py", "names no function"),
        ("no_such_package_xyz:net", "No module named"),
    ],
)
def test_a_factory_that_fails_says_where(folder: Path, factory: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(spec(factory=factory), folder)


def test_a_file_that_does_not_parse_is_named_with_its_line(folder: Path) -> None:
    (folder / "typo.py").write_text("def net(:\n    pass\n")
    with pytest.raises(ModelError, match=r"typo\.py:1: "):
        load_model(spec(factory="typo.py:net"), folder)


def test_inputs_of_the_wrong_shape_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"does not run on inputs of shape \[2, 3, 9, 9\]"):
        load_model(spec(inputs=((2, 3, 9, 9),)), folder)


def test_factory_and_file_exclude_each_other(folder: Path) -> None:
    with pytest.raises(ModelError, match="not both or neither"):
        load_model(spec(file="model.pt2"), folder)


# --- weights -------------------------------------------------------------------------------------


def test_weights_come_from_safetensors_or_a_state_dict(folder: Path) -> None:
    wanted = load_model(spec(), folder).state_dict()
    wanted = {key: value + 1 for key, value in wanted.items()}
    save_file(wanted, folder / "w.safetensors")
    torch.save(wanted, folder / "w.pt")
    torch.save({"state_dict": wanted}, folder / "wrapped.pth")
    for name in ("w.safetensors", "w.pt", "wrapped.pth"):
        found = load_model(spec(weights=name), folder).state_dict()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name


def test_weights_that_do_not_fit_are_listed(folder: Path) -> None:
    weights = dict(load_model(spec(), folder).state_dict())
    del weights["0.bias"]
    weights["extra"] = torch.ones(2)
    weights["4.weight"] = torch.ones(5, 7)
    save_file(weights, folder / "w.safetensors")
    with pytest.raises(
        ModelError, match=r"missing '0\.bias'; unexpected 'extra'; '4\.weight' is \[5, 7\], expected \[5, 512\]"
    ):
        load_model(spec(weights="w.safetensors"), folder)


def test_nan_weights_are_refused(folder: Path) -> None:
    weights = dict(load_model(spec(), folder).state_dict())
    weights["0.weight"][1, 2, 0, 0] = float("nan")
    save_file(weights, folder / "w.safetensors")
    with pytest.raises(ModelError, match=r"'0\.weight' holds NaN"):
        load_model(spec(weights="w.safetensors"), folder)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_malicious_pickle_is_refused_and_does_not_run(folder: Path, legacy: bool) -> None:
    proof = folder / "it_ran"
    attack = {"0.weight": RunsCommand(f"touch {proof}")}
    if legacy:
        (folder / "w.pt").write_bytes(pickle.dumps(attack))
    else:
        torch.save(attack, folder / "w.pt")
    with pytest.raises(ModelError, match="refused"):
        load_model(spec(weights="w.pt"), folder)
    assert not proof.exists()
    pickle.loads(pickle.dumps(attack))
    assert proof.exists(), "the attack itself must work, or this test shows nothing"


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_damaged_or_absent_weights_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(ModelError, match="no weights"):
        load_model(spec(weights=name), folder)
    (folder / name).write_bytes(b"\x80\x04 not weights")
    with pytest.raises(ModelError, match=name):
        load_model(spec(weights=name), folder)


# --- .pt2 ----------------------------------------------------------------------------------------


@pytest.fixture
def program(folder: Path) -> Path:
    model = load_model(spec(), folder)
    path = folder / "model.pt2"
    torch.export.save(torch.export.export(model, example_inputs(spec()), strict=False), path)
    return path


def change_archive(path: Path, change: dict[str, bytes]) -> None:
    """Rewrite members of a zip by the end of their name; a name with no match is added under the root."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(parts)).split("/")[0]
    for ending, data in change.items():
        matches = [name for name in parts if name.endswith(ending)]
        parts[matches[0] if matches else f"{root}/{ending}"] = data
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


def test_a_program_comes_back_trainable_with_its_own_names(folder: Path, program: Path) -> None:
    given = spec(factory=None, file="model.pt2")
    model = load_model(given, folder)
    assert isinstance(model.get_submodule("1"), nn.BatchNorm2d)
    assert model.state_dict().keys() == load_model(spec(), folder).state_dict().keys()
    model.train()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_program_that_we_wrote_comes_back(folder: Path) -> None:
    model = load_model(spec(), folder).eval()
    save_compact(model, example_inputs(spec()), folder, name="model")
    again = load_model(spec(factory=None, file="model.pt2"), folder).eval()
    x = torch.randn(3, *example_inputs(spec())[0].shape[1:])  # its batch size is free
    assert torch.allclose(again(x), model(x), atol=1e-5)


@pytest.mark.parametrize("text", ["Symbol('s0').__class__", "Symbol(open('s0'))", "Symbol('s0', x=exec('1'))"])
def test_more_than_a_symbol_is_refused(text: str) -> None:
    assert list(_refused_values({"as_expr": {"expr_str": text}}))
    assert not list(_refused_values({"as_expr": {"expr_str": "2*Symbol('s0', positive=True, integer=True) + 1"}}))


def test_a_program_that_is_no_archive_is_refused(folder: Path) -> None:
    (folder / "model.pt2").write_bytes(b"something else")
    with pytest.raises(ModelError, match=r"not a \.pt2"):
        load_model(spec(factory=None, file="model.pt2"), folder)


@pytest.mark.parametrize("kind", ["sample inputs", "pickled weight", "custom object", "size expression", "operator"])
def test_a_malicious_program_is_refused_and_does_not_run(folder: Path, program: Path, kind: str) -> None:
    proof = folder / "it_ran"
    torch.save(RunsCommand(f"touch {proof}"), folder / "attack.pt")
    attack = (folder / "attack.pt").read_bytes()
    with zipfile.ZipFile(program) as archive:
        name = next(n for n in archive.namelist() if n.endswith("model_weights_config.json"))
        weights = json.loads(archive.read(name))
        model = json.loads(archive.read(next(n for n in archive.namelist() if n.endswith("models/model.json"))))
    if kind == "sample inputs":
        change_archive(program, {"sample_inputs/model.pt": attack})
    elif kind == "pickled weight":
        weights["config"]["0.weight"]["use_pickle"] = True
        change_archive(program, {"model_weights_config.json": json.dumps(weights).encode(), "weights/weight_0": attack})
    elif kind == "custom object":
        change_archive(program, {"data/constants/opaque_obj_0": attack})
    elif kind == "size expression":
        value = next(iter(model["graph_module"]["graph"]["tensor_values"].values()))
        value["sizes"][0] = {"as_expr": {"expr_str": f"__import__('os').system('touch {proof}')", "hint": None}}
        change_archive(program, {"models/model.json": json.dumps(model).encode()})
    else:
        model["graph_module"]["graph"]["nodes"][0]["target"] = "torch.hub.load"
        change_archive(program, {"models/model.json": json.dumps(model).encode()})
    with pytest.raises(ModelError, match="refused"):
        load_model(spec(factory=None, file="model.pt2"), folder)
    assert not proof.exists()


# --- data ----------------------------------------------------------------------------------------

DATA = """
import torch

class Source:
    def __init__(self, train, calibration=None, test=None):
        self.train, self.calibration, self.test = train, calibration, test
        self.labels = ["a", "b"]

def batch(n=4, value=1.0):
    return torch.full((n, 3, 8, 8), value), torch.arange(n) % 2

def lists(): return Source([batch(), batch()], [batch()], [batch()])
def generators(): return Source((batch() for _ in range(3)))
def nothing(): return object()
def empty(): return Source([])
def unlabelled(): return Source([torch.ones(4, 3)])
def no_targets(): return Source([(torch.ones(4, 3), None)])
def nan(): return Source([batch(value=float("nan"))])
def lengths(): return Source([(torch.ones(4, 3), torch.zeros(3, dtype=torch.int64))])
def negative(): return Source([(torch.ones(4, 3), torch.tensor([0, 1, -1, 0]))])
def a_number(): return Source(7)
def fails():
    def batches():
        yield batch()
        raise RuntimeError("disk gone")
    return Source(batches())
"""


def test_data_from_a_factory(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text(DATA)
    data = load_data("data.py:lists", tmp_path)
    assert data.labels == ("a", "b")
    assert data.train is not None and len(list(data.train)) == 2


def test_a_generator_can_be_read_again(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text(DATA)
    data = load_data("data.py:generators", tmp_path)
    assert data.train is not None and data.test is None
    assert [len(list(data.train)) for _ in range(2)] == [3, 3]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nothing", "none of .train .calibration .test"),
        ("empty", "empty"),
        ("unlabelled", "expected a pair"),
        ("no_targets", "NoneType, expected torch tensors"),
        ("nan", "NaN"),
        ("lengths", r"\[4, 3\], \[3\]; the first axes must agree"),
        ("negative", "-1 is negative"),
        ("a_number", "int, expected an iterable"),
        ("fails", r"data\.py:\d+: RuntimeError: disk gone"),
    ],
)
def test_data_that_cannot_be_used_says_why(tmp_path: Path, function: str, message: str) -> None:
    (tmp_path / "data.py").write_text(DATA)
    with pytest.raises(DataError, match=message):
        load_data(f"data.py:{function}", tmp_path)


def test_arrays_are_split_the_same_way_every_time(tmp_path: Path) -> None:
    x = np.arange(100, dtype=np.float32).reshape(100, 1)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(100) % 3, labels=np.array(["a", "b", "c"]))
    first, second = (load_data("d.npz", tmp_path) for _ in range(2))
    assert first.labels == ("a", "b", "c")

    def seen(batches: object) -> set[float]:
        return {float(value) for inputs, _ in batches for value in inputs.flatten()}

    assert seen(first.test) == seen(second.test) and len(seen(first.test)) == 20
    assert seen(first.train).isdisjoint(seen(first.test)) and len(seen(first.train)) == 80
    assert seen(first.calibration) <= seen(first.train)
    for inputs, targets in first.train:
        assert torch.equal(inputs.flatten().long() % 3, targets)


def test_images_in_bytes_are_scaled_and_normalised(tmp_path: Path) -> None:
    x = np.full((20, 8, 8, 3), 255, np.uint8)
    np.savez(tmp_path / "d.npz", x=x, y=np.zeros(20, int), mean=[0.5, 0.5, 0.0], std=[0.5, 0.25, 1.0])
    data = load_data("d.npz", tmp_path)
    inputs, _ = next(iter(data.test))
    assert inputs.shape[1:] == (3, 8, 8)
    assert torch.allclose(inputs[0, :, 0, 0], torch.tensor([1.0, 2.0, 1.0]))
    assert data.preprocessing["mean"] == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.zeros(20, int)}, "needs the arrays x and y"),
        ({"a": np.ones((20, 3)), "b": np.ones((19, 3))}, "as many examples in each"),
        ({"x": np.ones((20, 3)), "y": np.ones(20)}, "whole-number label"),
        ({"x": np.ones((20, 3)), "y": np.zeros(19, int)}, "19 labels"),
        ({"x": np.full((20, 3), np.inf), "y": np.zeros(20, int)}, "NaN or infinity"),
        ({"x": np.ones((20, 3)), "y": np.zeros(20, int), "std": np.zeros(3)}, "mean and std"),
        ({"x": np.array([{}] * 20), "y": np.zeros(20, int)}, "not an .npz of plain arrays"),
    ],
)
def test_arrays_that_cannot_be_used_say_why(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_data("d.npz", tmp_path)


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((20, 3)), y=np.zeros(20, int))
    whole = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "d.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"not an \.npz"):
        load_data("d.npz", tmp_path)
    with pytest.raises(DataError, match="no data at"):
        load_data("absent.npz", tmp_path)
