"""A linear layer under several draws, whose weights are given or drawn inside the product."""
