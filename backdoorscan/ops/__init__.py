"""Pure mathematics on tensors: no files, no printing."""
