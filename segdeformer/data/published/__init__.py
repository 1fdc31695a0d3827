"""Published data sets: their layouts, classes, and how they are prepared."""
