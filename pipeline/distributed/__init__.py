"""Processes that work together: launchers, collectives, failures."""
