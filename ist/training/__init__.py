"""What train_ist.py is made of, around the method: rows, model, checkpoints, memory."""
