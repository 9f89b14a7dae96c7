"""Other libraries' interfaces on llmops' operators. Nothing here loads on `import llmops`."""
