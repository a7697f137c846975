"""Stage 1: FratMAE pretraining on whole-body grids; `fratmae.py` is the method from top to bottom."""
