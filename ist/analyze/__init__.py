"""Which layers of a trained adapter matter: `python -m ist.analyze`."""
