"""Speed beside PyTorch: `llmops bench`. harness.py measures, cases/<op>.py says what."""
