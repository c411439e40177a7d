"""Adam that decays towards the pre-trained weights, so that the delta stays small enough to prune."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from salience.errors import InputError


class AdamR(torch.optim.Optimizer):
    """Adam with decoupled decay towards reference weights, scaled by the global second moment.

        s_t = sqrt(mean over all parameters of vhat_t)
        theta <- theta - lr lambda / s_t (theta - theta_P)           (L2; sign(theta - theta_P) for L1)
        theta <- theta - lr mhat_t / (sqrt(vhat_t) + eps)

    With ``weight_decay=0`` this is Adam. Fine-tune with it, then prune the delta: DAREx-L2.

    Parameters
    ----------
    params : iterable of (str, Parameter), or of groups whose "params" are such pairs
        As `model.named_parameters()` gives them; names find the reference.
    reference : mapping of str to Tensor
        The pre-trained weights theta_P, copied once. What is not named in it, such as a new head, is not decayed.
    lr : float
    betas : (float, float)
    eps : float
    weight_decay : float
        lambda. The authors' code has 1e-4; how much a task stands is to be tried.
    norm : {"l2", "l1"}

    Raises
    ------
    InputError
        An option out of range, parameters without names, a reference of another shape, or none at all.

    Notes
    -----
    This is not AdamW: the decay is towards the pre-trained weights and not towards zero, and it is divided by one
    number for the whole model and not by each parameter's own.

    References
    ----------
    Deng et al., section 4.2, and `AdamR.py` of the authors' code; the scale is that of Xie et al., arXiv 2011.11152.
    """

    def __init__(
        self,
        params: Iterable[Any],
        reference: Mapping[str, Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
        norm: Literal["l2", "l1"] = "l2",
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name}: got {value!r}; it must be finite and at least 0")
        if not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise InputError(f"betas: got {betas!r}; two numbers from 0 to below 1 are needed")
        if norm not in ("l2", "l1"):
            raise InputError(f"norm: got {norm!r}; it must be 'l2' or 'l1'")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "norm": norm})
        self._reference: dict[nn.Parameter, Tensor] = {}
        for group in self.param_groups:
            if "param_names" not in group:
                raise InputError("params: have no names, by which to find the reference; give model.named_parameters()")
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                self._refer(name, parameter, reference)
        if not self._reference:
            raise InputError("reference: names none of the parameters; decay would do nothing")

    def _refer(self, name: str, parameter: nn.Parameter, reference: Mapping[str, Tensor]) -> None:
        if name not in reference:
            return
        value = reference[name]
        if value.shape != parameter.shape:
            raise InputError(
                f"reference: {name!r} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}; "
                "leave it out of the reference if it is a new head"
            )
        # A copy: the state_dict of the model itself would move along with the training.
        self._reference[parameter] = value.detach().clone().to(parameter.device, parameter.dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step; `closure` as in `torch.optim.Optimizer`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        total, entries = 0.0, 0
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise InputError("params: AdamR does not take sparse gradients")
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                total += float(state["exp_avg_sq"].sum(dtype=torch.float64)) / (1 - beta2 ** state["step"])
                entries += parameter.numel()
        scale = math.sqrt(total / entries) if entries else 0.0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, scale or 1.0)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], scale: float) -> None:
        (beta1, beta2), state = group["betas"], self.state[parameter]
        if group["weight_decay"] and parameter in self._reference:
            away = parameter - self._reference[parameter]
            away = away.sign() if group["norm"] == "l1" else away
            parameter.add_(away, alpha=-group["lr"] * group["weight_decay"] / scale)
        root = (state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1 ** state["step"]))
