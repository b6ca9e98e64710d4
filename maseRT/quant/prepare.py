"""plan + model -> the fake-quantized model, from the plan alone: nothing is traced and no data is needed."""

from __future__ import annotations

from torch import nn

from maseRT.errors import UsageError
from maseRT.plan import Plan
from maseRT.quant.backends import get_backend
from maseRT.quant.casts import set_float_precisions
from maseRT.quant.computed_weights import store_weights
from maseRT.quant.fold import fold_batchnorm
from maseRT.quant.layers import quantize_layer
from maseRT.quant.sites import add_sites, call_layers


def quantize_model(model: nn.Module, plan: Plan, *, master_weights: bool = False) -> nn.Module:
    """Fold BatchNorms, add the quantizers and set the float precisions, in place; returns the same model.

    Weights that are computed in each forward (weight norm, parametrizations) become plain ones first. The names in the
    state dict depend on the plan alone, so that a checkpoint made with it loads strictly.

    Args:
        model: float, as the plan was made for; its weights may be any.
        plan: what to do.
        master_weights: leave everything that is not INT8 in FP32, for calibration and training. The state dict has the
            same names, and loads into a model made without this.

    Raises:
        UsageError: the plan is for another model.
        MissingError: the plan's backend is not installed.
        StepError: a layer cannot be quantized.
    """
    store_weights(model)
    _check_same_model(model, plan)
    quantizer = get_backend(plan.backend).quantizer
    for fold in plan.folds:
        fold_batchnorm(model, fold.layer, fold.batchnorm)
    turn_off_fast_paths(model)
    call_layers(model, plan.layers)
    add_sites(model, plan.sites, quantizer=quantizer)
    for layer in plan.layers:
        if not layer.precision.is_float:
            module = model.get_submodule(layer.name)
            quantize_layer(module, name=layer.name, input=layer.input, weight=layer.weight, quantizer=quantizer)
    if not master_weights:
        set_float_precisions(model, plan)
    return model


def turn_off_fast_paths(model: nn.Module) -> None:
    """Keep nn.TransformerEncoder and its layers from computing with its layers' weights without calling the layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _check_same_model(model: nn.Module, plan: Plan) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for layer in plan.layers:
        module = modules.get(layer.name)
        found = "no such layer" if module is None else f"a {type(module).__name__}"
        if module is None or type(module).__name__ != layer.type:
            raise UsageError(
                f"the plan was made for another model: it has a {layer.type} here, the model has {found}",
                where=f"plan of {plan.model}, {layer.name}",
                fix="run `masert quantize` again",
            )
