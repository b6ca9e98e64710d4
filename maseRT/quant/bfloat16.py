"""What has no BF16 form in the opsets that are exported (19 and 20): ONNX gave it one in opset 22 or later."""

from __future__ import annotations

from torch import nn

from maseRT.quant.trace import Node

_LAYERS = (
    nn.modules.conv._ConvNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._LPPoolNd,
    nn.modules.instancenorm._InstanceNorm,
    nn.RNNBase,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.CELU,
    nn.ELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Mish,
    nn.SELU,
    nn.Softplus,
    nn.Softsign,
)
_OPERATIONS = """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    instance_norm group_norm local_response_norm celu elu hardsigmoid hardswish mish selu softplus softsign
    einsum sin cos tan asin acos atan atan2 sinh cosh asinh acosh atanh sinc round topk sort argsort msort grid_sample
    hstack vstack dstack row_stack column_stack
"""
_AREA = "area"  # average pools
_NAMES = frozenset(_OPERATIONS.split())


def layer_in_bf16(layer: nn.Module) -> bool:
    """Whether a layer can be exported in BF16, as far as its type tells."""
    return not isinstance(layer, _LAYERS) and not (isinstance(layer, nn.Upsample) and layer.mode == _AREA)


def operation_in_bf16(call: Node) -> bool:
    """Whether a functional operation can be exported in BF16, as far as its name and settings tell."""
    return call.op not in _NAMES and not (call.op == "interpolate" and call.argument(3, "mode") == _AREA)
