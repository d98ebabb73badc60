"""Plots and pages from result documents; nothing is measured here."""
