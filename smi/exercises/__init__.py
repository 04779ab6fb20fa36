"""Checks of the notebooks' exercises: one module a notebook, a ``check_N`` for each exercise of it."""
