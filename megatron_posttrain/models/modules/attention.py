"""Causal attention over packed sequences in torch, with context parallelism, sinks and sliding windows."""

import itertools
import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_posttrain.models.modules import kernels

PADDING_WASTE = 0.25  # sequences share one padded call while each fills at least 1 - this of it


@dataclass(frozen=True)
class _Bucket:
    """Sequences of similar length that go through one attention call, right-padded."""

    gather: Tensor | None  # [n * length] token of every padded slot; None: the tokens as they lie
    scatter: Tensor | None  # [real tokens] slot of every token
    count: int
    length: int


@dataclass(frozen=True)
class PackingPlan:
    """How the packed tokens [t] of one micro-batch are grouped; made once and used by every layer."""

    lengths: tuple[int, ...]
    buckets: tuple[_Bucket, ...]
    restore: Tensor | None  # puts the buckets' tokens back in packed order

    @classmethod
    def make(cls, cu_seqlens: Tensor) -> Self:
        bounds = cu_seqlens.tolist()
        lengths = tuple(b - a for a, b in itertools.pairwise(bounds))
        device = cu_seqlens.device
        if len(set(lengths)) == 1:
            return cls(lengths, (_Bucket(None, None, len(lengths), lengths[0]),), None)
        by_length = sorted((n, start) for n, start in zip(lengths, bounds[:-1], strict=True) if n)
        buckets, order = [], []
        while by_length:
            longest = by_length[-1][0]
            members = [m for m in by_length if m[0] >= longest * (1 - PADDING_WASTE)]
            by_length = by_length[: len(by_length) - len(members)]
            start = torch.tensor([s for _, s in members])[:, None]
            size = torch.tensor([n for n, _ in members])[:, None]
            slot = torch.arange(longest)[None]
            real = (slot < size).flatten()
            token = (start + torch.minimum(slot, size - 1)).flatten()
            scatter = real.nonzero().flatten()
            buckets.append(_Bucket(token.to(device), scatter.to(device), len(members), longest))
            order.append(token[scatter])
        restore = torch.argsort(torch.cat(order)).to(device)
        return cls(lengths, tuple(buckets), restore)


class PackedAttention(torch.nn.Module):
    """Core attention of megatron-core's SelfAttention and MLASelfAttention, in the layer spec's slot.

    Shapes: query [t, heads, dim], key [t, groups, dim], value [t, groups, value dim], all sequences of a
    micro-batch one after the other (THD); returns [t, heads * value dim]. With context parallelism t are
    this rank's tokens: chunks `rank` and `2 * size - 1 - rank` of every sequence; keys and values are
    gathered, which is exact and needs no online softmax.
    """

    def __init__(self, config: Any, layer_number: int, *, pg_collection: Any, **options: Any) -> None:
        """Of megatron-core's further `options` only `softmax_scale` and `k_channels` have an effect."""
        super().__init__()
        channels = options.get("k_channels") or config.kv_channels
        self.scale = options.get("softmax_scale") or 1.0 / math.sqrt(channels)
        self.context_group = pg_collection.cp
        skip = config.window_attn_skip_freq
        windowed = config.window_size is not None and (skip is None or bool(skip[layer_number - 1]))
        self.window = config.window_size[0] + 1 if windowed else None  # tokens visible, itself included
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

            heads = config.num_attention_heads // pg_collection.tp.size()
            sinks = torch.empty(heads, dtype=config.params_dtype, device=torch.cuda.current_device())
            self.softmax_offset = torch.nn.Parameter(sinks)
            config.init_method(self.softmax_offset)
            # Each tensor rank has its own heads' sinks: all count in the gradient norm, all are saved.
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """For megatron-core's checkpoints: the sinks are split over tensor ranks."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"softmax_offset": 0}, sharded_offsets)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Any, **__: Any) -> Tensor:
        # The kernel has no sinks: it gives the softmax's normaliser, but no gradient of it.
        plain = self.context_group.size() == 1 and self.softmax_offset is None
        if plain and kernels.varlen_attention(query.dtype, query.shape[-1]):
            return self._varlen(query, key, value, packed_seq_params).reshape(query.shape[0], -1)
        plan = getattr(packed_seq_params, "plan", None)
        if plan is None:
            plan = packed_seq_params.plan = PackingPlan.make(packed_seq_params.cu_seqlens_q)
        attend = self._context_parallel if self.context_group.size() > 1 else self._local
        return attend(query, key, value, plan).reshape(query.shape[0], -1)

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, packed: Any) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        width = value.shape[-1]
        if width < query.shape[-1]:  # MLA; the kernel knows one head size
            value = F.pad(value, (0, query.shape[-1] - width))
        bounds, longest = packed.cu_seqlens_q, packed.max_seqlen_q
        window = (-1 if self.window is None else self.window - 1, 0)
        out: Any = varlen_attn(
            query, key, value, bounds, bounds, longest, longest,
            scale=self.scale, window_size=window, enable_gqa=True,
        )  # fmt: skip
        return out[..., :width]

    def _local(self, query: Tensor, key: Tensor, value: Tensor, plan: PackingPlan) -> Tensor:
        outputs = []
        for bucket in plan.buckets:
            q, k, v = (_pad(x, bucket) for x in (query, key, value))
            mask = None
            if (self.window is not None and self.window < bucket.length) or self.softmax_offset is not None:
                at = torch.arange(bucket.length, device=query.device)
                mask = self._mask(at, at)
            out = self._attend(q, k, v, mask)
            out = out.transpose(1, 2).reshape(bucket.count * bucket.length, *out.shape[1:2], out.shape[-1])
            outputs.append(out if bucket.scatter is None else out.index_select(0, bucket.scatter))
        return outputs[0] if plan.restore is None else torch.cat(outputs).index_select(0, plan.restore)

    def _context_parallel(self, query: Tensor, key: Tensor, value: Tensor, plan: PackingPlan) -> Tensor:
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        group = self.context_group
        size, rank = group.size(), group.rank()
        # [size, t, ...]; the gradient is summed back to each rank's own part.
        gathered = (gather_from_sequence_parallel_region(x, group=group) for x in (key, value))
        keys, values = (x.unflatten(0, (size, -1)) for x in gathered)
        outputs, start = [], 0
        for full in plan.lengths:
            local, chunk = full // size, full // (2 * size)
            part = slice(start, start + local)
            k, v = (_natural_order(x[:, part], chunk) for x in (keys, values))
            at = torch.arange(full, device=query.device)
            mine = torch.cat([at[r * chunk : (r + 1) * chunk] for r in (rank, 2 * size - 1 - rank)])
            q, k, v = (x.transpose(0, 1)[None] for x in (query[part], k, v))
            outputs.append(self._attend(q, k, v, self._mask(mine, at))[0].transpose(0, 1))
            start += local
        return torch.cat(outputs)

    def _mask(self, query_at: Tensor, key_at: Tensor) -> Tensor:
        """[queries, keys]: True where a query may look."""
        distance = query_at[:, None] - key_at[None, :]
        mask = distance >= 0
        return mask & (distance < self.window) if self.window is not None else mask

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[n, heads, queries, dim]; `mask` None is plain causal."""
        if k.shape[1] != q.shape[1]:
            repeat = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        if self.softmax_offset is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale)
        # Attention sinks: one more logit a head takes part in the softmax and carries no value.
        scores = (q @ k.transpose(-1, -2)).float() * self.scale
        assert mask is not None
        scores = scores.masked_fill(~mask, float("-inf"))
        sink = self.softmax_offset.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
        return weights.to(v.dtype) @ v


def _pad(x: Tensor, bucket: _Bucket) -> Tensor:
    """[t, heads, dim] -> [n, heads, length, dim]."""
    if bucket.gather is not None:
        x = x.index_select(0, bucket.gather)
    return x.view(bucket.count, bucket.length, *x.shape[1:]).transpose(1, 2)


def _natural_order(gathered: Tensor, chunk: int) -> Tensor:
    """[size, 2 * chunk, ...] of ranks that hold chunks r and 2 * size - 1 - r -> [2 * size * chunk, ...]."""
    return torch.cat([*gathered[:, :chunk].unbind(0), *gathered[:, chunk:].flip(0).unbind(0)])
