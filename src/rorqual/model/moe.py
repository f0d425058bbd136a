"""DeepSeekMoE: one shared expert beside routed ones, clamped SwiGLU, weight applied before w2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.kernels import dispatch, reference
from rorqual.model.config import ModelConfig
from rorqual.model.gate import Gate
from rorqual.model.linear import Linear, PackedProduct, WeightFormat
from rorqual.model.packed import RouterStats


class Expert(nn.Module):
    """w2(silu(min(w1 x, limit)) * clamp(w3 x) * weight)."""

    def __init__(self, config: ModelConfig, weight_format: WeightFormat, width: int) -> None:
        super().__init__()
        self.limit = config.swiglu_limit
        official = config.numerics == "official"

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, weight_format=weight_format, quantize_input=official)

        self.w1 = linear(config.hidden_size, width)
        self.w2 = linear(width, config.hidden_size)
        self.w3 = linear(config.hidden_size, width)

    def forward(self, x_ND: Tensor, weight_N1: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, D]; the routing weight enters before w2, where it is rounded with it."""
        hidden = reference.swiglu(self.w1(x_ND), self.w3(x_ND), self.limit)
        if weight_N1 is not None:
            hidden = hidden * weight_N1
        out: Tensor = self.w2(hidden.to(x_ND.dtype))
        return out


class MoE(nn.Module):
    """Routed experts plus the shared expert."""

    def __init__(self, config: ModelConfig, *, hashed: bool) -> None:
        super().__init__()
        self.gate = Gate(config, hashed=hashed)
        self.is_packed = config.expert_dtype != "plain"
        width = config.moe_intermediate_size
        self.experts = nn.ModuleList(
            Expert(config, config.expert_dtype, width) for _ in range(config.n_routed_experts)
        )
        self._together = [
            (PackedProduct(), [getattr(expert, name) for expert in self.experts])
            for name in ("w1", "w2", "w3")
        ]
        self.shared_experts = Expert(config, config.linear_dtype, width * config.n_shared_experts)

    def forward(self, x_ND: Tensor, tokens_N: Tensor) -> Tensor:
        """[N, D] -> [N, D]; tokens_N are the input token ids (hash routing needs them)."""
        weight_NK, index_NK, _ = self.gate(x_ND, tokens_N)
        return self._mix(x_ND, weight_NK, index_NK)

    def forward_packed(
        self, x_ND: Tensor, tokens_N: Tensor, real_N: Tensor
    ) -> tuple[Tensor, RouterStats | None]:
        """As ``forward``, with routing statistics over the tokens where ``real_N`` is True."""
        weight_NK, index_NK, scores_NE = self.gate(x_ND, tokens_N)
        stats = None
        if not self.gate.hashed:
            share_NE = scores_NE[real_N] / scores_NE[real_N].sum(-1, keepdim=True)
            counts = torch.bincount(index_NK[real_N].flatten(), minlength=len(self.experts))
            stats = RouterStats(counts / counts.sum().clamp_min(1), share_NE.mean(0))
        return self._mix(x_ND, weight_NK, index_NK), stats

    def _mix(self, x_ND: Tensor, weight_NK: Tensor, index_NK: Tensor) -> Tensor:
        """Group tokens by expert, run each expert once, add up in float32."""
        topk = index_NK.shape[-1]
        expert_of, order = index_NK.flatten().sort(stable=True)
        token = order // topk
        weight = weight_NK.flatten()[order].unsqueeze(-1)
        numbers = torch.arange(len(self.experts), device=expert_of.device)
        ends_E = torch.searchsorted(expert_of, numbers, right=True)
        grouped = x_ND.index_select(0, token)
        if self.is_packed and dispatch.on_triton(x_ND):
            routed = self._run_together(grouped, weight, ends_E)
        else:
            routed = self._run_in_turn(grouped, weight, ends_E.tolist())
        total = routed.new_zeros(x_ND.shape).index_add(0, token, routed)
        return (total + reference.wide(self.shared_experts(x_ND))).to(x_ND.dtype)

    def _run_in_turn(self, x_ND: Tensor, weight_N1: Tensor, ends: list[int]) -> Tensor:
        """Each expert on its own rows, which are sorted by expert; float32."""
        outputs, start = [], 0
        for expert, end in zip(self.experts, ends, strict=True):
            if end > start:
                here = slice(start, end)
                outputs.append(reference.wide(expert(x_ND[here], weight_N1[here])))
                start = end
        return torch.cat(outputs)

    def _run_together(self, x_ND: Tensor, weight_N1: Tensor, ends_E: Tensor) -> Tensor:
        """As ``_run_in_turn`` in three products of all experts, without reading counts back."""
        (product_1, w1), (product_2, w2), (product_3, w3) = self._together
        limit = self.shared_experts.limit
        gate, up = product_1(w1, x_ND, ends_E), product_3(w3, x_ND, ends_E)
        hidden = reference.swiglu(gate, up, limit) * weight_N1
        return reference.wide(product_2(w2, hidden.to(x_ND.dtype), ends_E))
