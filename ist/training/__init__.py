"""The parts of train_ist.py around the method: rows, model, checkpoints, memory."""
