"""The TensorRT plugins: two operators, what they mean in numpy and in plain ONNX, their kernels and plugin classes."""
