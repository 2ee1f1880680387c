"""What readers share that build a network operator by operator, as those of ONNX and of exported programs do.

* ``values`` flow between operators; ``batch`` tells where the number of images is in a shape;
* ``limits`` bounds what a file can make us compute;
* ``network`` is how such a graph begins and ends.
"""
