"""From a model to maps and scores: views of an image, evaluation, metrics, prediction."""
