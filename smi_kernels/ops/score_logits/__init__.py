"""From the logits of all draws to scores."""
