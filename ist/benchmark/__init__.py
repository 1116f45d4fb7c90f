"""Memory, speed and communication against plain PEFT: `python -m ist.benchmark`."""
