"""SAM's vision attention in memory that grows with the number of tokens, not with its square.

Shapes: B images of rows x columns tokens, C channels. Attention sees them as R x S windows of H x W tokens (R counts
the rows of windows of all images, S those in a row; without windows R = B and S = 1), in h heads of d channels each.
In each of the G = R * S * h groups, N = H * W tokens attend to each other. `qkv` holds queries, keys and values, along
its first axis. Relative positions are tables (H, H, d) and (W, W, d), of one vector for each coordinate of a query and
of a key.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


RelPos = tuple[torch.Tensor, torch.Tensor]


def pad_to_windows(qkv: torch.Tensor, padding: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """Fills `qkv` (3, B, rows, columns, C) to the right and below with `padding` (3, 1, 1, 1, C), to whole windows."""
    _, batch_size, rows, columns, channels = qkv.shape
    height, width = (-(-tokens // size) * size for tokens, size in zip((rows, columns), window, strict=True))
    padded = padding.expand(3, batch_size, height, width, channels).clone()
    padded[:, :, :rows, :columns] = qkv
    return padded


def split_windows_and_heads(qkv: torch.Tensor, window: tuple[int, int], num_heads: int) -> torch.Tensor:
    """Views `qkv` (3, B, rows, columns, C), whole windows, as (3, R, S, h, H, W, d)."""
    _, batch_size, rows, columns, _ = qkv.shape
    height, width = window
    qkv = qkv.view(3, batch_size * rows // height, height, columns // width, width, num_heads, -1)
    return qkv.permute(0, 1, 3, 5, 2, 4, 6)


def merge_windows_and_heads(states: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The inverse of `split_windows_and_heads` for one of the three: (R, S, h, H, W, d) as (B, rows, columns, C)."""
    window_rows, window_columns, num_heads, height, width, head_dim = states.shape
    rows, columns = window_rows // batch_size * height, window_columns * width
    return states.permute(0, 3, 1, 4, 2, 5).reshape(batch_size, rows, columns, num_heads * head_dim)


def eager_attention(module: Any, qkv: torch.Tensor, rel_pos: RelPos | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (R, S, h, H, W, d) with every step spelt out, and its weights (G, N, N) before dropout."""
    q, k, v = (tokens(states) for states in qkv)
    attn_weights = (q * module.scale) @ k.mT
    if rel_pos is not None:
        attn_weights = attn_weights + relative_position_bias(qkv[0], *rel_pos)
    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(qkv.dtype)
    attn_probs = F.dropout(attn_weights, module.dropout, module.training)
    return (attn_probs @ v).view(qkv[0].shape), attn_weights


def sdpa_attention(module: Any, qkv: torch.Tensor, rel_pos: RelPos | None) -> tuple[torch.Tensor, None]:
    """Attention (R, S, h, H, W, d) by PyTorch's fused kernels, in tiles where there is a bias."""
    dropout = module.dropout if module.training else 0.0
    # Dropout could not be drawn again, tile by tile, for backward; and an exported graph has no use for a long loop.
    if rel_pos is not None and not dropout and not torch.compiler.is_exporting():
        return TiledAttention.apply(qkv, *rel_pos, module.scale, module.config.attention_tile_bytes), None
    query, key, value = qkv
    bias = None if rel_pos is None else relative_position_bias(query, *rel_pos)
    return _sdpa(query, key, value, bias, module.scale, dropout), None


ATTENTION_FUNCTIONS: dict[str, Callable] = {"eager": eager_attention, "sdpa": sdpa_attention}


def tokens(states: torch.Tensor) -> torch.Tensor:
    """(R, S, h, H, W, d) as (G, N, d), contiguous, as rows far apart in memory slow matrix products down."""
    return states.flatten(3, 4).flatten(0, 2).contiguous()


def relative_position_bias(
    query: torch.Tensor, rel_pos_h: torch.Tensor, rel_pos_w: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The bias (G, N, N) that decomposed relative positions add to the scores of `query`, or of a tile of it.

    Source: MViTv2, https://arxiv.org/abs/2112.01526, equation 4.
    """
    query = query.flatten(0, 2)  # (G, H, W, d)
    # contiguous, or torch.compile gives their sum strides that `out` does not have
    rel_h = torch.einsum("ghwd,hkd->ghwk", query, rel_pos_h).contiguous()[..., :, None]
    rel_w = torch.einsum("ghwd,wkd->ghwk", query, rel_pos_w).contiguous()[..., None, :]
    if out is None:
        return (rel_h + rel_w).flatten(3).flatten(1, 2)
    torch.add(rel_h, rel_w, out=out.view(*query.shape[:3], len(rel_pos_h[0]), len(rel_pos_w[0])))
    return out


class TiledAttention(torch.autograd.Function):
    """Attention with decomposed relative positions that never holds all N x N scores, nor keeps any for backward.

    Backward computes the scores of each tile again. For softmax attention its gradients are those of
    https://arxiv.org/abs/2205.14135, appendix B.4; the bias adds sums of the scores' gradient over one axis of keys.
    """

    @staticmethod
    def forward(ctx, qkv, rel_pos_h, rel_pos_w, scale, tile_bytes):
        """Returns the attended values (R, S, h, H, W, d)."""
        output = torch.empty_like(qkv[0])
        qkv = qkv.contiguous()  # one copy, after which the tokens of every tile need none
        ctx.save_for_backward(qkv, rel_pos_h, rel_pos_w)
        ctx.scale, ctx.tile_bytes = scale, tile_bytes
        query, key, value = qkv
        for tile, (scores,) in tiles(query, tile_bytes, query.dtype):
            group, (rows, columns) = tile[:3], tile[3:]
            bias = relative_position_bias(query[tile], rel_pos_h[rows], rel_pos_w[columns], out=scores)
            output[tile] = _sdpa(query[tile], key[group], value[group], bias, scale)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        """Returns the gradients of what `forward` took."""
        device = grad_output.device.type  # autocast's dtypes would mix with those chosen below; "meta" has none
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return *_tiled_gradients(grad_output, ctx.scale, ctx.tile_bytes, *ctx.saved_tensors), None, None


def _tiled_gradients(
    grad_output: torch.Tensor,
    scale: float,
    tile_bytes: int,
    qkv: torch.Tensor,
    rel_pos_h: torch.Tensor,
    rel_pos_w: torch.Tensor,
) -> Iterator[torch.Tensor]:
    """The gradients of the last three, in their dtypes, but computed in at least fp32."""
    inputs = qkv, rel_pos_h, rel_pos_w
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    grads = tuple(torch.zeros_like(tensor, dtype=dtype) for tensor in inputs)
    (grad_query, grad_key, grad_value), grad_rel_pos_h, grad_rel_pos_w = grads
    query, key, value = qkv
    for tile, (probs, scores) in tiles(query, tile_bytes, dtype, dtype):
        group, (rows, columns) = tile[:3], tile[3:]
        q, g = (tokens(states[tile].to(dtype)) for states in (query, grad_output))  # (g, n, d), n queries of the tile
        k, v = (tokens(states[group].to(dtype)) for states in (key, value))  # (g, N, d)
        tables = rel_pos_h[rows].to(dtype), rel_pos_w[columns].to(dtype)

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
        grad_rel_pos_h[rows] += torch.einsum("ghwk,ghwd->hkd", grad_rel_h, q.view(*grid, -1))
        grad_rel_pos_w[columns] += torch.einsum("ghwk,ghwd->wkd", grad_rel_w, q.view(*grid, -1))
    return (grad.to(tensor.dtype) for grad, tensor in zip(grads, inputs, strict=True))


def tiles(query: torch.Tensor, tile_bytes: int, *dtypes: torch.dtype) -> Iterator[tuple[tuple[slice, ...], list]]:
    """Cuts the queries (R, S, h, H, W, d) into tiles, each with room for its scores (g, n, N) against all its keys.

    Yields:
        The tile's index into `query`, less the last axis, and for each of `dtypes` a tensor (g, n, N) of at most
        `tile_bytes`, or one query's scores, which is the same memory for all tiles.
    """
    *shape, _ = query.shape
    num_keys = shape[-2] * shape[-1]
    limit = max(1, tile_bytes // (num_keys * max(dtype.itemsize for dtype in dtypes)))
    ranges, num_queries = [], 1
    for length in reversed(shape):  # an axis is cut only where all after it fit as a whole, or into ones
        step = max(1, min(length, limit // num_queries))
        num_queries *= step
        ranges.append([slice(start, min(start + step, length)) for start in range(0, length, step)])
    rooms = [query.new_empty(num_queries * num_keys, dtype=dtype) for dtype in dtypes]
    for tile in itertools.product(*reversed(ranges)):
        sides = [part.stop - part.start for part in tile]
        size = math.prod(sides[:3]), math.prod(sides[3:]), num_keys
        yield tile, [room[: math.prod(size)].view(size) for room in rooms]


def _sdpa(query, key, value, bias, scale: float, dropout: float = 0.0) -> torch.Tensor:
    """`scaled_dot_product_attention` of (R, S, h, H, W, d), as the four dimensions that its fused kernels ask for."""
    q, k, v = (tokens(states)[None] for states in (query, key, value))
    bias = None if bias is None else bias[None]
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
    return output.view(query.shape)
