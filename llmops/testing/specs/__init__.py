"""The specs of llmops' own operators, one same-named module each, each with a SPEC."""
