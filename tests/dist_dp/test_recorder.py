"""What the recorder refuses, and rules of single layers against one example at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dist_dp.clipping import dense_rules
from dist_dp.clipping.recorder import DenseRecorder
from dist_dp.errors import ModelError

BATCH = 5


class Call(nn.Module):
    """A layer and how it is called."""

    def __init__(self, layer: nn.Module, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.layer, x)


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def attend(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, 2 * x, need_weights=False)[0]


def attend_masked(layer: nn.Module, x: Tensor) -> Tensor:
    padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    padding[:, -1] = True
    return layer(x, x, x, padding)[0]


RULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[..., Tensor]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,), plain),
    "linear, few positions": (lambda: nn.Linear(16, 8), (3, 16), plain),
    "linear, many positions": (lambda: nn.Linear(2, 3), (4, 5, 2), plain),
    "layer norm": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4), plain),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 6), plain),
    "rms norm": (lambda: nn.RMSNorm(4), (3, 4), plain),
    "prelu": (lambda: nn.PReLU(4), (4, 3), plain),
    "conv1d": (lambda: nn.Conv1d(2, 3, 2, stride=2, bias=False), (2, 7), plain),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, groups=2), (2, 5, 4), plain),
    "bilinear": (lambda: nn.Bilinear(4, 4, 3), (4,), lambda m, x: m(x, torch.tanh(x))),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), (3, 4), attend),
    "attention, masked": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        (3, 4),
        attend_masked,
    ),
    "three calls": (lambda: nn.Linear(4, 4), (4,), lambda m, x: m(m(torch.tanh(m(x))))),
}


@pytest.mark.parametrize("case", RULES)
@pytest.mark.parametrize("slices", [False, True])
def test_rules(case: str, slices: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape, how = RULES[case]
    torch.manual_seed(1)
    model = Call(make(), how)
    exact = copy.deepcopy(model).double()
    if slices:
        for rule in (dense_rules.LinearRule, dense_rules.VmapRule):
            monkeypatch.setattr(rule, "SLICE_ELEMENTS", 1)
    x = torch.randn(BATCH, *shape)
    coefficients = torch.tensor([1.0, 0.0, 0.3, 2.0, 0.1])
    norms, sums = [], {n: torch.zeros_like(p) for n, p in exact.named_parameters()}
    for b in range(BATCH):
        exact.zero_grad()
        exact(x[b : b + 1].double()).sin().sum().backward()
        norms.append(sum(p.grad.square().sum() for p in exact.parameters()))
        for name, p in exact.named_parameters():
            sums[name] += coefficients[b] * p.grad
    recorder = DenseRecorder(model)
    model(x).sin().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    # 1e-5 is what float32 leaves of these small sums.
    torch.testing.assert_close(recorder.squared_norms(BATCH).double(), torch.stack(norms),
                               rtol=1e-5, atol=1e-5)  # fmt: skip
    found = {n: v.double() for n, v in recorder.clipped_sums(coefficients).items()}
    torch.testing.assert_close(found, sums, rtol=1e-5, atol=1e-5)


def test_the_chain_below_goes_on() -> None:
    """The input's gradient is what it is without the recorder."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 1))
    x = torch.randn(BATCH, 4, requires_grad=True)
    model(x).sum().backward()
    wanted, x.grad = x.grad, None
    DenseRecorder(model)
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, wanted)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))


class Subclass(nn.Linear):
    pass


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


REFUSED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        ["'1'", "BatchNorm1d", "mixes", "LayerNorm"],
    ),
    "batch norm without parameters": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)),
        ["'1'", "BatchNorm1d", "mixes"],
    ),
    "frozen batch norm": (
        lambda: nn.Sequential(nn.Linear(4, 4), frozen(nn.BatchNorm1d(4))),
        ["BatchNorm1d", "mixes"],
    ),
    "unknown layer": (
        lambda: nn.ModuleDict({"gate": Own()}),
        ["'gate'", "Own", "gain", "register_rule"],
    ),
    "subclass of a known layer": (lambda: nn.Sequential(Subclass(4, 4)), ["'0'", "Subclass"]),
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 4)), ["'0'", "EmbeddingCollection"]),
    "recurrent": (lambda: nn.Sequential(nn.GRU(4, 4)), ["'0'", "GRU"]),
    "tied weights": (tied, ["'1.weight'", "'0.weight'", "tied"]),
    "half precision": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).to(torch.bfloat16)),
        ["'1.weight'", "bfloat16", "float32", "model.float()"],
    ),
    "double precision": (lambda: nn.Linear(4, 4).double(), ["'weight'", "float64"]),
    "attention by sequence": (
        lambda: nn.Sequential(nn.MultiheadAttention(4, 2)),
        ["'0'", "batch_first"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_the_start(case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises(ModelError) as error:
        DenseRecorder(make())
    assert all(word in str(error.value) for word in words), error.value


def test_frozen_layers_need_no_rule() -> None:
    model = nn.Sequential(nn.Linear(4, 4), frozen(Own()), frozen(nn.GRU(4, 4)))
    assert set(DenseRecorder(model).parameters) == {"0.weight", "0.bias"}


def test_a_rule_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_rules, "_RULES", dict(dense_rules._RULES))
    dense_rules.register_rule(Subclass)(dense_rules.VmapRule)
    assert set(DenseRecorder(nn.Sequential(Subclass(4, 4))).parameters) == {"0.weight", "0.bias"}


def test_frozen_layers_may_have_any_precision() -> None:
    model = nn.Sequential(nn.Linear(4, 4), frozen(nn.Linear(4, 4).half()))
    assert set(DenseRecorder(model).parameters) == {"0.weight", "0.bias"}


def run(model: nn.Module, x: Tensor, batch: int = BATCH) -> None:
    recorder = DenseRecorder(model)
    model(x).square().sum().backward()
    recorder.check_no_stray_gradients()
    recorder.squared_norms(batch)


def attention(**options: float) -> nn.Module:
    return nn.MultiheadAttention(4, 2, batch_first=True, **options)


def half(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x).float()


def overwrite(layer: nn.Module, x: Tensor) -> Tensor:
    h = x * 1.0
    y = layer(h)
    h.add_(1.0)
    return y


USED_WRONGLY: dict[str, tuple[nn.Module, tuple[int, ...], list[str]]] = {
    "keyword tensor": (
        Call(nn.Linear(4, 3), lambda m, x: m(input=x)),
        (BATCH, 4),
        ["'layer'", "keyword", "input"],
    ),
    "first dimension": (
        Call(nn.Linear(4, 3), lambda m, x: m(x.transpose(0, 1))),
        (BATCH, 2, 4),
        ["'layer'", "first dimension", f"batch of {BATCH}"],
    ),
    "input changed in place": (Call(nn.Linear(4, 3), overwrite), (BATCH, 4), ["in place"]),
    "attention weights in the loss": (
        Call(attention(), lambda m, x: m(x, x, x)[1]),
        (BATCH, 3, 4),
        ["'layer'", "first output"],
    ),
    "attention mask": (
        Call(attention(), lambda m, x: m(x, x, x, None, False, torch.zeros(3, 3))[0]),
        (BATCH, 3, 4),
        ["'layer'", "attn_mask"],
    ),
    "attention dropout": (Call(attention(dropout=0.5), attend), (BATCH, 3, 4), ["dropout"]),
    "autocast": (Call(nn.Linear(4, 3), half), (BATCH, 4), ["'layer'", "bfloat16", "autocast"]),
    "argument that is no tensor": (
        Call(nn.Conv1d(2, 2, 1), lambda m, x: m(x, 3)),
        (BATCH, 2, 4),
        ["'layer'", "not tensors"],
    ),
}


@pytest.mark.parametrize("case", USED_WRONGLY)
def test_wrong_use(case: str) -> None:
    model, shape, words = USED_WRONGLY[case]
    with pytest.raises(ModelError) as error:
        run(model, torch.randn(*shape))
    assert all(word in str(error.value) for word in words), error.value


def test_gradients_past_the_layer() -> None:
    """A penalty on the weights, and a weight used outside its layer."""
    for extra in (
        lambda m, x: m.weight.square().sum(),
        lambda m, x: nn.functional.linear(x, m.weight).sum(),
    ):
        model = Call(nn.Linear(4, 3), lambda m, x, extra=extra: m(x).sum() + extra(m, x))
        with pytest.raises(ModelError, match=r"layer\.weight.*penalty.*weight_decay"):
            run(model, torch.randn(BATCH, 4))


def test_a_layer_without_part_in_the_loss() -> None:
    """Its parameters are there all the same, with a sum of zero, so that they get noise."""
    model = nn.ModuleDict({"used": nn.Linear(4, 1), "unused": nn.Linear(4, 1)})
    recorder = DenseRecorder(model)
    x = torch.randn(BATCH, 4)
    model["unused"](x)
    model["used"](x).sum().backward()
    wanted = x.square().sum(1) + 1.0
    torch.testing.assert_close(recorder.squared_norms(BATCH), wanted)
    sums = recorder.clipped_sums(torch.ones(BATCH))
    assert sums.keys() == dict(model.named_parameters()).keys()
    assert not sums["unused.weight"].any() and bool(sums["used.weight"].any())


def test_evaluation_is_not_recorded() -> None:
    model = nn.Linear(4, 1)
    recorder = DenseRecorder(model)
    model.eval()
    model(torch.randn(BATCH, 4))
    model.train()
    with torch.no_grad():
        model(torch.randn(BATCH, 4))
    assert not recorder.has_calls
    with pytest.raises(RuntimeError):
        model(torch.randn(BATCH, 3))  # a forward that fails leaves the parameters trainable
    assert all(p.requires_grad for p in model.parameters())
