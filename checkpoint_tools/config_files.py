"""`config.json` and the processor's JSON files as data: no code that they name is run, asked about, or passed on."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import SamConfig, SamProcessor
from transformers.utils import cached_file

from .checkout import ROOT, split_class


IMAGE_PROCESSORS = ("SamImageProcessor", "SamImageProcessorFast", "SamImageProcessorPil")
WRITTEN_WITH_A_MODEL = ("architectures", "dtype", "model_type", "sam_split_version", "transformers_version")
SIDES = ({"longest_edge"}, {"height", "width"})


def read_processor(
    source: str | Path, revision: str | None = None, token: str | None = None, **others: Any
) -> SamProcessor:
    """Returns the processor of a folder or Hub repo, made of the settings that SAM has, and of `others` before them.

    Raises:
        ValueError: If there is none, it is another model's, or a setting has a wrong type.
    """
    from transformers import SamImageProcessor  # imported here, because it warns if torchvision is missing

    settings = {
        name: value for name, value in processor_settings(source, revision, token).items() if value is not None
    }
    kind = settings.get("image_processor_type", IMAGE_PROCESSORS[0])
    if kind not in IMAGE_PROCESSORS:
        raise ValueError(f"{source}: its image processor is {kind!r:.80}, expected {IMAGE_PROCESSORS[0]}.")
    for name, (is_valid, expected) in SETTINGS.items():
        if name in settings and not is_valid(settings[name]):
            raise ValueError(f"{source}: its processor has {name}={settings[name]!r:.80}, expected {expected}.")
    known = {name: settings[name] for name in SETTINGS if name in settings}
    return SamProcessor(SamImageProcessor(**known | others))


def processor_settings(source: str | Path, revision: str | None = None, token: str | None = None) -> dict[str, Any]:
    """Returns the settings of the image processor, where transformers looks for them, too.

    Raises:
        ValueError: If there are none.
    """
    for file in ("processor_config.json", "preprocessor_config.json"):
        path = cached_file(
            str(source), file, revision=revision, token=token, _raise_exceptions_for_missing_entries=False
        )
        if path is None:
            continue
        content = read_json(Path(path))
        # An older processor_config.json does not hold the image processor.
        settings = content.get("image_processor") if file == "processor_config.json" else content
        if isinstance(settings, dict):
            return settings
    raise ValueError(f"{source} has no processor: save it there with processor.save_pretrained().")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ValueError: If it is not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r:.40}, expected an object.")
    return content


def copy_plain(file: Path, copy: Path) -> None:
    """Copies settings that are numbers, words and switches, lists of them, and groups of such settings.

    Raises:
        ValueError: If one is something else.
    """
    settings = read_json(file)
    for name, value in settings.items():
        if not all(map(_is_plain, value.values() if isinstance(value, dict) else [value])):
            raise ValueError(f"{file.name} has {name}={value!r:.80}, expected numbers, words, true or false.")
    copy.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def keep_known_settings(folder: Path) -> None:
    """Writes the `config.json` in `folder` anew, with the settings that SAM has, and this checkout's `auto_map`."""
    path = folder / "config.json"
    config = read_json(path)
    is_split = config["model_type"] == split_class().config_class.model_type
    known = known_settings(config, (split_class().config_class if is_split else SamConfig)().to_dict())
    if is_split:
        known["auto_map"] = read_json(ROOT / "config.json")["auto_map"]
    path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def known_settings(settings: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """Returns those of `settings` that `default` has too, or that are written with every model, at all levels."""
    return {
        name: known_settings(value, default[name]) if isinstance(value, dict) and name.endswith("_config") else value
        for name, value in settings.items()
        if (name in default or name in WRITTEN_WITH_A_MODEL) and name != "_name_or_path"  # a path of the author's
    }


def _is_plain(value: Any) -> bool:
    return all(isinstance(each, str | int | float | None) for each in (value if isinstance(value, list) else [value]))


def _is_bool(value: Any) -> bool:
    return type(value) is bool


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_three_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


def _is_size(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {name for name, side in value.items() if side is not None} in SIDES
        and all(side is None or (type(side) is int and side > 0) for side in value.values())
    )


# What SAM's image processor has.
SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("do_convert_rgb", "do_normalize", "do_pad", "do_rescale", "do_resize"), (_is_bool, "true or false")
    ),
    "image_mean": (_is_three_numbers, "a list of 3 numbers"),
    "image_std": (lambda value: _is_three_numbers(value) and all(value), "a list of 3 numbers other than 0"),
    "rescale_factor": (_is_number, "a number"),
    "resample": (lambda value: value in range(6) and type(value) is int, "a whole number from 0 to 5"),
    **dict.fromkeys(("mask_pad_size", "mask_size", "pad_size", "size"), (_is_size, "sides in pixels")),
}
