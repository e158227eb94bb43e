"""Attention written out, so that the operands of both its products can be quantized."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from swalp.layers.products import Products, integers


def attention(
    products: Products,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """`torch.nn.functional.scaled_dot_product_attention` as two products and what lies between.

    The scale, the mask, the softmax and dropout are float; a row of which everything is masked
    gives zeros, as there.

    Args:
        products: multiplies, its operands and results quantized.
        query: (…, heads, L, E), as all arguments in PyTorch's function.
        key: (…, heads, S, E).
        value: (…, heads, S, Ev).
        attn_mask: boolean (True takes part) or added to the scores.
        dropout_p: of the probabilities.
        is_causal: position l sees positions up to l.
        scale: of the scores; None: 1 / sqrt(E).
        enable_gqa: fewer heads of keys and values than of queries.

    Returns:
        The attention (…, heads, L, Ev), and the probabilities (…, heads, L, S) after dropout.
    """
    if is_causal and attn_mask is not None:
        raise RuntimeError("scaled_dot_product_attention: give attn_mask or is_causal, not both")
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), dim=-3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), dim=-3)
    scores = products.matmul(query, key.transpose(-2, -1))
    scores = scores * (1 / math.sqrt(query.size(-1)) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(
            query.size(-2), key.size(-2), dtype=torch.bool, device=query.device
        ).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), -math.inf)
        else:
            scores = scores + attn_mask
    probabilities = torch.ops.aten._safe_softmax(scores, -1)
    if dropout_p > 0:
        probabilities = F.dropout(probabilities, dropout_p)
    return products.matmul(probabilities, value), probabilities


def attention_on_integers(
    products: Products,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """`attention` by `swalp.matmul.attention`, which keeps no probabilities: the same numbers.

    None where that cannot be: with dropout, a mask to be learned, other dimensions than four,
    operands or a mask that make the others larger (broadcasting).
    """
    tensors = (query, key, value)
    if dropout_p > 0 or enable_gqa or any(x.dim() != 4 or not x.numel() for x in tensors):
        return None
    if any(x.shape[:2] != query.shape[:2] for x in tensors):
        return None
    if attn_mask is not None and (is_causal or attn_mask.requires_grad):
        return None
    if attn_mask is not None and not _fits(attn_mask, (*query.shape[:3], key.size(-2))):
        return None
    if not (products.native and all(integers(x) for x in tensors)):
        return None
    factor = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    return products.attend(query, key, value, attn_mask, is_causal, factor)


def _fits(mask: Tensor, scores: Sequence[int]) -> bool:
    """Whether scores of that shape keep it under the mask."""
    pairs = zip(reversed(mask.shape), reversed(scores), strict=False)
    return mask.dim() <= len(scores) and all(size in (1, whole) for size, whole in pairs)


def multi_head_attention(
    products: Products,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`torch.nn.functional.multi_head_attention_forward`, with its products by `products`.

    Arguments and results are that function's; of the weights returned, a row of which everything
    is masked is zeros instead of NaN.

    Raises:
        RuntimeError: `is_causal` without the mask that it is a hint to, as there.
    """
    if is_causal and attn_mask is None:
        raise RuntimeError("multi_head_attention_forward: is_causal needs attn_mask")
    batched = query.dim() == 3
    same = (query is key, key is value)
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    length, batch, width = query.shape
    if width != embed_dim_to_check:
        raise RuntimeError(
            f"multi_head_attention_forward: query has {width} features, not {embed_dim_to_check}"
        )
    inputs = [query, query if same[0] else key]
    inputs.append(inputs[1] if same[1] else value)
    found = None
    weights: Sequence[Tensor]
    if use_separate_proj_weight:
        assert q_proj_weight is not None
        assert k_proj_weight is not None
        assert v_proj_weight is not None
        weights = q_proj_weight, k_proj_weight, v_proj_weight
    else:
        assert in_proj_weight is not None
        found = products.project(inputs, in_proj_weight, in_proj_bias)
        weights = () if found else in_proj_weight.chunk(3)
    if found is None:
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        found = _project(products, inputs, weights, biases)
    q, k, v = found
    mask = _additive(attn_mask, q.dtype)
    if mask is not None:
        mask = (
            mask.unsqueeze(0)
            if mask.dim() == 2
            else mask.reshape(batch, num_heads, *mask.shape[1:])
        )
    padding = _additive(key_padding_mask, q.dtype)
    if padding is not None:
        padding = padding.view(batch, 1, 1, padding.size(-1))
        mask = padding if mask is None else mask + padding
    if bias_k is not None and bias_v is not None:
        k, v = (
            torch.cat([k, bias_k.expand(1, batch, -1)]),
            torch.cat([v, bias_v.expand(1, batch, -1)]),
        )
        mask = None if mask is None else F.pad(mask, (0, 1))

    def heads(x: Tensor) -> Tensor:
        return x.reshape(x.size(0), batch, num_heads, x.size(2) // num_heads).permute(1, 2, 0, 3)

    def static(x: Tensor) -> Tensor:
        return x.reshape(batch, num_heads, *x.shape[1:])

    q = heads(q)
    k = heads(k) if static_k is None else static(static_k)
    v = heads(v) if static_v is None else static(static_v)
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = None if mask is None else F.pad(mask, (0, 1))
    arguments = (products, q, k, v, mask, dropout_p if training else 0.0)
    whole = None if need_weights else attention_on_integers(*arguments)
    y, probabilities = attention(*arguments) if whole is None else (whole, None)
    y = y.permute(2, 0, 1, 3).reshape(length, batch, width)
    y = products.linear(y, out_proj_weight, out_proj_bias)
    y = y if batched else y.squeeze(1)
    if not need_weights or probabilities is None:
        return y, None
    probabilities = probabilities if batched else probabilities.squeeze(0)
    return y, probabilities.mean(dim=-3) if average_attn_weights else probabilities


def _project(
    products: Products,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> list[Tensor]:
    """Queries, keys and values; what enters several of the projections is quantized once."""
    entered: list[Tensor] = []
    for i, x in enumerate(inputs):
        entered.append(entered[-1] if i and x is inputs[i - 1] else products.enter(x))
    return [
        products.leave(F.linear(x, weight, bias))
        for x, weight, bias in zip(entered, weights, biases, strict=True)
    ]


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask to add, of one whose True does not take part."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
