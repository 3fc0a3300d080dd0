"""The user's model, weights and data, read without running anything they did not name."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from edgeprune.core.errors import DataError, InputError, ModelError, first_line
from edgeprune.core.family import load_member
from edgeprune.core.records import ModelSpec
from edgeprune.core.tensors import Calibration
from edgeprune.graphs.archive import check_archive
from edgeprune.graphs.capture import import_program
from edgeprune.graphs.lift import lift
from edgeprune.graphs.ports import PORTS, Ports, dtype_names, example, get_ports, set_ports

Batches = Iterable[tuple[Any, Tensor]]
"""Something that can be iterated again and again, each time giving (inputs, targets) batches."""

MAX_MATERIALISED_BYTES = 4 << 30
CALIBRATION_EXAMPLES = 512
TEST_SHARE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What a data source gives; a split that it lacks is None.

    labels: names of the classes, in the order of the model's outputs. labelled: whether targets are labels; else they
        are floats that say nothing, and accuracy cannot be measured.
    preprocessing: what was done to raw values (`scale`, `mean`, `std`, `layout`), for the app.
    """

    train: Batches | None = None
    calibration: Batches | None = None
    test: Batches | None = None
    labels: tuple[str, ...] | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    labelled: bool = True

    def require(self, split: Literal["train", "calibration", "test"]) -> Batches:
        """A split that cannot be done without. raises: DataError when the source lacks it."""
        batches: Batches | None = getattr(self, split)
        if batches is None:
            raise DataError(f"the data source has no .{split}; add it: batches of (inputs, targets)")
        return batches

    def example(self) -> list[Any] | None:
        """The first example of the test split, an array (1, ...) an input; None without that split."""
        for inputs, _ in self.test or ():
            return [tensor[:1].numpy(force=True) for tensor in _tensors(inputs)]
        return None


class PortableData:
    """What a data source gives, which can be pickled, and costs nothing where it is not: it is loaded anew where it
    arrives. That takes the same files there.

    source, base, names: as for `load_data`.
    """

    def __init__(self, data: Data, source: str, base: Path, names: Sequence[str] = ()) -> None:
        self._data, self._given = data, (source, base, tuple(names))

    @property
    def train(self) -> Batches | None:
        """Training batches."""
        return self._data.train

    @property
    def calibration(self) -> Batches:
        """Calibration batches. raises: DataError where there are none."""
        return self._data.require("calibration")

    def __reduce__(self) -> tuple[Callable[..., PortableData], tuple[Any, ...]]:
        return _load_again, self._given


def _load_again(source: str, base: Path, names: Sequence[str]) -> PortableData:
    return PortableData(load_data(source, base, names), source, base, names)


class ArrayBatches:
    """Batches of arrays in memory; shuffled anew by torch's global generator in each pass if asked to."""

    SIZE = 64

    def __init__(self, inputs: Tensor, targets: Tensor, batch: int = SIZE, shuffle: bool = False) -> None:
        self.inputs, self.targets, self.batch, self.shuffle = inputs, targets, batch, shuffle

    def __len__(self) -> int:
        return -(-len(self.targets) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.targets)) if self.shuffle else torch.arange(len(self.targets))
        for start in range(0, len(order), self.batch):
            picked = order[start : start + self.batch]
            yield self.inputs[picked], self.targets[picked]


# --- the model -----------------------------------------------------------------------------------


def example_inputs(spec: ModelSpec, module: nn.Module | None = None) -> tuple[Tensor, ...]:
    """Inputs of the shapes in the specification: standard normal or whole numbers, the same every time.

    module: one read from a file knows its own shapes, for when the specification names none, and types.
    raises: ModelError when neither does.
    """
    ports = get_ports(module) if module is not None else Ports()
    shapes = spec.inputs or ports.shapes
    if not shapes:
        raise ModelError(
            "the model's input shapes are not given; add inputs = [[1, 3, 32, 32]] to [model], or --input 1x3x32x32"
        )
    generator = torch.Generator().manual_seed(0)
    dtypes = [getattr(torch, name) for name in ports.dtypes] or [torch.float32] * len(shapes)
    return tuple(example(shape, dtype, generator) for shape, dtype in zip(shapes, dtypes, strict=False))


def load_model(spec: ModelSpec, base: Path) -> nn.Module:
    """Build the model, put its weights in, and try it on the example inputs.

    spec: exactly one of `factory` and `file` is set. base: folder that relative paths start from.
    returns: the module in eval mode; a `.pt2` or `.onnx` comes back with real layers, so that it trains.
    raises: ModelError when the factory fails, the file or weights are unsafe or do not fit, a weight
        is NaN, or the example inputs do not fit.
    """
    if (spec.factory is None) == (spec.file is None):
        raise ModelError(
            "give the model either as a factory (`path.py:fn`) or as a .pt2 or .onnx file, not both or neither"
        )
    if spec.file is not None:
        module, name = _read_file(base / spec.file, spec.inputs), spec.file
    else:
        assert spec.factory is not None
        module, name = call_factory(spec.factory, base, ModelError), spec.factory
        if not isinstance(module, nn.Module):
            raise ModelError(f"{name} returned {type(module).__name__}, expected a torch.nn.Module")
    if spec.weights is not None:
        _put_weights(module, base / spec.weights, name)
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ModelError(f"{spec.weights or name}: '{key}' holds NaN or infinity; train or export the model again")
    module.eval()
    if spec.inputs:
        _try_inputs(module, example_inputs(spec, module), name)
    return module


def _try_inputs(module: nn.Module, inputs: tuple[Tensor, ...], name: str) -> None:
    try:
        with torch.no_grad():
            module(*inputs)
    except Exception as error:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in inputs)
        raise ModelError(f"{name} does not run on inputs of shape {shapes}: {first_line(error)}") from error


def _read_file(path: Path, shapes: tuple[tuple[int, ...], ...]) -> nn.Module:
    if path.suffix.lower() == ".onnx":
        return load_member("formats", "onnx").import_model(path, shapes)  # type: ignore[no-any-return]
    return _read_program(path)


def _read_program(path: Path) -> nn.Module:
    check_archive(path)
    notes = {PORTS: ""}
    try:
        program = torch.export.load(path, extra_files=notes)
        captured = import_program(program)
        values = [node.meta["val"] for node in captured.graph.nodes if node.op == "placeholder"]
        shapes = tuple(tuple(size if isinstance(size, int) else 1 for size in value.shape) for value in values)
        ports = Ports.from_json(notes[PORTS]) if notes[PORTS] else Ports()
    except Exception as error:
        raise ModelError(f"{path} cannot be read by torch.export.load: {first_line(error)}") from error
    set_ports(captured, replace(ports, shapes=shapes, dtypes=dtype_names(values)))
    return lift(captured)


def _put_weights(module: nn.Module, path: Path, name: str) -> None:
    weights, own = read_weights(path), module.state_dict()
    problems = []
    if missing := sorted(own.keys() - weights.keys()):
        problems.append(f"missing {_some(missing)}")
    if unexpected := sorted(weights.keys() - own.keys()):
        problems.append(f"unexpected {_some(unexpected)}")
    for key in sorted(own.keys() & weights.keys()):
        if own[key].shape != weights[key].shape:
            problems.append(f"'{key}' is {list(weights[key].shape)}, expected {list(own[key].shape)}")
    if problems:
        raise ModelError(f"{path} does not fit {name}: {_some(problems, '; ', quote=False)}")
    module.load_state_dict(weights)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from `.safetensors`, or from a pickle that holds nothing but tensors.

    raises: ModelError when it cannot be read or holds anything else; nothing in it is executed.
    """
    if not path.is_file():
        raise ModelError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except safetensors.SafetensorError as error:
        raise ModelError(f"{path} is not a safetensors file: {first_line(error)}") from error
    except Exception as error:
        # torch raises UnpicklingError, RuntimeError, EOFError, zipfile and codec errors here.
        raise ModelError(
            f"{path} was refused: it is damaged or holds more than tensors, and loading it could run code; "
            f"save the plain state dict as .safetensors ({first_line(error)})"
        ) from error
    if isinstance(weights, dict) and set(weights) == {"state_dict"}:
        weights = weights["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ModelError(f"{path} is not a state dict of tensors; save `model.state_dict()`")
    return dict(weights)


# --- the data ------------------------------------------------------------------------------------


def load_data(source: str, base: Path, names: Sequence[str] = ()) -> Data:
    """Batches for training, calibration and testing.

    source: `path.py:fn` or `pkg.mod:fn`, returning an object with some of `.train .calibration
        .test` (iterables of (inputs, targets)) and optionally `.labels`, `.preprocessing`; or an
        `.npz` with x (n, ...) and y (n,), optionally labels, mean, std: the fifth part becomes the
        test set, the first 512 of the rest the calibration set, always the same ones. An `.npz` without y
        has an array for each input, and is divided in the same way.
    base: folder that relative paths start from. names: of the model's inputs, for arrays that are named after them.
    raises: DataError when it cannot be read, is not finite, or inputs and targets do not fit.
    """
    if source.endswith(".npz"):
        return _read_arrays(base / source, names)
    given = call_factory(source, base, DataError)
    splits = {split: getattr(given, split, None) for split in ("train", "calibration", "test")}
    if all(batches is None for batches in splits.values()):
        raise DataError(f"{source} returned {type(given).__name__}, which has none of .train .calibration .test")
    checked = {split: _checked(batches, f"{source} .{split}") for split, batches in splits.items()}
    labels = getattr(given, "labels", None)
    return Data(
        train=checked["train"],
        calibration=checked["calibration"],
        test=checked["test"],
        labels=None if labels is None else tuple(str(label) for label in labels),
        preprocessing=dict(getattr(given, "preprocessing", None) or {}),
    )


def _checked(batches: Any, where: str) -> Batches | None:
    """The batches in a form that can be iterated again; the first (or every kept) batch is looked at."""
    if batches is None:
        return None
    if not isinstance(batches, Iterable):
        raise DataError(f"{where} is {type(batches).__name__}, expected an iterable of (inputs, targets)")
    once = iter(batches)
    kept: list[tuple[Any, Tensor]] = []
    if once is not batches:
        first = _next(once, where)
        if first is None:
            raise DataError(f"{where} is empty")
        _check_batch(first, where)
        return batches
    # A generator gives its batches once; every stage needs them again, so keep them.
    size = 0
    while (batch := _next(once, where)) is not None:
        kept.append(_check_batch(batch, where))
        size += sum(tensor.nbytes for tensor in [*_tensors(batch[0]), batch[1]])
        if size > MAX_MATERIALISED_BYTES:
            raise DataError(
                f"{where} is a generator of more than {MAX_MATERIALISED_BYTES >> 30} GiB or without end; "
                "return an object whose __iter__ starts anew instead"
            )
    if not kept:
        raise DataError(f"{where} is empty")
    return kept


def _next(batches: Iterator[Any], where: str) -> Any:
    try:
        return next(batches, None)
    except Exception as error:
        raise DataError(f"{where}: {_describe(error)}") from error


def _tensors(inputs: Any) -> list[Any]:
    return list(inputs) if isinstance(inputs, tuple | list) else [inputs]


def _check_batch(batch: Any, where: str) -> tuple[Any, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise DataError(f"{where}: a batch is {type(batch).__name__}, expected a pair (inputs, targets)")
    inputs, targets = batch
    for tensor in [*_tensors(inputs), targets]:
        if not isinstance(tensor, Tensor):
            raise DataError(f"{where}: a batch holds {type(tensor).__name__}, expected torch tensors")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{where}: a batch holds NaN or infinity")
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in [*_tensors(inputs), targets]}
    if len(sizes) != 1 or 0 in sizes:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in [*_tensors(inputs), targets])
        raise DataError(f"{where}: inputs and targets of a batch have shapes {shapes}; the first axes must agree")
    if not targets.is_floating_point() and int(targets.min()) < 0:
        raise DataError(f"{where}: the label {int(targets.min())} is negative; classes are counted from 0")
    return inputs, targets


def as_arrays(batches: Batches) -> Calibration:
    """The inputs of batches as arrays, a tuple for each batch."""
    return [tuple(tensor.numpy(force=True) for tensor in _tensors(inputs)) for inputs, _ in batches]


def _read_arrays(path: Path, names: Sequence[str]) -> Data:
    if not path.is_file():
        raise DataError(f"no data at {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
        raise DataError(f"{path} is not an .npz of plain arrays: {first_line(error)}") from error
    if not {"x", "y"} <= arrays.keys():
        return _read_inputs(arrays, names, path)
    x, y = arrays["x"], arrays["y"]
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise DataError(f"{path}: y is {y.dtype} of shape {list(y.shape)}, expected one whole-number label per example")
    if x.ndim < 2 or x.dtype.kind not in "fiu" or len(x) != len(y) or len(x) < 10:
        raise DataError(f"{path}: x is {x.dtype} of shape {list(x.shape)} for {len(y)} labels; need 10 or more")
    inputs, preprocessing = _prepare(x, arrays, path)
    targets = torch.from_numpy(y.astype(np.int64))
    _check_batch((inputs, targets), str(path))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    tested = max(1, int(len(y) * TEST_SHARE))
    test, train = order[:tested], order[tested:]
    calibration = train[:CALIBRATION_EXAMPLES]
    labels = arrays.get("labels")
    return Data(
        train=ArrayBatches(inputs[train], targets[train], shuffle=True),
        calibration=ArrayBatches(inputs[calibration], targets[calibration]),
        test=ArrayBatches(inputs[test], targets[test]),
        labels=None if labels is None else tuple(str(label) for label in labels.tolist()),
        preprocessing=preprocessing,
    )


def _read_inputs(arrays: dict[str, Any], names: Sequence[str], path: Path) -> Data:
    """Examples without labels, an array for each input; floats stand in the place of the labels."""
    inputs = {name: array for name, array in arrays.items() if name not in ("y", "labels", "mean", "std")}
    if set(names) <= inputs.keys():
        inputs = {name: inputs[name] for name in names or inputs}
    wrong = [name for name, array in inputs.items() if array.ndim < 2 or array.dtype.kind not in "fiu"]
    if "y" in arrays or not inputs or wrong or len({len(array) for array in inputs.values()}) != 1:
        shown = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()) or "none"
        raise DataError(
            f"{path} needs the arrays x and y, or without labels one for each input, as many examples in each; "
            f"it has {shown}"
        )
    prepared = [_prepare(array, arrays, path) for array in inputs.values()]
    tensors = tuple(tensor for tensor, _ in prepared)
    count = len(tensors[0])
    _check_batch((tensors, torch.zeros(count)), str(path))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    tested = int(count * TEST_SHARE)

    def batches(picked: Tensor) -> list[tuple[Any, Tensor]]:
        parts = picked.split(ArrayBatches.SIZE) if len(picked) else ()
        return [(tuple(each[part] for each in tensors), torch.zeros(len(part))) for part in parts]

    return Data(
        calibration=batches(order[tested : tested + CALIBRATION_EXAMPLES]),
        test=batches(order[:tested]) or None,
        preprocessing=prepared[0][1] if len(prepared) == 1 else {},
        labelled=False,
    )


def _prepare(x: Any, arrays: dict[str, Any], path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Bytes become [0, 1], images channels-first, and the file's mean and std are applied per channel."""
    preprocessing: dict[str, Any] = {"scale": 1.0, "layout": "NCHW" if x.ndim == 4 else ""}
    if x.dtype == np.uint8:
        preprocessing["scale"] = 1 / 255
    if x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        x = np.ascontiguousarray(np.moveaxis(x, -1, 1))
    inputs = torch.from_numpy(x.astype(np.float32)) * preprocessing["scale"]
    if "mean" in arrays or "std" in arrays:
        channels = inputs.shape[1]
        mean = np.asarray(arrays.get("mean", 0.0), dtype=np.float64).reshape(-1)
        std = np.asarray(arrays.get("std", 1.0), dtype=np.float64).reshape(-1)
        if mean.size not in (1, channels) or std.size not in (1, channels) or not (std > 0).all():
            raise DataError(f"{path}: mean and std need one positive value, or one for each of {channels} channels")
        shape = (1, -1) + (1,) * (inputs.ndim - 2)
        inputs = (inputs - torch.tensor(mean).float().reshape(shape)) / torch.tensor(std).float().reshape(shape)
        preprocessing |= {"mean": mean.tolist(), "std": std.tolist()}
    return inputs, preprocessing


# --- the user's code -----------------------------------------------------------------------------


def call_factory(name: str, base: Path, error_kind: type[InputError]) -> Any:
    """Import `path.py:fn` or `pkg.mod:fn` and call it without arguments.

    error_kind: what to raise. raises: it, naming the file and line where the user's code failed.
    """
    place, separator, function_name = name.rpartition(":")
    if not separator or not place or not function_name:
        raise error_kind(f"'{name}' names no function; write path.py:function or package.module:function")
    path = (base / place).resolve()
    if place.endswith(".py") and not path.is_file():
        raise error_kind(f"no file {path} (from '{name}')")
    try:
        with _search_path(path.parent if place.endswith(".py") else base.resolve()):
            module = _import_file(path) if place.endswith(".py") else importlib.import_module(place)
            function: Callable[[], Any] | None = getattr(module, function_name, None)
            if callable(function):
                return function()
    except (Exception, SystemExit) as error:
        raise error_kind(f"{name} failed: {_describe(error)}") from error
    public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    raise error_kind(f"{place} has no function '{function_name}'; it has {_some(public) or 'none'}")


def _import_file(path: Path) -> Any:
    unique = f"_edgeprune_{path.stem}_{abs(hash(str(path))):x}"
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module  # dataclasses and torch.export look modules up by name
    spec.loader.exec_module(module)
    return module


@contextmanager
def _search_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _describe(error: BaseException) -> str:
    """`file:line: ValueError: what it says`, of the innermost frame outside installed packages."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {error.msg}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith("<frozen")]
    where = f"{own[-1].filename}:{own[-1].lineno}: " if own else ""
    return f"{where}{type(error).__name__}: {first_line(error)}"


def _some(names: list[str], separator: str = ", ", quote: bool = True, limit: int = 5) -> str:
    shown = [f"'{name}'" if quote else name for name in names[:limit]]
    return separator.join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
