"""Training, evaluation and prediction. Knows models and data; draws and prints nothing."""
