"""What TensorRT 8.6, 10, 11 and TensorRT-RTX share. Their APIs differ: features are asked for, not versions."""
