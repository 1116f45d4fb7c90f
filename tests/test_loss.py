"""The loss over narrow logits beside PyTorch's on float32 copies of them."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from ist import loss
from ist.loss import cross_entropy_sum


def logits_and_labels(dtype, n=37, vocabulary=101):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(n, vocabulary, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (n,), generator=generator)
    labels[[0, 5, n - 1]] = -100
    return logits, labels


@pytest.mark.parametrize("chunk", [1, 3 * 101, 2**24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_in_chunks(monkeypatch, dtype, chunk):
    monkeypatch.setattr(loss, "CPU_CHUNK", chunk)
    logits, labels = logits_and_labels(dtype)
    reference = logits.detach().double().requires_grad_()
    expected = cross_entropy(reference, labels, reduction="sum", ignore_index=-100)
    expected.backward()
    ours = cross_entropy_sum(logits, labels)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    (0.5 * ours).backward()
    rounded = (0.5 * reference.grad).to(dtype)
    torch.testing.assert_close(logits.grad, rounded, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert not logits.grad[[0, 5, -1]].any()


def test_all_labels_masked_is_zero():
    logits, labels = logits_and_labels(torch.bfloat16)
    ours = cross_entropy_sum(logits, torch.full_like(labels, -100))
    ours.backward()
    assert ours.item() == 0
    assert not logits.grad.any()


def test_what_is_kept_for_the_backward_is_the_logits_and_a_number_for_each():
    def kept(function, logits, labels):
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            function(logits, labels)
        return sum(t.nbytes for t in seen.values())

    logits, labels = logits_and_labels(torch.bfloat16)
    ours = kept(cross_entropy_sum, logits, labels)
    assert ours == logits.nbytes + labels.nbytes + 4 * len(labels)
    theirs = kept(lambda x, y: cross_entropy(x.float(), y, reduction="sum"), logits, labels)
    assert theirs > 1.9 * ours


def test_float32_is_pytorchs_bit_for_bit():
    logits, labels = logits_and_labels(torch.float32)
    assert torch.equal(cross_entropy_sum(logits, labels), cross_entropy(logits, labels, reduction="sum"))
