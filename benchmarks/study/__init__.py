"""Studies of how the decoder learns: many small trainings, compared over seeds and images."""
