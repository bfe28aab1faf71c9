"""Whatever objects lie beside the weights in a checkpoint, the weights are read, and no code of the file is run."""

import argparse
import datetime
import enum
import functools
import os
import pathlib
import re
from collections import OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Malicious, stock_model
from torch import nn
from transformers import SamModel

from checkpoint_tools import meta_layout, wrapped_checkpoints


ITEM = namedtuple("ITEM", "path roi")


class Mode(enum.Enum):
    TRAIN = 1


class Config(dict):
    """As Lightning's AttributeDict and EasyDict."""


class Data:
    """A data set, as torch_em's trainer saves it, that does something if its state is set."""

    def __init__(self, *values: object):
        self.values = values

    def __getstate__(self) -> dict:
        return {"values": self.values}

    def __setstate__(self, state: dict) -> None:
        Path("ran").touch()


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function: object, *arguments: object):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call

    def __call__(self) -> None:
        """Without it, it could not be called in a pickle."""


def transform(image: object) -> object:
    return image


def hooked() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm2d(2))
    module.register_forward_hook(transform)
    return module


OBJECTS = {
    "argparse": argparse.Namespace(lr=1),
    "a path": pathlib.Path("out"),
    "a module": hooked(),
    "an optimizer": torch.optim.AdamW([nn.Parameter(torch.zeros(2))]),
    "a class": Data,
    "a function": transform,
    "a partial": functools.partial(transform, image=Data()),
    "a method": hooked().forward,
    "an enum": Mode.TRAIN,
    "a named tuple": ITEM("a.tif", (slice(0, 3), ...)),
    "a dict of its own class": Config(lr=1),
    "a default dict": defaultdict(list, {"iou": [0.5]}),
    "a deque": deque([0.1, 0.2], maxlen=3),
    "a date": datetime.datetime(2024, 1, 1),
    "a range and a set": [range(3), frozenset({1}), {2}],
    "NumPy's numbers": [np.float64(0.5), np.zeros(3), np.array(["a.tif"])],
    "NumPy's objects": np.array([Data()], dtype=object),
    "NumPy's generator": np.random.default_rng(0),
    "objects in objects": OrderedDict(a=[Data(Data(nn.Linear(1, 1)), {"b": (Mode.TRAIN, None)})]),
}
CODE = {
    "exec": Malicious(),
    "getattr": Calls(getattr, Calls(pathlib.Path, "ran"), "touch"),
    "open": Calls(open, "ran", "w"),
    "setstate": Data(),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return meta_layout.meta_from_sam(stock_model())


@pytest.mark.parametrize("case", [*OBJECTS, *CODE])
def test_objects_beside_the_weights(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weight = torch.arange(6.0)
    torch.save({"model": {"weight": weight}, "x": {**OBJECTS, **CODE}[case]}, "best.pt")
    checkpoint = wrapped_checkpoints.read(Path("best.pt"))
    assert torch.equal(checkpoint.weights["weight"], weight)
    noted = "Not read, because that could run code: objects of " in checkpoint.notes[-1]
    assert noted == (case not in ("NumPy's numbers", "NumPy's generator"))
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


@pytest.mark.slow
def test_a_checkpoint_of_torch_em(weights, convert, tmp_path):
    """What micro-sam's `best.pt` holds: https://github.com/constantinpape/torch-em, trainer/default_trainer.py."""
    torch.save(
        {
            "iteration": 3,
            "best_metric": np.float64(0.25),
            "model_state": {f"sam.{name}": tensor for name, tensor in weights.items()},
            "optimizer_state": torch.optim.AdamW([nn.Parameter(torch.zeros(2))]).state_dict(),
            "init": {"train_loader": Data(np.zeros(3), transform), "loss": hooked(), "device": torch.device("cpu")},
            "train_time": datetime.timedelta(1),
        },
        "best.pt",
    )
    output = convert("from-meta best.pt out --stock --decoder-heads 2")
    (line,) = [line for line in output.splitlines() if "Not read" in line]
    assert "test_inert_pickles.Data" in line
    assert "and 1 more" in line
    assert not (tmp_path / "ran").exists()
    for name, tensor in SamModel.from_pretrained("out").state_dict().items():
        assert torch.equal(tensor, stock_model().state_dict()[name])


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("content", [Malicious(), Calls(os.system, "touch ran"), Calls(os.getcwd)])
def test_code_in_the_place_of_weights(content, is_new, tmp_path, refused):
    """torch does not let anything stand for what is in `os`, and knows no names in the old format."""
    for file in ({"model": content}, {"model": {"weight": content}}, content):
        torch.save(file, "sam.pth", _use_new_zipfile_serialization=is_new)
        assert re.search("code|expected tensors by name", refused("from-meta sam.pth out"))
        assert [path.name for path in tmp_path.iterdir()] == ["sam.pth"]


@pytest.mark.parametrize(
    ("content", "name"),
    [(Calls(os.getcwd), "posix.getcwd"), (Calls(Calls(getattr, "", "upper")), "builtins.getattr")],
)
def test_what_cannot_be_replaced_is_refused_by_name(content, name, tmp_path):
    path = tmp_path / "sam.pth"
    torch.save({"model": {"weight": torch.ones(1)}, "x": content}, path)
    with pytest.raises(ValueError, match=rf"without running code: {name}\. If you trust the file"):
        wrapped_checkpoints.read(path)


def test_another_pickle_protocol(tmp_path):
    path = tmp_path / "sam.pth"
    torch.save({"weight": torch.ones(1)}, path, pickle_protocol=4)
    with pytest.raises(ValueError, match=r"not written by torch\.save with its own pickle_protocol"):
        wrapped_checkpoints.read(path)
