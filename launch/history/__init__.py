"""Runs beside each other: how they ended, wherein they differ, and whether losses compare."""
