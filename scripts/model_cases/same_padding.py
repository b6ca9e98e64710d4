"""A [quantize] plug-in: the convolution class of efficientnet-lite-pytorch, which pads as TensorFlow does."""

from efficientnet_lite_pytorch.utils import Conv2dStaticSamePadding
from torch import Tensor

from maseRT.quant import register
from model_cases.models import padded_convolution


class QuantConv2dStaticSamePadding(Conv2dStaticSamePadding):
    def forward(self, x: Tensor) -> Tensor:
        return padded_convolution(self, x)


register(Conv2dStaticSamePadding, QuantConv2dStaticSamePadding, weights={"weight": 0}, folds_batchnorm=True)
