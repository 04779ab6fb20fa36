"""What maintainers run: notebooks kept true, shipped assets, the documentation's site."""
