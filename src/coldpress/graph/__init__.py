"""The ONNX side: architecture to graph, tensors streamed."""
