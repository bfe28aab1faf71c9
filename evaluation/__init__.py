"""Measures how well objects are found in labelled images."""
