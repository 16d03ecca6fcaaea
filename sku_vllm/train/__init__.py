"""The training engine for every method: it packs rows into forward passes, computes losses, writes checkpoints and the final adapter.

Start at `train_adapter` in `trainer.py`, which takes a `TrainRequest` (train_request.py); one training step is in `run.py`.
"""
