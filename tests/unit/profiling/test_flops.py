"""FLOPs of layers whose operations PyTorch hides."""

from __future__ import annotations

import torch
from torch import nn

from distill.profiling.flops import flop_counter, module_flops


def test_attention_in_use_is_counted_as_its_products() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(1, 5, 8)
    with torch.no_grad(), flop_counter() as counter:
        attention(x, x, x, need_weights=False)
    projections, products = 2 * 5 * 8 * (3 * 8 + 8), 2 * 2 * 5 * 5 * 8
    assert counter.get_total_flops() == projections + products
    assert torch.backends.mha.get_fastpath_enabled()


def test_only_the_form_of_an_input_counts() -> None:
    assert module_flops(nn.Linear(4, 3), torch.empty(2, 4, device="meta")) == 2 * 2 * 4 * 3
