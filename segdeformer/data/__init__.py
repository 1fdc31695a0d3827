"""Images with labels: files, data sets, augmentation and the order of training. Only `loader` needs torch."""
