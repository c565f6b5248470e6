"""A package, so that processes started by tests import these and not torch-fidelity's stray `tests`."""
