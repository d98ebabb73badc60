"""Runs of a recipe from start to end, alone or over many values of its keys."""
