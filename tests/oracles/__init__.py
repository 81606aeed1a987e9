"""Slow, obvious losses in plain Python, each written from its paper in 120-digit decimals. They import nothing of palate."""
