"""Small languages whose truth is known: for the demo, the experiments and the exact tests."""
