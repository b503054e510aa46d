"""Observers of time: signs of life, pauses, waits, speed and slow ranks."""
