"""The command line of `finetune.py`: settings from options, YAML or JSON files, and the file that repeats a run."""

import argparse
import copy
import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from checkpoint_tools.checkout import ROOT, SAM_TINY
from checkpoint_tools.messages import one_line
from checkpoint_tools.option_checks import SettingsError
from image_data.data_settings import DataSettings, SourceSettings

from .recipe_settings import ModelSettings, OutputSettings, PromptSettings, Settings, TrainingSettings


GROUPS = (DataSettings, PromptSettings, ModelSettings, OutputSettings, TrainingSettings)
OWN = [name for group in (SourceSettings, *GROUPS) for name in group.__annotations__]  # not those of TrainingArguments
# 4 images a step in each, so that the result differs only by precision.
PRESETS = {
    "8gb": ["--batch-size", "1", "--accumulate", "4", "--bf16", "--gradient-checkpointing"],
    "16gb": ["--batch-size", "2", "--accumulate", "2", "--bf16", "--gradient-checkpointing"],
    "24gb": ["--batch-size", "4", "--bf16", "--gradient-checkpointing"],
    "cpu": ["--batch-size", "1", "--accumulate", "4", "--use-cpu"],
}
FILE_SUFFIXES = (".yaml", ".yml", ".json")


def parse(arguments: Sequence[str], description: str | None = None) -> Settings:
    """Returns the settings of `[FILE] [--option value ...]`; what the command line says replaces what the file says.

    Exits with a message that names the option if one is unknown, or its value is not allowed.
    """
    parser = HfArgumentParser(
        GROUPS,
        description=description,
        usage="%(prog)s [run.yaml] [--option value ...]",
        formatter_class=RecipeHelpFormatter,
        allow_abbrev=False,
    )
    arguments = list(arguments)
    try:
        if arguments and arguments[0].endswith(FILE_SUFFIXES):
            arguments[:1] = read_file(Path(arguments[0]), parser)
        arguments = [*PRESETS.get(parser.parse_args(arguments).preset, []), *arguments]
        arguments = [*implied(vars(parser.parse_args(arguments))), *arguments]
        options = vars(parser.parse_args(arguments))
        data, prompts, model, output, training = parser.parse_args_into_dataclasses(
            arguments, look_for_args_file=False
        )
        return Settings(data, prompts, model, training, output, options_to_repeat(options))
    except (ValueError, ImportError) as error:  # also those of TrainingArguments
        return parser.error(one_line(error))


def implied(options: dict[str, Any]) -> list[str]:
    """Returns the defaults that depend on other settings, as arguments of the command line."""
    rate = 1e-4 if options["method"] == "full" else 1e-3
    is_sam_tiny = Path(options["base"]).resolve() == SAM_TINY
    return [
        *as_arguments("learning_rate", rate),
        *as_arguments("image_size", 192 if is_sam_tiny else None),
        *as_arguments("augment", ["none"] if options["cache_embeddings"] else None),
    ]


def read_file(file: Path, parser: argparse.ArgumentParser) -> list[str]:
    """Returns the settings in a YAML or JSON file as arguments of the command line.

    Raises:
        SettingsError: If it cannot be read, has settings that the parser does not know, one of them twice, or several
            values for one.
    """
    try:
        text = file.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)  # JSON is YAML, too
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{file}: cannot be read: {error}") from error
    if settings is None:
        return []
    if not isinstance(settings, dict):
        raise SettingsError(f"{file}: expected settings by name, as in `steps: 500`, got {type(settings).__name__}.")
    options = parser._option_string_actions
    if unknown := [str(name) for name in settings if option_of(name) not in options]:
        raise SettingsError(f"{file}: unknown settings: {', '.join(unknown)}.")
    for name, value in settings.items():
        if isinstance(value, list) and len(value) > 1 and options[option_of(name)].nargs not in ("*", "+"):
            raise SettingsError(f"{file}: {name}: expected one value, got {len(value)}.")
    keys = [key.value for key, _ in yaml.compose(text, yaml.SafeLoader).value]  # of which safe_load drops copies
    names: dict[str, list[str]] = {}
    for key in keys:
        if action := options.get(option_of(key)):
            names.setdefault(action.dest, []).append(key)
    if twice := [" and ".join(same) for same in names.values() if len(same) > 1]:
        raise SettingsError(f"{file}: expected each setting once, got {'; '.join(twice)}.")
    return [argument for name, value in settings.items() for argument in as_arguments(name, value)]


def option_of(name: Any) -> str:
    """Returns the option that a name with hyphens or underscores stands for."""
    return f"--{str(name).replace('_', '-')}"


def as_arguments(name: str, value: Any) -> list[str]:
    """Returns a setting as arguments of the command line; none for None and for an empty list."""
    if value is None or value == []:
        return []
    if isinstance(value, list):
        return [option_of(name), *map(str, value)]
    return [f"{option_of(name)}={json.dumps(value) if isinstance(value, dict | bool) else value}"]


def options_to_repeat(options: dict[str, Any]) -> dict[str, Any]:
    """Returns what repeats a run: the recipe's own options, and those of TrainingArguments that were changed.

    Paths are absolute, since the file is read from any folder.
    """
    stock = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    return {
        name: absolute(name, value)
        for name, value in options.items()
        if value not in (None, []) and (name in OWN or value != stock[name])
    }


def absolute(name: str, value: Any) -> Any:
    """Returns the setting `name` with its path, if it is one, as an absolute one."""
    if name in TrainingArguments._VALID_DICT_FIELDS and Path(value).is_file():  # DeepSpeed's and FSDP's files
        return str(Path(value).resolve())
    if isinstance(value, Path) or name == "output_dir" or (name == "base" and Path(value).is_dir()):
        return str(Path(value).resolve())
    return value


def write_file(options: dict[str, Any], file: Path) -> None:
    """Writes options to a file that repeats the run with `finetune.py FILE`."""
    file.write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows options with hyphens, short names and defaults."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [name for name in action.option_strings if "_" not in name][::-1]
        shown.dest = shown.option_strings[0].lstrip("-").replace("-", "_")
        if action.const is True:  # a switch: that it may be followed by true or false is for files
            shown.nargs = 0
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default not in (None, [], "", argparse.SUPPRESS) and not isinstance(action.default, bool)
        values = action.default if isinstance(action.default, list) else [action.default]
        default = " ".join(str(value).removeprefix(f"{ROOT}{os.sep}") for value in values).replace("%", "%%")
        return f"{action.help or ''} ({default})" if shown else action.help or ""


class RecipeHelpFormatter(HelpFormatter):
    """Shows our options before those of TrainingArguments, and of the latter only what the recipe heeds."""

    def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
        """Adds the options of a group."""
        places = {name: place for place, name in enumerate(OWN)}
        heeded = [action for action in actions if action.dest not in TrainingSettings.FIXED]
        super().add_arguments(sorted(heeded, key=lambda action: places.get(action.dest, len(places))))
