"""Unit noise for given counters."""
