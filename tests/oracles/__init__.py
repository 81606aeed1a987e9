"""Slow, obvious losses in plain Python, written from their papers in 120-digit decimals, without palate."""
