"""The doctor: what in a data set would spoil training."""
