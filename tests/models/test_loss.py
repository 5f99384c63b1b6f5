"""The loss in pieces equals the loss of all logits, in value and in gradients: in PyTorch, and with the head in one Triton kernel.

The kernel runs in Triton's interpreter on a CPU, or as it is on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from statex.models import loss
from statex.models.loss import next_token_loss
from tests.kernels.inputs import distance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY, HIDDEN = 45, 6

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""float32 sums over less than 100 numbers; else logits, their gradients and the results are rounded, to 2^-9 or 2^-12, and the
interpreter cuts bfloat16 off where a GPU rounds."""


def inputs(dtype: torch.dtype = torch.float32, rows: int = 11) -> tuple[nn.Linear, Tensor, Tensor]:
    """A head, hidden states of two rows, and labels of which some are ignored."""
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False, device=DEVICE, dtype=dtype)
    nn.init.normal_(head.weight)
    hidden = torch.randn(2, rows, HIDDEN, device=DEVICE).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (2, rows), device=DEVICE)
    labels[0, 3] = labels[0, 4] = labels[1, 0] = labels[1, -1] = -100
    return head, hidden, labels


def in_float64(head: nn.Linear, hidden: Tensor, labels: Tensor, divisor: float | None) -> dict[str, Tensor]:
    """The loss of all logits, and its gradients."""
    weight, states = (x.detach().double().requires_grad_() for x in (head.weight, hidden))
    logits, targets = (states @ weight.t())[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    whole = F.cross_entropy(logits, targets, reduction="sum") / (divisor or (targets >= 0).sum())
    return {"loss": whole.detach()} | dict(zip(("hidden", "weight"), torch.autograd.grad(whole, [states, weight]), strict=True))


def found(head: nn.Linear, hidden: Tensor, labels: Tensor, divisor: Any = None, factor: float = 1.0) -> dict[str, Tensor]:
    value = next_token_loss(head, hidden, labels, VOCABULARY, divisor)
    gradients = torch.autograd.grad(value * factor, [hidden, head.weight])
    return {"loss": value.detach()} | dict(zip(("hidden", "weight"), gradients, strict=True))


def errors(results: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {name: distance(x, expected[name]) for name, x in results.items()}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels' module, which takes plain heads on a CPU too, with several pieces and several blocks a row."""
    pytest.importorskip("triton")
    from statex.kernels.fused import linear_loss

    def kernels(head: nn.Module, rows: Tensor) -> Any:
        return linear_loss if loss._is_plain(head, rows) else None

    monkeypatch.setattr(loss, "_kernels", kernels)
    monkeypatch.setattr(linear_loss, "PIECE_BYTES", 5 * VOCABULARY * 4)
    monkeypatch.setattr(linear_loss, "BLOCK", 16)
    return linear_loss


@pytest.fixture
def never_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_kernels", lambda *_: None)


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("divisor", [None, 7.0])
@pytest.mark.usefixtures("never_fused")
def test_pieces_give_the_loss_and_the_gradients_of_the_whole(
    pieces: int, divisor: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, hidden, labels = inputs(rows=8)
    monkeypatch.setattr(loss, "LOGITS", 16 * VOCABULARY // pieces)
    wrong = errors(found(head, hidden, labels, divisor), in_float64(head, hidden, labels, divisor))
    assert max(wrong.values()) < 1e-6, wrong


@pytest.mark.parametrize("divisor", [None, 7.0, torch.tensor(7)], ids=["labels", "number", "tensor"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.usefixtures("fused")
def test_the_kernel_gives_the_loss_and_the_gradients_of_the_whole(dtype: torch.dtype, divisor: Any) -> None:
    head, hidden, labels = inputs(dtype)
    results = found(head, hidden, labels, divisor)
    assert [x.dtype for x in results.values()] == [torch.float32, dtype, dtype]
    wrong = errors(results, in_float64(head, hidden, labels, divisor))
    assert max(wrong.values()) < TOLERANCES[dtype], wrong


@pytest.mark.parametrize("vocabulary", [1, 16, 17, 300])
def test_the_kernel_takes_vocabularies_of_any_size(fused: Any, vocabulary: int) -> None:
    weight, rows = torch.randn(vocabulary, HIDDEN, device=DEVICE), torch.randn(9, HIDDEN, device=DEVICE)
    targets = torch.randint(0, vocabulary, (9,), device=DEVICE)
    expected = F.cross_entropy(rows.double() @ weight.double().t(), targets, reduction="sum")
    torch.testing.assert_close(fused.mean_loss(rows, weight, targets, 1.0).double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.usefixtures("fused")
def test_logits_that_are_far_apart_overflow_nothing() -> None:
    head, hidden, labels = inputs()
    with torch.no_grad():
        hidden *= 1000
    wrong = errors(found(head, hidden, labels), in_float64(head, hidden, labels, None))
    assert max(wrong.values()) < 1e-5, wrong


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("fused")
def test_float32_weights_under_autocast_get_float32_gradients_that_no_sum_rounded(hidden_dtype: torch.dtype) -> None:
    head, hidden, labels = inputs()
    with torch.no_grad():
        head.weight.copy_(head.weight.bfloat16())  # so that only what is computed is rounded
    hidden = hidden.detach().bfloat16().to(hidden_dtype).requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        results = found(head, hidden, labels)
    assert (results["hidden"].dtype, results["weight"].dtype) == (hidden_dtype, torch.float32)
    wrong = errors(results, in_float64(head, hidden, labels, None))
    assert max(wrong.values()) < TOLERANCES[torch.bfloat16], wrong


def test_the_weights_gradient_is_summed_over_pieces_in_float32(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a piece, the first 512 times the others: behind it a sum in bfloat16 would not notice them."""
    weight = torch.zeros(2, 1, device=DEVICE, requires_grad=True)
    rows = torch.tensor([512.0] + 8 * [1.0], device=DEVICE)[:, None]
    targets = torch.zeros(9, dtype=torch.long, device=DEVICE)
    monkeypatch.setattr(fused, "PIECE_BYTES", 1)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        (gradient,) = torch.autograd.grad(fused.mean_loss(rows, weight, targets, 1.0), [weight])
    assert gradient.flatten().tolist() == [-260.0, 260.0]


@pytest.mark.usefixtures("fused")
def test_float16_keeps_gradients_below_its_smallest_normal_number() -> None:
    head = nn.Linear(1, 2, bias=False, device=DEVICE, dtype=torch.float16)
    hidden = torch.ones(1, 2, 1, device=DEVICE, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(1, 2, dtype=torch.long, device=DEVICE)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[14.0], [0.0]]))  # a gradient of 8e-7, which float16 alone holds to one digit
    gradient, expected = found(head, hidden, labels, factor=4096.0), in_float64(head, hidden, labels, None)
    assert distance(gradient["weight"][1], 4096 * expected["weight"][1]) < 2e-3


@pytest.mark.usefixtures("fused")
def test_a_factor_on_the_loss_that_narrow_numbers_do_not_hold_reaches_the_gradients() -> None:
    head, hidden, labels = inputs(torch.float16)
    factor = 1.4 * 2.0**-17
    results, expected = found(head, hidden, labels, 1.0, factor), in_float64(head, hidden, labels, 1.0)
    for name in ("hidden", "weight"):
        assert distance(results[name] / 2.0**-17, 1.4 * expected[name]) < 0.02, name


@pytest.mark.usefixtures("fused")
def test_a_tied_weight_gets_the_gradients_of_both_its_uses() -> None:
    head, _, labels = inputs()
    ids = labels.clamp_min(0)

    def gradient(compute: Callable[[Tensor, nn.Linear], Tensor]) -> Tensor:
        return torch.autograd.grad(compute(F.embedding(ids, head.weight), head), [head.weight])[0]

    wanted = gradient(lambda x, h: F.cross_entropy(h(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"))
    assert distance(gradient(lambda x, h: next_token_loss(h, x, labels, VOCABULARY, 1.0)), wanted) < 1e-6


@pytest.mark.usefixtures("fused")
def test_two_rows_accumulated_give_the_gradients_of_one_batch() -> None:
    head, hidden, labels = inputs()
    expected = in_float64(head, hidden, labels, 7.0)
    for row in (0, 1):
        next_token_loss(head, hidden[row : row + 1], labels[row : row + 1], VOCABULARY, 7.0).backward()
    assert distance(head.weight.grad, expected["weight"]) < 1e-6
    assert distance(hidden.grad, expected["hidden"]) < 1e-6


@pytest.mark.usefixtures("fused")
def test_a_kept_graph_gives_the_same_gradients_again() -> None:
    head, hidden, labels = inputs()
    value = next_token_loss(head, hidden, labels, VOCABULARY, 7.0)
    first, second = (torch.autograd.grad(value, [hidden, head.weight], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("trained", ["head", "hidden states", "neither", "both, without gradients"])
@pytest.mark.usefixtures("fused")
def test_gradients_that_nobody_wants_are_not_made(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, labels = inputs()
    expected = in_float64(head, hidden, labels, None)
    head.weight.requires_grad_(trained.startswith(("head", "both")))
    hidden.requires_grad_(trained.startswith(("hidden", "both")))
    products = []
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **options: products.append(args[1].shape) or multiply(*args, **options))
    made = []
    add = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *args: made.append(args[0].shape) or add(*args))
    with torch.set_grad_enabled(not trained.endswith("without gradients")):
        value = next_token_loss(head, hidden, labels, VOCABULARY, None)
    assert distance(value.detach(), expected["loss"]) < 1e-6
    assert value.requires_grad == (trained in ("head", "hidden states"))
    assert ((VOCABULARY, HIDDEN) in products) == (trained == "hidden states")
    assert ((VOCABULARY, HIDDEN) in made) == (trained == "head")
    if value.requires_grad:
        value.backward()
        leaf, name = (head.weight, "weight") if trained == "head" else (hidden, "hidden")
        assert distance(leaf.grad, expected[name]) < 1e-6


@pytest.mark.parametrize("form", ["fused", "never_fused"])
def test_no_label_gives_no_loss_and_no_gradient(form: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(form)
    head, hidden, labels = inputs()
    results = found(head, hidden, torch.full_like(labels, -100))
    assert not any(x.any() for x in results.values())


@pytest.mark.parametrize("form", ["fused", "never_fused"])
def test_labels_of_another_shape_than_the_tokens_are_refused(form: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(form)
    head, hidden, labels = inputs()
    for wrong in (labels[:, 1:], labels[:1], labels.flatten()):
        with pytest.raises(ValueError, match=r"labels must be \[2, 11\], one a token, got"):
            next_token_loss(head, hidden, wrong, VOCABULARY, None)


@pytest.mark.parametrize("label", [-1, VOCABULARY, (1 << 32) + 1])
@pytest.mark.usefixtures("fused")
def test_a_label_outside_the_vocabulary_makes_the_loss_nan(label: int) -> None:
    head, hidden, labels = inputs()
    labels[1, 5] = label
    assert next_token_loss(head, hidden, labels, VOCABULARY, None).isnan()


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation gave, bytes that Triton's interpreter copies aside."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) and x.is_floating_point() else 0)
        return out


@pytest.mark.parametrize("form", ["fused", "never_fused"])
def test_never_more_logits_than_a_piece_exist(form: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    request.getfixturevalue(form)
    monkeypatch.setattr(loss, "LOGITS", 5 * VOCABULARY)
    head, hidden, labels = inputs(rows=20)
    with Largest() as largest:
        next_token_loss(head, hidden, labels, VOCABULARY, None).backward()
    assert largest.numel <= max(hidden.numel(), 5 * VOCABULARY, head.weight.numel())


class Adapted(nn.Linear):
    """A layer with a path of its own beside the weight, as adapters and quantised layers have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum(-1, keepdim=True) * torch.arange(VOCABULARY, device=x.device)


def hooked(head: nn.Linear) -> nn.Linear:
    head.register_forward_hook(lambda _, __, logits: 2 * logits)
    return head


def offloaded(head: nn.Linear) -> nn.Linear:
    original = head.forward
    head.forward = lambda x: 2 * original(x)  # type: ignore[method-assign]
    return head


OTHER_HEADS: dict[str, Callable[[], nn.Module]] = {
    "biased": lambda: nn.Linear(HIDDEN, VOCABULARY),
    "adapted": lambda: Adapted(HIDDEN, VOCABULARY, bias=False),
    "hooked": lambda: hooked(nn.Linear(HIDDEN, VOCABULARY, bias=False)),
    "offloaded": lambda: offloaded(nn.Linear(HIDDEN, VOCABULARY, bias=False)),
    "no linear layer": lambda: nn.Sequential(nn.Linear(HIDDEN, VOCABULARY), nn.Tanh()),
    "parametrised": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(HIDDEN, VOCABULARY, bias=False)),
    "float64": lambda: nn.Linear(HIDDEN, VOCABULARY, bias=False).double(),
}


@pytest.mark.parametrize("kind", OTHER_HEADS)
@pytest.mark.usefixtures("fused")
def test_heads_that_do_more_than_a_product_are_called(kind: str) -> None:
    head = OTHER_HEADS[kind]().to(DEVICE)
    _, hidden, labels = inputs()
    states = hidden.detach().to(next(head.parameters()).dtype)
    expected = F.cross_entropy(head(states)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(next_token_loss(head, states, labels, VOCABULARY, None), expected.to(torch.float32))


class Packed(nn.Parameter):
    """A weight whose product is not that of its numbers, as quantised and distributed ones are."""


def set_weight(head: nn.Linear, weight: nn.Parameter) -> None:
    head.weight = weight


SPECIAL: dict[str, Callable[[nn.Linear], object]] = {
    "hook": lambda head: head.register_forward_hook(lambda *_: None),
    "hook in front": lambda head: head.register_forward_pre_hook(lambda *_: None),
    "hook on gradients": lambda head: head.register_full_backward_hook(lambda *_: None),
    "hook in front of gradients": lambda head: head.register_full_backward_pre_hook(lambda *_: None),
    "dtype that the rows do not have": lambda head: head.to(torch.bfloat16),
    "device that the rows are not on": lambda head: head.to("meta"),
    "weight of a kind of its own": lambda head: set_weight(head, Packed(head.weight.detach())),
    "part of a weight": lambda head: set_weight(head, nn.Parameter(head.weight.detach()[:5])),
}


@pytest.mark.parametrize("what", SPECIAL)
def test_the_kernel_is_not_for_heads_with_a(what: str) -> None:
    head, hidden, _ = inputs()
    rows = hidden.flatten(0, 1)
    assert loss._is_plain(head, rows)
    SPECIAL[what](head)
    assert not loss._is_plain(head, rows)


def test_the_kernel_is_taken_on_cuda_devices_where_triton_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from statex.kernels import triton_backend

    head, hidden, _ = inputs()
    taken = loss._kernels(head, hidden.flatten(0, 1))
    assert (taken is not None) == hidden.is_cuda
    monkeypatch.setattr(triton_backend, "MODULES", {})
    assert loss._kernels(head, hidden.flatten(0, 1)) is None
