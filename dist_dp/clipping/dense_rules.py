"""Per-example gradient norms and clipped sums of dense layers, one rule a layer kind.

A rule sees what one layer took in (``a``) and the gradient of the loss with respect to what it
gave out (``delta``), both recorded during the only backward of a step (Book-Keeping: Bu et al.,
"Differentially Private Optimization on Large Model at Small Cost", ICML 2023). The first
dimension of both is the example.

Add a rule for a layer of your own with :func:`register_rule`. Every rule is tested against
autograd run on one example at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Record = tuple[tuple[Tensor, ...], Tensor]
"""The positional inputs of one call of a layer and the gradient of its output."""


class DenseRule(ABC):
    """How one kind of layer is clipped.

    Guarantee:
        ``squared_norms`` must return, for every example, the exact squared l2 norm of the
        gradient of *all* trainable parameters below the layer, and ``clipped_sums`` the sum over
        examples of ``coefficients[b]`` times that gradient. The sensitivity of the released sum
        rests on both; a rule that leaves a parameter out breaks the guarantee.
    """

    @abstractmethod
    def squared_norms(self, layer: nn.Module, records: Sequence[Record]) -> Tensor:
        """Squared norms per example.

        Args:
            layer: The layer.
            records: One entry for each time the layer was called in this step.

        Returns:
            float tensor of shape ``[batch]``.
        """

    def squared_norms_of_groups(self, layer: nn.Module, records: Sequence[Record]) -> Tensor:
        """Squared norms of the gradients that the examples of a group have together.

        Needed where the unit of privacy is a user; a rule without it is refused then.

        Args:
            layer: The layer.
            records: As for :meth:`squared_norms`, each tensor ``[groups, size, ...]``. The output
                gradient is 0 where a group has fewer than ``size`` examples, and the input there
                is some other one.

        Returns:
            float ``[groups]``: squared norms of *sums* over the examples of a group.

        Guarantee:
            Exact: no bound, and not the sum of the examples' norms.
        """
        raise NotImplementedError(f"{type(self).__name__} has no norms of groups of examples")

    @property
    def takes_groups(self) -> bool:
        """Whether :meth:`squared_norms_of_groups` is there."""
        return type(self).squared_norms_of_groups is not DenseRule.squared_norms_of_groups

    @abstractmethod
    def clipped_sums(
        self, layer: nn.Module, records: Sequence[Record], coefficients: Tensor
    ) -> dict[str, Tensor]:
        """Sums of the scaled per-example gradients.

        Args:
            layer: The layer.
            records: One entry for each time the layer was called in this step.
            coefficients: float tensor ``[batch]``, the clip factor of each example.

        Returns:
            The sum by parameter name, relative to ``layer``, in the parameter's shape.
        """

    def add_clipped_sums(
        self,
        layer: nn.Module,
        records: Sequence[Record],
        coefficients: Tensor,
        sums: dict[str, Tensor],
        *,
        anew: bool,
    ) -> None:
        """Adds :meth:`clipped_sums` to ``sums``, in place; override it to save the copy.

        Args:
            layer: The layer.
            records: One entry for each time the layer was called in this step.
            coefficients: float tensor ``[batch]``.
            sums: By parameter name, every trained parameter's, in its shape.
            anew: Write instead of adding: what the sums hold is no number yet.
        """
        for name, value in self.clipped_sums(layer, records, coefficients).items():
            if anew:
                sums[name].copy_(value.detach())
            else:
                sums[name].add_(value.detach())


_RULES: dict[type[nn.Module], DenseRule] = {}


def register_rule(*kinds: type[nn.Module]) -> Callable[[type[DenseRule]], type[DenseRule]]:
    """Class decorator: serve layers of exactly these types with this rule."""

    def decorate(rule: type[DenseRule]) -> type[DenseRule]:
        for kind in kinds:
            _RULES[kind] = rule()
        return rule

    return decorate


def rule_for(layer: nn.Module) -> DenseRule | None:
    """The rule of a layer's exact type, or None.

    Subclasses do not inherit a rule: they may compute something else.
    """
    return _RULES.get(type(layer))


def _squared(values: Tensor) -> Tensor:
    """Squared norm of each example's values, float ``[batch]``, in one pass over them."""
    norms: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1)
    return norms.square_()


def _scaled(values: Tensor, coefficients: Tensor) -> Tensor:
    return values * coefficients.view(-1, *([1] * (values.dim() - 1)))


@register_rule(nn.Linear)
class LinearRule(DenseRule):
    """``y = x Wᵀ + b`` on ``[batch, in]`` or ``[batch, ..., in]``.

    With one position per example the gradient is an outer product, so its norm is the product
    of two norms. With T positions: the Gram form Σ_ts (a_t·a_s)(δ_t·δ_s) or, when that is
    dearer, the per-example product itself, in slices (Li et al., "Large Language Models Can Be
    Strong Differentially Private Learners", ICLR 2022, section 4).
    """

    SLICE_ELEMENTS = 1 << 22

    def _positions(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        if len(records) == 1 and records[0][1].dim() == 2:
            (inputs, delta) = records[0]
            return inputs[0].unsqueeze(1), delta.unsqueeze(1)
        batch = records[0][1].shape[0]
        a = torch.cat([r[0][0].reshape(batch, -1, r[0][0].shape[-1]) for r in records], dim=1)
        d = torch.cat([r[1].reshape(batch, -1, r[1].shape[-1]) for r in records], dim=1)
        return a, d

    def squared_norms(self, layer: nn.Module, records: Sequence[Record]) -> Tensor:
        """See the class."""
        return self._squared_norms(layer, records, None)

    def squared_norms_of_groups(self, layer: nn.Module, records: Sequence[Record]) -> Tensor:
        """See the class: a group's examples are further positions.

        The Gram form is taken in float64. Its terms are squares of the examples' gradients, which
        may be far larger than that of their sum when they nearly cancel.
        """
        return self._squared_norms(layer, records, torch.float64)

    def _squared_norms(
        self, layer: nn.Module, records: Sequence[Record], gram: torch.dtype | None
    ) -> Tensor:
        a, d = self._positions(records)
        positions = a.shape[1]
        if positions == 1:
            d2 = _squared(d)
            weight = _squared(a) * d2 if layer.weight.requires_grad else 0.0 * d2
            return weight + d2 if _trained(layer, "bias") else weight
        squared = torch.zeros(a.shape[0], dtype=d.dtype, device=d.device)
        if layer.weight.requires_grad:
            if positions * positions <= a.shape[2] * d.shape[2]:
                aa, dd = (x @ x.transpose(1, 2) for x in (a.to(gram), d.to(gram)))
                squared += (aa * dd).sum((1, 2))
            else:
                size = max(1, self.SLICE_ELEMENTS // (a.shape[2] * d.shape[2]))
                parts = zip(d.split(size), a.split(size), strict=True)
                squared += torch.cat(
                    [(ds.transpose(1, 2) @ as_).square().sum((1, 2)) for ds, as_ in parts]
                )
        if _trained(layer, "bias"):
            squared += d.sum(1).square().sum(1)
        # The Gram form may round to a tiny negative number.
        return squared.clamp_min(0.0)

    def clipped_sums(
        self, layer: nn.Module, records: Sequence[Record], coefficients: Tensor
    ) -> dict[str, Tensor]:
        """See the class."""
        sums = {n: torch.empty_like(p) for n, p in layer.named_parameters() if p.requires_grad}
        self.add_clipped_sums(layer, records, coefficients, sums, anew=True)
        return sums

    @torch.no_grad()
    def add_clipped_sums(
        self,
        layer: nn.Module,
        records: Sequence[Record],
        coefficients: Tensor,
        sums: dict[str, Tensor],
        *,
        anew: bool,
    ) -> None:
        """See the class: one matrix product δᵀ diag(c) a, scaling the narrower of the two."""
        a, d = (x.flatten(0, 1) for x in self._positions(records))
        each = coefficients
        if d.shape[0] != coefficients.shape[0]:
            each = coefficients.repeat_interleave(d.shape[0] // coefficients.shape[0])
        keep = 0.0 if anew else 1.0  # with 0 the old content is not read
        if "bias" in sums:
            sums["bias"].addmv_(d.t(), each, beta=keep)
        if "weight" in sums:
            if a.shape[1] < d.shape[1]:
                a = a * each.unsqueeze(1)
            else:
                d = d * each.unsqueeze(1)
            sums["weight"].addmm_(d.t(), a, beta=keep)


@register_rule(nn.LayerNorm)
class LayerNormRule(DenseRule):
    """``y = x̂ γ + β`` with x̂ the normalised input; x̂ is recomputed, not stored."""

    def _per_example(self, layer: nn.LayerNorm, records: Sequence[Record]) -> dict[str, Tensor]:
        grads: dict[str, Tensor] = {}
        size = layer.weight.numel()
        for (x,), delta in records:
            d = delta.reshape(delta.shape[0], -1, size)
            parts = {}
            if layer.weight.requires_grad:
                hat = functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
                parts["weight"] = (d * hat.reshape(d.shape)).sum(1)
            if _trained(layer, "bias"):
                parts["bias"] = d.sum(1)
            for name, value in parts.items():
                grads[name] = grads[name] + value if name in grads else value
        return grads

    def squared_norms(self, layer: nn.Module, records: Sequence[Record]) -> Tensor:
        """See the class."""
        assert isinstance(layer, nn.LayerNorm)
        zero = torch.zeros(records[0][1].shape[0], device=records[0][1].device)
        grads = self._per_example(layer, records)
        return sum((g.square().sum(1) for g in grads.values()), start=zero)

    def squared_norms_of_groups(self, layer: nn.Module, records: Sequence[Record]) -> Tensor:
        """See the class: a group's examples are further positions."""
        return self.squared_norms(layer, records)

    def clipped_sums(
        self, layer: nn.Module, records: Sequence[Record], coefficients: Tensor
    ) -> dict[str, Tensor]:
        """See the class."""
        assert isinstance(layer, nn.LayerNorm)
        grads = self._per_example(layer, records)
        return {n: (coefficients @ g).reshape(layer.weight.shape) for n, g in grads.items()}


@register_rule(
    nn.Conv1d, nn.Conv2d, nn.PReLU, nn.GroupNorm, nn.RMSNorm, nn.Bilinear, nn.MultiheadAttention
)
class VmapRule(DenseRule):
    """Any layer that works on one example at a time, by vectorised autograd.

    Norms come from a vector-Jacobian product per example, computed a slice of the batch at a
    time; the clipped sum is one ordinary product with the scaled output gradient. It costs two
    more passes through this layer (only this one), and O(slice x parameters) of memory.
    Attention counts as one layer and must be ``batch_first`` and used without its weights.
    """

    SLICE_ELEMENTS = 1 << 22

    def _call(
        self, layer: nn.Module, inputs: tuple[Tensor, ...]
    ) -> Callable[[dict[str, Tensor]], Tensor]:
        fixed = {n: p for n, p in layer.named_parameters() if not p.requires_grad}

        def call(trained: dict[str, Tensor]) -> Tensor:
            output = torch.func.functional_call(layer, {**fixed, **trained}, inputs)
            first: Tensor = output[0] if isinstance(output, tuple) else output
            return first

        return call

    def squared_norms(self, layer: nn.Module, records: Sequence[Record]) -> Tensor:
        """See the class."""
        alone = [(tuple(x.unsqueeze(1) for x in i), d.unsqueeze(1)) for i, d in records]
        return self.squared_norms_of_groups(layer, alone)

    def squared_norms_of_groups(self, layer: nn.Module, records: Sequence[Record]) -> Tensor:
        """See the class: the layer runs on a group's examples as on a batch."""
        trained = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}
        inputs = [r[0] for r in records]
        deltas = [r[1] for r in records]

        def one(inputs_g: list[tuple[Tensor, ...]], deltas_g: list[Tensor]) -> Tensor:
            def outputs(parameters: dict[str, Tensor]) -> list[Tensor]:
                return [self._call(layer, i)(parameters) for i in inputs_g]

            vjp: Any = torch.func.vjp(outputs, trained)[1]
            (grads,) = vjp(deltas_g)
            return torch.stack([g.square().sum() for g in grads.values()]).sum()

        per_example = sum(p.numel() for p in trained.values())
        size = max(1, self.SLICE_ELEMENTS // max(1, per_example))
        result: Tensor = torch.func.vmap(one, chunk_size=size)(inputs, deltas)
        return result

    def clipped_sums(
        self, layer: nn.Module, records: Sequence[Record], coefficients: Tensor
    ) -> dict[str, Tensor]:
        """See the class."""
        trained = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}

        def outputs(parameters: dict[str, Tensor]) -> list[Tensor]:
            return [self._call(layer, inputs)(parameters) for inputs, _ in records]

        vjp: Any = torch.func.vjp(outputs, trained)[1]
        (grads,) = vjp([_scaled(delta, coefficients) for _, delta in records])
        result: dict[str, Tensor] = grads
        return result


def register_torchrec_rules() -> None:
    """Serve TorchRec's cross networks (DLRM-DCN); called when a TorchRec model is prepared."""
    from torchrec.modules import crossnet

    from dist_dp.clipping.cross_rules import LowRankCrossRule

    _RULES.setdefault(crossnet.LowRankCrossNet, LowRankCrossRule())
    for name in ("CrossNet", "VectorCrossNet", "LowRankMixtureCrossNet"):
        _RULES.setdefault(getattr(crossnet, name), VmapRule())


def _trained(layer: nn.Module, name: str) -> bool:
    parameter = getattr(layer, name, None)
    return parameter is not None and parameter.requires_grad
