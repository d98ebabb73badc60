"""Recipes from start to end, alone or over many values of their keys."""
