"""A run drawn again, runs side by side, and evaluations compared: `python -m ist.report`."""
