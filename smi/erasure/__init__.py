"""Find triggers, erase their directions from the features, tune a little."""
