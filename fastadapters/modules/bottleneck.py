"""The bottleneck adapter of AdaptFormer and MultiWay-Adapter, Houlsby and Pfeiffer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends, functional
from ..checks import (
    check_choice,
    check_factory,
    check_flag,
    check_number,
    check_probability,
    check_residual,
    check_sizes,
)
from ..functional.arguments import autocast_dtype
from ..ops.codes import ACTIVATION_CODES
from ..options import Activation, Init, LayerNormPlace, LearnableScale
from ..reference.bottleneck import ACTIVATIONS
from .layers import (
    as_leaf,
    check_input,
    keep_initial_values,
    like_an_op,
    why_all_called,
    why_called,
)


def normalize(y: Tensor, norm: nn.LayerNorm, scale: float | Tensor) -> Tensor:
    """A LayerNorm behind the op: as autocast has it, else in the dtype of y.

    A learnable scale precedes it here, not in the op: the LayerNorm takes almost all of its
    gradient away, and what is left is right only if the product is not rounded in between.
    """
    autocast = autocast_dtype(y) is not None
    if isinstance(scale, Tensor):
        y = y * (scale if autocast else scale.to(y.dtype))
    if autocast:
        normed: Tensor = norm(y)
        return normed
    weight, bias = (None if t is None else t.to(y.dtype) for t in (norm.weight, norm.bias))
    return F.layer_norm(y, norm.normalized_shape, weight, bias, norm.eps)


def residual_for(
    x: Tensor, residual: Tensor | None, add_residual: bool | None, default: bool
) -> Tensor | None:
    """What is added for these arguments of `forward`; ``default`` is whether x is for none."""
    if add_residual is None:
        add_residual = residual is not None or default
    else:
        check_flag("add_residual", add_residual)
    if not add_residual:
        return None
    return x if residual is None else residual


class BottleneckAdapter(nn.Module):
    """residual + scale * (dropout(activation(norm(x) Wd^T + bd)) Wu^T + bu).

    Parameters are named as in the ``Adapter`` of AdaptFormer and MultiWay-Adapter, whose state
    dicts load: ``down_proj``, ``up_proj``, ``adapter_layer_norm_before``, ``scale``.

    Args:
        dim: model width D.
        bottleneck: bottleneck width r.
        activation: "relu", "gelu", "gelu_tanh", "silu", "quick_gelu" or "identity". A module
            set as the published ``non_linear_func`` is called in its place, in plain PyTorch.
        scale: a number, "learnable" (one, [1], starting at 1) or "channel" ([D], starting at 1).
        dropout: probability of dropping an element after the activation, in training.
        layernorm: "in" normalises x, "out" the adapter's output before the residual; or None.
        residual: whether ``forward`` adds x when it is given no residual.
        bias: whether the projections have biases.
        init: "lora" (Kaiming-uniform down, zero up), "houlsby" (truncated normal of standard
            deviation 0.01) or "bert" (normal, 0.02); biases are zero. Only "lora" starts as the
            identity. Hugging Face's ``post_init`` leaves these values alone; ``from_pretrained``
            builds models without values: behind it, call `reset_parameters` of every adapter, of
            this or another class, that the checkpoint lacks.
        device, dtype: of the parameters.

    Shapes: x [..., D], residual like x, result [..., D] in the dtype of x (or of autocast).

    Raises:
        TypeError, ValueError: naming the argument.

    Examples:
        >>> adapter = BottleneckAdapter(768, 64, activation="gelu", scale="learnable")
        >>> x = torch.randn(2, 197, 768)
        >>> torch.equal(adapter(x), x)  # the identity until it is trained
        True
    """

    def __init__(
        self,
        dim: int,
        bottleneck: int,
        *,
        activation: Activation = "relu",
        scale: float | LearnableScale = 1.0,
        dropout: float = 0.0,
        layernorm: LayerNormPlace | None = None,
        residual: bool = True,
        bias: bool = True,
        init: Init = "lora",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim, bottleneck = check_sizes(dim=dim, bottleneck=bottleneck)
        check_choice("activation", activation, ACTIVATION_CODES)
        check_choice("layernorm", layernorm, (None, *get_args(LayerNormPlace)))
        check_choice("init", init, get_args(Init))
        if isinstance(scale, str):
            check_choice("scale", scale, get_args(LearnableScale))
        else:
            scale = check_number("scale", scale, ", 'learnable' or 'channel'")
        check_flag("residual", residual)
        check_flag("bias", bias)
        check_factory(device, dtype)
        self.activation = activation
        self.dropout = check_probability("dropout", dropout)
        self.layernorm = layernorm
        self.residual = residual
        self.init = init
        # Registered in the published order, which the state of an optimizer follows: the scale,
        # LayerNorm, the projections.
        self.scale: float | nn.Parameter
        if isinstance(scale, str):
            size = 1 if scale == "learnable" else dim
            self.scale = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        else:
            self.scale = scale
        if layernorm is not None:
            self.adapter_layer_norm_before = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.down_proj = nn.Linear(dim, bottleneck, bias, device, dtype)
        self.up_proj = nn.Linear(bottleneck, dim, bias, device, dtype)
        self.reset_parameters()

    @classmethod
    def from_module(cls, module: nn.Module) -> BottleneckAdapter:
        """An adapter that computes what ``module`` does, on the same layers and parameters.

        Args:
            module: an adapter of AdaptFormer, MultiWay-Adapter or `adapters`, patched or not. What
                is trained, loaded or hooked in one of the two is in both. The call is ours.

        Raises:
            ValueError: ``module`` is none of them, or computes what no op does.

        Examples:
            >>> adapter = BottleneckAdapter.from_module(model.encoder.adapter)  # doctest: +SKIP
        """
        from ..interop.sharing import adapter_of  # which builds on these modules

        layers, residual = adapter_of(module)
        adapter = cls.__new__(cls)
        nn.Module.__init__(adapter)
        adapter.activation = layers.activation
        adapter.dropout = layers.dropout
        adapter.layernorm = None if layers.norm is None else "out" if layers.after else "in"
        adapter.residual = residual
        adapter.init = "lora"
        adapter.scale = layers.scale  # type: ignore[assignment]
        if layers.norm is not None:
            adapter.adapter_layer_norm_before = layers.norm  # type: ignore[assignment]
        adapter.down_proj = layers.down  # type: ignore[assignment]
        adapter.up_proj = layers.up  # type: ignore[assignment]
        adapter.training = module.training
        return adapter

    def reset_parameters(self) -> None:
        """Draw the weights as ``init`` says; biases 0, LayerNorm and learnable scale 1."""
        for layer in (self.down_proj, self.up_proj):
            if self.init == "houlsby":
                nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
            elif self.init == "bert":
                nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if self.init == "lora":
            nn.init.kaiming_uniform_(self.down_proj.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up_proj.weight)
        if self.layernorm is not None:
            self.adapter_layer_norm_before.reset_parameters()
        if isinstance(self.scale, Tensor):
            nn.init.ones_(self.scale)
        keep_initial_values(self)

    def parameters_of(self) -> functional.BottleneckParameters:
        """What the functional form takes: all up to what `normalize` sees to."""
        layers: dict[str, Any] = self._modules  # past nn.Module.__getattr__, which takes long
        down, up = layers["down_proj"]._parameters, layers["up_proj"]._parameters
        norm_weight = norm_bias = None
        if self.layernorm == "in":
            norm = layers["adapter_layer_norm_before"]._parameters
            norm_weight, norm_bias = norm["weight"], norm["bias"]
        return functional.BottleneckParameters(
            down["weight"], up["weight"], down["bias"], up["bias"],
            1.0 if self._scales_last() else self.scale, norm_weight, norm_bias,
        )  # fmt: skip

    def _scales_last(self) -> bool:
        """Whether the scale is left to `normalize`."""
        return self.layernorm == "out" and isinstance(self.scale, Tensor)

    def options(self) -> tuple[object, ...]:
        """What two adapters that one op runs have in common, beside the width D."""
        return (
            self.activation, self.dropout, self.training, self.layernorm, self.norm_eps,
            self.residual,
        )  # fmt: skip

    def residual_for(
        self, x: Tensor, residual: Tensor | None, add_residual: bool | None
    ) -> Tensor | None:
        """What is added for these arguments of `forward`."""
        return residual_for(x, residual, add_residual, self.residual)

    def why_called(self, x: Tensor, residual: Tensor | None) -> str | None:
        """Why the layers must be called on x; None where the op does all that they do."""
        layers: dict[str, Any] = self._modules
        reason = (
            why_all_called(x=x, residual=residual, scale=self.scale)
            or why_called("down_proj", layers["down_proj"])
            or why_called("up_proj", layers["up_proj"])
        )
        if reason is None and self.layernorm is not None:
            name = "adapter_layer_norm_before"
            reason = why_called(name, layers[name], nn.LayerNorm)
        if reason is None and "non_linear_func" in layers:
            kind = type(layers["non_linear_func"])
            return f"non_linear_func is a {kind.__qualname__}: its own forward is called"
        return reason

    def forward(
        self, x: Tensor, residual: Tensor | None = None, add_residual: bool | None = None
    ) -> Tensor:
        """The adapter on x, and a residual: AdaptFormer's call.

        Args:
            x: [..., D].
            residual: shaped like x; None stands for x.
            add_residual: whether a residual is added; by default if one is given, or else if the
                module has ``residual=True``.
        """
        residual = self.residual_for(x, residual, add_residual)
        reason = self.why_called(x, residual)
        if reason is not None:
            leaf: Tensor | None = as_leaf(self, x, residual, residual is not None)
            if leaf is not None:
                return leaf
            backends.call_layers("bottleneck", reason)
            return self._call_layers(x, residual)
        after = self.layernorm == "out"
        if after:
            check_residual(residual, x)
        down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias = (
            self.parameters_of()
        )
        y = functional.bottleneck(
            x,
            down_weight,
            up_weight,
            down_bias=down_bias,
            up_bias=up_bias,
            activation=self.activation,
            scale=scale,
            residual=None if after else residual,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
            training=self.training,
        )
        if not after:
            return y
        y = self.normalize(y)
        return y if residual is None else y + residual

    if TYPE_CHECKING:
        __call__ = forward

    def _call_layers(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """`forward` as published, operation for operation."""
        check_input("x", x, self.down_proj)
        check_residual(residual, x)

        def branch() -> Tensor:
            normed = self.adapter_layer_norm_before(x) if self.layernorm == "in" else x
            activate = getattr(self, "non_linear_func", ACTIVATIONS[self.activation])
            h = activate(self.down_proj(normed))
            y: Tensor = self.up_proj(F.dropout(h, self.dropout, self.training)) * self.scale
            return self.adapter_layer_norm_before(y) if self.layernorm == "out" else y

        y = like_an_op(x, branch)
        return y if residual is None else y + residual

    def normalize(self, y: Tensor) -> Tensor:
        """What is left to do behind the op with ``layernorm="out"``."""
        return normalize(y, self.adapter_layer_norm_before, self.scale)

    @property
    def norm_eps(self) -> float:
        return 1e-5 if self.layernorm is None else self.adapter_layer_norm_before.eps

    def extra_repr(self) -> str:
        scale = f"[{self.scale.numel()}]" if isinstance(self.scale, Tensor) else self.scale
        return (
            f"activation={self.activation!r}, scale={scale}, dropout={self.dropout}, "
            f"layernorm={self.layernorm!r}, residual={self.residual}"
        )
