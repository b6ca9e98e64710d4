"""ONNX Runtime beyond a plain session: forms of a model for its targets, its quantizers, its devices, kernel counts."""
