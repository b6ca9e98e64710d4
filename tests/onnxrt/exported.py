"""A model that is quantized, calibrated and exported, for the tests of its forms."""

import onnx
import torch
from torch import nn

from maseRT.config import QuantizeSection
from maseRT.onnx_export import export_onnx
from maseRT.onnxrt.forms import cpu_form, openvino_form
from maseRT.onnxrt.ranges import measure_ranges
from maseRT.quant import make_plan, quantize_model
from maseRT.quant.calibrators import Method, amax_from_histograms
from maseRT.quant.observe import load_amax, observe
from maseRT.runtimes.onnxruntime import OnnxRuntime


class Exported:
    """A model, quantized, calibrated and exported, and what torch computes of it.

    Without inputs its weights are random, and so are 24 inputs, of which the first 16 calibrate.
    """

    def __init__(self, folder, model, shape, *, inputs=None, calibration=None, **options):
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(24, *shape, generator=generator) if inputs is None else inputs
        self.calibration = self.inputs[:16] if calibration is None else calibration
        if inputs is None:
            _settle_batchnorms(model, self.inputs)
        with torch.inference_mode():
            self.float = model(self.inputs).numpy()
        plan = make_plan(model, self.inputs[:2], QuantizeSection(**options), model_name="model")
        quantize_model(model, plan)
        with torch.inference_mode(), observe(model) as histograms:
            for batch in self.calibration.split(16):
                model(batch)
        load_amax(model, amax_from_histograms(histograms, lambda name: Method("max")))
        with torch.inference_mode():
            self.quantized = model(self.inputs).numpy()
        self.folder = folder
        path = folder / "model.onnx"
        export_onnx(model, self.inputs[:2], path, opset=20)
        self.onnx = onnx.load(path)
        self.model = model

    def feeds(self):
        return [{"input": batch.numpy()} for batch in self.calibration.split(16)]

    def cpu(self):
        """Return the form's file and what is told about it."""
        return self._write("cpu", cpu_form)

    def openvino(self):
        """Return the form's file and what is told about it."""
        return self._write("openvino", openvino_form)

    def _write(self, name, make):
        model, form = make(self.onnx, lambda m, names: measure_ranges(m, names, self.feeds(), threads=1))
        onnx.checker.check_model(model, full_check=True)
        path = self.folder / f"{name}.onnx"
        onnx.save(model, path)
        return path, form

    def infer(self, path):
        with OnnxRuntime().open(path, threads=1) as session:
            return session.infer({"input": self.inputs.numpy()})["output"]


def _settle_batchnorms(model, inputs):
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = None
        model(inputs[:16])
    model.eval()
