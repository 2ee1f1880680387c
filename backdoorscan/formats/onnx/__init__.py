"""ONNX models, opset 7 and later, read as data.

In the sandbox (``formats.sandbox``), without torch:

* ``parse`` turns bytes, and those of files beside the model (``tensors``), into plain data (``plain``), bounded;
* ``reference`` runs what was read in onnxruntime;
* ``replace`` puts arrays into a copy of the file.

Here:

* ``network`` builds a ``torch.fx.GraphModule`` node by node, with one small function per operator in ``operators``;
* ``fallback`` has onnx2torch build it, where that is installed and an operator is missing;
* ``verify`` compares the result with the reference;
* ``write`` finds which arrays of the file changed.
"""

import os

# onnxruntime asks when it is imported: it must start no threads that tell its makers how it is used.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
