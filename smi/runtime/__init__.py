"""How work is done whatever it is: how models run, on what, from which seed, with what state, and into which files."""
