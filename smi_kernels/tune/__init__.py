"""What was measured on a GPU, what is chosen by it, and the command that measures."""
