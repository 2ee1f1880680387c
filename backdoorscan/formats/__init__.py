"""Files: models, images and GoodNets, in and out. Each model format is a plugin module of its own."""
