"""Measuring models: perplexity by position, recall, memory, the report card, and lm-eval's tasks.

Import the module you need; this one stays empty so that importing the package costs nothing.
"""
