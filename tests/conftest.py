"""Tiny seeded models, the stock model as oracle, and guards against network access and unnoticed log messages."""

import importlib
import importlib.util
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType


# Before importing transformers: use temporary caches, stay offline.
_home = tempfile.TemporaryDirectory(prefix="sam-split-tests-")
os.environ.update(HF_HOME=_home.name, HF_MODULES_CACHE=f"{_home.name}/modules", HF_HUB_OFFLINE="1")
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("TEST_CUDA_DEVICES", "")  # most tests put inputs on the CPU
os.environ["OMP_NUM_THREADS"] = "1"  # threads only slow such tiny models down

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from filelock import FileLock  # noqa: E402
from hub import Hub, serve  # noqa: E402
from huggingface_hub import constants, hf_api  # noqa: E402
from labelled_images import blocks, save_pair  # noqa: E402
from packaging.version import Version  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModel, PreTrainedModel, SamConfig, SamModel, SamProcessor  # noqa: E402
from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity  # noqa: E402

import upload  # noqa: E402
from checkpoint_tools import model_repo  # noqa: E402
from checkpoint_tools.base_provenance import read_base  # noqa: E402
from checkpoint_tools.checkout import ROOT, split_class  # noqa: E402
from checkpoint_tools.licences import Licence  # noqa: E402
from checkpoint_tools.loading import processor_for  # noqa: E402
from checkpoint_tools.model_repo_card import card_facts, model_card  # noqa: E402
from checkpoint_tools.output_comparison import relative_error  # noqa: E402


disable_progress_bar()

CommandLine = Callable[[str], str]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE_FILES = {path.name for path in ROOT.glob("*_sam_split.py")}
MODEL_REPO_FILES = {
    *CODE_FILES,
    *("README.md", "LICENSE-code", "config.json", "processor_config.json", "model.safetensors"),
}
NEEDS_ADD_ADAPTER = pytest.mark.skipif(
    Version(version("transformers")) >= Version("5.24") and Version(version("peft")) < Version("0.22"),
    reason="model.add_adapter of transformers 5.24 needs peft 0.22",
)
FIGURES = {"num_parameters": 1234, "num_vision_parameters": 1000, "max_difference": 1.2e-7}  # as verification gives

# Windows that do not divide the grid (so that padding counts), one global layer, heads of 14 channels.
TINY = {
    "vision_config": {
        "hidden_size": 28,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "global_attn_indexes": [1],
        "image_size": 64,
        "patch_size": 8,
        "window_size": 3,
        "output_channels": 16,
        "num_pos_feats": 8,
        "mlp_dim": 32,
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
    "mask_decoder_config": {
        "hidden_size": 16,
        "mlp_dim": 16,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    },
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection but to this machine fails the test."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address, *args):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address, *args)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def logged(processor: SamProcessor) -> Iterator[list[str]]:
    """The warnings and errors that transformers logs during the test, less those of the first image processor."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub that this process uses with a token that may write, and an empty cache."""
    with serve() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path_factory.mktemp("cache")),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)  # of huggingface_hub's functions, which PEFT calls
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield server.hub


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Takes the place of the verification, which test_hub.py and the tests of verify.py run, and counts it."""
    calls: list[tuple] = []

    def run_verify(*args) -> dict:
        calls.append(args)
        return FIGURES

    monkeypatch.setattr(model_repo, "run_verify", run_verify)
    return calls


@pytest.fixture
def run_upload(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs upload.py with arguments and returns what it prints, or the one line that it ends with."""

    def run(*args: object, fails: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["upload.py", *map(str, args)])
        if not fails:
            upload.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as caught:
            upload.main()
        message = str(caught.value.code)
        assert "\n" not in message
        assert "hf_" not in message + "".join(capsys.readouterr()), "a token was shown"
        return message

    return run


@pytest.fixture
def push(run_upload, base_dir: Path) -> Callable[..., str]:
    options = ("--base", base_dir, "--repo-id", "user/sam", "--license", "mit")
    return lambda *args, **kwargs: run_upload(*options, *args, **kwargs)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fills every parameter with noise: SAM initialises `rel_pos_*` and biases to zero, which hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_config(**vision) -> SamConfig:
    return SamConfig(**{**TINY, "vision_config": {**TINY["vision_config"], **vision}})


def stock_model(**vision) -> SamModel:
    """A stock `SamModel` with non-zero weights everywhere, in evaluation mode."""
    return randomize(SamModel(tiny_config(**vision))).eval()


@pytest.fixture(scope="session")
def stock() -> SamModel:
    """Shared: tests must not change it."""
    return stock_model()


@pytest.fixture(scope="session")
def stock_dir(stock: SamModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stock") / "sam"
    stock.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def processor() -> SamProcessor:
    """For the tiny models."""
    return processor_for(tiny_config())


@pytest.fixture(scope="session")
def base_dir(stock_dir: Path, processor: SamProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock checkpoint with its processor, as on the Hub."""
    path = shutil.copytree(stock_dir, tmp_path_factory.mktemp("base") / "sam-base")
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def split_dir(stock_dir: Path, processor: SamProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repo with split weights, made as users make it."""
    path = tmp_path_factory.mktemp("split") / "sam-split"
    split_class().from_pretrained(stock_dir).save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def staged_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `upload.py` stages of a base. Tests change copies of it."""
    path = tmp_path_factory.mktemp("staged") / "sam"
    path.mkdir()
    model_repo.stage(base_dir, path, "5GB")
    card = card_facts("user/sam", read_base(str(base_dir), licence=Licence("mit")), FIGURES)
    (path / "README.md").write_text(model_card(card))
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Six images with masks; the arguments that name them."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(6):
        labels = np.roll(blocks(), number, axis=1)
        if number % 2:  # processes validate on different numbers of objects
            labels[labels == 300] = 0
        save_pair(folder, f"photo{number}", labels)
    return ["--images", str(folder / "images"), "--masks", str(folder / "masks"), "--validation", "0.5"]


@pytest.fixture(scope="session")
def segment_anything() -> Iterator[ModuleType]:
    """Meta's code; the package itself would import torchvision for its predictor."""
    spec = importlib.util.find_spec("segment_anything")
    if spec is None:
        pytest.skip("segment-anything-py is not installed")
    package = ModuleType("segment_anything")
    package.__path__, package.__spec__ = list(spec.submodule_search_locations), spec
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "segment_anything", package)
        for module in ("modeling", "build_sam", "utils.onnx"):
            importlib.import_module(f"segment_anything.{module}")
        yield package
    for name in [name for name in sys.modules if name.startswith("segment_anything.")]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def onnx_files(tmp_path_factory: pytest.TempPathFactory):
    """Written when they are first asked for, and by one process of several, as that takes seconds."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from onnx_files import OnnxFiles, make_checkpoint

    temporary = tmp_path_factory.getbasetemp()
    folder = (temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary) / "onnx"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            make_checkpoint(folder)
    return OnnxFiles(folder, SamModel.from_pretrained(folder / "stock").eval())


@pytest.fixture
def load(split_dir: Path) -> Callable[..., PreTrainedModel]:
    """Loads the model repo as users do."""
    return lambda path=split_dir, **kwargs: AutoModel.from_pretrained(path, trust_remote_code=True, **kwargs)


@pytest.fixture
def convert(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[CommandLine]:
    """Runs `convert.py` in an empty folder and returns what it prints."""
    import convert as command

    monkeypatch.chdir(tmp_path)
    verbosity = get_verbosity()

    def run(arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["convert.py", *arguments.split()])
        capsys.readouterr()
        command.main()
        return capsys.readouterr().out

    yield run
    set_verbosity(verbosity)


@pytest.fixture
def refused(convert: CommandLine) -> CommandLine:
    """Runs `convert.py`, which must fail, and returns its one line."""

    def run(arguments: str) -> str:
        with pytest.raises(SystemExit) as error:
            convert(arguments)
        message = str(error.value)
        assert "\n" not in message
        return message

    return run


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """Two images with two prompts each."""
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(2, 3, 64, 64, generator=generator),
        "input_points": 64 * torch.rand(2, 2, 1, 2, generator=generator),
    }


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Applies `change` to the weights in folder `path`."""
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def configure(path: Path, name: str, value: object) -> None:
    """Changes a setting of the configuration in folder `path`."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, name: value}))


class Malicious:
    """Ends the process if it is unpickled without care."""

    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('code of a pickle was run')",)


def run_python(code: str, *, expect_failure: bool = False, options: tuple[str, ...] = ()) -> str:
    """Runs `code` in a fresh interpreter, with this one's caches, and returns what it prints."""
    process = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    output = process.stdout + process.stderr
    assert (process.returncode != 0) == expect_failure, output
    return output


def assert_same_outputs(actual, expected, tolerance: float = 1e-5) -> None:
    """Every output agrees to `tolerance` of its own scale."""
    assert actual.keys() == expected.keys()
    for name in expected:
        actual_tensors, expected_tensors = (
            [output[name]] if isinstance(output[name], torch.Tensor) else list(output[name])
            for output in (actual, expected)
        )
        assert len(actual_tensors) == len(expected_tensors), name
        for actual_tensor, expected_tensor in zip(actual_tensors, expected_tensors, strict=True):
            if expected_tensor is None:
                assert actual_tensor is None, name
                continue
            assert actual_tensor.shape == expected_tensor.shape, name
            error = relative_error(actual_tensor, expected_tensor)
            assert error <= tolerance, f"{name}: {error}"


def assert_holds_weights_of(split: nn.Module, stock: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """`split` holds exactly the weights of `stock`, bit for bit after the cast to `dtype`."""
    actual = {name: tensor.cpu() for name, tensor in split.state_dict().items()}
    for name, tensor in stock.state_dict().items():
        tensor = tensor.to(dtype)
        if ".attn.qkv." in name:
            parts = [actual.pop(name.replace(".qkv.", f".{part}.")) for part in "qkv"]
            assert [len(part) for part in parts] == [len(tensor) // 3] * 3
            assert torch.equal(torch.cat(parts), tensor), name
        else:
            assert torch.equal(actual.pop(name), tensor), name
    assert not actual, f"weights that stock does not have: {list(actual)}"
