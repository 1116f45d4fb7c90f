"""`python -m ist.export`: an adapter merged into its base model."""
