"""Configurations: `ralenet` is the commented default, the others are short overlays on it."""
