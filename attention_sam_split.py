"""SAM's vision attention with decomposed relative positions, in memory that grows with the number of tokens.

    scores[q, k] = scale * query[q] · key[k] + rel_h[q, row of k] + rel_w[q, column of k]

Shapes: R x S windows of H x W tokens, in n heads of d channels. R counts the rows of windows of all images, S the
windows in a row; without windows R is the number of images, and S is 1. In each of the G = R * S * n groups, N = H * W
tokens attend to each other. `qkv` (3, R, S, n, H, W, d) holds queries, keys and values. The tables (H, H, d) and
(W, W, d) hold the vector of relative position for each coordinate of a query and of a key.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F


TILE_BYTES = {"cpu": 8 * 2**20}  # what stays in a CPU's caches
TILE_BYTES_ELSEWHERE = 256 * 2**20  # what keeps other devices busy

Tables = tuple[torch.Tensor, torch.Tensor]


def eager_attention(module: Any, qkv: torch.Tensor, tables: Tables | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns attention (R, S, n, H, W, d), every step spelt out, and its weights (G, N, N) before dropout."""
    query, key, value = (tokens(states) for states in qkv)  # (G, N, d)
    attn_weights = (query * module.scale) @ key.transpose(-1, -2)
    if tables is not None:
        attn_weights = attn_weights + relative_position_bias(qkv[0], *tables)
    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(qkv.dtype)
    attn_probs = F.dropout(attn_weights, module.dropout, module.training)
    return (attn_probs @ value).view(qkv[0].shape), attn_weights


def sdpa_attention(module: Any, qkv: torch.Tensor, tables: Tables | None) -> tuple[torch.Tensor, None]:
    """Returns attention (R, S, n, H, W, d) by PyTorch's fused kernels, on the path that fits the device."""
    dropout = module.dropout if module.training else 0.0
    # A recorded graph has no use for a long loop, and some recorders lose what is written in place.
    is_recorded = torch.compiler.is_exporting() or torch.jit.is_tracing()
    if tables is not None and not is_recorded:
        if attention_path(qkv[0]) == "folded":
            return folded_attention(qkv, *tables, module.scale, dropout), None
        if not dropout:  # which could not be drawn again, tile by tile, for backward
            tile_bytes = getattr(module.config, "attention_tile_bytes", None)
            tile_bytes = tile_bytes or TILE_BYTES.get(qkv.device.type, TILE_BYTES_ELSEWHERE)
            return TiledAttention.apply(qkv, *tables, module.scale, tile_bytes), None
    bias = None if tables is None else relative_position_bias(qkv[0], *tables)[None]
    query, key, value = (tokens(states)[None] for states in qkv)  # (1, G, N, d)
    output = F.scaled_dot_product_attention(query, key, value, bias, dropout_p=dropout, scale=module.scale)
    return output.view(qkv[0].shape), None


def attention_path(query: torch.Tensor) -> str:
    """Returns "folded" where flash kernels can run, else "tiled", for queries (R, S, n, H, W, d).

    | device | dtype | path | why |
    |---|---|---|---|
    | CUDA, ROCm | fp16, bf16 | folded | flash kernels, or cuDNN's, or memory-efficient ones |
    | CUDA, ROCm if d + H + W > 256 | fp16, bf16 | tiled | too many channels for flash; the rest is slower than tiles |
    | CUDA before compute capability 8.0 | bf16 | tiled | no fused kernel |
    | CUDA, ROCm | fp32 | tiled | the memory-efficient kernel is slower, as folding triples its work |
    | CUDA, ROCm | fp64 | tiled | no fused kernel |
    | CPU | any | tiled | tiles stay in the caches, and folding triples the work |
    | MPS, XPU, others | any | tiled | no fused kernel that trains with so many channels |
    """
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type != "cuda" or not is_half or sum(query.shape[3:]) > 256:  # ROCm calls its devices "cuda", too
        return "tiled"
    return "folded" if query.dtype == torch.float16 or takes_bfloat16(query.device) else "tiled"


@torch.compiler.assume_constant_result  # torch.compile cannot ask for it within a graph
def takes_bfloat16(device: torch.device) -> bool:
    """Returns whether a CUDA device has attention kernels for bf16."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def relative_positions(
    query: torch.Tensor, table_h: torch.Tensor, table_w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `rel_h` (R, S, n, H, W, H) and `rel_w` (R, S, n, H, W, W).

    Source: MViTv2, https://arxiv.org/abs/2112.01526, equation 4.
    """
    rel_h = torch.einsum("rsnhwd,hkd->rsnhwk", query, table_h)
    rel_w = torch.einsum("rsnhwd,wkd->rsnhwk", query, table_w)
    return rel_h.to(query.dtype), rel_w.to(query.dtype)


def relative_position_bias(
    query: torch.Tensor, table_h: torch.Tensor, table_w: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the bias (G, N, N) of the scores of `query`, or that of a tile, given its rows of the tables."""
    rel_h, rel_w = (rel.flatten(0, 2).contiguous() for rel in relative_positions(query, table_h, table_w))
    if out is None:
        return (rel_h[..., :, None] + rel_w[..., None, :]).flatten(3).flatten(1, 2)
    shape = *rel_h.shape, rel_w.shape[-1]
    return torch.add(rel_h[..., :, None], rel_w[..., None, :], out=out.view(shape)).view(out.shape)


def tokens(states: torch.Tensor) -> torch.Tensor:
    """Returns (R, S, n, H, W, d) as (G, N, d), contiguous, as rows far apart in memory slow matrix products down."""
    return states.flatten(3, 4).flatten(0, 2).contiguous()


def folded_attention(
    qkv: torch.Tensor, table_h: torch.Tensor, table_w: torch.Tensor, scale: float, dropout: float = 0.0
) -> torch.Tensor:
    """Returns attention (R, S, n, H, W, d) with the bias folded into head channels, so that kernels need no mask.

    [scale * query[q], rel_h[q], rel_w[q]] · [key[k], onehot(row of k), onehot(column of k)]

    Channels are filled up with zeros to what kernels ask for: multiples of 8, values as wide as keys. Flash does not
    train 193 to 255 channels on all GPUs.
    """
    query, key, value = qkv
    rel_h, rel_w = relative_positions(query, table_h, table_w)
    height, width, channels = query.shape[3:]
    num_channels = -(-(channels + height + width) // 8) * 8
    if 192 < num_channels < 256:
        num_channels = 256

    rows = torch.eye(height, dtype=key.dtype, device=key.device)[:, None].expand(height, width, height)
    columns = torch.eye(width, dtype=key.dtype, device=key.device).expand(height, width, width)
    zeros = key.new_zeros(()).expand(height, width, num_channels)
    filling = num_channels - channels - height - width
    onehots = torch.cat([rows, columns, zeros[..., :filling]], -1)  # (H, W, num_channels - d)

    def extend(*parts: torch.Tensor) -> torch.Tensor:
        parts = tuple(part.expand(*query.shape[:-1], part.shape[-1]) for part in parts)
        return torch.cat(parts, -1).flatten(3, 4).flatten(0, 1)  # (R * S, n, N, channels)

    output = F.scaled_dot_product_attention(
        extend(query * scale, rel_h, rel_w, zeros[..., :filling]),
        extend(key, onehots),
        extend(value, zeros[..., channels:]),
        dropout_p=dropout,
        scale=1.0,
    )
    return output[..., :channels].reshape(query.shape)


class TiledAttention(torch.autograd.Function):
    """Attention with decomposed relative positions that never holds all N x N scores, nor keeps any for backward.

    Backward computes the scores of each tile again. For softmax attention its gradients are those of
    https://arxiv.org/abs/2205.14135, appendix B.4; the bias adds sums of the scores' gradient over one axis of keys.
    """

    # No `jvp` that says to use eager attention, as `vmap` does: torch.compile refuses a Function that has one.

    @staticmethod
    def forward(qkv, table_h, table_w, scale, tile_bytes):
        """Returns the attended values (R, S, n, H, W, d)."""
        query, key, value = qkv
        output = torch.empty_like(query)
        for tile, (scores,) in tiles(query, tile_bytes, query.dtype):
            group, (rows, columns) = tile[:3], tile[3:]
            bias = relative_position_bias(query[tile], table_h[rows], table_w[columns], out=scores)
            q, k, v = (tokens(states)[None] for states in (query[tile], key[group], value[group]))
            tile_output = F.scaled_dot_product_attention(q, k, v, bias[None], scale=scale)
            output[tile] = tile_output.view(query[tile].shape)
        return output

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keeps the inputs for backward."""
        *tensors, ctx.scale, ctx.tile_bytes = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_output):
        """Returns the gradients of what `forward` took."""
        try:
            grads = TiledAttentionBackward.apply(grad_output, *ctx.saved_tensors, ctx.scale, ctx.tile_bytes)
        except RuntimeError as error:
            if "atching rule" in str(error):  # of the vmap that is_grads_batched uses
                TiledAttention.vmap()
            raise
        return *grads, None, None

    @staticmethod
    def vmap(*_):
        """Raises, as there is no batching rule."""
        raise RuntimeError(
            "Tiled attention has no second derivatives and no batching rule for vmap (is_grads_batched, jacobian): "
            'load the model with attn_implementation="eager", or call model.set_attn_implementation("eager").'
        )


class TiledAttentionBackward(torch.autograd.Function):
    """The gradients of `TiledAttention`, in the dtypes of its inputs, but computed in at least fp32."""

    @staticmethod
    def forward(grad_output, qkv, table_h, table_w, scale, tile_bytes):
        """Returns the gradients of `qkv` and of both tables."""
        device = qkv.device.type  # autocast's dtypes would mix with those chosen here; "meta" has none
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return tiled_gradients(grad_output, qkv, table_h, table_w, scale, tile_bytes)

    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = vmap = TiledAttention.vmap


def tiled_gradients(grad_output, qkv, table_h, table_w, scale, tile_bytes) -> tuple[torch.Tensor, ...]:
    """Returns the gradients of `qkv` and of both tables, without regard to autocast."""
    inputs = qkv, table_h, table_w
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    grads = tuple(torch.zeros_like(tensor, dtype=dtype) for tensor in inputs)
    (grad_query, grad_key, grad_value), grad_table_h, grad_table_w = grads
    query, key, value = qkv
    for tile, (probs, scores) in tiles(query, tile_bytes, dtype, dtype):
        group, (rows, columns) = tile[:3], tile[3:]
        q, g = (tokens(states[tile].to(dtype)) for states in (query, grad_output))  # (g, n, d), n queries of the tile
        k, v = (tokens(states[group].to(dtype)) for states in (key, value))  # (g, N, d)
        tables = table_h[rows].to(dtype), table_w[columns].to(dtype)

        relative_position_bias(query[tile].to(dtype), *tables, out=scores)
        torch.softmax(scores.baddbmm_(q, k.mT, alpha=scale), -1, out=probs)
        grad_value[group].view(v.shape).baddbmm_(probs.mT, g)
        grad_probs = torch.bmm(g, v.mT, out=scores)
        grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, dtype, grad_input=probs)
        grad_key[group].view(k.shape).baddbmm_(grad_scores.mT, q, alpha=scale)

        grid = (len(q), *query[tile].shape[3:5])
        grad_bias = grad_scores.view(*grid, *query.shape[3:5])
        grad_rel_h, grad_rel_w = grad_bias.sum(-1), grad_bias.sum(-2)  # (g, h, w, H) and (g, h, w, W)
        grad_query[tile] = (
            (grad_scores @ k).mul_(scale).view(*grid, -1)
            + torch.einsum("ghwk,hkd->ghwd", grad_rel_h, tables[0])
            + torch.einsum("ghwk,wkd->ghwd", grad_rel_w, tables[1])
        ).view(query[tile].shape)
        grad_table_h[rows] += torch.einsum("ghwk,ghwd->hkd", grad_rel_h, q.view(*grid, -1))
        grad_table_w[columns] += torch.einsum("ghwk,ghwd->wkd", grad_rel_w, q.view(*grid, -1))
    return tuple(grad.to(tensor.dtype) for grad, tensor in zip(grads, inputs, strict=True))


def tiles(query: torch.Tensor, tile_bytes: int, *dtypes: torch.dtype) -> Iterator[tuple[tuple[slice, ...], list]]:
    """Cuts the queries (R, S, n, H, W, d) into tiles, each with buffers for its scores (g, n, N) against all its keys.

    Yields:
        The tile's index into `query`, less the last axis, and for each of `dtypes` a buffer (g, n, N) of at most
        `tile_bytes`, or one query's scores. All tiles share the buffers' memory.
    """
    *shape, _ = query.shape
    num_keys = shape[-2] * shape[-1]
    limit = max(1, tile_bytes // (num_keys * max(dtype.itemsize for dtype in dtypes)))
    ranges, num_queries = [], 1
    for length in reversed(shape):  # an axis is cut only where all after it fit as a whole, or into ones
        step = max(1, min(length, limit // num_queries))
        num_queries *= step
        ranges.append([slice(start, min(start + step, length)) for start in range(0, length, step)])
    buffers = [query.new_empty(num_queries * num_keys, dtype=dtype) for dtype in dtypes]
    for tile in itertools.product(*reversed(ranges)):
        sides = [part.stop - part.start for part in tile]
        size = math.prod(sides[:3]), math.prod(sides[3:]), num_keys
        yield tile, [buffer[: math.prod(size)].view(size) for buffer in buffers]


ATTENTION_FUNCTIONS = {"eager": eager_attention, "sdpa": sdpa_attention}
