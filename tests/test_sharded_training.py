"""Two processes that shard the model get the gradients of one."""

import copy
import itertools
import time
import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import assert_same_outputs
from gradient_comparison import EXACT, Tensors, adapted, adapter_gradients, inputs, joined, loss, models, plain  # noqa: F401
from torch import nn
from transformers import AutoModel


def sharded_gradients(rank: int, folders: dict[str, str], result: str) -> None:
    """What one of two processes does: each takes one image, and both hold a part of each weight.

    Run in a process of its own.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    warnings.simplefilter("ignore")  # torch, of its own parts
    torch.distributed.init_process_group("gloo", init_method=f"file://{result}.store", rank=rank, world_size=2)
    inputs = {name: tensor[rank : rank + 1] for name, tensor in torch.load(f"{result}.inputs").items()}
    results = {}
    for name, wrapped in itertools.product(("whole", "adapted"), ("FSDP1", "FSDP2")):
        torch.manual_seed(0)
        model = AutoModel.from_pretrained(folders["split"], trust_remote_code=True).double().train()
        layer = type(model.vision_encoder.layers[0])
        if name == "adapted":
            model = adapted(model)
        if wrapped == "FSDP1":
            policy, device = ModuleWrapPolicy({layer}), torch.device("cpu")
            model = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)
            loss(model(**inputs)).backward()
            with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
                grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        else:
            mesh = torch.distributed.init_device_mesh("cpu", (2,))
            for module in [module for module in model.modules() if isinstance(module, layer)]:
                fully_shard(module, mesh=mesh)
            fully_shard(model, mesh=mesh)
            loss(model(**inputs)).backward()
            grads = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
        results[f"{wrapped} {name}"] = {n.replace("_fsdp_wrapped_module.", ""): grad for n, grad in grads.items()}
    if rank == 0:
        torch.save(results, result)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded(models, split_dir, tmp_path, inputs):
    """FSDP 1 and 2, of all weights and of adapters, equal one process with both images."""
    stock, split = copy.deepcopy(models[0]), models[1]
    result = tmp_path / "gradients"
    torch.save(inputs, f"{result}.inputs")
    context = torch.multiprocessing.start_processes(
        sharded_gradients, ({"split": str(split_dir)}, str(result)), nprocs=2, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + 120
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the processes wait for each other"
    finally:
        for process in context.processes:
            process.kill()
    results = torch.load(result)

    def averaged(run: Callable[[Tensors], Tensors], model: nn.Module) -> Tensors:
        total: Tensors = {}
        for index in range(2):
            model.zero_grad()
            one = run({name: tensor[index : index + 1] for name, tensor in inputs.items()})
            for name in one.keys() - {"output", "after"}:
                total[name] = total.get(name, 0) + one[name] / 2
        return total

    model = adapted(split)
    expected = {
        "whole": averaged(lambda one: plain(stock, one), stock),
        "adapted": averaged(adapter_gradients(model), model),
    }
    assert len(results) == 4
    for name, grads in results.items():
        wanted = expected[name.split()[1]]
        grads = joined(grads) if "whole" in name else grads
        unused = grads.keys() - wanted.keys()
        assert not any(grads[name].any() for name in unused), name  # FSDP1 gives zeros
        assert_same_outputs({name: grads[name] for name in wanted}, wanted, EXACT)
