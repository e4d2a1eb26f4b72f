"""Log-probs of labels and their gradient against float64, and what the GPU fuses against what the CPU runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_posttrain.training import token_logprobs as module


class Alone:
    """A tensor parallel group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


GROUP: Any = Alone()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_float64(
    dtype: torch.dtype, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 7 * 512)  # several chunks, the last one shorter
    torch.manual_seed(0)
    real, columns = 500, 512
    logits = (5 * torch.randn(30, columns)).to(dtype)
    before = logits.clone()
    labels, weights = torch.randint(0, real, (30,)), torch.randn(30)
    leaf = logits.requires_grad_()
    logprobs, entropy, normalisers = module.token_logprobs(leaf, labels, real, GROUP, temperature)
    (gradient,) = torch.autograd.grad((logprobs * weights).sum(), leaf, retain_graph=True)
    z_loss = normalisers.square() * weights.roll(3)
    of_all = torch.autograd.grad((logprobs * weights + entropy * weights.flip(0) + z_loss).sum(), leaf)[0]

    wide = before[:, :real].double().requires_grad_()
    all_logprobs = torch.log_softmax(wide / temperature, -1)
    expected = all_logprobs.gather(1, labels[:, None])[:, 0]
    expected_entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), wide, retain_graph=True)
    expected_z_loss = torch.logsumexp(wide / temperature, -1).square() * weights.roll(3)
    expected_sum = (expected * weights + expected_entropy * weights.flip(0) + expected_z_loss).sum()
    (expected_of_all,) = torch.autograd.grad(expected_sum, wide)
    assert torch.equal(leaf.detach(), before)
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=1e-5)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(gradient[:, :real].double(), expected_gradient, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(z_loss.double(), expected_z_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_all[:, :real].double(), expected_of_all, rtol=tolerance, atol=5e-5)
    assert not gradient[:, real:].any()


@pytest.mark.slow  # calls the C++ compiler
def test_compiled_equals_eager() -> None:
    torch.manual_seed(0)
    for rows in (30, 17):
        logits, top = torch.randn(rows, 512).bfloat16(), torch.full((rows,), 4.0)
        labels = torch.randint(0, 512, (rows,))
        for function, arguments in (
            (module._row_sums, (logits, top, labels, labels > 5, 0.7)),
            (module._softmax_gradient, (logits, top, top, 0.7)),
        ):
            torch.testing.assert_close(module._compiled(function)(*arguments), function(*arguments))
