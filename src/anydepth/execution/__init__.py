"""Doing what a method decided: gates around layers and branches, the cache, the trace, the cost of what ran."""
