"""The loss by chunks is torch's over all logits: values, gradients, and what it never holds."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_native as qn
from qlora_native.nn import Linear4bit
from qlora_native.training import chunked_cross_entropy, linear_cross_entropy

TOKENS, WIDTH, VOCABULARY = 37, 32, 101
TRANSFORMS = [(1.0, None), (0.3, None), (1.0, 2.0), (1.7, 3.0)]


def case(dtype, device, ignored=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(device, dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(device, dtype) / 2
    bias = torch.randn(VOCABULARY, generator=generator).to(device, dtype)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[torch.rand(TOKENS, generator=generator) < ignored] = -100
    return hidden, weight, bias, labels.to(device)


def plain(hidden, weight, bias, labels, scale=1.0, softcap=None):
    """Of all logits at once, in the precision of the arguments."""
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction="none")


def in_double(*tensors):
    return [t.double().detach().requires_grad_() for t in tensors]


@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 1000, None])
@pytest.mark.parametrize(("scale", "softcap"), TRANSFORMS)
def test_losses_and_gradients_are_torchs(device, chunk, scale, softcap):
    hidden, weight, bias, labels = case(torch.float32, device)
    hidden.requires_grad_()
    factors = torch.linspace(0.5, 2.0, TOKENS, device=device)
    found = linear_cross_entropy(
        hidden, weight, labels, bias, scale=scale, softcap=softcap, chunk_tokens=chunk
    )
    (found * factors).sum().backward()
    exact, *others = in_double(hidden, weight, bias)
    expected = plain(exact, *others, labels, scale, softcap)
    (expected * factors).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    assert not hidden.grad[labels == -100].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale", "softcap"), TRANSFORMS)
def test_16_bits_are_as_near_as_those_of_all_logits(device, dtype, scale, softcap):
    hidden, weight, _, labels = case(dtype, device)
    errors = []
    for compute in (
        lambda h: linear_cross_entropy(
            h, weight, labels, scale=scale, softcap=softcap, chunk_tokens=10
        ),
        lambda h: chunked_cross_entropy(
            lambda rows: F.linear(rows, weight), VOCABULARY, h, labels,
            scale=scale, softcap=softcap, chunk_tokens=TOKENS,
        ),
    ):  # fmt: skip
        mine = hidden.detach().requires_grad_()
        loss = compute(mine)
        assert loss.dtype == torch.float32
        loss.sum().backward()
        exact, exact_weight = in_double(hidden, weight)
        expected = plain(exact, exact_weight, None, labels, scale, softcap)
        expected.sum().backward()
        errors.append((loss.double() - expected).norm() / expected.norm())
        errors.append((mine.grad.double() - exact.grad).norm() / exact.grad.norm())
    assert errors[0] <= 1.1 * errors[2] and errors[1] <= 1.1 * errors[3]
    assert errors[1] < 0.02


def test_a_target_that_is_almost_certain_has_its_small_gradient(device):
    """1 - p is below what bfloat16 tells from 1."""
    hidden = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.tensor([[4.0, 4.0], [0.0, 0.0]], dtype=torch.bfloat16, device=device)
    linear_cross_entropy(hidden, weight, torch.tensor([0], device=device)).sum().backward()
    exact = torch.tensor([[1.0, 1.0]], dtype=torch.float64, device=device, requires_grad=True)
    F.cross_entropy(exact @ weight.double().T, torch.tensor([0], device=device)).backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-2, atol=0)


def test_without_any_label_the_mean_is_nan_and_the_gradient_zero(device):
    hidden, weight, _, labels = case(torch.float32, device, ignored=2.0)
    hidden.requires_grad_()
    losses = linear_cross_entropy(hidden, weight, labels, chunk_tokens=10)
    mean = losses.sum() / (labels != -100).sum()
    assert mean.isnan() and F.cross_entropy(hidden @ weight.T, labels).isnan()
    mean.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_another_ignored_label_and_more_dimensions(device):
    hidden, weight, _, labels = case(torch.float32, device)
    labels[labels == -100] = 5
    found = linear_cross_entropy(
        hidden[:36].view(4, 9, WIDTH), weight, labels[:36].view(4, 9), ignore_index=5
    )
    expected = F.cross_entropy(
        hidden[:36] @ weight.T, labels[:36], ignore_index=5, reduction="none"
    )
    torch.testing.assert_close(found, expected.view(4, 9))


@pytest.mark.parametrize("chunk", [7, 1000])
def test_a_head_that_trains_has_its_gradients(device, chunk):
    tensors = [t.requires_grad_() for t in case(torch.float32, device)[:3]]
    labels = case(torch.float32, device)[3]
    found = linear_cross_entropy(tensors[0], tensors[1], labels, tensors[2], chunk_tokens=chunk)
    found.sum().backward()
    exact = in_double(*tensors)
    plain(*exact, labels).sum().backward()
    for mine, theirs in zip(tensors, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_a_4_bit_head_with_an_adapter(device):
    hidden, weight, _, labels = case(torch.float32, device)
    dense = torch.nn.Linear(WIDTH, VOCABULARY, bias=False, device=device)
    dense.weight.data.copy_(weight)
    head = torch.nn.Sequential(Linear4bit.from_linear(dense))
    qn.add_lora(head, r=4, target_modules=["0"])
    adapter = [p for p in head.parameters() if p.requires_grad]
    for parameter in adapter:
        torch.nn.init.normal_(parameter, 0, 0.1)
    hidden.requires_grad_()
    chunked_cross_entropy(head, VOCABULARY, hidden, labels, chunk_tokens=10).sum().backward()
    found = [hidden.grad, *(p.grad for p in adapter)]
    hidden.grad = None
    for parameter in adapter:
        parameter.grad = None
    F.cross_entropy(head(hidden), labels, reduction="sum").backward()
    for mine, theirs in zip(found, [hidden.grad, *(p.grad for p in adapter)], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """Sees the elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("trains", [False, True])
def test_no_more_logits_exist_than_those_of_a_chunk(trains):
    hidden, weight, _, labels = case(torch.float32, "cpu")
    hidden.requires_grad_()
    weight.requires_grad_(trains)
    with Largest() as seen:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=8).sum().backward()
    assert seen.elements == max(weight.numel(), hidden.numel())
    with Largest() as seen:
        F.cross_entropy(hidden @ weight.T, labels).backward()
    assert seen.elements == TOKENS * VOCABULARY


@pytest.mark.parametrize("trains", [False, True])
def test_compiled_whole_and_under_a_checkpoint(trains):
    hidden, weight, _, labels = case(torch.float32, "cpu")
    weight.requires_grad_(trains)

    def loss(hidden):
        return linear_cross_entropy(hidden * 2, weight, labels, chunk_tokens=10).sum()

    found = []
    for function in (
        loss,
        torch.compile(loss, backend="aot_eager", fullgraph=True),
        lambda h: torch.utils.checkpoint.checkpoint(loss, h, use_reentrant=False),
    ):
        mine = hidden.detach().requires_grad_()
        function(mine).backward()
        found.append(mine.grad)
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], found[1])


def test_autocast_multiplies_in_its_dtype():
    hidden, weight, _, labels = case(torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, labels)
        logits = F.linear(hidden, weight)
    assert logits.dtype == torch.bfloat16
    expected = F.cross_entropy(logits.float(), labels, reduction="none")
    torch.testing.assert_close(found, expected)


def test_what_is_wrong_is_refused():
    hidden, weight, bias, labels = case(torch.float32, "cpu", ignored=0)
    with pytest.raises(ValueError, match=r"hidden is \(37, 32\) and weight \(101, 31\)"):
        linear_cross_entropy(hidden, weight[:, 1:], labels)
    with pytest.raises(ValueError, match=r"hidden is \(37, 32\) and labels \(36,\)"):
        linear_cross_entropy(hidden, weight, labels[1:])
    with pytest.raises(ValueError, match=r"bias is \(100,\)"):
        linear_cross_entropy(hidden, weight, labels, bias[1:])
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=0)
    with pytest.raises(ValueError, match=r"hidden is torch.float32 and weight torch.bfloat16"):
        linear_cross_entropy(hidden, weight.bfloat16(), labels)
    labels[3] = VOCABULARY
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(hidden, weight, labels)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels.clamp(max=5)).sum().square()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable"):
        gradient.sum().backward()


def test_chunks_are_of_one_size():
    from qlora_native.training.cross_entropy import CHUNK_BYTES, chunk_rows

    for tokens in (1, 127, 128, 1000, 1024, 8192, 8193, 100_000):
        for vocabulary in (320, 32_000, 128_256, 262_144, 10**8):
            rows = chunk_rows(tokens, vocabulary)
            chunks = -(-tokens // rows)
            assert rows % 128 == 0 and (chunks - 1) * rows < tokens <= chunks * rows
            assert rows == 128 or rows * vocabulary * 4 <= CHUNK_BYTES + 128 * vocabulary * 4
