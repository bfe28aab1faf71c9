"""What was pushed is what was staged, byte for byte, before anything of it is loaded."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub import File, Hub
from huggingface_hub import HfApi
from safetensors.torch import load, save

from checkpoint_tools.model_repo import FILES
from checkpoint_tools.push_to_hub import Destination
from checkpoint_tools.push_to_hub import push as push_folder


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own

Files = dict[str, File]


def add(name: str, content: bytes) -> Callable[[Files], None]:
    return lambda files: files.update({name: File(content, lfs=name.endswith((".bin", ".safetensors")))})


def remove(name: str) -> Callable[[Files], None]:
    return lambda files: files.pop(name)  # type: ignore[return-value]


def change(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Files], None]:
    return lambda files: files.update({name: File(edit(files[name].content), files[name].lfs)})


def set_in(name: str, *path: str, value: object) -> Callable[[Files], None]:
    def edit(content: bytes) -> bytes:
        settings = json.loads(content)
        inner = settings
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return json.dumps(settings).encode()

    return change(name, edit)


def smallest_change_of_a_weight(content: bytes) -> bytes:
    weights = load(content)
    weights["mask_decoder.iou_token.weight"].view(torch.int32)[0, 0] ^= 1
    return save(weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("tamper", "problem"),
    [
        (change("modeling_sam_split.py", lambda code: code + b"\nprint('added')\n"), "contents in modeling_sam_split"),
        (add("evil.py", b"raise SystemExit"), "also contains evil.py"),
        (add("pytorch_model.bin", b"pickle"), "also contains pytorch_model.bin"),
        (add("adapter_config.json", b"{}"), "also contains adapter_config.json"),
        (add("deep/er/file.txt", b"text"), "also contains deep/er/file.txt"),
        (set_in("config.json", "vision_config", "attention_dropout", value=0.1), "contents in config.json"),
        (set_in("config.json", "dtype", value="bfloat16"), "contents in config.json"),
        (set_in("config.json", "auto_map", "AutoModel", value="a/b--c.D"), "contents in config.json"),
        (set_in("config.json", "custom_pipelines", value={"x": {"impl": "evil.X"}}), "contents in config.json"),
        (set_in("processor_config.json", "image_processor", "size", value={"longest_edge": 32}), "processor_config"),
        (change("README.md", lambda card: card.replace(b"license: mit", b"license: gpl")), "contents in README.md"),
        (remove("README.md"), "lacks README.md"),
        (remove("LICENSE-code"), "lacks LICENSE-code"),
        (remove("config.json"), "lacks config.json"),
        (change("model.safetensors", smallest_change_of_a_weight), "contents in model.safetensors"),
        (remove("notes.txt"), "lacks notes.txt"),
        (change("notes.txt", lambda text: text + b"!"), "contents in notes.txt"),
    ],
)
def test_any_change_is_found(tamper, problem: str, hub: Hub, staged_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"mine")
    repo = hub.add("user/sam", tmp_path)
    hub.tamper = tamper
    destination, head = Destination("user/sam", "Split"), repo.refs["main"]
    loaded: list[tuple] = []
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        push_folder(HfApi(), destination, staged_dir, head, FILES, verify=lambda *pushed: loaded.append(pushed))
    commit = repo.refs["main"]
    assert str(caught.value).startswith(f"Commit {commit} was pushed to user/sam, but verification failed: ")
    assert not loaded


def test_no_change(hub: Hub, push, verified: list, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"mine")
    repo = hub.add("user/sam", tmp_path)
    push()
    assert verified[1][:1] + verified[1][2:3] == ("user/sam", repo.refs["main"])
    assert repo.files()["notes.txt"] == b"mine"


def test_a_change_ends_the_command(hub: Hub, push, verified: list) -> None:
    hub.tamper = add("evil.py", b"raise SystemExit")
    assert "it also contains evil.py. Nothing was loaded." in push(fails=True)
    assert len(verified) == 1


def test_what_the_hub_writes_itself_is_no_change(hub: Hub, push, verified: list) -> None:
    hub.tamper = add(".gitattributes", b"*.safetensors filter=lfs\n*.bin filter=lfs\n")
    push()
    assert len(verified) == 2


@pytest.mark.parametrize("name", ["pytorch_model.bin", "code.py", "model.onnx", "tokenizer.json"])
def test_repos_with_other_files_to_load_are_refused(name: str, hub: Hub, push, verified: list, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    repo = hub.add("user/sam", tmp_path)
    assert f"user/sam also contains {name}, which may be loaded or run" in push(fails=True)
    assert len(repo.commits) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer", [lambda answer: answer.pop("commitUrl"), lambda answer: answer.pop("commitOid"), dict.clear]
)
def test_answers_without_a_commit(answer, hub: Hub, push, verified: list) -> None:
    hub.answer = answer
    assert "names no commit" in push(fails=True)
    hub.answer = lambda answer: None
    assert "No changes" in push()
    assert len(verified) == 3, "both were staged, and the second was loaded back"


def test_it_says_how_others_load_it(hub: Hub, push, verified: list) -> None:
    code = re.findall(r"^    (\w.*)", push(), re.MULTILINE)
    assert code[0] == "from transformers import AutoModel"
    assert code[1].startswith('AutoModel.from_pretrained("user/sam", revision=')
