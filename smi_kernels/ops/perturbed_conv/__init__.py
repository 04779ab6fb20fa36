"""A convolution under several draws, whose weights are given or expanded from signs inside the product."""
