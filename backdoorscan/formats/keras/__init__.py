"""Keras models: ``.h5`` files of Keras 2.0 to 3, whole or weights alone, and ``.keras`` archives, read as data.

Reading has two stages, so that the first can run in a child process with limits:

* ``parse`` turns bytes into plain data (``archive`` and ``hdf5`` guard what it may touch) and needs neither torch nor
  Keras;
* ``network`` builds a ``torch.fx.GraphModule`` from the plain data, with one small function per layer class in
  ``layers``.
"""
