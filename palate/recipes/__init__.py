"""Recipes: one method, one page, top to bottom. Each page has its config on top and a `run(config)` below it."""
