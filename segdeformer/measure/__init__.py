"""What a model costs: parameters, FLOPs, time and memory, and the paper's figures beside them."""
