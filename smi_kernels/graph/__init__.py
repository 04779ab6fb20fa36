"""A model as a plan: its forward pass recorded, and layers with what folds and fuses into them."""
