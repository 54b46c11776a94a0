"""Records, during the one backward of a step, what dense layers took in and got back.

No parameter gradient is computed in that backward: while a layer runs, its parameters are
outside the graph, and a tap on its output keeps the chain to the layers below alive. The rules
then build norms and clipped sums from the record.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_dp.clipping.dense_rules import DenseRule, Record, register_torchrec_rules, rule_for
from dist_dp.errors import ModelError


class _Call:
    """One call of one layer: its inputs, and after the backward its output gradient."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = inputs
        self.delta: Tensor | None = None


class _Tap(torch.autograd.Function):
    """Identity whose backward notes the gradient that passes.

    The anchor is a scalar that requires a gradient, so that a layer at the bottom of the model,
    fed by plain data, is recorded too.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = grad_outputs
        call: _Call = ctx.call
        call.delta = grad if call.delta is None else call.delta + grad
        return grad, None, None


class DenseRecorder:
    """Watches every dense layer of a model that has trainable parameters.

    Args:
        model: The model; embedding collections must already be replaced by their cut.
        skip: Modules that look after their own parameters (the embedding cuts).

    Raises:
        ModelError: A trainable parameter belongs to a layer without a clipping rule, to two
            layers, or the layer mixes examples (batch normalisation).

    Guarantee:
        Every trainable parameter outside the embedding tables is covered by exactly one rule;
        a gradient that reaches a parameter by another way (a penalty on the weights in the
        loss) is an error at the step, never dropped or applied without clipping.
    """

    def __init__(self, model: nn.Module, skip: tuple[nn.Module, ...] = ()) -> None:
        register_torchrec_rules()
        self.layers: dict[str, tuple[nn.Module, DenseRule]] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self._calls: dict[str, list[_Call]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._collect(model, "", skip)
        self._refuse_shared()
        device = next(iter(self.parameters.values())).device if self.parameters else None
        self._anchor = torch.zeros((), requires_grad=True, device=device)
        # Rules may run a layer again (VmapRule); those calls are not part of the step.
        self._paused = False
        for name, (layer, _) in self.layers.items():
            self._watch(name, layer)

    def _collect(self, module: nn.Module, name: str, skip: tuple[nn.Module, ...]) -> None:
        if any(module is s for s in skip):
            return
        if not any(p.requires_grad for p in module.parameters()):
            return
        rule = rule_for(module)
        if rule is not None:
            if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
                raise ModelError(
                    f"layer '{name}': MultiheadAttention must be built with batch_first=True, "
                    "so that the first dimension is the example"
                )
            self.layers[name] = (module, rule)
            for child, parameter in module.named_parameters():
                if parameter.requires_grad:
                    self.parameters[f"{name}.{child}" if name else child] = parameter
            return
        own = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
        if own:
            raise ModelError(
                f"layer '{name or type(module).__name__}' ({type(module).__name__}) has trainable "
                f"parameters {own} but no clipping rule. {_remedy(module)}"
            )
        for child_name, child in module.named_children():
            self._collect(child, f"{name}.{child_name}" if name else child_name, skip)

    def _refuse_shared(self) -> None:
        seen: dict[int, str] = {}
        for name, parameter in self.parameters.items():
            if id(parameter) in seen:
                raise ModelError(
                    f"parameter '{name}' is the same tensor as '{seen[id(parameter)]}': tied "
                    "weights of two layers have no clipping rule. Use one layer called twice."
                )
            seen[id(parameter)] = name

    def _watch(self, name: str, layer: nn.Module) -> None:
        trained = [p for p in layer.parameters() if p.requires_grad]

        def before(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._paused:
                return
            if kwargs and any(isinstance(v, Tensor) for v in kwargs.values()):
                raise ModelError(
                    f"layer '{name}' was called with keyword tensors {sorted(kwargs)}; "
                    "pass them by position, so that clipping sees them"
                )
            for parameter in trained:
                parameter.requires_grad_(False)

        def after(
            _module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any
        ) -> Any:
            if self._paused:
                return output
            for parameter in trained:
                parameter.requires_grad_(True)
            if not torch.is_grad_enabled() or output is None:
                return output
            call = _Call(tuple(x.detach() for x in args if isinstance(x, Tensor)))
            self._calls.setdefault(name, []).append(call)
            if isinstance(output, tuple):
                return (_Tap.apply(output[0], self._anchor, call), *output[1:])
            return _Tap.apply(output, self._anchor, call)

        self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(layer.register_forward_hook(after, with_kwargs=True, always_call=True))

    def clear(self) -> None:
        """Forgets what was recorded; called when a step is over."""
        self._calls.clear()

    @property
    def has_calls(self) -> bool:
        """Whether a forward was recorded since the last step."""
        return bool(self._calls)

    def detach(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _records(self, name: str, batch: int) -> list[Record]:
        records: list[Record] = []
        for call in self._calls.get(name, []):
            if call.delta is None:
                continue
            for value in (call.delta, *call.inputs[:1]):
                if value.dim() < 2 or value.shape[0] != batch:
                    raise ModelError(
                        f"layer '{name}' saw a tensor of shape {tuple(value.shape)} in a batch of "
                        f"{batch} examples; the first dimension must be the example. Reshape "
                        "inside the model so that it is."
                    )
            records.append((call.inputs, call.delta))
        return records

    def check_no_stray_gradients(self) -> None:
        """Refuses gradients that came by a way clipping does not see.

        Raises:
            ModelError: A dense parameter has a gradient of its own.
        """
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                raise ModelError(
                    f"parameter '{name}' got a gradient outside its layer's forward (a penalty on "
                    "the weights in the loss?). It would not be clipped: use weight_decay of the "
                    "optimizer instead, and zero_grad() before the step."
                )

    def squared_norms(self, batch: int) -> Tensor:
        """Σ over dense layers of the squared per-example gradient norms, float ``[batch]``."""
        total = torch.zeros(batch, device=self._anchor.device)
        with self._pause():
            for name, (layer, rule) in self.layers.items():
                records = self._records(name, batch)
                if records:
                    total += rule.squared_norms(layer, records).detach()
        return total

    def clipped_sums(self, coefficients: Tensor) -> dict[str, Tensor]:
        """Sums over examples of the scaled gradients, by full parameter name.

        A parameter whose layer had no part in the loss gets zeros: it is noised all the same.
        """
        sums = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        with self._pause():
            for name, (layer, rule) in self.layers.items():
                records = self._records(name, coefficients.shape[0])
                if not records:
                    continue
                for child, value in rule.clipped_sums(layer, records, coefficients).items():
                    sums[f"{name}.{child}" if name else child] = value.detach()
        return sums

    @contextmanager
    def _pause(self) -> Iterator[None]:
        self._paused = True
        try:
            yield
        finally:
            self._paused = False


def _remedy(module: nn.Module) -> str:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "It mixes the examples of a batch, so no rule can exist: use LayerNorm or GroupNorm."
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return (
            "Use torchrec's EmbeddingCollection or EmbeddingBagCollection for it: tables are "
            "sharded and clipped there."
        )
    return (
        "Freeze it (requires_grad_(False)), or write a DenseRule and register it with "
        "dist_dp.clipping.dense_rules.register_rule (VmapRule serves any layer that works on one "
        "example at a time)."
    )
