"""Complete networks. They build their convolutional parts from what nnU-Net planned (:mod:`.architecture`)."""
