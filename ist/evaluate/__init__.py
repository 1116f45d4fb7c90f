"""Accuracy and perplexity of a model or an adapter: `python -m ist.evaluate`."""
