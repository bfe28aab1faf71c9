"""What is staged is the base and nothing else; what is not never reaches a Hub; and errors say what to do."""

import errno
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import stock_model
from hub import Fault, File, Server, serve
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, SamProcessor, SamVisionModel

import upload
import verify
from staging import ROOT, split_class


# huggingface_hub's own way of sending files
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FIGURES = {"num_parameters": 100, "num_vision_parameters": 80, "max_difference": 1e-7}
CODE = {path.name for path in ROOT.glob("*_sam_split.py")}
FILES = {*CODE, "README.md", "LICENSE", "config.json", "processor_config.json", "model.safetensors"}


@pytest.fixture(scope="module")
def base(stock_dir: Path, processor: SamProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock checkpoint with its processor, as on the Hub."""
    path = shutil.copytree(stock_dir, tmp_path_factory.mktemp("base") / "sam-base")
    processor.save_pretrained(path)
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A Hub that this process uses with a token that may write, and an empty cache."""
    with serve() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield server


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Takes the place of the verification, which test_hub.py and the tests of verify.py run, and counts it."""
    calls: list[tuple] = []

    def run_verify(*args) -> dict:
        calls.append(args)
        return FIGURES

    monkeypatch.setattr(upload, "run_verify", run_verify)
    return calls


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
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


# --- staging and verification


def sharded(base: Path, path: Path) -> None:
    split_class().from_pretrained(base).to_sam().save_pretrained(path, max_shard_size="20KB")
    (path / "config.json").write_bytes((base / "config.json").read_bytes())


def pickled(base: Path, path: Path) -> None:
    path.mkdir()
    torch.save(load_file(base / "model.safetensors"), path / "pytorch_model.bin")


def split(base: Path, path: Path) -> None:
    split_class().from_pretrained(base).save_pretrained(path)
    for file in CODE:
        (path / file).write_text("raise RuntimeError('code of the base was run')")


def fused_with_split_configuration(base: Path, path: Path) -> None:
    split_class().from_pretrained(base).save_pretrained(path)
    shutil.copy(base / "model.safetensors", path)


def split_in_half_precision(base: Path, path: Path) -> None:
    split_class().from_pretrained(base, dtype=torch.bfloat16).save_pretrained(path)


@pytest.mark.parametrize(
    "make", [None, sharded, pickled, split, fused_with_split_configuration, split_in_half_precision]
)
def test_staged_from(make, base: Path, tmp_path: Path) -> None:
    """From every kind of base come its weights and this checkout's code, and `verify` finds no fault with it."""
    folder, output = base, tmp_path / "staged"
    if make:
        folder = tmp_path / "made"
        make(base, folder)
        for file in base.glob("*.json"):
            if not (folder / file.name).exists():
                shutil.copy(file, folder)
    output.mkdir()
    upload.stage(folder, output, "5GB")
    assert {path.name for path in output.iterdir()} == FILES - {"README.md"}
    dtype = torch.bfloat16 if make is split_in_half_precision else torch.float32
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {dtype}
    assert all((output / name).read_bytes() == (ROOT / name).read_bytes() for name in CODE)
    figures = verify.verify(str(output), folder)
    assert figures["num_parameters"] == stock_model().num_parameters()
    assert figures["max_difference"] <= 1e-5


@pytest.fixture(scope="module")
def staged_dir(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A staged folder as it should be: tests change copies of it."""
    path = tmp_path_factory.mktemp("staged") / "sam"
    path.mkdir()
    upload.stage(base, path, "5GB")
    (path / "README.md").write_text(upload.model_card("user/sam", str(base), base, FIGURES))
    return path


def test_sharded_output(base: Path, tmp_path: Path) -> None:
    upload.stage(base, tmp_path, "20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert all(upload.is_ours(path.name) for path in tmp_path.iterdir())
    verify.compare_weights(tmp_path, base)


def rewrite(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def rewrite_weights(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite_weights


def configure(name: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, name: value}))

    return change


def append(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text((folder / name).read_text() + text)  # type: ignore[return-value]


def exchange_q_and_k(weights: dict) -> None:
    q, k = (f"vision_encoder.layers.0.attn.{name}.weight" for name in "qk")
    weights[q], weights[k] = weights[k], weights[q]


AUTO_MAP = json.loads((ROOT / "config.json").read_text())["auto_map"]
POSITIONS = "shared_image_embedding.positional_embedding"


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (rewrite(exchange_q_and_k), "outputs differ"),
        (rewrite(lambda weights: weights["mask_decoder.iou_token.weight"].mul_(float("nan"))), "outputs differ"),
        # which have no part in the outputs that are compared
        (
            rewrite(lambda weights: weights["prompt_encoder.mask_embed.conv1.bias"].add_(1e-6)),
            "conv1.bias .* is not the",
        ),
        (rewrite(lambda weights: weights.update(foreign=torch.zeros(1))), "that its base has not: foreign"),
        (
            append("modeling_sam_split.py", "\nimport torch as scipy\nif False:\n    import antigravity, PIL\n"),
            "imports PIL",
        ),
        (configure("auto_map", {**AUTO_MAP, "AutoModelForMaskGeneration": "another.Model"}), "MaskGeneration"),
    ],
)
def test_verify_finds(spoil, problem: str, staged_dir: Path, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(staged_dir, tmp_path / "spoilt")
    spoil(folder)
    with pytest.raises(Exception, match=problem):
        verify.verify(str(folder), base)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (append("conversion_sam_split.py", "\n"), "conversion_sam_split.py is not that"),
        (lambda folder: (folder / "notes.txt").write_text(""), "notes.txt, which is no part"),
        (lambda folder: (folder / "README.md").write_text("---\nlibrary_name: timm\n---\n"), "library_name: timm"),
    ],
)
def test_staged_files_are_checked(spoil, problem: str, staged_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(staged_dir, tmp_path / "spoilt")
    upload.check_staged(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=problem):
        upload.check_staged(folder)


def test_failed_verification_pushes_nothing(
    hub: Server, run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(*args) -> None:
        stage(*args)
        rewrite(exchange_q_and_k)(args[1])

    stage = upload.stage
    monkeypatch.setattr(upload, "stage", spoilt)
    message = run("--base", base, "--repo-id", "user/sam", "--output", tmp_path / "sam", fails=True)
    assert "Verification failed" in message
    assert "outputs differ from stock" in message
    assert not (tmp_path / "sam").exists()
    assert not hub.hub.repos


# --- what is no base


class Malicious:
    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('code of a pickle was run')",)


def with_pickle(content: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return change


def replaced_by(model) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        model().save_pretrained(folder)

    return change


def tiny_bert() -> BertModel:
    return BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (replaced_by(tiny_bert), "'bert' model, and SAM v1"),
        (replaced_by(lambda: SamVisionModel(stock_model().config.vision_config)), "'sam_vision_model' model"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json: .* An adapter must be merged"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter"),
        (configure("quantization_config", {"quant_method": "bitsandbytes"}), "quantized"),
        (lambda folder: (folder / "processor_config.json").unlink(), "no processor"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"{"), "(?i)header|safetensors"),
        (rewrite(lambda weights: weights.pop("mask_decoder.iou_token.weight")), "missing_keys: .*iou_token"),
        (rewrite(lambda weights: weights.update(head=torch.zeros(1))), "unexpected_keys: .*head"),
        (rewrite(lambda weights: weights.update({POSITIONS: torch.zeros(2, 3)})), "positional_embedding"),
        (with_pickle(Malicious()), "(?i)weights_only|unsupported|malicious"),
    ],
)
def test_not_a_base(spoil, problem: str, base: Path, run, verified: list, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "made" / "sam")
    spoil(folder)
    message = run("--base", folder, "--output", tmp_path / "output" / "sam", fails=True)
    assert re.search(problem, message), message
    assert not verified
    assert not list((tmp_path / "output").glob("*"))


def test_staging_alone(base: Path, run, verified: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = run("--base", base, "--output", "new/sam")
    assert {path.name for path in (tmp_path / "new" / "sam").iterdir()} == FILES
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sam"]
    assert "config.json" in output
    assert "not empty" in run("--base", base, "--output", "new/sam", fails=True)
    run("--base", base, "--output", "new/sam", "--force")
    shutil.copytree(base, tmp_path / "holds" / "base")
    assert "would be lost" in run("--base", "holds/base", "--output", "holds", "--force", fails=True)
    assert (tmp_path / "holds" / "base" / "model.safetensors").exists()
    texts = [path.read_text() for path in (tmp_path / "new" / "sam").iterdir() if path.suffix in (".json", ".md")]
    assert not any(str(place) in text for place in (tmp_path, base.parent, ROOT) for text in texts)


def test_no_space(base: Path, run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(upload, "stage", full)
    assert "No space left on the disk: choose another" in run("--base", base, "--output", tmp_path / "sam", fails=True)
    assert not list(tmp_path.iterdir())


# --- the model card


def test_card_of_a_base_on_the_hub(hub: Server, run, verified: list, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "made")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n# Mine\n")
    commit = hub.hub.add("someone/sam", folder).refs["main"]
    run("--base", "someone/sam", "--repo-id", "user/sam")
    card = ModelCard(hub.hub.repos["user/sam"].files()["README.md"].decode())
    data = card.data.to_dict()
    assert (data["license"], data["license_name"], data["base_model"]) == ("other", "mine", "someone/sam")
    assert set(data["tags"]) >= verify.TAGS
    assert f"[someone/sam](https://huggingface.co/someone/sam) at commit `{commit}`" in card.text
    assert "100 parameters" in card.text
    assert "by 1e-07 of the largest" in card.text.replace("\n", " ")
    assert 'from_pretrained("user/sam", revision="<commit>", trust_remote_code=True)' in card.text
    assert 'repo = "user/sam"' in card.text


def test_card_names_nothing_that_stays_here(base: Path) -> None:
    text = upload.model_card("user/sam", str(base), base, FIGURES)
    data = ModelCard(text).data
    assert data.license == "apache-2.0"
    assert data.base_model is None
    assert "<user>" not in text
    assert str(base.parent) not in text
    names = set(re.findall(r"`[\w/]+\.(?:py|md|json|txt)`|make \w+|`\w+/`", text))
    assert names <= {f"`{name}`" for name in FILES}


def test_card_of_the_base_is_unreadable(base: Path, run, verified: list, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "made")
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert "base's README.md cannot be read" in run("--base", folder, "--output", tmp_path / "sam", fails=True)


# --- pushing


@pytest.fixture
def push(run, base: Path) -> Callable[..., str]:
    return lambda *args, **kwargs: run("--base", base, "--repo-id", "user/sam", *args, **kwargs)


def test_push_again(hub: Server, push, verified: list, staged_dir: Path) -> None:
    push()
    repo = hub.hub.repos["user/sam"]
    commit = repo.refs["main"]
    assert repo.files()["model.safetensors"] == (staged_dir / "model.safetensors").read_bytes()
    assert verified[-1][2:] == (commit, "hf_writer"), "loaded back"

    assert "Nothing was changed" in push()
    assert repo.refs["main"] == commit

    repo.commit("main", {**repo.commits[commit], "notes.txt": File(b"mine", lfs=False)})
    assert "Nothing was changed" not in push("--max-shard-size", "20KB", "--commit-message", "Shards")
    files = repo.files()
    assert "model.safetensors" not in files, "it would be loaded in place of the shards"
    assert "notes.txt" in files
    assert "model.safetensors.index.json" in files


def test_dry_run(hub: Server, push, verified: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    output = push("--dry-run")
    assert all(re.search(rf" [\d,]+  {re.escape(name)}\n", output) for name in FILES)
    assert not hub.hub.requests


def test_branch_and_pull_request(hub: Server, push, verified: list, monkeypatch: pytest.MonkeyPatch) -> None:
    push("--revision", "next")
    repo = hub.hub.repos["user/sam"]
    assert repo.files("next").keys() == FILES | {".gitattributes"}
    assert repo.files().keys() == {".gitattributes"}
    push("--revision", "next")
    assert len(repo.commits) == 2

    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert "/user/sam/discussions/1" in push("--create-pr")
    assert repo.files("refs/pr/1").keys() == FILES | {".gitattributes"}
    assert verified[-1][2] == repo.refs["refs/pr/1"]


def test_token_file(hub: Server, push, verified: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_writer\n")
    push("--private", "--token-file", tmp_path / "token")
    assert hub.hub.repos["user/sam"].private
    (tmp_path / "token").write_text("hf_secret and more\n")
    assert "is not a token" in push("--token-file", tmp_path / "token", fails=True)
    assert "No such file" in push("--token-file", tmp_path / "nothing", fails=True)


def test_somebody_pushes_meanwhile(hub: Server, push, monkeypatch: pytest.MonkeyPatch, staged_dir: Path) -> None:
    repo = hub.hub.add("user/sam", staged_dir)

    def meanwhile(*args) -> dict:
        repo.commit("main", {"theirs.txt": File(b"theirs", lfs=False)})
        return FIGURES

    monkeypatch.setattr(upload, "run_verify", meanwhile)
    assert "Somebody pushed to user/sam meanwhile" in push("--max-shard-size", "20KB", fails=True)
    assert repo.files() == {"theirs.txt": b"theirs"}


@pytest.mark.parametrize(
    ("token", "repo_id", "problem"),
    [
        (None, "user/sam", "A push needs a token"),
        ("hf_unknown", "user/sam", "does not know the token"),
        ("hf_reader", "user/new", "may not write to user/new"),
        ("hf_reader", "user/sam", "may not write to user/sam"),
        ("hf_writer", "user/data", "user/data is taken, by a dataset"),
        ("hf_writer", "user/adapter", "user/adapter holds an adapter"),
        ("hf_writer", "user/a b", "(?i)repo id"),
    ],
)
def test_refused(token, repo_id: str, problem: str, hub: Server, run, base, verified, monkeypatch, tmp_path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "adapter_config.json").write_text("{}")
    for name in ("user/sam", "user/adapter"):
        hub.hub.add(name, tmp_path / "theirs" if name == "user/adapter" else base)
    hub.hub.other_types.add("user/data")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
    assert re.search(problem, run("--base", base, "--repo-id", repo_id, fails=True))
    assert all(len(repo.commits) == 1 for repo in hub.hub.repos.values())
    assert not hub.hub.lfs


def test_public_repo_is_no_private_one(hub: Server, push, base: Path) -> None:
    hub.hub.add("user/sam", base)
    assert "user/sam exists and is public" in push("--private", fails=True)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nobody/nothing", "not a folder, and the Hub has no such model"),
        ("user/gated", "user/gated is gated: accept its terms"),
        ("a/b/c", "not a folder, and the Hub has no such model"),
    ],
)
def test_no_such_base(name: str, problem: str, hub: Server, run, base: Path, tmp_path: Path) -> None:
    hub.hub.add("user/gated", base, gated=True)
    assert problem in run("--base", name, "--output", tmp_path / "sam", fails=True)


def test_no_such_base_revision(hub: Server, run, base: Path, tmp_path: Path) -> None:
    hub.hub.add("user/sam", base)
    message = run("--base", "user/sam", "--base-revision", "old", "--output", tmp_path / "sam", fails=True)
    assert "user/sam has no revision old" in message


def test_no_hub(run, tmp_path: Path) -> None:
    """Offline, as all tests are."""
    assert "try --base checkpoints/sam-tiny" in run("--output", tmp_path / "sam", fails=True)


# --- faults on the way


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have waited before each of its retries."""
    waits: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    return waits


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/preupload/", 500),
        Fault("POST", "/preupload/", 429, {"Retry-After": "20"}),
        Fault("POST", "/objects/batch", 503, times=2),
        Fault("PUT", "/lfs/", 500),
        Fault("PUT", "/lfs/", None, times=2),
    ],
    ids=str,
)
def test_passing_fault(fault: Fault, hub: Server, push, verified: list, no_waiting: list[float]) -> None:
    hub.hub.faults.append(fault)
    push()
    assert hub.hub.repos["user/sam"].files().keys() == FILES | {".gitattributes"}
    assert not hub.hub.faults
    assert no_waiting[0] >= (20 if fault.headers else 1)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (Fault("GET", "/whoami-v2", None), "connection to the Hub was lost"),
        (Fault("POST", "/repos/create", 429, {"Retry-After": "20"}), "rate limit is reached"),
        (Fault("POST", "/repos/create", 500), "connection to the Hub was lost"),
        (Fault("POST", "/objects/batch", 403), "may not write"),
        (Fault("POST", "/preupload/", 429, times=-1), "rate limit is reached"),
        (Fault("PUT", "/lfs/", None, times=-1), "connection to the Hub was lost: run the same command again"),
        (Fault("POST", "/commit/", None), "connection to the Hub was lost: run the same command again"),
        (Fault("POST", "/commit/", 409), "user/sam is taken"),
        (Fault("POST", "/commit/", 418), "The Hub refused"),
    ],
    ids=str,
)
def test_lasting_fault(fault: Fault, problem: str, hub: Server, push, verified: list, no_waiting: list[float]) -> None:
    """It ends with one line, nothing is half there, and the next run does the rest."""
    hub.hub.faults.append(fault)
    assert problem in push(fails=True)
    assert all(len(repo.commits) == 1 for repo in hub.hub.repos.values())
    sent = set(hub.hub.lfs)
    hub.hub.faults.clear()
    hub.hub.requests.clear()
    push()
    assert hub.hub.repos["user/sam"].files().keys() == FILES | {".gitattributes"}
    assert not any(request == f"PUT /lfs/{oid}" for oid in sent for request in hub.hub.requests)
