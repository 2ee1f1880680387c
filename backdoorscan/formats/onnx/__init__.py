"""ONNX models, opset 7 and later, read as data.

* ``parse`` turns bytes into nodes and arrays, bounded, and needs no torch;
* ``network`` builds a ``torch.fx.GraphModule`` node by node, with one small function per operator in ``operators``;
* ``verify`` compares the result with onnxruntime;
* ``write`` puts changed tensors into a copy of the file.
"""
