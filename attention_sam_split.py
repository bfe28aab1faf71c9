"""SAM's vision attention in memory that grows with the number of tokens, not with its square.

Shapes: G groups (image x window x head), H x W tokens in each, N = H * W, C channels, d of them per head. Tables of
relative positions are (H, H, d) and (W, W, d): one vector per query and key coordinate.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


# What one tile of attention scores may take; training holds about three of them at a time. Smaller tiles stay in the
# caches of a CPU, larger ones keep a GPU busier.
ATTENTION_TILE_BYTES = 16 * 2**20

RelPos = tuple[torch.Tensor, torch.Tensor]


def pad_windows(states: torch.Tensor, padding: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """Fills `states` (B, rows, columns, C) up to whole windows with `padding` (C,), to the right and below."""
    batch_size, rows, columns, channels = states.shape
    height, width = (-(-tokens // size) * size for tokens, size in zip((rows, columns), window, strict=True))
    padded = padding.expand(batch_size, height, width, channels).clone()
    padded[:, :rows, :columns] = states
    return padded


def split_windows_and_heads(states: torch.Tensor, window: tuple[int, int], num_heads: int) -> torch.Tensor:
    """Cuts `states` (B, rows, columns, C), whole windows, into windows and heads (G, H, W, d)."""
    batch_size, rows, columns, _ = states.shape
    height, width = window
    states = states.view(batch_size, rows // height, height, columns // width, width, num_heads, -1)
    return states.permute(0, 1, 3, 5, 2, 4, 6).flatten(0, 3)


def merge_windows_and_heads(states: torch.Tensor, grid: tuple[int, int], num_heads: int) -> torch.Tensor:
    """Puts windows and heads (G, H, W, d) together again, without the padding: (B, rows, columns, C)."""
    _, height, width, head_dim = states.shape
    rows, columns = grid
    grid_height, grid_width = -(-rows // height), -(-columns // width)
    states = states.view(-1, grid_height, grid_width, num_heads, height, width, head_dim).permute(0, 1, 4, 2, 5, 3, 6)
    states = states.reshape(-1, grid_height * height, grid_width * width, num_heads * head_dim)
    return states[:, :rows, :columns]


def eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rel_pos: RelPos | None,
    scale: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (G, H, W, d) with every step spelt out, and its weights (G, N, N) before dropout."""
    q, k, v = (tensor.flatten(1, 2) for tensor in (query, key, value))  # (G, N, d)
    attn_weights = (q * scale) @ k.mT
    if rel_pos is not None:
        attn_weights = attn_weights + relative_position_bias(query, *rel_pos)
    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return (F.dropout(attn_weights, dropout) @ v).view_as(query), attn_weights


def sdpa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rel_pos: RelPos | None,
    scale: float,
    dropout: float,
) -> tuple[torch.Tensor, None]:
    """Attention (G, H, W, d) by PyTorch's fused kernels, in tiles where there is a bias."""
    # A tile's dropout could not be drawn again for its backward, and an exported graph holds no loop over tiles.
    if rel_pos is not None and not dropout and not torch.compiler.is_exporting():
        return TiledAttention.apply(query, key, value, *rel_pos, scale), None
    bias = None if rel_pos is None else relative_position_bias(query, *rel_pos)
    return _sdpa(query, key, value, bias, scale, dropout), None


ATTENTION_FUNCTIONS: dict[str, Callable] = {"eager": eager_attention, "sdpa": sdpa_attention}


def relative_position_bias(query: torch.Tensor, rel_pos_h: torch.Tensor, rel_pos_w: torch.Tensor) -> torch.Tensor:
    """The bias (G, h * w, N) that decomposed relative positions add to the scores of a tile of queries (G, h, w, d).

    The tables are (h, H, d) and (w, W, d). Source: MViTv2, https://arxiv.org/abs/2112.01526, equation 4.
    """
    rel_h = torch.einsum("ghwd,hkd->ghwk", query, rel_pos_h)
    rel_w = torch.einsum("ghwd,wkd->ghwk", query, rel_pos_w)
    return (rel_h[..., :, None] + rel_w[..., None, :]).flatten(3).flatten(1, 2)


class TiledAttention(torch.autograd.Function):
    """Attention with decomposed relative positions that never holds all N x N scores, nor keeps any for backward.

    Backward computes the scores of each tile again. For softmax attention its gradients are those of
    https://arxiv.org/abs/2205.14135, appendix B.4; the bias adds sums of the scores' gradient over one axis of keys.
    """

    @staticmethod
    def forward(ctx, query, key, value, rel_pos_h, rel_pos_w, scale):
        """Returns the attended values (G, H, W, d)."""
        ctx.save_for_backward(query, key, value, rel_pos_h, rel_pos_w)
        ctx.scale = scale
        output = torch.empty_like(query)
        for group, rows, columns in query_tiles(query):
            tile = query[group, rows, columns]
            bias = relative_position_bias(tile, rel_pos_h[rows], rel_pos_w[columns])
            output[group, rows, columns] = _sdpa(tile, key[group], value[group], bias, scale)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        """Returns the gradients of what `forward` took."""
        with torch.autocast(grad_output.device.type, enabled=False):  # its dtypes would mix with those chosen below
            return *_tiled_gradients(grad_output, ctx.scale, *ctx.saved_tensors), None


def _tiled_gradients(
    grad_output: torch.Tensor,
    scale: float,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rel_pos_h: torch.Tensor,
    rel_pos_w: torch.Tensor,
) -> Iterator[torch.Tensor]:
    """The gradients of the five inputs, in their dtypes, but computed in at least fp32."""
    inputs = query, key, value, rel_pos_h, rel_pos_w
    dtype = torch.promote_types(query.dtype, torch.float32)
    grads = tuple(torch.zeros_like(tensor, dtype=dtype) for tensor in inputs)
    grad_query, grad_key, grad_value, grad_rel_pos_h, grad_rel_pos_w = grads
    for group, rows, columns in query_tiles(query):
        tile = query[group, rows, columns].to(dtype)
        tables = rel_pos_h[rows].to(dtype), rel_pos_w[columns].to(dtype)
        # q, g: (g, n, d) for the n queries of the tile; k, v: (g, N, d); all others (g, n, N)
        q, g = tile.flatten(1, 2), grad_output[group, rows, columns].to(dtype).flatten(1, 2)
        k, v = (tensor[group].to(dtype).flatten(1, 2) for tensor in (key, value))

        probs = relative_position_bias(tile, *tables).baddbmm_(q, k.mT, alpha=scale).softmax(-1)
        grad_value[group].flatten(1, 2).baddbmm_(probs.mT, g)
        grad_scores = torch._softmax_backward_data(g @ v.mT, probs, -1, dtype)
        grad_key[group].flatten(1, 2).baddbmm_(grad_scores.mT, q, alpha=scale)

        grad_bias = grad_scores.view(*tile.shape[:3], *query.shape[1:3])
        grad_rel_h, grad_rel_w = grad_bias.sum(-1), grad_bias.sum(-2)
        grad_query[group, rows, columns] = (
            (grad_scores @ k).mul_(scale).view_as(tile)
            + torch.einsum("ghwk,hkd->ghwd", grad_rel_h, tables[0])
            + torch.einsum("ghwk,wkd->ghwd", grad_rel_w, tables[1])
        )
        grad_rel_pos_h[rows] += torch.einsum("ghwk,ghwd->hkd", grad_rel_h, tile)
        grad_rel_pos_w[columns] += torch.einsum("ghwk,ghwd->wkd", grad_rel_w, tile)
    return (grad.to(tensor.dtype) for grad, tensor in zip(grads, inputs, strict=True))


def query_tiles(query: torch.Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts queries (G, H, W, d) into tiles whose scores against all keys take at most `ATTENTION_TILE_BYTES`.

    Yields:
        The tile's range of groups, of rows and of columns; more than one row only with all columns, more than one group
        only with all rows.
    """
    groups, height, width, _ = query.shape
    itemsize = max(query.element_size(), torch.float32.itemsize)
    queries = max(1, ATTENTION_TILE_BYTES // (height * width * itemsize))
    for group in _ranges(groups, queries // (height * width)):
        for rows in _ranges(height, queries // width):
            for columns in _ranges(width, queries):
                yield group, rows, columns


def _ranges(length: int, step: int) -> list[slice]:
    step = max(1, step)
    return [slice(start, start + step) for start in range(0, length, step)]


def _sdpa(query, key, value, bias, scale: float, dropout: float = 0.0) -> torch.Tensor:
    """`scaled_dot_product_attention` of (G, H, W, d), as the four dimensions that its fused kernels ask for."""
    query_, key_, value_ = (tensor.flatten(1, 2)[None] for tensor in (query, key, value))
    bias = None if bias is None else bias[None]
    output = F.scaled_dot_product_attention(query_, key_, value_, attn_mask=bias, dropout_p=dropout, scale=scale)
    return output.view_as(query)
