"""What maintainers run: notebooks kept true, shipped assets, the API reference."""
