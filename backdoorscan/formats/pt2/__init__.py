"""Exported programs of PyTorch (``torch.export.save``, .pt2), read as data and never through ``torch.export.load``.

* ``archive`` reads the zip archive and replaces bytes in it;
* ``parse`` turns bytes into nodes and arrays (``spec``), bounded, and needs no torch;
* ``network`` builds a ``torch.fx.GraphModule`` node by node, with the functions of ``operators``;
* ``verify`` compares the result with the program run operator by operator;
* ``write`` puts changed tensors into a copy of the file; ``export`` makes a new file of a network.
"""
