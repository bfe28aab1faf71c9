"""Exports SAM to ONNX, as an encoder of images and a decoder of prompts, for the tools that read such files."""

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, SamProcessor

from ..config_files import read_processor
from ..conversions import accepted, allowed_difference, effect_of, load_at_side_of, note, note_other_adapters
from ..fused_adapters import with_adapter
from ..loading import processor_for
from ..output_comparison import Outputs, example_outputs, largest_relative_error
from ..output_folders import staged
from .graphs import Graph
from .interface import Interface, Tensors
from .prompts import Prompts
from .sam import Sam
from .transformers_js import TransformersJs


if TYPE_CHECKING:
    from onnxruntime import InferenceSession

INTERFACES: dict[str, type[Interface]] = {"transformers": Interface, "sam": Sam, "transformers-js": TransformersJs}
TOLERANCES = {"float32": 1e-4, "float16": 16 * torch.finfo(torch.float16).eps}  # relative to the largest output
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_FILE = 2**31 - 2**24  # bytes of weights in one file: protobuf's limit of 2 GiB, less the graph


def to_onnx(
    source: str,
    destination: Path,
    interface: str = "transformers",
    adapter: str | None = None,
    dtype: str = "float32",
    all_masks: bool = False,
    force: bool = False,
) -> float:
    """Writes a split or stock model as ONNX files.

    Args:
        source: Folder or Hub id of a model.
        destination: The folder to write.
        interface: The tools to write for, one of `INTERFACES`.
        adapter: Folder or Hub id of a PEFT adapter, which is merged.
        dtype: In which the encoder and the decoder compute. Inputs and outputs are in float32.
        all_masks: Whether the decoder of `sam` returns all masks, instead of the one that Meta's rule selects.
        force: Whether an earlier output is replaced.

    Returns:
        The largest relative difference between the outputs of the files in onnxruntime and those of `source`.

    Raises:
        ModuleNotFoundError: If a package is missing.
        ValueError: If the difference is too large, or the interface has no place for an option.
    """
    require_packages()
    if all_masks and interface != "sam":
        raise ValueError(f"--all-masks is for --interface sam, got --interface {interface}.")
    with staged(destination, "ONNX model", force, sources=(source, adapter)) as folder:
        model, reference, _, sizes = load_at_side_of(adapter, source)
        if adapter is not None:
            note_other_adapters(adapter)
            adapted = with_adapter(model, adapter)
            adapted_outputs, effect = effect_of(adapted, model, reference)
            model = adapted.merge_and_unload()
            accepted(example_outputs(model), adapted_outputs, allowed_difference(effect))
            reference = model.float().to_sam()
        model = model.float()
        target = INTERFACES[interface](load_processor(source, model, sizes), getattr(torch, dtype), all_masks)
        for message in target.notes(model):
            note(message)
        expected = expected_outputs(reference, target)
        export(model, target, folder)
        actual = onnx_outputs(model, target, folder)
        if dtype != "float32":
            note(f"{dtype} changes the outputs by {largest_relative_error(actual, expected):.1e} (relative).")
        return accepted(actual, expected, TOLERANCES[dtype])


def require_packages() -> None:
    """Checks that the packages are installed that exporting and comparing need.

    Raises:
        ModuleNotFoundError: If one is not.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        names = " ".join(missing)
        raise ModuleNotFoundError(f"to-onnx needs packages that are not installed: pip install {names}")


def load_processor(source: str, model: PreTrainedModel, sizes: dict[str, Any]) -> SamProcessor:
    """Returns the processor of `source`, with other `sizes` if any; if it has none, notes that, and returns SAM's."""
    try:
        return read_processor(source, **sizes)
    except ValueError as error:
        note(f"{error} The result has SAM's, with the mean and standard deviation of ImageNet.")
        return processor_for(model.config)


def export(model: PreTrainedModel, interface: Interface, folder: Path) -> None:
    """Writes all files of `interface`, and changes the dtype of the model.

    In float16, the prompt encoder stays in float32: it is small, and would round coordinates.
    """
    model.vision_encoder.to(interface.dtype)
    model.mask_decoder.to(interface.dtype)
    encoder, decoder = interface.graphs(model)
    prompts = Prompts.random(model.config, **interface.example)
    grid, channels = model.prompt_encoder.image_embedding_size[0], model.prompt_encoder.hidden_size
    embeddings = {name: torch.zeros(len(prompts.points), channels, grid, grid) for name in encoder.outputs}
    write(encoder, interface.encoder_example(model), folder / interface.encoder_file)
    write(decoder, interface.decoder_inputs(embeddings, prompts), folder / interface.decoder_file)
    interface.write_settings(model, folder)


def write(graph: Graph, inputs: Tensors, file: Path) -> None:
    """Exports a graph to one file, or, if it is too large, to a second one with the weights and the suffix `_data`."""
    import onnx_ir  # imported here, like onnxruntime, because only this command needs it
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it logs that torchvision is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter emits warnings about its own internals
        program = torch.onnx.export(
            graph.eval(),
            tuple(inputs[name] for name in graph.inputs),
            dynamo=True,
            input_names=list(graph.inputs),
            output_names=graph.outputs,
            dynamic_shapes=[dimensions or None for dimensions in graph.inputs.values()],
            verbose=False,
        )
    assert program is not None  # as it is without `dynamo`
    ClearMetadataAndDocStringPass()(program.model)  # stack traces, with the paths of this machine
    tensors = (value.const_value for value in program.model.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    file.parent.mkdir(exist_ok=True)
    onnx_ir.save(program.model, file, external_data=f"{file.name}_data" if size > LARGEST_FILE else None)


def expected_outputs(model: PreTrainedModel, interface: Interface) -> Outputs:
    """Returns what `model` itself gives for images and prompts of each kind, by the names of the decoder's outputs."""
    with torch.no_grad():
        embeddings = model.get_image_embeddings(interface.example_images(model)[1])
    outputs = {"image_embeddings": embeddings}
    for case, arguments in interface.cases.items():
        prompts = Prompts.random(model.config, **arguments)
        for name, tensor in interface.expected(model, embeddings, prompts).items():
            outputs[f"{name} from {case}"] = tensor
    return outputs


def onnx_outputs(model: PreTrainedModel, interface: Interface, folder: Path) -> Outputs:
    """Returns what the files of `model` give in onnxruntime, like `expected_outputs`."""
    import onnxruntime

    encoder, decoder = (
        onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
        for file in (interface.encoder_file, interface.decoder_file)
    )
    embeddings = run(encoder, interface.example_images(model)[0])
    outputs = {"image_embeddings": embeddings["image_embeddings"]}
    for case, arguments in interface.cases.items():
        prompts = Prompts.random(model.config, **arguments)
        inputs = {name: tensor[: len(prompts.points)] for name, tensor in embeddings.items()}
        for name, tensor in run(decoder, interface.decoder_inputs(inputs, prompts)).items():
            outputs[f"{name} from {case}"] = tensor
    return outputs


def run(session: "InferenceSession", inputs: Tensors) -> Tensors:
    """Returns the outputs of one file by name."""
    names = [output.name for output in session.get_outputs()]
    arrays = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}
