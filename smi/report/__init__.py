"""What a run found, for people: an HTML page, a JSON record, a table for the terminal, and the repaired weights."""

from smi.report.removal import Removal, write_report

__all__ = ["Removal", "write_report"]
