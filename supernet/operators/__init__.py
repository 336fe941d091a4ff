"""Token pooling between two blocks: the modules, and the mathematics as pure functions."""
