"""Chunked log-probs against a dense fp64 reference, values and gradients."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genac_megatron.errors import InputError
from genac_megatron.models.logprobs import _Shard, vocab_parallel_logprobs


def dense(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, temperature: float, vocab: int
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy by one dense log_softmax, in the dtype of hidden."""
    logp_TV = (hidden @ weight[:vocab].T / temperature).log_softmax(-1)
    return logp_TV.gather(1, labels[:, None]).squeeze(1), -(logp_TV.exp() * logp_TV).sum(1)


def case(seed: int, tokens: int, hidden: int, rows: int, vocab: int, dtype: torch.dtype) -> list[Tensor]:
    """hidden, weight, labels, and upstream gradients of log-prob and entropy."""
    g = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(tokens, hidden, generator=g).to(dtype)
    weight_VH = torch.randn(rows, hidden, generator=g).to(dtype)
    labels_T = torch.randint(vocab, (tokens,), generator=g)
    return [
        hidden_TH,
        weight_VH,
        labels_T,
        torch.randn(tokens, generator=g),
        torch.randn(tokens, generator=g),
    ]


def reference(
    inputs: list[Tensor], *, temperature: float, vocab: int, mask: Tensor | None = None
) -> list[Tensor]:
    """fp64 log-prob, entropy, and the gradients of hidden and weight, from the same rounded inputs."""
    hidden, weight = (x.double().requires_grad_() for x in inputs[:2])
    logp, entropy = dense(hidden, weight, inputs[2], temperature=temperature, vocab=vocab)
    if mask is not None:
        logp, entropy = logp * mask, entropy * mask
    (logp @ inputs[3].double() + entropy @ inputs[4].double()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [logp.detach(), entropy.detach(), hidden.grad, weight.grad]


def ours(inputs: list[Tensor], *, with_entropy: bool = True, **kwargs: object) -> list[Tensor]:
    hidden, weight = (x.clone().requires_grad_() for x in inputs[:2])
    logp, entropy = vocab_parallel_logprobs(
        hidden, weight, inputs[2], tp_group=None, with_entropy=with_entropy, **kwargs
    )
    total = logp @ inputs[3].to(logp)
    if entropy is not None:
        total = total + entropy @ inputs[4].to(logp)
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [logp.detach(), torch.zeros(0) if entropy is None else entropy.detach(), hidden.grad, weight.grad]


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected figure."""
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    tokens=st.integers(1, 33),
    vocab=st.integers(2, 70),
    padding=st.integers(0, 9),
    temperature=st.sampled_from([1.0, 0.6, 2.5]),
    chunk=st.integers(1, 40),
    masked=st.booleans(),
)
def test_fp32_equals_dense_fp64(
    seed: int, tokens: int, vocab: int, padding: int, temperature: float, chunk: int, masked: bool
) -> None:
    inputs = case(seed, tokens, 16, vocab + padding, vocab, torch.float32)
    mask = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.5 if masked else None
    expected = reference(inputs, temperature=temperature, vocab=vocab, mask=mask)
    found = ours(inputs, temperature=temperature, chunk=chunk, vocab=vocab, mask_T=mask)
    # Logits reach about 30 here; fp32 rounds them at 2e-6, and a log-prob or an entropy inherits
    # that, as does p in the gradients. Sums of 33 tokens add a few more. 1e-4 leaves a factor ten.
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=1e-4)
    assert not found[3][vocab:].any()
    if mask is not None:
        for x in found[:3]:
            assert not x[~mask].any()


def test_gradients_are_those_of_finite_differences() -> None:
    hidden, weight, labels, *_ = case(0, 5, 4, 9, 7, torch.float64)

    def both(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        logp, entropy = vocab_parallel_logprobs(
            hidden, weight, labels, tp_group=None, vocab=7, chunk=2, temperature=0.7, with_entropy=True
        )
        assert entropy is not None
        return logp, entropy

    assert torch.autograd.gradcheck(both, (hidden.requires_grad_(), weight.requires_grad_()))


def test_bf16_is_as_near_as_dense_bf16() -> None:
    """At a real head's scale: logits of a few units, as 1/sqrt(H) weights make them."""
    inputs = case(1, 96, 256, 9100, 9000, torch.bfloat16)
    inputs[1] = (inputs[1] / 8).to(torch.bfloat16)
    expected = reference(inputs, temperature=1.0, vocab=9000)
    found = ours(inputs, chunk=40, vocab=9000)
    assert [x.dtype for x in found] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]

    hidden, weight = (x.clone().requires_grad_() for x in inputs[:2])
    logits = (hidden @ weight[:9000].T).float()
    logp = logits.log_softmax(-1)
    value, entropy = logp.gather(1, inputs[2][:, None]).squeeze(1), -(logp.exp() * logp).sum(1)
    (value @ inputs[3] + entropy @ inputs[4]).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    for x, plain, y in zip(found, [value, entropy, hidden.grad, weight.grad], expected, strict=True):
        # Both round the logits to bf16 (8 bits: 0.4 %) and the logits' gradient too; the weight's
        # gradient rounds once more per chunk. Half as much again as the dense way's own error.
        assert error(x, y) <= 1.5 * error(plain.detach(), y)
        assert error(x, y) < 0.02


def test_without_entropy_logprobs_and_gradients_are_the_same() -> None:
    inputs = case(2, 20, 8, 30, 29, torch.float32)
    inputs[4].zero_()
    plain = ours(inputs, with_entropy=False, vocab=29, chunk=6)
    full = ours(inputs, with_entropy=True, vocab=29, chunk=6)
    for i in (0, 2, 3):
        torch.testing.assert_close(plain[i], full[i], rtol=1e-6, atol=1e-6)  # one rounding of p apart
    assert vocab_parallel_logprobs(*inputs[:3], tp_group=None, vocab=29)[1] is None


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("tokens", [0, 4, 6, 13])
def test_the_last_chunks_logits_are_made_once_and_a_second_backward_is_the_first(
    monkeypatch: pytest.MonkeyPatch, tokens: int, with_entropy: bool
) -> None:
    made = []
    whole = _Shard.logits
    monkeypatch.setattr(_Shard, "logits", lambda *args: made.append(1) or whole(*args))
    hidden_TH, weight_VH, labels_T, upstream_T, _ = case(7, tokens, 8, 12, 11, torch.float32)
    weight_VH.requires_grad_()
    logp_T, entropy_T = vocab_parallel_logprobs(
        hidden_TH, weight_VH, labels_T, tp_group=None, vocab=11, chunk=6, with_entropy=with_entropy
    )
    total = logp_T @ upstream_T + (0.0 if entropy_T is None else entropy_T.sum())
    chunks = math.ceil(tokens / 6)
    assert len(made) == chunks
    (first,) = torch.autograd.grad(total, weight_VH, retain_graph=True)
    assert len(made) == max(0, 2 * chunks - 1)
    (second,) = torch.autograd.grad(total, weight_VH)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)  # one rounding of p apart


def test_entropy_alone_has_a_gradient() -> None:
    inputs = case(3, 6, 8, 12, 12, torch.float32)
    hidden = inputs[0].clone().requires_grad_()
    _, entropy = vocab_parallel_logprobs(hidden, *inputs[1:3], tp_group=None, vocab=12, with_entropy=True)
    assert entropy is not None
    entropy.sum().backward()
    twin = inputs[0].double().requires_grad_()
    dense(twin, inputs[1].double(), inputs[2], temperature=1.0, vocab=12)[1].sum().backward()
    assert hidden.grad is not None
    assert twin.grad is not None
    torch.testing.assert_close(hidden.grad.double(), twin.grad, rtol=1e-5, atol=1e-5)


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    logp, entropy = vocab_parallel_logprobs(
        hidden, weight, torch.tensor([0, 0]), tp_group=None, vocab=3, with_entropy=True
    )
    assert entropy is not None
    torch.testing.assert_close(logp, torch.tensor([0.0, -600.0]))
    torch.testing.assert_close(entropy, torch.zeros(2))
    (logp.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.0], [2.0]]))


def test_nothing_to_compute_still_gives_zero_gradients() -> None:
    inputs = case(4, 5, 8, 12, 12, torch.bfloat16)
    found = ours(inputs, vocab=12, mask_T=torch.zeros(5, dtype=torch.bool))
    for x, shape in zip(found, [(5,), (5,), (5, 8), (12, 8)], strict=True):
        assert x.shape == shape
        assert not x.any()


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, labels, *_ = case(5, 4, 8, 12, 12, torch.float32)
    hidden.requires_grad_()
    vocab_parallel_logprobs(hidden, weight, labels, tp_group=None, vocab=12)[0].sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_no_tensor_larger_than_a_chunk_of_logits() -> None:
    """Every tensor that an operation makes holds at most chunk x V figures (H is smaller than chunk)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest, chunk, rows = 0, 8, 500

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ):
            nonlocal largest
            out = func(*args, **(kwargs or {}))  # type: ignore[operator]
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, Tensor):
                    largest = max(largest, x.untyped_storage().nbytes() // x.element_size())
            return out

    inputs = case(6, 200, 4, rows, rows, torch.float32)
    with Watch():
        ours(inputs, vocab=rows, chunk=chunk)
    gc.collect()
    assert largest == chunk * rows


GOOD = {"temperature": 1.0, "chunk": 4, "vocab": 12}


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0.0},
        {"chunk": 0},
        {"vocab": 13},
        {"vocab": 0},
        {"hidden_TH": torch.zeros(5, 7)},
        {"hidden_TH": torch.zeros(5, 8, dtype=torch.bfloat16)},
        {"labels_T": torch.zeros(4, dtype=torch.int64)},
        {"mask_T": torch.ones(4, dtype=torch.bool)},
        {"mask_T": torch.ones(5)},
    ],
)
def test_refuses(changed: dict[str, object]) -> None:
    hidden, weight, labels, *_ = case(7, 5, 8, 12, 12, torch.float32)
    arguments = {"hidden_TH": hidden, "weight_VH": weight, "labels_T": labels, **GOOD, **changed}
    with pytest.raises(InputError):
        vocab_parallel_logprobs(**arguments, tp_group=None)


@pytest.mark.parametrize("label", [-1, 10, 11])
def test_a_label_outside_the_vocabulary_fails(label: int) -> None:
    hidden, weight, labels, *_ = case(8, 5, 8, 12, 10, torch.float32)
    labels[3] = label
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        vocab_parallel_logprobs(hidden, weight, labels, tp_group=None, vocab=10)
    kept = torch.arange(5) != 3
    vocab_parallel_logprobs(hidden, weight, labels, tp_group=None, vocab=10, mask_T=kept)


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_several_labels_of_one_row_are_as_many_rows(chunk: int, with_entropy: bool) -> None:
    """Rows in any order, some asked for twice with one label, some not at all."""
    hidden, weight, *_ = case(0, 9, 8, 13, 11, torch.float64)
    rows = torch.tensor([4, 0, 4, 8, 4, 2, 2, 0])
    labels = torch.tensor([1, 10, 3, 0, 1, 7, 7, 2])
    g = torch.Generator().manual_seed(1)
    upstream = torch.randn(2, len(rows), generator=g, dtype=torch.float64)
    results = []
    for shared in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        how: dict[str, object] = {"tp_group": None, "temperature": 0.7, "chunk": chunk, "vocab": 11}
        logp, entropy = vocab_parallel_logprobs(
            h if shared else h.index_select(0, rows),
            w,
            labels,
            with_entropy=with_entropy,
            rows_E=rows if shared else None,
            **how,  # type: ignore[arg-type]
        )
        total = logp @ upstream[0]
        if entropy is not None:
            total = total + entropy @ upstream[1]
        total.backward()
        results.append([logp.detach(), h.grad, w.grad, *([] if entropy is None else [entropy.detach()])])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_no_labels_of_any_row_give_nothing() -> None:
    hidden, weight, *_ = case(0, 4, 8, 13, 11, torch.float32)
    empty = torch.zeros(0, dtype=torch.int64)
    hidden.requires_grad_()
    logp, _ = vocab_parallel_logprobs(hidden, weight, empty, tp_group=None, vocab=11, rows_E=empty)
    assert logp.shape == (0,)
    (logp.sum() * 0.0).backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_rows_that_do_not_meet_the_labels_are_refused() -> None:
    hidden, weight, labels, *_ = case(0, 4, 8, 13, 11, torch.float32)
    with pytest.raises(InputError, match=r"rows \(3,\)"):
        vocab_parallel_logprobs(
            hidden, weight, labels, tp_group=None, vocab=11, rows_E=torch.zeros(3, dtype=torch.int64)
        )
