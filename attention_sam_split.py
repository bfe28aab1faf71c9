"""SAM's vision attention with decomposed relative positions, in memory that grows with the number of tokens.

    scores[q, k] = scale * query[q] · key[k] + rel_h[q, row of k] + rel_w[q, column of k]

Shapes: M windows, or images if there are no windows, of H x W tokens, in n heads of d channels. In each of the
G = M * n groups, N = H * W tokens attend to each other. `qkv` (3, M, n, H, W, d) holds queries, keys and values. The
tables (H, H, d) and (W, W, d) hold the vector of relative position for each coordinate of a query and of a key.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F


TILE_BYTES = {"cpu": 8 * 2**20}  # what stays in a CPU's caches
TILE_BYTES_ELSEWHERE = 256 * 2**20  # what keeps other devices busy

Tables = tuple[torch.Tensor, torch.Tensor]


def eager_attention(module: Any, qkv: torch.Tensor, tables: Tables | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns attention (M, n, H, W, d), every step spelt out, and its weights (G, N, N) before dropout."""
    query, key, value = qkv.flatten(1, 2).flatten(2, 3)  # (G, N, d)
    attn_weights = (query * module.scale) @ key.transpose(-1, -2)
    if tables is not None:
        attn_weights = attn_weights + relative_position_bias(qkv[0], *tables).flatten(0, 1)
    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(qkv.dtype)
    attn_probs = F.dropout(attn_weights, module.dropout, module.training)
    return (attn_probs @ value).view(qkv[0].shape), attn_weights


def sdpa_attention(module: Any, qkv: torch.Tensor, tables: Tables | None) -> tuple[torch.Tensor, None]:
    """Returns attention (M, n, H, W, d) by PyTorch's fused kernels, on the path that fits the device."""
    dropout = module.dropout if module.training else 0.0
    # A recorded graph has no use for a long loop, and some recorders lose what is written in place.
    is_recorded = torch.compiler.is_exporting() or torch.jit.is_tracing()
    if tables is not None and not is_recorded:
        if attention_path(qkv[0]) == "folded":
            return folded_attention(qkv, *tables, module.scale, dropout), None
        if not dropout:  # which could not be drawn again, tile by tile, for backward
            tile_bytes = getattr(module.config, "attention_tile_bytes", None)
            tile_bytes = tile_bytes or TILE_BYTES.get(qkv.device.type, TILE_BYTES_ELSEWHERE)
            output = TiledAttention.apply(qkv.flatten(1, 2), *tables, module.scale, tile_bytes)
            return output.view(qkv[0].shape), None
    bias = None if tables is None else relative_position_bias(qkv[0], *tables)
    query, key, value = qkv.flatten(3, 4)  # (M, n, N, d)
    output = F.scaled_dot_product_attention(query, key, value, bias, dropout_p=dropout, scale=module.scale)
    return output.view(qkv[0].shape), None


def attention_path(query: torch.Tensor) -> str:
    """Returns "folded" where flash kernels can run, else "tiled", for queries (M, n, H, W, d).

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
    if query.device.type != "cuda" or not is_half or sum(query.shape[2:]) > 256:  # ROCm calls its devices "cuda", too
        return "tiled"
    return "folded" if query.dtype == torch.float16 or takes_bfloat16(query.device) else "tiled"


@torch.compiler.assume_constant_result  # torch.compile cannot ask for it within a graph
def takes_bfloat16(device: torch.device) -> bool:
    """Returns whether a CUDA device has attention kernels for bf16."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def relative_positions(
    query: torch.Tensor, table_h: torch.Tensor, table_w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `rel_h` (..., H, W, H) and `rel_w` (..., H, W, W) for `query` (..., H, W, d).

    Source: MViTv2, https://arxiv.org/abs/2112.01526, equation 4.
    """
    rel_h = torch.einsum("...hwd,hkd->...hwk", query, table_h)
    rel_w = torch.einsum("...hwd,wkd->...hwk", query, table_w)
    return rel_h.to(query.dtype), rel_w.to(query.dtype)


def relative_position_bias(
    query: torch.Tensor, table_h: torch.Tensor, table_w: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the bias (..., N, N) of `query` (..., H, W, d), or of some of its rows, given those of `table_h`."""
    rel_h, rel_w = (rel.contiguous() for rel in relative_positions(query, table_h, table_w))
    if out is not None:
        out = out.view(*rel_h.shape, rel_w.shape[-1])
    bias = torch.add(rel_h[..., :, None], rel_w[..., None, :], out=out)  # (..., H, W, H, W)
    return bias.flatten(-4, -3).flatten(-2, -1)


def folded_attention(
    qkv: torch.Tensor, table_h: torch.Tensor, table_w: torch.Tensor, scale: float, dropout: float = 0.0
) -> torch.Tensor:
    """Returns attention (M, n, H, W, d) with the bias folded into head channels, so that kernels need no mask.

    [scale * query[q], rel_h[q], rel_w[q]] · [key[k], onehot(row of k), onehot(column of k)]

    Channels are filled up with zeros to what kernels ask for: multiples of 8, values as wide as keys. Flash does not
    train 193 to 255 channels on all GPUs.
    """
    query, key, value = qkv
    height, width, channels = query.shape[2:]
    num_channels = -(-(channels + height + width) // 8) * 8
    if 192 < num_channels < 256:
        num_channels = 256
    filling = num_channels - channels - height - width

    rel_h, rel_w = relative_positions(query, table_h, F.pad(table_w, (0, 0, 0, filling)))
    rows = torch.eye(height, dtype=key.dtype, device=key.device)[:, None].expand(height, width, -1)
    columns = torch.eye(width, width + filling, dtype=key.dtype, device=key.device).expand(height, width, -1)
    onehots = torch.cat([rows, columns], -1).expand(*key.shape[:-1], -1)
    output = F.scaled_dot_product_attention(
        torch.cat([query * scale, rel_h, rel_w], -1).flatten(2, 3),  # (M, n, N, num_channels)
        torch.cat([key, onehots], -1).flatten(2, 3),
        F.pad(value, (0, num_channels - channels)).flatten(2, 3),
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
        """Returns the attended values (G, H, W, d), given `qkv` (3, G, H, W, d)."""
        query, key, value = qkv
        output = torch.empty_like(query)
        for groups, rows, (scores,) in tiles(query, tile_bytes, query.dtype):
            tile = query[groups, rows]  # (g, h, W, d)
            bias = relative_position_bias(tile, table_h[rows], table_w, out=scores)
            q, k, v = (states.flatten(1, 2)[None] for states in (tile, key[groups], value[groups]))
            attended = F.scaled_dot_product_attention(q, k, v, bias[None], scale=scale)
            output[groups, rows] = attended.view(tile.shape)
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
        inputs = qkv, table_h, table_w
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        grads = tuple(tensor.new_zeros(tensor.shape, dtype=dtype) for tensor in inputs)
        (grad_query, grad_key, grad_value), grad_table_h, grad_table_w = grads
        query, key, value = qkv
        for groups, rows, (probs, scores) in tiles(query, tile_bytes, dtype, dtype):
            tile, grad_tile = (states[groups, rows].to(dtype) for states in (query, grad_output))  # (g, h, W, d)
            q, g = tile.flatten(1, 2), grad_tile.flatten(1, 2)  # (g, hW, d)
            k, v = (states[groups].flatten(1, 2).to(dtype) for states in (key, value))  # (g, N, d)
            tables = table_h[rows].to(dtype), table_w.to(dtype)

            relative_position_bias(tile, *tables, out=scores)
            torch.softmax(scores.baddbmm_(q, k.mT, alpha=scale), -1, out=probs)
            grad_value[groups].view(v.shape).baddbmm_(probs.mT, g)
            grad_probs = torch.bmm(g, v.mT, out=scores)
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, dtype, grad_input=probs)
            grad_key[groups].view(k.shape).baddbmm_(grad_scores.mT, q, alpha=scale)

            grad_bias = grad_scores.view(*tile.shape[:3], *query.shape[1:3])
            grad_rel_h, grad_rel_w = grad_bias.sum(-1), grad_bias.sum(-2)  # (g, h, W, H) and (g, h, W, W)
            grad_query[groups, rows] = (
                (grad_scores @ k).mul_(scale).view(tile.shape)
                + torch.einsum("ghwk,hkd->ghwd", grad_rel_h, tables[0])
                + torch.einsum("ghwk,wkd->ghwd", grad_rel_w, tables[1])
            )
            grad_table_h[rows] += torch.einsum("ghwk,ghwd->hkd", grad_rel_h, tile)
            grad_table_w += torch.einsum("ghwk,ghwd->wkd", grad_rel_w, tile)
        return tuple(grad.to(tensor.dtype) for grad, tensor in zip(grads, inputs, strict=True))

    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = vmap = TiledAttention.vmap


def tiles(query: torch.Tensor, tile_bytes: int, *dtypes: torch.dtype) -> Iterator[tuple[slice, slice, list]]:
    """Cuts the queries (G, H, W, d) into tiles: several groups, or several rows of one.

    Yields:
        The groups and the rows of the tile, and for each of `dtypes` a buffer (g, h * W, N) for the scores of its
        queries, of at most `tile_bytes`, or one row's. All tiles share the buffers' memory.
    """
    num_groups, height, width, _ = query.shape
    row_bytes = width * height * width * max(dtype.itemsize for dtype in dtypes)
    group_step = max(1, min(num_groups, tile_bytes // (row_bytes * height)))
    row_step = max(1, min(height, tile_bytes // row_bytes))
    buffers = [query.new_empty(group_step, row_step * width, height * width, dtype=dtype) for dtype in dtypes]
    for group, row in itertools.product(range(0, num_groups, group_step), range(0, height, row_step)):
        scores = [buffer[: num_groups - group, : (height - row) * width] for buffer in buffers]
        yield slice(group, group + group_step), slice(row, row + row_step), scores


ATTENTION_FUNCTIONS = {"eager": eager_attention, "sdpa": sdpa_attention}
