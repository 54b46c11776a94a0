"""Records, during the one backward of a step, what dense layers took in and got back.

No parameter gradient is computed in that backward: while a layer runs, its parameters are
outside the graph, and a tap on its output keeps the chain to the layers below alive. The rules
then build norms and clipped sums from the record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_dp.clipping.dense_rules import DenseRule, Record, register_torchrec_rules, rule_for
from dist_dp.clipping.user_groups import UserGroups
from dist_dp.errors import ModelError


class _Call:
    """One call of one layer: its inputs, and after the backward its output gradient."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = inputs
        self.versions = [x._version for x in inputs]
        self.delta: Tensor | None = None

    @property
    def overwritten(self) -> bool:
        """Whether an input was changed in place after the layer had read it."""
        return [x._version for x in self.inputs] != self.versions


class _Tap(torch.autograd.Function):
    """Identity whose backward notes the gradient that passes.

    The anchor is a scalar that requires a gradient, so that a layer at the bottom of the model,
    fed by plain data, is recorded too.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        # Not a view: an activation that works in place may follow.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = grad_outputs
        call: _Call = ctx.call
        call.delta = grad if call.delta is None else call.delta + grad
        return grad, None, None


class _Untapped(torch.autograd.Function):
    """Identity that refuses a gradient: no rule accounts for what comes by this way."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, name: str) -> Tensor:
        ctx.name = name
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise ModelError(
            f"layer '{ctx.name}': the loss uses more than the layer's first output (attention "
            "weights?); clipping sees the first one only. Detach the others."
        )


class DenseSums:
    """One number for every trained dense parameter, in one piece of memory.

    Attributes:
        flat: float ``[parameters]``, all of them back to back: one norm, one noise.
        faults: float ``[1]``, how many examples have no finite gradient.
        shared: ``flat`` and ``faults`` in one tensor: one all-reduce.
        by_name: Views of it in the parameters' shapes, by full name.
        is_empty: Nothing was added since :meth:`empty`; ``flat`` then holds no numbers.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        sizes = [p.numel() for p in parameters.values()]
        device = next(iter(parameters.values())).device if parameters else None
        self.shared = torch.zeros(sum(sizes) + 1, device=device)
        self.flat, self.faults = self.shared[:-1], self.shared[-1:]
        self.is_empty = True
        parts = self.flat.split(sizes) if sizes else ()
        self.by_name = {
            n: part.view(p.shape) for (n, p), part in zip(parameters.items(), parts, strict=True)
        }

    def empty(self) -> None:
        """Starts afresh: what is added next is written over what is there."""
        self.is_empty = True
        self.faults.zero_()


class DenseRecorder:
    """Watches every dense layer of a model that has trainable parameters.

    Args:
        model: The model; embedding collections must already be replaced by their cut.
        skip: Modules that look after their own parameters (the embedding cuts).

    Raises:
        ModelError: A trainable parameter belongs to a layer without a clipping rule, to two
            layers, or is not float32, or the layer mixes examples (batch normalisation).

    Guarantee:
        Every trainable parameter outside the embedding tables is covered by exactly one rule;
        a gradient that reaches a parameter by another way (a penalty on the weights in the
        loss) is an error at the step, never dropped or applied without clipping.
    """

    def __init__(self, model: nn.Module, skip: tuple[nn.Module, ...] = ()) -> None:
        register_torchrec_rules()
        self._model = model
        self.layers: dict[str, tuple[nn.Module, DenseRule]] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self._calls: dict[str, list[_Call]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        _refuse_batch_norm(model, skip)
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
            for inner, parameter in module.named_parameters():
                if parameter.requires_grad:
                    full = f"{name}.{inner}" if name else inner
                    if parameter.dtype != torch.float32:
                        raise ModelError(
                            f"parameter '{full}' is {parameter.dtype}; private training takes "
                            "float32 only: call model.float(), or freeze it"
                        )
                    self.parameters[full] = parameter
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

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._paused or not self._model.training:
                return
            _check_arguments(name, layer, args, kwargs)
            for parameter in trained:
                parameter.requires_grad_(False)

        def after(
            _module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any
        ) -> Any:
            if self._paused or not self._model.training:
                return output
            for parameter in trained:
                parameter.requires_grad_(True)
            if not torch.is_grad_enabled() or output is None:
                return output
            call = _Call(tuple(x.detach() for x in args if isinstance(x, Tensor)))
            self._calls.setdefault(name, []).append(call)
            # Functions of autograd carry no annotations.
            tap: Any = _Tap.apply
            refuse: Any = _Untapped.apply
            if not isinstance(output, tuple):
                return tap(output, self._anchor, call)
            first, *others = output
            return (
                tap(first, self._anchor, call),
                *(refuse(o, self._anchor, name) if isinstance(o, Tensor) else o for o in others),
            )

        self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(layer.register_forward_hook(after, with_kwargs=True, always_call=True))

    def clear(self) -> None:
        """Forgets what was recorded; called when a step is over."""
        self._calls.clear()

    @property
    def has_calls(self) -> bool:
        """Whether a forward was recorded since the last step."""
        return bool(self._calls)

    @property
    def has_gradients(self) -> bool:
        """Whether a backward reached a recorded forward."""
        return any(c.delta is not None for calls in self._calls.values() for c in calls)

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
            if call.overwritten:
                raise ModelError(
                    f"layer '{name}': its input was changed in place after the layer had read it, "
                    "so its gradient cannot be computed. Replace the in-place operation."
                )
            for value in (call.delta, *call.inputs):
                if value.is_floating_point() and value.dtype != torch.float32:
                    raise ModelError(
                        f"layer '{name}' ran in {value.dtype}; clipping and noise need float32: "
                        "train without autocast, and give the model float32 features"
                    )
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

    def squared_norms_of_users(self, users: UserGroups) -> Tensor:
        """Σ over dense layers of the squared norms of users' gradients, float ``[units]``."""
        total = torch.zeros(users.num_units, device=self._anchor.device)
        with self._pause():
            for name, (layer, rule) in self.layers.items():
                records = self._records(name, users.batch)
                for bucket in users.buckets if records else ():
                    gathered = [bucket.gather(record) for record in records]
                    squared = rule.squared_norms_of_groups(layer, gathered).detach()
                    total.index_add_(0, bucket.units, squared.to(total.dtype))
        return total

    def check_rules_take_users(self) -> None:
        """Refuses layers whose rule knows the gradients of single examples only.

        Raises:
            ModelError: There is one.
        """
        for name, (layer, rule) in self.layers.items():
            if not rule.takes_groups:
                raise ModelError(
                    f"layer '{name}' ({type(layer).__name__}): its clipping rule "
                    f"{type(rule).__name__} has no squared_norms_of_groups, without which the "
                    "gradient of a user with several records has no norm. Write it, derive the "
                    "rule from VmapRule, or freeze the layer"
                )

    def clipped_sums(self, coefficients: Tensor) -> dict[str, Tensor]:
        """Sums over examples of the scaled gradients, by full parameter name.

        A parameter whose layer had no part in the loss gets zeros: it is noised all the same.
        """
        sums = DenseSums(self.parameters)
        self.add_clipped_sums(coefficients, sums)
        return sums.by_name

    def add_clipped_sums(self, coefficients: Tensor, sums: DenseSums) -> None:
        """Adds the sums over examples of the scaled gradients to ``sums``, in place.

        Args:
            coefficients: float ``[batch]``, the clip factor of each example.
            sums: Of all trained dense parameters.
        """
        with self._pause():
            for name, (layer, rule) in reversed(self.layers.items()):
                prefix = f"{name}." if name else ""
                own = {
                    child: sums.by_name[prefix + child]
                    for child, parameter in layer.named_parameters()
                    if parameter.requires_grad
                }
                records = self._records(name, coefficients.shape[0])
                if records:
                    rule.add_clipped_sums(layer, records, coefficients, own, anew=sums.is_empty)
                elif sums.is_empty:
                    for value in own.values():
                        value.zero_()
        sums.is_empty = False

    @contextmanager
    def _pause(self) -> Iterator[None]:
        self._paused = True
        try:
            yield
        finally:
            self._paused = False


def _refuse_batch_norm(model: nn.Module, skip: tuple[nn.Module, ...]) -> None:
    """Batch normalisation mixes examples whether its parameters are trained or not."""
    inside = {id(m) for s in skip for m in s.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) not in inside:
            raise ModelError(
                f"layer '{name or type(module).__name__}' ({type(module).__name__}) mixes the "
                "examples of a batch, so no clipping rule can exist: use LayerNorm or GroupNorm."
            )


_ATTENTION_ARGUMENTS = (
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "average_attn_weights",
    "is_causal",
)


def _check_arguments(
    name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuses what the rules would not see when they run a layer again: all but plain tensors."""
    if any(isinstance(v, Tensor) for v in kwargs.values()):
        raise ModelError(
            f"layer '{name}' was called with keyword tensors {sorted(kwargs)}; "
            "pass them by position, so that clipping sees them"
        )
    options = {k: v for k, v in kwargs.items() if v is not None and v is not False}
    if isinstance(layer, nn.MultiheadAttention):
        given = zip(_ATTENTION_ARGUMENTS, args[3:], strict=False)
        options |= {k: v for k, v in given if v is not None and v is not False}
        # The form of the weights does not touch the first output; a padding mask by position is
        # per example, like the others.
        for harmless in ("need_weights", "average_attn_weights"):
            options.pop(harmless, None)
        mask = options.pop("key_padding_mask", None)
        args = (*args[:3], mask) if mask is not None else args[:3]
        if layer.dropout > 0.0 and layer.training:
            raise ModelError(
                f"layer '{name}': MultiheadAttention with dropout draws anew when clipping runs "
                "it again; set its dropout to 0 and put nn.Dropout after it"
            )
    if options or not all(isinstance(a, Tensor) for a in args):
        raise ModelError(
            f"layer '{name}' was called with arguments that clipping does not see "
            f"({', '.join(options) or 'not tensors'}); call it with tensors only"
        )


def _remedy(module: nn.Module) -> str:
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
